"""`pytest benchmarks/`: each implementation and peer of each case as one pytest-benchmark entry, grouped by case.

A file bench_*.py has a `BENCH` and a test that asks for `contestant`. pytest-benchmark times one after the other;
`llmsys bench ops` interleaves them, and its ratios are the ones to quote.
"""

from functools import lru_cache

import pytest

from benchmarks.contest import rotating


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")


def pytest_generate_tests(metafunc):
    if "contestant" in metafunc.fixturenames:
        bench = metafunc.module.BENCH
        entries = [(bench, case, name) for case in bench.plan for name in bench.names]
        metafunc.parametrize("contestant", entries, indirect=True, ids=[f"{case} {name}" for _, case, name in entries])


@lru_cache(maxsize=1)
def contests(contests_of, case):
    """The contests of one case, whose buffers are kept until another case is asked for."""
    return list(contests_of(case, "cpu"))


@pytest.fixture
def contestant(request, benchmark):
    bench, case, name = request.param
    benchmark.group = f"{bench.op} {case}"
    for contest in contests(bench.contests, case):
        entrant = {**contest.peers, **contest.implementations}.get(name)
        if name in contest.wrong:
            pytest.fail(f"{name} {entrant}")
        if isinstance(entrant, str):
            pytest.skip(f"{name}: {entrant}")
        if entrant is not None:
            return rotating(entrant, contest.num_sets)
    pytest.skip(f"{name}: not in this case")
