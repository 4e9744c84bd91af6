"""AdamW with 8-bit states over 33.6 million parameters, against float32 states and against the same in PyTorch's ops.

Beside the op runs `adamw`, with float32 moments, on as many parameters of the same dtype. The reference takes seconds.

Why float32 states win on a Zen 4, whose two cores reach 70 GB/s: 16 elements take `adamw` 30 cycles, and here 60 vector
instructions, of which that machine starts two a cycle, and of shifts, shuffles, divisions and roots fewer still.
"""

from functools import partial

import torch

import llmsys.optim
from benchmarks.bars import Bar
from benchmarks.contest import Bench, Case, Contest
from benchmarks.optimizers import step_contest, without_sets
from llmsys.ops.adamw import OP as ADAMW, cases as adamw_cases
from llmsys.ops.adamw_8bit import OP, cases

OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
PARAMETERS = (1 << 22, 1 << 11) * 8  # 33.6 million in 16 tensors
WIDE = "float32 states"
DTYPES = ("bfloat16", "float32")
BARS = tuple(
    Bar("adamw_8bit", Case("ready", "step", PARAMETERS, dtype), "times", times, than)
    for dtype in DTYPES
    for times, than in ((1.3, WIDE), (10, "reference"))
)


def contests(case: Case, device: str) -> list[Contest]:
    contest = step_contest(OP, cases, llmsys.optim.AdamW8bit, OPTIONS, (), case, device)
    wide = adamw_cases.inputs(case.shape, getattr(torch, case.dtype), device)
    contest.peers[WIDE] = without_sets(partial(ADAMW, *wide))
    return [contest]


BENCH = Bench(
    op="adamw_8bit",
    plan=[Case("ready", "step", shape, dtype) for shape in cases.LARGE for dtype in DTYPES],
    contests=contests,
    names=[*OP.implementations, WIDE],
    bars=BARS,
)


def test_adamw_8bit(benchmark, contestant):
    benchmark(contestant)
