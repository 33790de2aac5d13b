"""Fixtures of the weights tests."""

import os
from contextlib import contextmanager

import pytest


@pytest.fixture
def unprivileged(tmp_path, monkeypatch):
    """A context in which file permissions apply even if the tests run as root; paths are relative to ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)

    @contextmanager
    def context():
        if os.geteuid() != 0:
            yield
            return
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    return context
