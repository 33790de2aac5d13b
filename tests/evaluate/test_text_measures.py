"""Perplexity and KL against transformers and against definitions; references and logs that go on where they were."""

from __future__ import annotations

import json
import os
import sys
from itertools import islice

import numpy as np
import pytest
from eval_verb import run_eval

from tokenmill.errors import MemoryLimitError, UsageError
from tokenmill.evaluate import text as texts
from tokenmill.evaluate.kl import kl_divergence
from tokenmill.evaluate.reference import ReferenceError, stored_reference
from tokenmill.evaluate.result_log import ResultLog, ResultLogError
from tokenmill.evaluate.runs import RunSpec, all_rows, open_run, parse_run, read_text_model
from tokenmill.evaluate.scoring import Perplexity, Window, Windowing, cut_windows, score_window, score_windows
from tokenmill.evaluate.text import Kind, Part, TextError, corpus, documents, part_of, read_texts

TEXT = "The quick brown fox jumps over the lazy dog. " * 3 + "def add(a, b):\n    return a + b\n" * 4


# ---- windows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 9, 10, 11, 25, 100])
@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize(("window", "stride"), [(10, 5), (10, 9), (7, 1)])
def test_sliding_windows_score_each_token_once_with_context(count, bos, window, stride):
    cut = cut_windows(range(100, 100 + count), window, stride, Windowing.SLIDING, bos)
    scored = [token for each in cut for token in each.token_ids[each.scored :]]
    assert scored == list(range(100 if bos is not None else 101, 100 + count))
    assert all(len(each.token_ids) <= window for each in cut)
    for each in cut[1:]:
        assert each.scored >= min(window - stride, len(each.token_ids) - 1)


def test_llama_cpp_windows_lie_side_by_side_and_score_their_second_half():
    cut = cut_windows(range(25), 10, 5, Windowing.LLAMA_CPP, bos=99)
    assert [each.token_ids[0] for each in cut] == [99, 99]
    assert [each.token_ids[1:] for each in cut] == [tuple(range(1, 10)), tuple(range(11, 20))]
    assert {each.scored for each in cut} == {6}
    with pytest.raises(TextError, match="less than one window"):
        cut_windows(range(9), 10, 5, Windowing.LLAMA_CPP, None)


def test_senseless_windows_are_refused():
    with pytest.raises(ValueError, match="stride is 10"):
        cut_windows(range(25), 10, 10, Windowing.SLIDING, None)
    with pytest.raises(TextError, match="fewer than two tokens"):
        cut_windows([1], 10, 5, Windowing.SLIDING, None)
    with pytest.raises(ValueError, match="second token"):
        Window((1, 2), 0)


# ---- against transformers ------------------------------------------------------------------------------------------


def transformers_logits(model):
    """Logits of given token ids from transformers."""
    import torch

    def run(ids):
        with torch.inference_mode():
            return model(torch.tensor([list(ids)])).logits[0].numpy()

    return run


def check_against_transformers(path, theirs, ids, window):
    """Perplexity and divergence of the torch backend on windows of ``ids`` equal those computed from ``theirs``."""
    cut = cut_windows(ids, window, window // 2, Windowing.SLIDING, None)
    expected = []
    for each in cut:
        logs = theirs(each.token_ids).astype(np.float64)
        logs -= np.log(np.exp(logs - logs.max(1, keepdims=True)).sum(1, keepdims=True)) + logs.max(1, keepdims=True)
        expected += [-logs[i - 1, each.token_ids[i]] for i in range(each.scored, len(each.token_ids))]
    with open_run(RunSpec(str(path), "torch", "f32"), window) as backend:
        nll = score_windows(backend, cut, ResultLog(None, {}))
        ours = [rows.copy() for rows in all_rows(backend, [cut[0].token_ids])]
    assert nll == pytest.approx(expected, abs=1e-4)
    assert Perplexity.of(nll, 24).perplexity == pytest.approx(np.exp(np.mean(expected)), rel=1e-5)
    assert kl_divergence(theirs(cut[0].token_ids), np.concatenate(ours)).max() < 1e-7


def test_perplexity_and_divergence_of_the_torch_backend_equal_transformers(tmp_path):
    import transformers
    from tiny_models import random_transformers_model

    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    model = random_transformers_model(config).eval()
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(0, 300, 130).tolist()
    check_against_transformers(tmp_path, transformers_logits(model), ids, 48)


@pytest.mark.slow
def test_perplexity_and_divergence_of_a_real_model_equal_transformers(smollm2_path):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    ).eval()
    ids = read_text_model(str(smollm2_path)).encode(TEXT)
    check_against_transformers(smollm2_path, transformers_logits(model), ids, 48)


