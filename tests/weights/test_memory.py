"""Peak resident memory of a load, in a process of its own."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

MIB = 1 << 20
BOUND_BYTES = 64 * MIB
"""Two packing buffers, a part of the source and the metadata; the model itself has 92 MiB."""

PROGRAM = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from model_files import CopyingPacker, bind_all
    from tokenmill.weights.checkpoint import Checkpoint, open_checkpoint
    from tokenmill.weights.packing import load_weights

    def peak():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    {change}
    before = peak()
    checkpoint = open_checkpoint({model!r})
    bound, packer = bind_all(checkpoint), CopyingPacker()
    weights = load_weights(checkpoint, bound, Path({cache!r}), packer=packer, use_cache={use_cache})
    print(weights.origin, peak() - before)
"""


def load_apart(model, cache, use_cache=True, change=""):
    """Origin of the weights, and by how much loading raised the peak."""
    program = textwrap.dedent(PROGRAM).format(
        tests=str(Path(__file__).parent), model=str(model), cache=str(cache), use_cache=use_cache, change=change
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    origin, growth = run.stdout.split()
    return origin, int(growth)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def model(smollm2_path, tmp_path_factory):
    """A copy that was written in pieces of 1 MiB, as a download is.

    How a file was written decides how much of it the kernel maps around a touched page: a copy of one's own makes the
    measure repeatable, and this size is the hardest.
    """
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    with smollm2_path.open("rb") as source, path.open("wb", buffering=0) as copy:
        while piece := source.read(MIB):
            copy.write(piece)
    yield path
    path.unlink()


def test_first_load_holds_parts_and_not_the_model(model, cache):
    origin, growth = load_apart(model, cache)
    assert origin == "packed"
    assert growth < BOUND_BYTES


def test_second_load_holds_next_to_nothing(model, cache):
    load_apart(model, cache)
    origin, growth = load_apart(model, cache)
    assert origin == "mapped"
    assert growth < 24 * MIB


def test_load_in_memory_holds_the_model_once(model, cache):
    origin, growth = load_apart(model, cache, use_cache=False)
    assert origin == "memory"
    assert growth < model.stat().st_size + BOUND_BYTES


def test_the_bound_notices_source_pages_that_are_kept(model, tmp_path):
    # Negative control.
    _, growth = load_apart(model, tmp_path, change="Checkpoint.release = lambda *_: None")
    assert growth > BOUND_BYTES
