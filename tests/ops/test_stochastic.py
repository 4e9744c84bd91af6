"""Stochastic rounding of bfloat16 parameters, by the optimizers' ops."""

import math
from types import SimpleNamespace

import pytest
import torch

from llmsys import ops
from llmsys.ops._op import get
from llmsys.ops._philox import random_words
from llmsys.ops._stochastic import UNIT, first_elements, rounded
from llmsys.ops.adamw import cases as adamw_cases
from llmsys.ops.lion import cases as lion_cases
from llmsys.ops.sgd import cases as sgd_cases
from tests import harness
from tests.harness import runners
from tests.ops.list_ops import assert_same_bits, call, copied

# Settings under which p - update is one sum, so that every implementation has the same p to round.
EXACT = {
    "adamw": {"lr": 2**-12, "beta1": 0.0, "beta2": 0.0, "eps": 0.0, "weight_decay": 0.0},
    "lion": {"lr": 2**-12, "beta1": 0.0, "weight_decay": 0.0},
    "sgd": {"lr": 2**-5, "momentum": 0.0, "weight_decay": 0.0},
}
CASES = {"adamw": adamw_cases, "lion": lion_cases, "sgd": sgd_cases}
SEED = 0x0123_4567_89AB_CDEF
BOTH = [(name, runner) for name in EXACT for runner in runners(get(name)) if runner.implementation != "cuda_simt"]


def exact_inputs(name, shape, device="cpu", **options):
    """The op's arguments in bfloat16, with gradients of ±2⁻⁷."""
    args = CASES[name].inputs(shape, torch.bfloat16, device, **EXACT[name], **options)
    for grad in args[1]:
        grad.copy_(grad.sign() * 2**-7)
    return args


@pytest.fixture(params=BOTH, ids=lambda both: f"{both[0]}-{both[1].name}")
def chosen(request):
    name, runner = request.param
    args = exact_inputs(name, (1,), runner.device, stochastic_rounding=SEED)
    if why_not := runner.why_not or get(name).implementations[runner.implementation].reason(runner.device, args):
        pytest.skip(why_not)
    with runner.selected():
        yield SimpleNamespace(name=name, op=get(name), runner=runner)


# ---- the rounding ----


@pytest.mark.parametrize(
    "number", [1 + 2**-9, -1 - 2**-20, 3.0e-38, 5e-40, 0.1, -777.7, 2.0, 0.0], ids=lambda number: f"{number:g}"
)
def test_the_mean_is_the_number(number):
    """Of a quarter of a million draws, within five standard deviations; each is one of the two neighbours."""
    value = torch.full((2**18,), number)
    drawn = rounded(value, SEED, 0)
    below, above = torch.tensor(number).view(torch.int32) & -0x10000, 0
    below, above = below.view(torch.float32).item(), (below + 0x10000).view(torch.float32).item()
    exact = value[0].item()
    assert ((drawn == below) | (drawn == above)).all()
    if exact == below:
        assert (drawn == below).all()
        return
    share = (exact - below) / (above - below)
    deviation = math.sqrt(share * (1 - share) / len(drawn))
    assert abs((drawn == above).double().mean().item() - share) < 5 * deviation


def test_what_is_not_finite_stays():
    value = torch.tensor([math.inf, -math.inf, math.nan, -0.0]).repeat(1000)
    value[2::8] = torch.tensor(0x7FFF_FFFF, dtype=torch.int32).view(
        torch.float32
    )  # the NaN that a sum would carry over
    drawn = rounded(value, SEED, 0).view(1000, 4)
    assert (drawn[:, 0] == math.inf).all() and (drawn[:, 1] == -math.inf).all() and drawn[:, 2].isnan().all()
    assert (drawn[:, 3].view(torch.int16) == -0x8000).all()


def test_each_tensor_begins_at_a_multiple_of_64():
    assert UNIT == 64
    assert first_elements([torch.empty(size) for size in (0, 1, 64, 65, 0, 3)]) == [0, 0, 64, 128, 256, 256]


# ---- in the ops ----


def test_bits_are_the_references(chosen):
    """Over vectors, tails, blocks and lists longer than one launch takes; transposed, too."""
    many = (3,) * (1500 if chosen.runner.implementation == "cpu" else 5)
    for shape in ((5000, 1, 0, 63, 64, 65, 4096), many):
        args = exact_inputs(chosen.name, shape, chosen.runner.device, stochastic_rounding=SEED)
        expected, nearest = copied(args), (*copied(args)[:-1], None)
        chosen.op.implementations["reference"].forward(*expected)
        call(chosen.op, chosen.runner, args)
        call(chosen.op, chosen.runner, nearest)
        assert_same_bits(args[:1], expected[:1])
        assert_same_bits(args[1:], nearest[1:])  # all but the params


