import pytest

from llmsys.perf.ceilings import Bandwidth
from llmsys.perf.roofline import attainable_s, percent

BANDWIDTH = Bandwidth(read=100.0, write=50.0, copy=80.0, ways={})


@pytest.mark.parametrize(
    "work, seconds",
    [
        ({"read_bytes": 200}, 2.0),
        ({"written_bytes": 200}, 4.0),
        ({"read_bytes": 40, "written_bytes": 40}, 1.0),
        ({"read_bytes": 140, "written_bytes": 40}, 2.0),
        ({"read_bytes": 40, "written_bytes": 90}, 2.0),
        ({"flops": 300, "flops_per_s": 100}, 3.0),
        ({"read_bytes": 100, "flops": 300, "flops_per_s": 100}, 3.0),
        ({}, 0.0),
    ],
)
def test_attainable(work, seconds):
    assert attainable_s(BANDWIDTH, **work) == pytest.approx(seconds)


def test_percent():
    assert percent(1.0, 4.0) == 25.0
