"""Pages say what result files say, and the committed pages are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tokenmill.bench.record import ResultFileError, read_record, record
from tokenmill.bench.report import BEGIN, END, build_page, with_headline
from tokenmill.cli import app

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


def spread(value):
    return {"median": value, "low": value - 1, "high": value + 1, "samples": [value, value]}


def metric(value, ratio=None):
    samples = {"samples": [value], "shares": [0.5]}
    return {**samples, "rate": value and spread(value), "share": value and spread(0.5), "ratio": ratio}


def comparison(name="peer"):
    ours = {
        "name": "tokenmill",
        "version": "1",
        "build": "avx",
        "settings": {},
        "error": None,
        "metrics": {"prefill": metric(8.0), "decode": metric(4.0)},
    }
    other = {**ours, "name": name, "metrics": {"prefill": metric(8.0), "decode": metric(4.0, spread(3.25))}}
    nothing = {"prefill": metric(None), "decode": metric(None)}
    broken = {**ours, "name": "broken", "build": "", "error": "it died; /some/path", "metrics": nothing}
    workload = {"name": "latency", "requests": 1, "input_tokens": 8, "output_tokens": 4}
    return {
        "model": "/somewhere/m.gguf",
        "comparisons": [{"workload": workload, "threads": 2, "rounds": 3, "engines": [ours, other, broken]}],
    }


def write(path, kind, figures):
    path.write_text(json.dumps(record(kind, figures)))
    return path


def test_a_page_holds_rates_shares_ratios_failures_and_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/tokenmill", "bench", "compare", "m", "--peer", "a b"])
    page = build_page([write(tmp_path / "a.json", "compare", comparison())])
    assert "| tokenmill | 8.0 (7.0 to 9.0) |" in page.text
    assert "50.0 %" in page.text
    assert "3.25 (2.25 to 4.25)" in page.text
    assert "- broken failed: it died\n" in page.text
    assert "tokenmill bench compare m --peer 'a b'" in page.text
    assert "/somewhere" not in page.text
    assert "| m | peer | failed | 3.25 (2.25 to 4.25) | not measured |" in page.headline
    assert "| model | beside | prefill of 8 tokens | decode after 8 | many requests |" in page.headline
    assert "| broken | failed |" in page.text
    assert list(page.pictures) == ["a.svg"]


def test_the_headline_goes_between_the_readme_s_markers(tmp_path):
    readme = f"# Title\n{BEGIN}\nold\n{END}\nrest\n"
    assert with_headline(readme, "new") == f"# Title\n{BEGIN}\nnew\n{END}\nrest\n"
    assert with_headline(with_headline(readme, "new"), "new") == with_headline(readme, "new")
    with pytest.raises(ResultFileError, match="no place for the headline"):
        with_headline("# Title", "new")


def test_files_that_are_no_results_are_named(tmp_path):
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ResultFileError, match=r"text\.json is no JSON"):
        read_record(tmp_path / "text.json")
    with pytest.raises(ResultFileError, match="is no result file"):
        read_record(tmp_path / "list.json")
    with pytest.raises(ResultFileError, match="cannot be read"):
        read_record(tmp_path / "none.json")
    with pytest.raises(ResultFileError, match="kind 'dance'"):
        build_page([write(tmp_path / "dance.json", "dance", {})])
    with pytest.raises(ResultFileError, match=r"short\.json lacks what a result of latency has: KeyError"):
        build_page([write(tmp_path / "short.json", "latency", {"model": "m"})])


def test_the_verb_writes_page_and_readme(tmp_path):
    write(tmp_path / "a.json", "compare", comparison())
    pytest.importorskip("matplotlib")
    page, readme = tmp_path / "page.md", tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    result = CliRunner().invoke(app, ["bench", "report", str(tmp_path), "--out", str(page), "--readme", str(readme)])
    assert result.exit_code == 0, result.output
    assert "## Beside other engines" in page.read_text()
    assert "3.25" in readme.read_text()
    assert "](pictures/a.svg)" in page.read_text()
    drawn = (tmp_path / "pictures" / "a.svg").read_text()
    assert "tokenmill" in drawn or "<svg" in drawn
    CliRunner().invoke(app, ["bench", "report", str(tmp_path / "a.json"), "--out", str(page)])
    assert (tmp_path / "pictures" / "a.svg").read_text() == drawn


def test_the_committed_pages_are_those_of_the_committed_results():
    page = build_page(RESULTS.glob("*.json"))
    assert (ROOT / "docs" / "benchmarks.md").read_text() == page.text
    readme = (ROOT / "README.md").read_text()
    assert with_headline(readme, page.headline) == readme
    assert {path.name for path in (ROOT / "docs" / "pictures").glob("*.svg")} == set(page.pictures)
