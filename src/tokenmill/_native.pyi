"""Types of the compiled module; see csrc/bindings for what each part does."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]

# bindings.cpp
def active_isa() -> str: ...
def available_isas() -> list[str]: ...
def set_active_isa(name: str) -> None: ...
def usable_cpu_count() -> int: ...

# sampler.cpp
class SamplerSettings:
    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        typical_p: float = 1.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int = 0,
        sample_index: int = 0,
        min_tokens: int = 0,
        end_ids: Sequence[int] = (),
        bias_ids: Sequence[int] = (),
        biases: Sequence[float] = (),
        logprobs: int = -1,
    ) -> None: ...

class Sampler:
    def __init__(self, vocabulary: int, threads: int = 1) -> None: ...
    @property
    def scratch_bytes(self) -> int: ...
    def sample(
        self,
        logits: Float32,
        rows: Int32,
        settings: Sequence[SamplerSettings],
        tokens: Sequence[Int32],
        prompt_tokens: Int32,
    ) -> tuple[Int32, Int32, Float32, Int32, Int32, Float32]: ...
    def score(
        self, logits: Float32, rows: Int32, targets: Int32, best: int = 0
    ) -> tuple[Int32, Int32, Float32, Int32, Int32, Float32]: ...

def draw_words(seed: int, sample_index: int, position: int, purpose: int = 0) -> list[int]: ...
