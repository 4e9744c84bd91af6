"""Times of several callables, taken in interleaved rounds over rotating buffers.

Two callables timed one after the other see two different machines: clocks, neighbours and page caches drift. Here every
round calls each of them once, in an order that shifts from round to round, so the drift falls on all alike.
A callable takes the index of the buffer set it must work on; with `num_sets` from `sets_for_cold_caches`, a set has
left the caches by the time its turn comes again.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

Timed = Callable[[int], object]
Name = TypeVar("Name", bound=Hashable)

MIN_SAMPLE_NS = 1_000_000  # short calls in a row, as a model makes them: what ran before has left the caches by then


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over several rounds."""

    samples_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.samples_s)

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """First and third quartile."""
        if len(self.samples_s) == 1:
            return self.samples_s[0], self.samples_s[0]
        first, _, third = statistics.quantiles(self.samples_s, n=4, method="inclusive")
        return first, third


def time_interleaved(
    calls: Mapping[Name, Timed],
    *,
    num_sets: int = 1,
    device: torch.device | str = "cpu",
    rounds: int = 50,
    min_rounds: int = 5,
    warmup: int = 2,
    budget_s: float = 4.0,
) -> dict[Name, Timing]:
    """Time every callable in `calls` once per round; each call gets the next buffer set in rotation.

    Stops after `rounds` rounds, or once `budget_s` seconds are spent and `min_rounds` are done. Calls shorter than
    1 ms are repeated within one sample. On CUDA, events around the calls; on the CPU, the monotonic clock.

    Errors     ValueError if calls is empty, or a count is below 1
    """
    if not calls:
        raise ValueError("llmsys.perf.time_interleaved: no calls, expected at least one callable to time")
    if min(num_sets, rounds, min_rounds) < 1 or warmup < 0:
        raise ValueError(
            f"llmsys.perf.time_interleaved: num_sets={num_sets}, rounds={rounds}, min_rounds={min_rounds}, "
            f"warmup={warmup}, expected counts of at least 1 (warmup: 0)"
        )
    sample_s = _sample_cuda_s if torch.device(device).type == "cuda" else _sample_cpu_s
    turn = 0

    def sample(call: Timed, repeats: int) -> float:
        nonlocal turn
        indices = [(turn + i) % num_sets for i in range(repeats)]
        turn += repeats
        return sample_s(call, indices)

    repeats = {}
    for name, call in calls.items():
        quickest_s = min(sample(call, 1) for _ in range(warmup + 1))
        repeats[name] = max(1, -(-MIN_SAMPLE_NS // max(1, int(quickest_s * 1e9))))
    names = list(calls)
    samples: dict[Name, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for done in range(rounds):
        if done >= min_rounds and time.perf_counter() - started > budget_s:
            break
        shift = done % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(sample(calls[name], repeats[name]))
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def sets_for_cold_caches(set_bytes: int, device: torch.device | str = "cpu") -> int:
    """How many buffer sets of `set_bytes` span three times the last-level cache."""
    return max(1, -(-3 * last_level_cache_bytes(device) // max(1, set_bytes)))


def last_level_cache_bytes(device: torch.device | str = "cpu") -> int:
    """Size of the largest cache: the GPU's L2, or the CPU's highest level as Linux reports it (else 32 MiB)."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((_size_bytes(path.read_text()) for path in sizes), default=32 << 20)


def _size_bytes(text: str) -> int:
    """`32768K` as bytes."""
    text = text.strip()
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1], 1)
    return int(text.rstrip("KMG")) * unit


def _sample_cpu_s(call: Timed, indices: list[int]) -> float:
    start = time.perf_counter_ns()
    for index in indices:
        call(index)
    return (time.perf_counter_ns() - start) / len(indices) * 1e-9


def _sample_cuda_s(call: Timed, indices: list[int]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for index in indices:
        call(index)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / len(indices) * 1e-3