def test_words_are_in_row_major_order(chosen):
    args = exact_inputs(chosen.name, (66, 300), chosen.runner.device, stochastic_rounding=SEED)
    args = tuple([t.view(-1, 6) for t in arg] if isinstance(arg, list) else arg for arg in args)
    expected = copied(args)
    call(chosen.op, chosen.runner, expected)
    for layout in (harness.transposed, harness.gapped):
        strided = tuple([layout(t.clone()) for t in arg] if isinstance(arg, list) else arg for arg in args)
        call(chosen.op, chosen.runner, strided)
        assert_same_bits(strided, expected)


def test_the_word_of_each_element(chosen):
    """p is rounded away from 0 where the upper half of its word carries over, and nowhere else."""
    args = exact_inputs(chosen.name, (100, 40), chosen.runner.device, stochastic_rounding=SEED)
    before = copied(args)[0]
    call(chosen.op, chosen.runner, args)
    step = 2**-12  # of every parameter, see EXACT
    for param, old, grad, first in zip(args[0], before, args[1], first_elements(before), strict=True):
        exact = (old.float() - step * grad.sign().float()).view(torch.int32).cpu()
        words = random_words(SEED, first, len(old)) >> 16
        moved = ((exact.long() & 0xFFFF) + words >= 0x10000).int()
        assert torch.equal(param.cpu().view(torch.int16).int(), (exact >> 16) + moved)


def test_steps_too_small_for_the_nearest_add_up(chosen):
    """A hundred steps of 2⁻¹² each, from 1: nearest stays there, stochastic goes down by 100 · 2⁻¹² in the mean."""
    size, steps = (4096 if chosen.runner.implementation == "cpu" else 1024), 100
    for seed in (None, 5):
        args = exact_inputs(chosen.name, (size,), chosen.runner.device, stochastic_rounding=seed)
        args[0][0].fill_(1.0)
        args[1][0].fill_(2**-7)
        for step in range(steps):
            call(chosen.op, chosen.runner, (*args[:-1], seed and seed + step))
        moved = 1 - args[0][0].double().mean().item()
        if seed is None:
            assert moved == 0
        else:  # below 1 bfloat16 are 2⁻⁸ apart: a step goes down by one with probability 2⁻⁴
            deviation = 2**-8 * math.sqrt(steps * 2**-4 / size)
            assert abs(moved - steps * 2**-12) < 5 * deviation


def test_another_seed_gives_other_numbers(chosen):
    first, second = (
        exact_inputs(chosen.name, (500,), chosen.runner.device, stochastic_rounding=s) for s in (1, 1 + 2**32)
    )
    call(chosen.op, chosen.runner, first)
    call(chosen.op, chosen.runner, second)
    assert 0.02 < (first[0][0] != second[0][0]).double().mean().item() < 0.5


# ---- errors ----


def public(name, params, masters=(), **settings):
    grads, states = [p.clone() for p in params], [[p.float() for p in params] for _ in range(2)]
    if name == "adamw":
        common = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.0, "step": 1}
        ops.adamw(params, grads, *states, masters, **common, **settings)
    elif name == "lion":
        ops.lion(params, grads, states[0], masters, lr=0.1, **settings)
    else:
        ops.sgd(params, grads, masters=masters, lr=0.1, **settings)


@pytest.mark.parametrize("name", EXACT)
def test_refuses(name):
    param = torch.ones(3, dtype=torch.bfloat16)
    with pytest.raises(
        TypeError, match=f"llmsys.{name}: params.0. is torch.float16 with stochastic_rounding, expected"
    ):
        public(name, [param.half()], stochastic_rounding=1)
    with pytest.raises(
        ValueError, match=f"llmsys.{name}: 1 masters with stochastic_rounding, expected one or the other"
    ):
        public(name, [param], [param.float()], stochastic_rounding=1)
    with pytest.raises(
        ValueError, match=f"llmsys.{name}: stochastic_rounding is -9223372036854775809, expected a seed"
    ):
        public(name, [param], stochastic_rounding=-(2**63) - 1)
    public(name, [param], stochastic_rounding=2**64 - 1)


def test_cuda_says_that_it_rounds_to_nearest():
    args = exact_inputs("adamw", (5,), stochastic_rounding=SEED)
    assert ops.explain("adamw", *args).chosen == "cpu"
    cuda = get("adamw").implementations["cuda"]
    assert cuda.why_not(*args) == "no stochastic rounding in the CUDA kernel"
    assert cuda.why_not(*args[:-1], None) != "no stochastic rounding in the CUDA kernel"