def test_a_window_s_score_does_not_depend_on_how_its_rows_are_cut(smollm2_path, monkeypatch):
    ids = tuple(read_text_model(str(smollm2_path)).encode(TEXT)[:40])
    with open_run(RunSpec(str(smollm2_path)), 40) as backend:
        whole = score_window(backend, Window(ids, 1))
        tail = score_window(backend, Window(ids, 17))
    monkeypatch.setattr("tokenmill.evaluate.runs.ROWS", 7)
    with open_run(RunSpec(str(smollm2_path)), 40) as backend:
        assert np.array_equal(score_window(backend, Window(ids, 1)), whole)
    assert np.array_equal(tail, whole[16:])


# ---- references ----------------------------------------------------------------------------------------------------


def test_a_reference_is_run_once_and_its_rounding_is_far_below_what_is_measured(tmp_path):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (70, 5000)).astype(np.float32)
    logits[3, 7] = -np.inf
    runs = []

    def run():
        runs.append(1)
        yield from np.array_split(logits, 3)

    stored, found = stored_reference(tmp_path, {"model": "a"}, 70, 5000, run)
    assert not found
    again, found = stored_reference(tmp_path, {"model": "a"}, 70, 5000, run)
    assert found
    assert len(runs) == 1
    targets = rng.integers(0, 5000, 70)
    assert np.abs(again.compare([logits], targets).kl).max() < 1e-6
    other = logits + rng.normal(0, 0.05, logits.shape).astype(np.float32)
    divergence = stored.compare(np.array_split(other, 4), targets)
    finite = np.arange(70) != 3
    exact = kl_divergence(logits[finite], other[finite])
    assert divergence.kl[finite] == pytest.approx(exact, rel=1e-2, abs=1e-6)
    assert divergence.kl[finite].mean() == pytest.approx(exact.mean(), rel=1e-3)
    assert np.array_equal(divergence.same_top, logits.argmax(1) == other.argmax(1))
    assert stored_reference(tmp_path, {"model": "b"}, 70, 5000, run)[1] is False


def test_references_that_do_not_fit_are_refused(tmp_path):
    rows = np.zeros((4, 10), np.float32)
    stored, _ = stored_reference(tmp_path, {}, 4, 10, lambda: [rows])
    with pytest.raises(ReferenceError, match="rows of 11 tokens"):
        stored.compare([np.zeros((4, 11), np.float32)], np.zeros(4, np.int64))
    with pytest.raises(ReferenceError, match="the run has 3 rows, the reference 4"):
        stored.compare([rows[:3]], np.zeros(4, np.int64))
    with pytest.raises(ReferenceError, match="gave 4 rows, 5 were expected"):
        stored_reference(tmp_path, {"x": 1}, 5, 10, lambda: [rows])
    assert not [path for path in tmp_path.iterdir() if "part" in path.name]
    with pytest.raises(ReferenceError, match="cannot be stored"):
        stored_reference(tmp_path / "missing.log", {}, 1 << 45, 10, lambda: [rows])


# ---- logs ----------------------------------------------------------------------------------------------------------


