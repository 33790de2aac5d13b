"""Tokenmill's CPU kernels and program executor."""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy
from numpy.typing import NDArray


def active_isa() -> str:
    """Name of the instruction-set path in use."""

def available_isas() -> list[str]:
    """Names of the paths that this processor can run, slowest first."""

def set_active_isa(arg: str, /) -> None:
    """
    Switches the path in use, for tests and benchmarks. Not while a step runs.
    """

def usable_cpu_count() -> int:
    """Threads allowed by the affinity mask and the cgroup's CPU quota."""

def index_bpe(text: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], starts: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)], findable: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], merges: Annotated[NDArray[numpy.int32], dict(shape=(None, 2), order='C', device='cpu', writable=False)]) -> tuple[NDArray[numpy.uint32], NDArray[numpy.uint32]]:
    """
    Hash tables of a vocabulary: (token_slots, merge_slots), uint32 each, for Bpe.

    `text` holds the spellings one after the other, `starts` [tokens + 1] where each begins; `findable` [tokens] is 0
    for tokens that text never becomes; `merges` [merges, 2] holds ids, best merge first. Raises ValueError for a
    merge that joins to no token.
    """

class Bpe:
    """
    Byte-pair encoding over a vocabulary's tables. Safe to use from many threads.
    """

    def __init__(self, text: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], starts: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)], token_slots: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)], merge_slots: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)], ignore_merges: bool, byte_fallback: bool, unknown: int | None) -> None: ...

    def find(self, text: str) -> int | None:
        """The id of a token by its spelling, or None."""

    def encode(self, fragments: list[str]) -> list[int]:
        """The ids of texts that do not merge with each other, without the GIL."""

def skip_strings(data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], position: int, count: int) -> int:
    """
    Where `count` GGUF strings that begin at `position` end; -1 if that is beyond the data.
    """

def value_row_bytes(format: int, width: int) -> int:
    """Bytes of one row of a value; a multiple of 64."""

