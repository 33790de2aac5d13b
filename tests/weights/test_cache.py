"""The build cache: packed once, mapped afterwards, and never trusted when damaged."""

import errno
import logging
import multiprocessing
import os
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from model_files import CopyingPacker, bind_all, small_model
from test_fuzz import mutate

from tokenmill.cache_folder import cache_folder
from tokenmill.weights import packed_file as packed_file_module
from tokenmill.weights.cache import CacheEntry
from tokenmill.weights.checkpoint import file_digest, open_checkpoint
from tokenmill.weights.packing import load_weights


@pytest.fixture
def model(tmp_path):
    return small_model().write(tmp_path / "small.gguf")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def load(model, cache, packer=None, **options):
    checkpoint = open_checkpoint(model)
    return load_weights(checkpoint, bind_all(checkpoint), cache, packer=packer or CopyingPacker(), **options)


def packed_file(cache: Path) -> Path:
    (path,) = cache.glob("packed/*/weights-*.safetensors")
    return path


def contents(weights) -> dict[str, bytes]:
    return {name: weights.matrix(name).data.tobytes() for name in weights.formats}


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def files_left(cache: Path) -> set[str]:
    return {path.name.split("-")[0] for path in cache.glob("packed/*/*")}


def test_the_second_load_maps_what_the_first_packed(model, cache, caplog):
    first = load(model, cache)
    packer = CopyingPacker()
    second = load(model, cache, packer)
    assert (first.origin, second.origin) == ("packed", "mapped")
    assert contents(second) == contents(first)
    in_use = {info.tensor_type for info in open_checkpoint(model).tensors.values()}
    assert packer.calls == len(in_use), "only the layout's fingerprint may be packed"
    assert files_left(cache) == {"lock", "weights"}
    assert not warnings(caplog)


def test_mapped_weights_cannot_be_written_to(model, cache):
    load(model, cache)
    with pytest.raises(ValueError, match="read-only"):
        load(model, cache).matrix("matrix.Q8_0").data[0] = 1


def test_a_changed_checkpoint_is_packed_again(model, cache):
    before = contents(load(model, cache))
    small_model(seed=1).write(model)
    again = load(model, cache)
    assert again.origin == "packed"
    assert contents(again) != before
    assert contents(again) == contents(load(model, cache, use_cache=False))
    assert len(list(cache.glob("packed/*/weights-*"))) == 1


def test_a_touched_checkpoint_is_packed_again(model, cache):
    load(model, cache)
    os.utime(model, ns=(1, 1))
    assert load(model, cache).origin == "packed"
    assert load(model, cache).origin == "mapped"


def test_a_changed_packed_layout_is_packed_again(model, cache):
    load(model, cache)
    changed = CopyingPacker(version=1)
    assert load(model, cache, changed).origin == "packed"
    assert load(model, cache, changed).origin == "mapped"


def test_models_of_one_name_in_two_folders_do_not_meet(tmp_path, cache):
    paths = [tmp_path / name / "model.gguf" for name in ("a", "b")]
    for seed, path in enumerate(paths):
        path.parent.mkdir()
        small_model(seed).write(path)
    assert contents(load(paths[0], cache)) != contents(load(paths[1], cache))
    assert [load(path, cache).origin for path in paths] == ["mapped", "mapped"]


# ---- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_cache_file_is_made_again_with_one_warning(model, cache, caplog, length):
    expected = contents(load(model, cache))
    path = packed_file(cache)
    os.truncate(path, length if length >= 0 else path.stat().st_size - 1)
    again = load(model, cache)
    assert again.origin == "packed"
    assert contents(again) == expected
    assert len(warnings(caplog)) == 1
    assert "is damaged and is made again" in warnings(caplog)[0]
    assert load(model, cache).origin == "mapped"


def flip_last_byte(path: Path, keep_times: bool) -> None:
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    if keep_times:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_cache_file_that_was_written_to_is_made_again(model, cache, caplog):
    expected = contents(load(model, cache))
    flip_last_byte(packed_file(cache), keep_times=False)
    again = load(model, cache)
    assert again.origin == "packed"
    assert contents(again) == expected
    assert len(warnings(caplog)) == 1
    assert "has damaged data in 'matrix.BF16'" in warnings(caplog)[0]