def test_a_log_goes_on_where_it_was_broken_off(tmp_path):
    path = tmp_path / "run" / "log.jsonl"
    first = ResultLog(path, {"model": "a"})
    first.add("0", {"nll": [1.0]})
    first.add("1", {"nll": [2.0]})
    with path.open("a") as file:
        file.write('{"item": "2", "res')  # killed while writing
    again = ResultLog(path, {"model": "a"})
    assert again.done == {"0": {"nll": [1.0]}, "1": {"nll": [2.0]}}
    again.add("2", {"nll": [3.0]})
    assert list(ResultLog(path, {"model": "a"}).done) == ["0", "1", "2"]
    with pytest.raises(ResultLogError, match="model was 'a', is 'b'"):
        ResultLog(path, {"model": "b"})
    (tmp_path / "other").write_text("hello\n")
    with pytest.raises(ResultLogError, match="is no log"):
        ResultLog(tmp_path / "other", {})


def test_a_resumed_run_scores_only_what_is_missing(tmp_path):
    log = ResultLog(tmp_path / "log", {})
    log.add("0", {"nll": [0.5, 0.25]})

    class Broken:
        def __getattr__(self, name):
            raise AssertionError("the backend was used for a window that is done")

    assert score_windows(Broken(), [Window((1, 2, 3), 1)], log).tolist() == [0.5, 0.25]


# ---- texts ---------------------------------------------------------------------------------------------------------


def names(kind, part, count=80):
    return [name for name, _ in islice(documents(kind, part), count)]


def test_no_document_is_in_both_parts_and_the_order_is_fixed():
    every = {part: names(Kind.CODE, part) for part in Part}
    assert not set(every[Part.CALIBRATION]) & set(every[Part.EVALUATION])
    assert all(part_of(name) is part for part, own in every.items() for name in own)
    assert [len(own) for own in every.values()] == [80, 80]
    assert every[Part.EVALUATION] == names(Kind.CODE, Part.EVALUATION)


def test_a_file_s_docstrings_are_in_the_part_of_the_file():
    prose = set(names(Kind.PROSE, Part.EVALUATION, 300))
    assert any(name.startswith("code/") for name in prose)
    assert not prose & set(names(Kind.CODE, Part.CALIBRATION, 10_000))


@pytest.mark.parametrize("kind", Kind)
def test_a_corpus_is_as_long_as_asked_for(kind, monkeypatch):
    monkeypatch.setattr(texts.importlib.metadata, "distributions", lambda: [])  # thousands of files
    assert len(corpus(kind, Part.CALIBRATION, 20_000)) == 20_000


def test_a_machine_without_texts_says_so(tmp_path):
    with pytest.raises(TextError, match="this machine has 0 characters of code"):
        corpus(Kind.CODE, Part.EVALUATION, 1000, tmp_path)


def test_texts_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "binary").write_bytes(b"abc\xff")
    (tmp_path / "a").write_text("one")
    with pytest.raises(TextError, match=r"missing cannot be read: No such file"):
        read_texts([str(tmp_path / "missing")])
    with pytest.raises(TextError, match=r"no UTF-8 text: byte 3 is 0xff"):
        read_texts([str(tmp_path / "binary")])
    with pytest.raises(UsageError, match="is no corpus"):
        read_texts(["corpus:poetry"])
    assert read_texts([str(tmp_path / "a"), str(tmp_path / "a")]) == "one\n\none"


# ---- runs and verbs ------------------------------------------------------------------------------------------------


def test_runs_are_written_in_one_way():
    assert parse_run("a.gguf") == RunSpec("a.gguf", "native", "f16")
    assert parse_run("a@torch") == RunSpec("a", "torch", "f32")
    assert parse_run("native/bf16", "m") == RunSpec("m", "native", "bf16")
    assert parse_run("torch/f16+int8", "m") == RunSpec("m", "torch", "f16", True)
    assert str(parse_run("org/name@torch")) == "org/name@torch/f32"
    for wrong, message in (("fast", "is no run"), ("native/f8", "KV element 'f8'"), ("native+int8", "torch backend")):
        with pytest.raises(UsageError, match=message):
            parse_run(wrong, "m")


