"""Splitting a row of blocks over pipeline stages by cost."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate


def balanced(costs: Sequence[float], stages: int) -> list[range]:
    """The contiguous runs of blocks, one for each stage and none empty, whose largest sum is least.

    costs    of each block in order, in any unit, at least 0

    Errors   ValueError for fewer blocks than stages, no stage, a cost below 0
    """
    if not 1 <= stages <= len(costs):
        raise ValueError(
            f"llmsys.parallel.balanced: {len(costs)} blocks for {stages} stages, expected 1 to {len(costs)}"
        )
    for block, cost in enumerate(costs):
        if not cost >= 0:
            raise ValueError(f"llmsys.parallel.balanced: cost {cost} of block {block}, expected at least 0")
    until = [0, *accumulate(costs)]  # the cost of the first i blocks
    best = [0.0] + [float("inf")] * len(costs)  # over the stages so far: the largest sum of the first i blocks
    cuts = []  # by stage and i: where the last of those stages begins
    for stage in range(1, stages + 1):
        before, best, cut = best, [float("inf")] * len(until), [0] * len(until)
        for i in range(stage, len(until)):
            # `before` grows and the last run shrinks as the run begins later: the least is where they cross.
            cross = bisect_left(range(i), True, lo=stage - 1, key=lambda j: before[j] >= until[i] - until[j])
            best[i], cut[i] = min(
                (max(before[j], until[i] - until[j]), j) for j in (cross - 1, cross) if stage - 1 <= j < i
            )
        cuts.append(cut)
    runs, stop = [], len(costs)
    for cut in reversed(cuts):
        runs.append(range(cut[stop], stop))
        stop = cut[stop]
    return runs[::-1]
