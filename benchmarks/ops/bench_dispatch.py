"""What a call costs before any work is done: the public function on 16×64, against the raw binding and PyTorch.

Overhead is the time over "raw binding", the native kernel called with addresses into an output that exists.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

import llmsys
from benchmarks.bars import Bar, warm
from benchmarks.contest import Bench, Case, Contest
from benchmarks.gate import fault_of
from llmsys import _C
from llmsys.ops._native import DTYPES
from llmsys.ops.rms_norm import OP, cases

EPS = 1e-6
BARS = (
    Bar("dispatch", warm((16, 64)), "extra_us", 5, "raw binding", "no autograd"),
    Bar("dispatch", warm((16, 64)), "extra_us", 10, "raw binding", "autograd"),
)
WAYS = ("no autograd", "autograd", "torch.compile", "torch.compile, autograd")


def contest(way: str, case: Case, device: str) -> Contest:
    """`llmsys.rms_norm` called in one way, and PyTorch's own function called in the same way."""
    x, weight, *_ = cases.inputs(case.shape, getattr(torch, case.dtype), device=device)
    raw = raw_call(x, weight, torch.empty_like(x)) if device == "cpu" else "measured on the CPU only"
    for tensor in (x, weight):
        tensor.requires_grad_(way.endswith("autograd") and way != "no autograd")
    ours: Callable = llmsys.rms_norm
    theirs: Callable = F.rms_norm
    if "torch.compile" in way:
        torch.compiler.reset()
        ours = torch.compile(lambda x, weight: llmsys.rms_norm(x, weight), fullgraph=True)
        theirs = torch.compile(lambda x, shape, weight, eps: F.rms_norm(x, shape, weight, eps), fullgraph=True)
    peers = {"raw binding": raw, "F.rms_norm": lambda index: theirs(x, weight.shape, weight, EPS)}
    entered = Contest("dispatch", case, peers=peers)
    chosen = str(OP.explain(x, weight).chosen)
    entered.enter(way, lambda index: ours(x, weight), fault_of(OP, cases, chosen, case.shape, case.dtype, device))
    return entered


def raw_call(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> Callable[[int], object]:
    """The native kernel with its arguments ready; csrc/rms_norm.h names them."""
    rstd = torch.empty(x.shape[:-1])
    (rows, dim), dtype = x.shape, DTYPES[x.dtype]
    addresses = (x.data_ptr(), 0, weight.data_ptr(), 0, y.data_ptr(), rstd.data_ptr())
    stream = 0
    strides = (1, 0, dim, 0, 0)
    arguments = (stream, *addresses, rows, dim, *strides, EPS, 0.0, dtype, dtype)
    kernel = _C.cpu.rms_norm_forward
    kept_alive = (x, weight, y, rstd)
    return lambda index, kept_alive=kept_alive: kernel(*arguments)


BENCH = Bench(
    op="dispatch",
    plan=[warm((16, 64))],
    contests=lambda case, device: (contest(way, case, device) for way in WAYS),
    names=[*WAYS, "raw binding", "F.rms_norm"],
    bars=BARS,
)


def test_dispatch(benchmark, contestant):
    benchmark(contestant)
