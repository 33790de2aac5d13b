"""A step taken apart: the parts are those of the program, their work is counted right, and they add up."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny_gguf import VOCABULARY, write_tiny_gguf
from typer.testing import CliRunner

from tokenmill.backends.backend import StepLimits
from tokenmill.bare_model import open_bare
from tokenmill.bench.op_work import op_work
from tokenmill.bench.profile import profile_model
from tokenmill.cli import app
from tokenmill.errors import UsageError
from tokenmill.program.ops import Attention, LinearGroup
from tokenmill.program.step import SequenceStep, lay_plan

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 256, 512, 4, 2, 64, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", "llama", ("Q8_0",), LAYERS)


def test_a_timed_step_computes_what_a_step_does(model):
    with open_bare(model, StepLimits(16, 1, 16, 64), threads=2) as opened:
        backend = opened.backend
        tables = [[0, 1]] * len(backend.kv_groups)
        plan = lay_plan([SequenceStep(list(range(1, 11)), 0, tables, range(10))], len(backend.kv_groups))
        expected = backend.run(plan)["logits"].copy()
        backend.run(lay_plan([SequenceStep([7] * 10, 0, tables, range(10))], len(backend.kv_groups)))
        times = backend.run_timed(plan)
        assert np.array_equal(backend._executor.value(backend._ids["logits"], 10), expected)
        assert len(times.ops) == len(backend.program.ops)
        assert all(part >= 0 for part in (times.prepare, *times.ops))
        assert times.forks > 0
        assert 0 <= times.joining <= times.waiting <= sum(times.ops) + times.prepare
        # values of a timed step are those of its plan: a later range may go on from them
        assert np.array_equal(backend.run(plan, len(backend.program.ops) - 1)["logits"], expected)
        with pytest.raises(ValueError, match="tokens"):
            backend.run_timed(lay_plan([SequenceStep([1] * 17, 0, tables)], len(backend.kv_groups)))


def test_work_of_each_op_is_that_of_its_matrices_and_keys(model):
    with open_bare(model, StepLimits(8, 2, 2, 128)) as opened:
        backend = opened.backend
        formats = {name: backend.matrix_format(name) for name in backend.program.matrices()}
        parts = [SequenceStep([1, 2, 3], 40, [[0, 1]], [2]), SequenceStep([5], 70, [[2, 3, 4]], [0])]
        plan = lay_plan(parts, 1)
        works = [op_work(op, backend.program, plan, formats, backend.kv_groups) for op in backend.program.ops]
    by_type = {type(op): work for op, work in zip(backend.program.ops, works, strict=True)}
    attention = by_type[Attention]
    assert attention.memory_bytes == (43 + 71) * 2 * KV_HEADS * HEAD_DIM * 2
    assert attention.float_operations == 4 * HEADS * HEAD_DIM * (41 + 42 + 43 + 71)
    linears = [w for op, w in zip(backend.program.ops, works, strict=True) if isinstance(op, LinearGroup)]
    body = LAYERS * (HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) + 3 * HIDDEN * INNER)
    head = [w for w in works if w.role.startswith("Linear") and w.memory_bytes == VOCABULARY * HIDDEN * 34 // 32]
    assert sum(w.int8_operations for w in linears if w not in head) == 2 * body * 4
    assert head[0].int8_operations == 2 * VOCABULARY * HIDDEN * 2
    assert "Linear attention.q + attention.k + attention.v" in {work.role for work in works}


def test_a_profile_adds_up(model):
    profile = profile_model(model, prompt_tokens=32, depth=40, sequences=2, rounds=3, threads=1)
    assert [step.phase for step in profile.steps] == ["prefill", "decode"]
    for step in profile.steps:
        inside = sum(op.seconds for op in step.ops)
        assert inside + step.prepare_seconds <= step.seconds
        assert sum(role.count for role in step.roles) == len(step.ops)
        assert sum(role.seconds for role in step.roles) == pytest.approx(inside)
        assert sum(role.operations for role in step.roles) == sum(op.operations for op in step.ops)
    assert (profile.steps[1].tokens, profile.steps[1].sequences, profile.steps[1].depth) == (2, 2, 40)
    assert profile.engine is not None
    assert 0 < profile.engine.network_seconds < profile.engine.seconds


def test_a_depth_beyond_the_model_is_refused(model):
    with pytest.raises(UsageError, match="at most"):
        profile_model(model, depth=10**6)


@pytest.mark.parametrize("ending", ["svg", "png", "html"])
def test_the_verb_draws(model, tmp_path, ending):
    pytest.importorskip("matplotlib")
    picture, report = tmp_path / f"profile.{ending}", tmp_path / "profile.json"
    arguments = ["bench", "profile", str(model), "--prompt-tokens", "8", "--depth", "8", "--rounds", "1"]
    result = CliRunner().invoke(app, [*arguments, "--plot", str(picture), "--json", str(report)])
    assert result.exit_code == 0, result.output
    assert "Linear mlp.gate + mlp.up" in result.output
    head = picture.read_bytes()[:200]
    assert {"svg": b"<?xml", "png": b"\x89PNG", "html": b"<!doctype html>"}[ending] in head
    assert json.loads(report.read_text())["kind"] == "profile"
