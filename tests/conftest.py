"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokenmill import _native


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


@pytest.fixture(params=_native.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction-set path of this processor in turn, in use."""
    before = _native.active_isa()
    _native.set_active_isa(request.param)
    yield request.param
    _native.set_active_isa(before)