def test_perplexity_of_two_backends_is_paired(smollm2_path, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    report, log = tmp_path / "report.json", tmp_path / "log.jsonl"
    shared = ["--text", tmp_path / "text", "--tokens", "60", "--window", "32", "--json", report, "--log", log]
    shared += ["--peer", f"llama.cpp={sys.executable}"]
    output = run_eval("perplexity", smollm2_path, "--vs", f"{smollm2_path}@torch", *shared)
    assert "first / it" in output
    record = json.loads(report.read_text())
    first, second = record["runs"]
    assert first["tokens"] == second["tokens"] == 59 + (first["tokens"] == 60)
    assert first["perplexity"] == pytest.approx(second["perplexity"], rel=0.1)
    assert first["difference"] is None
    assert second["difference"]["lower"] <= second["difference"]["value"] <= second["difference"]["upper"]
    assert second["difference"]["value"] == pytest.approx(first["nll"]["value"] - second["nll"]["value"])
    assert "no module" in record["errors"]["llama.cpp"]
    assert (tmp_path / "log-0.jsonl").exists()
    assert {"model_sha256", "text_sha256", "command"} <= record.keys()


def test_a_run_that_does_not_fit_the_memory_is_refused_before_anything_is_loaded(smollm2_path, tmp_path, monkeypatch):
    monkeypatch.setattr("tokenmill.cache_folder.cache_folder", lambda: tmp_path)
    monkeypatch.setattr("tokenmill.bare_model.load_weights", lambda *_, **__: pytest.fail("weights were loaded"))
    (tmp_path / "text").write_text(TEXT)
    for verb in (["perplexity", smollm2_path], ["kl", smollm2_path, "--tokens", "32", "--window", "32"]):
        with pytest.raises(MemoryLimitError, match=r"needs .* memory=100MB allows 100 MB; take a smaller model"):
            run_eval(*verb, "--text", tmp_path / "text", "--memory", "100MB")


def test_kl_of_runs_against_a_stored_reference(smollm2_path, tmp_path, monkeypatch):
    monkeypatch.setattr("tokenmill.cache_folder.cache_folder", lambda: tmp_path)
    monkeypatch.setenv("TOKENMILL_CACHE", os.environ.get("TOKENMILL_CACHE", str(tmp_path)))
    (tmp_path / "text").write_text(TEXT)
    report = tmp_path / "report.json"
    shared = ["kl", smollm2_path, "--text", tmp_path / "text", "--tokens", "64", "--window", "32"]
    runs = ["--run", "native", "--run", "torch/f32+int8", "--run", "torch", "--peer", "llama.cpp=/nowhere/python"]
    output = run_eval(*shared, *runs, "--json", report)
    assert "llama.cpp FAILED" in output
    native, int8, same, peer = json.loads(report.read_text())["runs"]
    assert 1e-5 < native["summary"]["mean"] < 0.1
    assert native["summary"]["mean"] == pytest.approx(int8["summary"]["mean"], rel=0.5)
    assert same["summary"]["mean"] < 1e-7
    assert same["summary"]["same_top_token"] == 1.0
    assert 0.3 < int8["ratio"]["value"] < 3
    assert peer["summary"] is None
    (stored,) = (tmp_path / "references").glob("*.log")
    assert stored.stat().st_size == 2 * 64 * 49152
    before = stored.stat().st_mtime_ns
    run_eval(*shared, "--run", "native")
    assert stored.stat().st_mtime_ns == before
    with pytest.raises(TextError, match="windows of 32 tokens"):
        run_eval("kl", smollm2_path, "--text", tmp_path / "text", "--tokens", "6400", "--window", "32")


def test_a_corpus_is_written(tmp_path):
    output = run_eval("corpus", tmp_path / "out.txt", "--kind", "code", "--characters", "5000")
    facts = json.loads(output)
    assert facts["characters"] == len((tmp_path / "out.txt").read_text()) == 5000
    with pytest.raises(UsageError, match="--part calibration or evaluation"):
        run_eval("corpus", tmp_path / "x", "--part", "test")