def test_verify_finds_damage_that_left_no_trace(model, cache, caplog):
    expected = contents(load(model, cache))
    flip_last_byte(packed_file(cache), keep_times=True)
    assert contents(load(model, cache)) != expected, "the hot start trusts an untouched file"
    again = load(model, cache, verify=True)
    assert again.origin == "packed"
    assert contents(again) == expected
    assert len(warnings(caplog)) == 1


def test_verify_accepts_a_sound_file(model, cache, caplog):
    load(model, cache)
    assert load(model, cache, verify=True).origin == "mapped"
    assert not warnings(caplog)


def test_a_touched_cache_file_is_verified_once(model, cache, monkeypatch):
    load(model, cache)
    os.utime(packed_file(cache))
    assert load(model, cache).origin == "mapped"

    def no_more(*_):
        raise AssertionError("verified again")

    monkeypatch.setattr("tokenmill.weights.packed_file._verify_checksums", no_more)
    assert load(model, cache).origin == "mapped"


def test_a_mutated_header_never_gives_other_weights(model, cache):
    expected = contents(load(model, cache))
    path = packed_file(cache)
    whole, times = path.read_bytes(), path.stat().st_mtime_ns
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = np.random.default_rng(0)
    origins = set()
    for _ in range(50):
        path.write_bytes(mutate(rng, whole[:header], header) + whole[header:])
        os.utime(path, ns=(times, times))
        weights = load(model, cache)
        origins.add(weights.origin)
        assert contents(weights) == expected
    assert "packed" in origins


def test_a_cache_file_of_another_key_is_replaced_silently(model, cache, caplog):
    load(model, cache)
    path = packed_file(cache)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"small.gguf", b"other.gguf"))
    assert load(model, cache).origin == "packed"
    assert not warnings(caplog)


def test_partial_files_of_killed_processes_are_removed(model, cache):
    load(model, cache)
    partial = packed_file(cache).with_name("weights-0.safetensors.1.partial")
    partial.write_bytes(b"half")
    packed_file(cache).unlink()
    load(model, cache)
    assert not partial.exists()


# ---- a cache that cannot be written --------------------------------------------------------------------------------


def assert_packed_in_memory(model, cache, caplog, reason):
    expected = contents(load(model, cache, use_cache=False))
    weights = load(model, cache)
    assert weights.origin == "memory"
    assert contents(weights) == expected
    assert len(warnings(caplog)) == 1
    assert "the build cache cannot be used" in warnings(caplog)[0]
    assert reason in warnings(caplog)[0]


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "replace"])
def test_a_full_disk_leaves_no_file_and_packs_in_memory(model, cache, caplog, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        assert_packed_in_memory(model, cache, caplog, "No space left on device")
    assert files_left(cache) == {"lock"}
    assert load(model, cache).origin == "packed"


def test_a_disk_that_fills_in_the_middle(model, cache, caplog, monkeypatch):
    real, calls = os.pwrite, []

    def filling(*arguments):
        calls.append(1)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(packed_file_module, "_PIECE", 4096)  # the model is smaller than one piece
    monkeypatch.setattr(os, "pwrite", filling)
    assert_packed_in_memory(model, cache, caplog, "No space left on device")
    assert files_left(cache) == {"lock"}


@pytest.mark.parametrize("piece", [64, 1000, 1 << 20])
def test_weights_cross_the_borders_of_pieces(model, cache, monkeypatch, piece):
    expected = contents(load(model, cache, use_cache=False))
    monkeypatch.setattr(packed_file_module, "_PIECE", piece)
    load(model, cache)
    assert contents(load(model, cache, verify=True)) == expected


def test_a_short_write_is_continued(model, cache, monkeypatch):
    expected = contents(load(model, cache, use_cache=False))
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:1000], offset))
    load(model, cache)
    assert contents(load(model, cache, verify=True)) == expected


