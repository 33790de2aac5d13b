"""Starting the engine again: what the build cache spares, and what a start never loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokenmill import LLM, SamplingParams
from tokenmill.weights.gguf import Metadata

GREEDY = SamplingParams(max_tokens=8, temperature=0)
PROMPT = "The capital of France is"


def answer(model: Path, cache: Path) -> list[int]:
    with LLM(model, cache_dir=cache, max_model_len=256) as llm:
        return llm.generate(PROMPT, GREEDY)[0].token_ids


@pytest.fixture(scope="module")
def filled(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A cache that one start has filled, and that start's answer."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, answer(smollm2_path, cache)


def test_a_second_start_reads_no_vocabulary_and_answers_the_same(
    smollm2_path: Path, filled: tuple[Path, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, expected = filled
    original = Metadata.__getitem__

    def scalars_only(self: Metadata, key: str) -> object:
        value = original(self, key)
        assert not isinstance(value, list), f"{key} was read"
        return value

    monkeypatch.setattr(Metadata, "__getitem__", scalars_only)
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    assert answer(smollm2_path, cache) == expected
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == written


def test_a_start_without_a_usable_cache_answers_the_same(
    smollm2_path: Path, filled: tuple[Path, list[int]], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    assert answer(smollm2_path, tmp_path / "file" / "cache") == filled[1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache_is_used(smollm2_path: Path, filled: tuple[Path, list[int]]) -> None:
    cache, expected = filled
    folders = [path for path in (cache, *cache.rglob("*")) if path.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert answer(smollm2_path, cache) == expected
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_the_first_token_needs_no_heavy_module(smollm2_path: Path, filled: tuple[Path, list[int]]) -> None:
    code = f"""
import json, sys
from tokenmill import LLM, SamplingParams
with LLM({str(smollm2_path)!r}, cache_dir={str(filled[0])!r}, max_model_len=256) as llm:
    print(json.dumps(llm.generate({PROMPT!r}, SamplingParams(max_tokens=8, temperature=0))[0].token_ids))
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    ids, modules = map(json.loads, done.stdout.splitlines())
    assert ids == filled[1]
    heavy = {"torch", "transformers", "huggingface_hub", "jinja2", "pydantic", "rich", "typer", "subprocess", "asyncio"}
    assert heavy.isdisjoint(modules)
