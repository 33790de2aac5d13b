"""Importing the package is quick and brings nothing that was not asked for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import tokenmill


def in_new_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_is_quick():
    """The limit is 0.4 s on an idle machine; best of five and a margin, for busy ones."""
    code = "import time; t = time.perf_counter(); import tokenmill; print(time.perf_counter() - t)"
    assert min(float(in_new_process(code)) for _ in range(5)) < 1.2


def test_import_loads_no_heavy_module():
    code = "import json, sys, tokenmill; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(in_new_process(code)))
    assert not loaded & {"numpy", "torch", "tokenizers", "huggingface_hub", "rich", "transformers"}


def test_the_front_door_needs_no_torch():
    code = """
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "gguf"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
from tokenmill import LLM, SamplingParams
import tokenmill.cli
print(LLM.__name__, SamplingParams.__name__)
"""
    assert in_new_process(code).split() == ["LLM", "SamplingParams"]


def test_the_front_door_is_listed():
    assert {"LLM", "SamplingParams"} <= set(dir(tokenmill))


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = tokenmill.nonsense
