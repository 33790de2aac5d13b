"""The limit loops run on every path and are not optimized away."""

import pytest

from tokenmill import _native
from tokenmill.bench.roofline import measure_roofline


@pytest.fixture(params=_native.available_isas())
def isa(request):
    before = _native.active_isa()
    _native.set_active_isa(request.param)
    yield request.param
    _native.set_active_isa(before)


def test_limits_are_those_of_a_processor(isa):
    limits = measure_roofline(threads=1, seconds=0.01)
    assert limits.isa == isa
    assert 1e8 < limits.memory_read_bytes_per_second < 1e12
    # Upper bounds: 4 GHz x 2 ports x 64 bytes x 2 operations, with room; a folded loop exceeds them by far.
    assert 1e9 < limits.int8_operations_per_second < 4e12
    assert 1e8 < limits.f32_operations_per_second < 1e12


def test_small_working_sets_are_refused():
    with pytest.raises(ValueError, match="at least 1 KiB"):
        _native.read_bytes_per_second(100, 1)
