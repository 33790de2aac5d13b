"""``tokenmill doctor``: what this machine offers and what Tokenmill makes of it."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from tokenmill.cli.terminal import megabytes, print_table

# Ops of a program by the kernel family that runs them; each family is one dispatch table in csrc/kernels.
KERNEL_FAMILIES = {
    "linear": ("linear", "embed"),
    "attention": ("attention",),
    "pointwise": ("rms_norm", "rope", "gated_activation", "add", "soft_cap", "quantize"),
    "sampler_rows": ("sampler",),
}

_PATHS = {
    "portable": "portable C++",
    "avx2": "AVX2, FMA, F16C",
    "avx2vnni": "AVX2 with 256-bit vpdpbusd",
    "avx512": "AVX-512 F, BW, DQ, VL",
    "avx512vnni": "AVX-512 with vpdpbusd",
    "neon": "NEON with dot product",
}

_SETTINGS = {
    "TOKENMILL_ISA": "instruction-set path to use instead of the best one",
    "TOKENMILL_CACHE": "cache folder",
    "TOKENMILL_MODELS": "models folder",
    "TOKENMILL_DEBUG": "show tracebacks",
    "HF_HUB_OFFLINE": "never ask the Hugging Face hub",
    "HF_HOME": "huggingface_hub's own cache",
}

_PACKAGES = ("tokenmill", "numpy", "tokenizers", "huggingface_hub", "jinja2", "torch")


@dataclass(frozen=True, slots=True)
class CacheFolder:
    """A folder that Tokenmill fills. ``size`` in bytes."""

    purpose: str
    path: str
    size: int
    writable: bool


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show processor, kernel paths, memory, caches, settings and versions."""
    from tokenmill.cli.machine import processor
    from tokenmill.engine.ledger import memory_budget

    native = _native_report()
    cpu, budget, folders, versions = processor(), memory_budget(None), _cache_folders(), _versions()
    engine = _engine_defaults()
    settings = {name: os.environ.get(name) for name in _SETTINGS}
    if as_json:
        report = {
            "versions": versions,
            "processor": asdict(cpu),
            "kernels": native,
            "memory": {"total": _total_memory(), "budget": budget.limit, "source": budget.source},
            "engine defaults": engine,
            "caches": [asdict(folder) for folder in folders],
            "settings": settings,
        }
        print(json.dumps(report, indent=2))
    else:
        print("versions")
        print("  " + ", ".join(f"{name} {version}" for name, version in versions.items()))
        print("\nprocessor")
        print(f"  {cpu.model} ({cpu.architecture}); features: {', '.join(cpu.features) or 'none that kernels use'}")
        quota = "no quota" if cpu.quota is None else f"cgroup quota {cpu.quota:g} CPUs"
        threads = native.get("threads", "-")
        print(f"  {cpu.cores} cores, affinity to {len(cpu.affinity)}, {quota}; threads in use: {threads}")
        print("\nkernels")
        _print_kernels(native)
        print("\nmemory")
        print(f"  {megabytes(_total_memory())} in all")
        print(f"  budget if none is given: {megabytes(budget.limit)}, {budget.source}")
        print("\nengine defaults")
        print("  " + ", ".join(f"{name} {value}" for name, value in engine.items()))
        print("\ncaches")
        print_table(
            ("  folder", "size", "", "path"),
            [(f"  {f.purpose}", megabytes(f.size), "" if f.writable else "NOT WRITABLE", f.path) for f in folders],
            right={1},
        )
        print("\nsettings")
        print_table(
            ("  variable", "value", "meaning"),
            [(f"  {name}", value or "(not set)", _SETTINGS[name]) for name, value in settings.items()],
        )
    if "error" in native:
        raise typer.Exit(1)


def _native_report() -> dict[str, object]:
    """The native module's paths, or the reason why it cannot be used under "error"."""
    try:
        from tokenmill import _native

        path = _native.active_isa()
        return {
            "path": path,
            "available": list(_native.available_isas()),
            "threads": _native.usable_cpu_count(),
            "ops": {op: path for ops in KERNEL_FAMILIES.values() for op in ops},
        }
    except (ImportError, RuntimeError) as error:
        return {"error": str(error)}


def _print_kernels(native: dict[str, object]) -> None:
    if "error" in native:
        print(f"  NOT USABLE: {native['error']}")
        return
    path = str(native["path"])
    forced = " (forced by TOKENMILL_ISA)" if os.environ.get("TOKENMILL_ISA") else ""
    available = native["available"]
    assert isinstance(available, list)
    print(f"  path in use: {path}, {_PATHS.get(path, '')}{forced}; this processor runs: {', '.join(available)}")
    print_table(
        ("  kernels", "path", "ops"),
        [(f"  {family}", path, ", ".join(ops)) for family, ops in KERNEL_FAMILIES.items()],
    )


def _engine_defaults() -> dict[str, object]:
    """What the engine's configuration says unless it is told otherwise."""
    from tokenmill.engine.config import EngineConfig
    from tokenmill.sources import DEFAULT_MODEL

    config = asdict(EngineConfig(model=DEFAULT_MODEL))
    return {name: "automatic" if value is None else value for name, value in config.items() if name != "model"}


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cache_folders() -> list[CacheFolder]:
    from tokenmill.cache_folder import cache_folder, expand_home
    from tokenmill.sources import models_folder
    from tokenmill.sources.progress import folder_bytes

    hub = expand_home(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub"
    models, cache = models_folder(), cache_folder()
    cached = folder_bytes(cache) - (folder_bytes(models) if models.is_relative_to(cache) else 0)
    return [
        CacheFolder("models", str(models), folder_bytes(models), _writable(models)),
        CacheFolder("packed weights", str(cache), cached, _writable(cache)),
        CacheFolder("hub", str(hub), folder_bytes(hub), _writable(hub)),
    ]


def _writable(folder: Path) -> bool:
    """Whether files can be made in ``folder``, or the folder itself where it does not exist yet."""
    for place in (folder, *folder.absolute().parents):
        try:
            place.stat()
        except FileNotFoundError:
            continue
        except OSError:  # behind a folder that may not be entered, or below a file
            return False
        return place.is_dir() and os.access(place, os.W_OK | os.X_OK, effective_ids=True)
    return False


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