class Matrix:
    """A packed weight matrix [n, k] (csrc/kernels/linear.h)."""

    def __init__(self, format: int, n: int, k: int, data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None: ...

class LinearPart:
    """
    out = x @ matrix.T (+ bias) (+ residual); values by the ids of add_value.
    """

    def __init__(self, x: int, matrix: Matrix, out: int, bias: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None, residual: int | None) -> None: ...

class PlanWords:
    """The buffer of a step plan, in place."""

    def __init__(self, buffer: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None: ...

class Executor:
    """Runs a program, step by step. Build it op by op, prepare it, run it."""

    def __init__(self, tokens: int, sequences: int, sampled: int, context: int, vocab_size: int, pool: ThreadPool) -> None: ...

    def add_kv_group(self, layers: int, kv_heads: int, head_dim: int, window: int | None, element: int, pages: int) -> int: ...

    def add_value(self, offset: int, row_bytes: int, width: int, format: int, sampled: bool) -> int: ...

    def add_embed(self, matrix: Matrix, out: int, scale: float) -> None: ...

    def add_rms_norm(self, x: int, weight: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], out: int | None, quantized: Sequence[int], eps: float, group_width: int, weight_offset: float) -> None: ...

    def add_linear_group(self, parts: Sequence[LinearPart]) -> None: ...

    def add_screened_head(self, part: LinearPart, screen: Matrix, bounds: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None:
        """
        A linear of which plans may want only each row's largest result; screen and bounds as make_screen gives them.
        """

    def add_rope(self, x: int, out: int, heads: int, head_dim: int, rotary_dim: int, style: int, frequencies: Sequence[float], magnitude: float) -> None: ...

    def add_attention(self, q: int, k: int, v: int, out: int | None, quantized: Sequence[int], layer: int, group: int, heads: int, scale: float, softcap: float | None) -> None: ...

    def add_gated_activation(self, gate: int, up: int, out: int | None, quantized: Sequence[int], activation: int) -> None: ...

    def add_add(self, a: int, b: int, out: int) -> None: ...

    def add_softcap(self, x: int, out: int, cap: float) -> None: ...

    def add_gather_sampled(self, x: int, out: int) -> None: ...

    def add_quantize(self, x: int, out: int) -> None: ...

    def prepare(self) -> None: ...

    def run(self, plan: PlanWords, first: int, last: int) -> None:
        """
        Executes ops [first, last) without the GIL. Raises ValueError for a bad plan.
        """

    def run_timed(self, plan: PlanWords) -> tuple[list[float], int, float, float]:
        """
        Executes all ops without the GIL; seconds of preparing the step, then of each op.
        """

    def diagnose(self, plan: PlanWords, row: int) -> int:
        """Index of the first op with a non-finite result, or -1."""

    def value(self, id: int, rows: int) -> NDArray[numpy.float32]: ...

    def kv_plane(self, group: int, plane: int) -> NDArray[Any]: ...

    def copy_page(self, group: int, from_page: int, to_page: int) -> None: ...

    @property
    def screen_counts(self) -> tuple[int, int, int]:
        """
        Rows that the head's screen has served, row blocks of the head that they read beside it, and steps that it left alone.
        """

    @property
    def op_count(self) -> int: ...

    @property
    def threads(self) -> int: ...

    @property
    def scratch_bytes(self) -> int: ...

    @property
    def kv_bytes(self) -> int: ...

def packed_bytes(format: int, n: int, k: int) -> int:
    """
    Bytes of a packed [n, k] matrix: the file's bytes with n padded to a multiple of 16. ValueError if k does not fit.
    """

def pack_matrix(format: int, source: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], n: int, k: int, out: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')], threads: int = 0) -> None:
    """
    Repacks rows in GGUF block layout (uint8, n * bytes of a row) into `out` (uint8, packed_bytes). Exact.
    threads = 0: all usable. The GIL is released.
    """

def can_screen(format: int) -> bool:
    """Whether a head of this format can be screened."""

def make_screen(format: int, packed: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], n: int, k: int, screen: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')], bounds: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu')], threads: int = 0) -> None:
    """
    Fills `screen` (uint8, packed as Q5_0) and `bounds` (fp32 [n]) for a packed head; see
    csrc/kernels/head_screen.h. The GIL is released.
    """

def screen_norm(x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)]) -> float:
    """What bounds are multiplied by for the activation x (fp32 [1, k])."""

def decode_packed_rows(format: int, packed: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], n: int, k: int, rows: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> NDArray[numpy.float32]:
    """
    Rows (int32) of a packed matrix as fp32 [len(rows), k], equal to the file format's reference decoding.
    """

def quantize_rows(x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], format: int) -> tuple[Any, ...]:
    """
    x (fp32 [m, k]) as int8 activations: codes int8 [m, k], scales fp32 [m, groups], sums of codes int32 per 32
    (INT8_GROUP32) or per 16 (INT8_GROUP256) columns. A group with NaN or infinity has scale NaN and codes 0.
    """

def linear(format: int, packed: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], n: int, k: int, x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], bias: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None, residual: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)] | None = None, threads: int = 0) -> NDArray[numpy.float32]:
    """
    x @ weight.T (+ bias [n]) (+ residual [m, n]) as fp32 [m, n]; x (fp32 [m, k]) is quantized as the format asks.
    """

def rms_norm(x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], weight: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], eps: float, weight_offset: float = 0.0) -> None:
    """
    x / sqrt(mean(x^2) + eps) * (weight + weight_offset) over groups of len(weight) elements of each row.
    """

def gated_activation(activation: int, gate: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], up: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]) -> None:
    """activation(gate) * up; activation 0 is SiLU, 1 GELU, 2 GELU by tanh."""

def softcap(x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], cap: float, out: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]) -> None:
    """cap * tanh(x / cap)."""

def read_bytes_per_second(bytes: int, threads: int = 0, seconds: float = 0.3) -> float:
    """Best streaming read rate over a working set of `bytes`."""

