"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real default model, from TOKENMILL_TEST_MODEL or the catalogue; the test is skipped without either."""
    given = os.environ.get("TOKENMILL_TEST_MODEL")
    if given:
        path = Path(given)
        if not path.exists():
            pytest.fail(f"TOKENMILL_TEST_MODEL names {path}, which does not exist")
        return path
    from tokenmill.errors import TokenmillError
    from tokenmill.sources import resolve

    try:
        return Path(resolve("smollm2-135m"))
    except TokenmillError as error:
        pytest.skip(f"the default model cannot be had here: {error}")
