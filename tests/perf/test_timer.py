import time

import pytest

from llmsys.perf import timer


def test_every_round_calls_each_candidate_once_and_buffers_rotate():
    calls = []
    candidates = {name: lambda index, name=name: (calls.append((name, index)), time.sleep(2e-3)) for name in "abc"}
    timings = timer.time_interleaved(candidates, num_sets=4, rounds=6, warmup=0, budget_s=60)
    assert [index for _, index in calls] == [turn % 4 for turn in range(len(calls))]
    timed = [name for name, _ in calls[3:]]  # one warm-up call of each comes before
    rounds = [timed[i : i + 3] for i in range(0, len(timed), 3)]
    assert [sorted(names) for names in rounds] == [["a", "b", "c"]] * 6
    assert {names[0] for names in rounds} == {"a", "b", "c"}, "no candidate is always first"
    assert all(len(timings[name].samples_s) == 6 for name in "abc")


def test_short_calls_are_repeated_within_a_sample():
    count = 0

    def short(index):
        nonlocal count
        count += 1

    timer.time_interleaved({"short": short}, rounds=2, warmup=0)
    assert count > 2 * 10, "a call far below 1 ms is repeated many times per sample"


def test_median_and_quartiles():
    timing = timer.Timing((5.0, 1.0, 3.0, 2.0, 4.0))
    assert (timing.median_s, timing.quartiles_s) == (3.0, (2.0, 4.0))
    assert timer.Timing((7.0,)).quartiles_s == (7.0, 7.0)


def test_budget_stops_after_min_rounds():
    timings = timer.time_interleaved({"slow": lambda index: time.sleep(0.002)}, rounds=1000, min_rounds=3, budget_s=0)
    assert len(timings["slow"].samples_s) == 3


def test_sets_span_three_last_level_caches():
    cache = timer.last_level_cache_bytes()
    assert cache >= 1 << 20
    for set_bytes in (1 << 16, cache, 7 * cache):
        sets = timer.sets_for_cold_caches(set_bytes)
        assert sets * set_bytes >= 3 * cache
        assert sets == 1 or (sets - 1) * set_bytes < 3 * cache


@pytest.mark.parametrize("text, expected", [("32768K\n", 32 << 20), ("1M", 1 << 20), ("512", 512)])
def test_cache_size_text(text, expected):
    assert timer._size_bytes(text) == expected


@pytest.mark.parametrize("options", [{"rounds": 0}, {"num_sets": 0}, {"warmup": -1}])
def test_bad_counts(options):
    with pytest.raises(ValueError, match="expected counts of at least 1"):
        timer.time_interleaved({"a": lambda index: None}, **options)


def test_no_calls():
    with pytest.raises(ValueError, match="no calls"):
        timer.time_interleaved({})