def test_a_file_size_limit_of_the_system(model, cache):
    # The kernel's own refusal (EFBIG), in a process of its own.
    program = f"""
        import logging, resource, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_cache import load, Path
        logging.basicConfig(format="%(message)s")
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        print(load(Path({str(model)!r}), Path({str(cache)!r})).origin)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True, timeout=60
    )
    assert run.stdout == "memory\n"
    assert run.stderr.count("the build cache cannot be used") == 1
    assert files_left(cache) == {"lock"}


def test_a_cache_folder_below_a_file(model, tmp_path, caplog):
    (tmp_path / "file").touch()
    assert_packed_in_memory(model, tmp_path / "file" / "cache", caplog, "Not a directory")


def test_an_unwritable_cache_folder(model, tmp_path, caplog, unprivileged):
    (tmp_path / "locked").mkdir(mode=0o555)
    with unprivileged():
        assert_packed_in_memory(Path(model.name), Path("locked/cache"), caplog, "Permission denied")


def test_a_read_only_cache_that_is_filled_is_used(model, cache, unprivileged, tmp_path):
    load(model, Path("cache"))
    for path in (*cache.rglob("*"), cache):
        path.chmod(0o555 if path.is_dir() else 0o444)
    with unprivileged():
        assert load(Path(model.name), Path("cache")).origin == "mapped"
    for path in (cache, *cache.rglob("*")):
        path.chmod(0o755)


# ---- two processes -------------------------------------------------------------------------------------------------


class SlowPacker(CopyingPacker):
    def pack_matrix(self, *arguments):
        time.sleep(0.02)
        super().pack_matrix(*arguments)


def start_at_once(model, cache, barrier, results):
    waited = []
    barrier.wait()
    weights = load(model, cache, SlowPacker(), progress=lambda p: waited.append(p.stage == "waiting"))
    results.put((weights.origin, any(waited), file_digest(packed_file(cache)), contents(weights)))


def test_of_processes_that_start_at_once_one_packs_and_the_others_map(model, cache):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=start_at_once, args=(model, cache, barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert sorted(origin for origin, *_ in outcomes) == ["mapped", "mapped", "packed"]
    assert all(waited == (origin == "mapped") for origin, waited, *_ in outcomes)
    assert len({digest for _, _, digest, _ in outcomes}) == 1
    assert outcomes[0][3] == outcomes[1][3] == outcomes[2][3]


def pack_until_killed(model, cache, started):
    packer = SlowPacker()
    load(model, cache, packer, progress=lambda _: started.set())


def test_a_killed_process_leaves_the_lock_free_and_no_weights(model, cache):
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=pack_until_killed, args=(model, cache, started))
    process.start()
    assert started.wait(timeout=60)
    process.kill()
    process.join(timeout=60)
    assert load(model, cache).origin == "packed"
    assert files_left(cache) == {"lock", "weights"}
    assert not list(cache.glob("packed/*/*.partial"))


# ---- places --------------------------------------------------------------------------------------------------------


def test_default_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("TOKENMILL_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("TOKENMILL_CACHE")
    assert cache_folder() == Path("/b/tokenmill")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache_folder() == Path("/c/.cache/tokenmill")


def test_sidecars_go_when_the_checkpoint_changes(model, cache):
    sidecar = CacheEntry(open_checkpoint(model), cache).sidecar("tokenizer")
    (sidecar / "data").write_text("derived")
    assert CacheEntry(open_checkpoint(model), cache).sidecar("tokenizer") == sidecar
    load(model, cache)
    assert (sidecar / "data").read_text() == "derived"
    small_model(seed=1).write(model)
    os.utime(model, ns=(1, 1))
    assert CacheEntry(open_checkpoint(model), cache).sidecar("tokenizer") != sidecar
    load(model, cache)
    assert not sidecar.exists()


def test_content_digest_is_sha256_of_the_file(model):
    import hashlib

    expected = hashlib.sha256(model.read_bytes()).hexdigest()
    assert open_checkpoint(model).content_digest() == expected == file_digest(model)


def test_the_cached_weights_of_the_real_model_are_its_bytes(smollm2_path, cache):
    weights = load(smollm2_path, cache)
    checkpoint = open_checkpoint(smollm2_path)
    for name, info in checkpoint.tensors.items():
        if len(info.shape) == 2:
            assert np.array_equal(weights.matrix(name).data[: info.nbytes], checkpoint.raw(name)), name
        else:
            assert np.array_equal(weights.vector(name), checkpoint.decode(name)), name
