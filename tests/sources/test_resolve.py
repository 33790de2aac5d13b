"""What a user calls a model becomes a path, or an error that says what to write instead."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tokenmill.errors import UsageError
from tokenmill.sources import CATALOGUE, DEFAULT_MODEL, ModelUnavailableError, SilentProgress, models_folder, resolve
from tokenmill.sources.catalogue import CarrierPackages
from tokenmill.sources.hub import parse_reference


def test_a_gguf_file_is_itself(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\x03\0\0\0")
    assert resolve(str(file)) == file
    assert resolve(file) == file


def test_a_file_of_another_kind_is_refused(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"not a model")
    with pytest.raises(UsageError, match="not a GGUF file"):
        resolve(file)


def test_a_checkpoint_folder_is_itself(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("present", "message"),
    [
        (["config.json"], "a .safetensors file is missing"),
        (["model.safetensors"], "config.json is missing"),
        (["model.gguf"], "name the file"),
        ([], "config.json is missing"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, present, message):
    for name in present:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError, match=message):
        resolve(tmp_path)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_refused(name):
    with pytest.raises(UsageError, match=r"name is empty.*smollm2-135m"):
        resolve(name)


def test_an_empty_file_is_called_empty(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UsageError, match="is empty; fetch it again"):
        resolve(tmp_path / "model.gguf")


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(UsageError, match="neither a regular file nor a folder"):
        resolve(tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["./absent.gguf", "/absent/model.gguf", "absent.gguf", "~/absent"])
def test_an_absent_path_is_named(name):
    with pytest.raises(UsageError, match="no such file or folder"):
        resolve(name)


def test_a_misspelt_name_gets_a_suggestion():
    with pytest.raises(UsageError, match="Did you mean 'smollm2-135m'"):
        resolve("smollm-135m")


def test_an_unknown_name_lists_the_catalogue():
    with pytest.raises(UsageError) as caught:
        resolve("xyzzy")
    assert all(name in str(caught.value) for name in CATALOGUE)


def test_a_pulled_catalogue_model_is_its_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENMILL_MODELS", str(tmp_path))
    file = tmp_path / f"{DEFAULT_MODEL}.gguf"
    with file.open("wb") as stream:
        stream.truncate(CATALOGUE[DEFAULT_MODEL].size)  # sparse: the size is what resolve looks at
    assert resolve(DEFAULT_MODEL, SilentProgress()) == file


def test_a_catalogue_file_of_the_wrong_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENMILL_MODELS", str(tmp_path))
    (tmp_path / f"{DEFAULT_MODEL}.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"has 4 bytes.*remove the file"):
        resolve(DEFAULT_MODEL, SilentProgress())


def test_an_unreachable_hub_is_an_error_with_its_reason(tmp_path, monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelUnavailableError, match="hub cannot be reached") as caught:
        resolve("someone/model@v1", SilentProgress())
    assert [source for source, _ in caught.value.failures][1] == "Hugging Face hub: someone/model@v1"


def test_a_revision_is_passed_to_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    seen = {}

    def snapshot(repository, **options):
        seen.update(options, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve("someone/model@v1.0", SilentProgress()) == tmp_path
    assert (seen["repository"], seen["revision"]) == ("someone/model", "v1.0")


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("org/name", ("org/name", None)),
        ("org/name@main", ("org/name", "main")),
        ("org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        ("name", None),
        ("a/b/c", None),
        ("org/name@", None),
        ("../name", None),
        ("org/na me", None),
    ],
)
def test_hub_references(reference, expected):
    assert parse_reference(reference) == expected


def test_folders_follow_the_environment(monkeypatch):
    for variable in ("TOKENMILL_MODELS", "TOKENMILL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert models_folder() == Path("~/.cache/tokenmill/models").expanduser()
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert models_folder() == Path("/x/tokenmill/models")
    monkeypatch.setenv("TOKENMILL_CACHE", "/c")
    assert models_folder() == Path("/c/models")
    monkeypatch.setenv("TOKENMILL_MODELS", "/m")
    assert models_folder() == Path("/m")


@pytest.mark.parametrize("model", CATALOGUE.values(), ids=list(CATALOGUE))
def test_catalogue_entries_are_complete(model):
    assert len(model.sha256) == 64
    assert int(model.sha256, 16) > 0
    assert model.size > 0
    assert model.licence
    assert model.licence_url
    carriers = [source for source in model.sources if isinstance(source, CarrierPackages)]
    assert len(carriers) == 1
    assert all(requirement.count("==") == 1 for requirement in carriers[0].requirements)


def test_the_default_model_is_in_the_catalogue():
    assert DEFAULT_MODEL in CATALOGUE
