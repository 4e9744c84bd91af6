"""`llmsys.linear_cross_entropy` against PyTorch's own, the formula, and the matrix products that it cannot do without.

A shape is (rows, width, classes). "its GEMMs" are PyTorch's, into outputs that exist: one for the loss, three with its
gradients.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

import llmsys
from benchmarks.bars import Bar
from benchmarks.contest import Bench, Case, Contest
from benchmarks.gate import tensors
from benchmarks.peers import Peer, torch_peers
from llmsys.ops._cases import random
from llmsys.ops._verify import judge
from llmsys.ops.linear_cross_entropy import cases

NAME, GEMMS = "linear_cross_entropy", "its GEMMs"
SMALL, LARGE = (1024, 768, 32000), (2048, 2048, 32000)
TRAINS = "forward+backward"
BARS = (
    Bar(NAME, Case("public", "forward", SMALL), "times", 0.833, GEMMS),  # at most 1.2 times its one GEMM
    Bar(NAME, Case("public", TRAINS, SMALL), "times", 0.833, GEMMS),  # 1.2 times its three
    Bar(NAME, Case("public", TRAINS, LARGE), "times", 0.926, GEMMS),  # 1.08 times
)


def formula(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), target)


PEERS = (*torch_peers(formula), Peer("F.linear_cross_entropy", lambda: F.linear_cross_entropy))


def why_not(peer: Peer, device: str) -> str | None:
    if peer.name == f"F.{NAME}" and not hasattr(F, NAME):
        return f"this PyTorch has no {NAME}"
    return peer.why_not(device)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and targets: logits of deviation 1."""
    rows, width, classes = shape
    x, weight, drawn = random(0, device, ((rows, width), dtype), ((classes, width), dtype), ((rows,), torch.float64))
    return x, weight * width**-0.5, drawn.mul(1e6).long() % classes


def outcome(function: Callable, trains: bool, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The loss, or the gradients of x and of the weight."""
    loss = function(*args)
    return torch.autograd.grad(loss, args[:2]) if trains else (loss,)


@cache
def fault_of(width: int, classes: int, dtype: str, device: str) -> str | None:
    """None when loss and gradients are right by the rule of the tests, of rows that make several chunks."""
    args = inputs((256, width, classes), getattr(torch, dtype), device)
    wide = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in args)
    verdicts = []
    for trains, names in ((False, ("loss",)), (True, ("dinput", "dlinear_weight"))):
        calls = ((llmsys.linear_cross_entropy, args), (formula, args), (formula, wide))
        found = [outcome(call, trains, leaves(given, trains)) for call, given in calls]
        verdicts += [judge(name, [triple]) for name, triple in zip(names, zip(*found, strict=True), strict=True)]
    return "; ".join(str(verdict) for verdict in verdicts if not verdict.right) or None


def leaves(args: tuple[Tensor, Tensor, Tensor], trains: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, target = (tensor.detach() for tensor in args)
    return x.requires_grad_(trains), weight.requires_grad_(trains), target


def gemms(trains: bool, x: Tensor, weight: Tensor) -> Callable[[int], object]:
    """PyTorch's products, and nothing else."""
    logits = torch.mm(x, weight.T)
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)

    def run(index: int) -> None:
        torch.mm(x, weight.T, out=logits)
        if trains:
            torch.mm(logits, weight, out=dx)
            torch.mm(logits.T, x, out=dweight)

    return run


def contest(case: Case, device: str) -> Contest:
    """On one set of buffers: the weight alone is larger than most caches."""
    (_, width, classes), trains = case.shape, case.direction == TRAINS
    args = leaves(inputs(case.shape, getattr(torch, case.dtype), device), trains)
    moved, flops = cases.traffic(case.direction, *args), cases.flops(case.direction, *args)
    entered = Contest(NAME, case, bytes=moved, flops=flops, sets=[args])
    timed = lambda function: partial(lambda function, index: outcome(function, trains, args), function)  # noqa: E731
    entered.enter("chunked", timed(llmsys.linear_cross_entropy), fault_of(width, classes, case.dtype, device))
    torch.compiler.reset()
    for peer in PEERS:
        entered.peers[peer.name] = why_not(peer, device) or timed(peer.build())
    entered.peers[GEMMS] = gemms(trains, *(tensor.detach() for tensor in tensors(args)[:2]))
    return entered


BENCH = Bench(
    op=NAME,
    plan=[Case("public", direction, shape) for shape in (SMALL, LARGE) for direction in ("forward", TRAINS)],
    contests=lambda case, device: [contest(case, device)],
    names=["chunked", *(peer.name for peer in PEERS), GEMMS],
    bars=BARS,
)


def test_linear_cross_entropy(benchmark, contestant):
    benchmark(contestant)