def int8_operations_per_second(threads: int = 0, seconds: float = 0.3) -> float:
    """
    Best rate of int8 multiply and add operations of the path in use, from registers.
    """

def f32_operations_per_second(threads: int = 0, seconds: float = 0.3) -> float:
    """
    Best rate of fp32 multiply and add operations of the path in use, from registers.
    """

def bf16_operations_per_second(threads: int = 0, seconds: float = 0.3) -> float | None:
    """
    Best rate of bf16 multiply and add operations, from registers; None if the processor has no such instruction.
    """

class SamplerSettings:
    """One request's sampling parameters, converted once."""

    def __init__(self, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, typical_p: float = 1.0, repetition_penalty: float = 1.0, presence_penalty: float = 0.0, frequency_penalty: float = 0.0, seed: int = 0, sample_index: int = 0, min_tokens: int = 0, end_ids: Sequence[int] = [], bias_ids: Sequence[int] = [], biases: Sequence[float] = [], allowed: Sequence[int] = [], bad_words: Sequence[Sequence[int]] = [], logprobs: int = -1) -> None: ...

class TokenHistory:
    """One output as the sampler sees it: its settings, and prompt and output so far."""

    def __init__(self, settings: SamplerSettings, tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], prompt_tokens: int) -> None: ...

    def append(self, token: int) -> None: ...

    def __len__(self) -> int: ...

    def copy(self, begin: int, end: int) -> NDArray[numpy.int32]:
        """Tokens begin .. end - 1. Raises IndexError."""

class Samples:
    """What a sampler found, one entry for each row that it was given."""

    @property
    def ids(self) -> list[int]:
        """The picked (or given) tokens; -1 where a row cannot be used."""

    @property
    def status(self) -> list[int]:
        """0, 1 (NaN or infinity in the row) or 2 (nothing may be picked)."""

    def logprobs(self, row: int) -> tuple[float, int, list[tuple[int, float]]]:
        """
        Where they were wanted: the token's log-probability and rank, and the best tokens with theirs, most likely
        first. Of the logits as given. Raises IndexError.
        """

class Sampler:
    """Picks tokens from rows of logits; one caller at a time."""

    def __init__(self, vocabulary: int, pool: ThreadPool) -> None: ...

    @property
    def scratch_bytes(self) -> int: ...

    def sample(self, logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], rows: Sequence[int], histories: Sequence[TokenHistory], masks: Sequence[Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None] = []) -> Samples:
        """
        One token for each element of `rows`, which are rows of `logits` [rows, vocabulary].

        `masks` is empty, or holds for each row None or one bit a token (int32, bit i % 32 of word i / 32): those
        without a bit cannot be picked.
        """

    def pick(self, logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], rows: Sequence[int], histories: Sequence[TokenHistory], masks: Sequence[Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None] = []) -> list[int] | Samples:
        """
        Like `sample`; only the ids where there is no more to know: no log-probabilities, and no row that is unusable.
        """

    def score(self, logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], rows: Sequence[int], targets: Sequence[int], best: int = 0) -> Samples:
        """
        Like `sample`, for given tokens: log-probability and rank of targets[i] in row rows[i], and its best tokens.
        """

def draw_words(seed: int, sample_index: int, position: int, purpose: int = 0) -> list[int]:
    """Four random words of Philox4x32-10 for one draw."""

def cgroup_cpu_quota(membership: str, mount: str) -> float:
    """
    CPU quota, in CPUs, that /proc/self/cgroup and the cgroup mount at these places grant; inf if none.
    """

class ThreadPool:
    """The threads that executor and sampler run on; one caller at a time."""

    def __init__(self, threads: int) -> None: ...

    @property
    def size(self) -> int: ...

    @property
    def pinned(self) -> bool:
        """Whether every worker is bound to a core of its own."""

    def fork_join(self, times: int) -> list[int]:
        """Runs an empty job `times` times; returns how often each thread ran it."""

    def default_environment(self) -> list[bool]:
        """
        Per thread, whether rounding is to nearest even and subnormals are kept.
        """
