"""llmsys.optim.AdamW beside torch.optim.AdamW. Long because every option, state dict and error has its test here."""

import copy
import pickle

import pytest
import torch

from llmsys.ops._cases import random
from llmsys.optim import AdamW, clip_grad_norm
from llmsys.optim._list_optimizer import seed_of
from tests.optim.training import give_gradients, model, state_of, train

EPS = 2**-24  # half the distance from 1 to the next float32


def assert_close(ours: torch.nn.Module, theirs: torch.nn.Module, *, lr: float, steps: int) -> None:
    """Each step rounds the parameter in each of decay, update and sum (3 roundings), and the update, below 10 lr once
    the moments have begun, in about ten operations; both sides may.
    """
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        allowed = 2 * steps * EPS * (3 * b.abs().max() + 100 * lr)
        assert (a - b).abs().max() <= allowed


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lr": 0.05, "weight_decay": 0.3},
        {"maximize": True, "betas": (0.8, 0.99)},
        {"betas": (0.0, 0.9), "eps": 1e-4},
        {"weight_decay": 0},
    ],
    ids=str,
)
def test_twenty_steps_as_torch(settings):
    ours, theirs = model(), model()
    train(ours, AdamW(ours.parameters(), **settings), range(20))
    train(theirs, torch.optim.AdamW(theirs.parameters(), **settings), range(20))
    assert_close(ours, theirs, lr=settings.get("lr", 1e-3), steps=20)
    assert any((a != b).any() for a, b in zip(ours.parameters(), model().parameters(), strict=True))


def test_groups_with_their_own_settings_and_steps():
    def groups(net):
        return [
            {"params": net[0].parameters(), "lr": 0.1, "weight_decay": 0.0},
            {"params": [net[2].weight], "betas": (0.5, 0.5)},
        ]

    ours, theirs = model(), model()
    a, b = AdamW(groups(ours), lr=0.01), torch.optim.AdamW(groups(theirs), lr=0.01)
    for net, optimizer in ((ours, a), (theirs, b)):
        train(net, optimizer, range(3))
        optimizer.add_param_group({"params": [net[2].bias], "lr": 0.2})
        train(net, optimizer, range(3, 6))
        net[0].weight.grad = None  # a parameter that sits out a step keeps its own count
        optimizer.step()
        train(net, optimizer, range(6, 8))
    assert_close(ours, theirs, lr=0.2, steps=9)
    assert [state["step"] for state in a.state.values()] == [int(state["step"]) for state in b.state.values()]


def test_scheduler_closure_tensor_lr_and_zero_grad():
    ours, theirs = model(), model()
    x, results = random(0, "cpu", ((4, 9), torch.float32))[0], []
    for net, kind in ((ours, AdamW), (theirs, torch.optim.AdamW)):
        optimizer = kind(net.parameters(), lr=torch.tensor(0.01))
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

        def closure(net=net, optimizer=optimizer):
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            return loss

        for _ in range(5):
            loss = optimizer.step(closure)
            scheduler.step()
        results.append(loss.detach())
    torch.testing.assert_close(*results)
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=1e-4, atol=1e-6)


# ---- state dicts ----


@pytest.mark.parametrize(("first", "second"), [(AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW)])
def test_state_dict_continues_in_the_other(first, second):
    """Ten steps in one, ten in the other, are twenty steps."""
    net, whole = model(), model()
    settings = {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.2}
    before = first(net.parameters(), **settings)
    train(net, before, range(10))
    after = second(net.parameters())
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert after.param_groups[0]["lr"] == 0.02 and after.param_groups[0]["betas"] == (0.8, 0.95)
    train(net, after, range(10, 20))
    train(whole, torch.optim.AdamW(whole.parameters(), **settings), range(20))
    assert_close(net, whole, lr=0.02, steps=20)


def test_state_dict_looks_like_torchs():
    ours, theirs = model(), model()
    a, b = AdamW(ours.parameters()), torch.optim.AdamW(theirs.parameters())
    for net, optimizer in ((ours, a), (theirs, b)):
        train(net, optimizer, range(2))
    a, b = a.state_dict(), b.state_dict()
    assert a["state"].keys() == b["state"].keys()
    for key, theirs in b["state"].items():
        ours = a["state"][key]
        assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
        assert ours["step"] == theirs["step"] == 2
    assert b["param_groups"][0].keys() - a["param_groups"][0].keys() == {"decoupled_weight_decay"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_own_state_dict_pickle_and_deepcopy_continue_exactly(dtype):
    net = model(dtype)
    optimizer = AdamW(net.parameters(), lr=0.01)
    train(net, optimizer, range(3))
    weights, saved, pickled = (
        copy.deepcopy(net.state_dict()),
        copy.deepcopy(optimizer.state_dict()),
        pickle.dumps((net, optimizer)),
    )
    train(net, optimizer, range(3, 6))

    other = model(dtype)
    other.load_state_dict(weights)
    loaded = AdamW(other.parameters())
    loaded.load_state_dict(saved)
    train(other, loaded, range(3, 6))
    unpickled, its_optimizer = pickle.loads(pickled)
    train(unpickled, its_optimizer, range(3, 6))
    for resumed, its in ((other, loaded), (unpickled, its_optimizer)):
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), resumed.parameters(), strict=True))
        for name in ("exp_avg", "exp_avg_sq"):
            assert all(torch.equal(a, b) for a, b in zip(state_of(optimizer, name), state_of(its, name), strict=True))


def test_load_hooks_are_heard():
    net = model()
    optimizer = AdamW(net.parameters())
    train(net, optimizer, range(2))
    loaded = AdamW(net.parameters())

    def halve(_, state_dict):
        state = {k: {**v, "exp_avg": v["exp_avg"] / 2} for k, v in state_dict["state"].items()}
        return {**state_dict, "state": state}

    loaded.register_load_state_dict_pre_hook(halve)
    loaded.load_state_dict(optimizer.state_dict())
    for a, b in zip(state_of(optimizer, "exp_avg"), state_of(loaded, "exp_avg"), strict=True):
        assert torch.equal(a / 2, b)


def test_refuses_what_is_not_adamws_state():
    net = model()
    sgd = torch.optim.SGD(net.parameters(), momentum=0.9)
    train(net, sgd, range(1))
    saved = sgd.state_dict()
    saved["param_groups"][0].update(AdamW(net.parameters()).state_dict()["param_groups"][0])
    with pytest.raises(
        ValueError, match=r"state has \['momentum_buffer'\], expected \['exp_avg', 'exp_avg_sq', 'step'"
    ):
        AdamW(net.parameters()).load_state_dict(saved)
    good = AdamW(net.parameters())
    train(net, good, range(1))
    saved = good.state_dict()
    saved["state"][0] = {**saved["state"][0], "exp_avg": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"exp_avg has shape \(3,\), expected \(33, 9\)"):
        AdamW(net.parameters()).load_state_dict(saved)
    amsgrad = torch.optim.AdamW(net.parameters(), amsgrad=True).state_dict()
    with pytest.raises(ValueError, match="amsgrad is True, expected False"):
        AdamW(net.parameters()).load_state_dict(amsgrad)


# ---- masters ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masters_follow_a_float32_model(dtype):
    """The masters are the weights of a float32 model given the same gradients; the parameters are their rounding."""
    net, wide = model(dtype), model(dtype).float()
    optimizer = AdamW(net.parameters(), lr=1e-3)
    wide_optimizer = AdamW(wide.parameters(), lr=1e-3)
    for step in range(20):
        give_gradients(net, step)
        for narrow, param in zip(net.parameters(), wide.parameters(), strict=True):
            param.grad = narrow.grad.float()
        optimizer.step()
        wide_optimizer.step()
    for param, expected in zip(net.parameters(), wide.parameters(), strict=True):
        master = optimizer.state[param]["master"]
        assert master.dtype == torch.float32 and torch.equal(master, expected)
        assert torch.equal(param, master.to(dtype))


def test_masters_are_for_16_bit_parameters_that_want_them():
    for dtype, wanted, expected in (
        (torch.float32, True, False),
        (torch.bfloat16, True, True),
        (torch.half, False, False),
    ):
        net = model(dtype)
        optimizer = AdamW(net.parameters(), master_weights=wanted)
        train(net, optimizer, range(1))
        for state in optimizer.state.values():
            assert ("master" in state) == expected and state["exp_avg"].dtype == torch.float32


def test_masters_through_state_dicts():
    net = model(torch.bfloat16)
    optimizer = AdamW(net.parameters())
    train(net, optimizer, range(3))
    masters, saved = copy.deepcopy(state_of(optimizer, "master")), copy.deepcopy(optimizer.state_dict())

    own = AdamW(net.parameters())
    own.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(state_of(own, "master"), masters, strict=True))

    # torch steps without knowing of masters; what comes back from it must not bring the old ones.
    torchs = torch.optim.AdamW(net.parameters())
    torchs.load_state_dict(saved)
    train(net, torchs, range(3, 5))
    back = AdamW(net.parameters())
    back.load_state_dict(torchs.state_dict())
    assert all("master" not in state and state["exp_avg"].dtype == torch.float32 for state in back.state.values())
    before = [param.detach().clone() for param in net.parameters()]
    for group in back.param_groups:
        group["lr"] = 0.0
    train(net, back, range(5, 6))
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert all(torch.equal(a.float(), b) for a, b in zip(before, state_of(back, "master"), strict=True))


# ---- stochastic rounding ----


def test_stochastic_rounding_keeps_no_masters_and_updates_add_up():
    """Fifty steps of 2⁻¹² from 1, where bfloat16 are 2⁻⁸ apart: lost to the nearest, there in the mean without it."""
    for seed in (None, 3):
        param = torch.nn.Parameter(torch.ones(100, 100, dtype=torch.bfloat16))
        optimizer = AdamW([param], lr=2**-12, weight_decay=0, master_weights=False, stochastic_rounding=seed)
        for _ in range(50):
            param.grad = torch.ones_like(param)
            optimizer.step()
        assert "master" not in optimizer.state[param]
        moved = 1 - param.double().mean().item()
        deviation = 2**-8 * (50 * 2**-4 / 10_000) ** 0.5
        assert moved == 0 if seed is None else abs(moved - 50 * 2**-12) < 5 * deviation


def test_stochastic_rounding_is_for_bfloat16_parameters_alone():
    net = torch.nn.ModuleList([model(dtype) for dtype in (torch.float32, torch.bfloat16, torch.half)])
    optimizer = AdamW(net.parameters(), stochastic_rounding=1)
    train(net, optimizer, range(2))
    for param in net.parameters():
        assert ("master" in optimizer.state[param]) == (param.dtype == torch.half)


def test_stochastic_rounding_repeats_with_its_seed_and_through_state_dicts():
    results = []
    for seed in (1, 1, 2):
        net = model(torch.bfloat16)
        optimizer = AdamW(net.parameters(), stochastic_rounding=seed)
        train(net, optimizer, range(3))
        loaded = AdamW(net.parameters())
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(net, loaded if len(results) == 0 else optimizer, range(3, 6))
        results.append([param.detach() for param in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(*results[1:], strict=True))


def test_each_call_has_words_of_its_own():
    seeds = {seed_of(seed, step, place) for seed in (-1, 0, 1) for step in range(20) for place in range(20)}
    assert len(seeds) == 3 * 20 * 20 and all(0 <= seed < 2**64 for seed in seeds)


# ---- which parameters ----


def test_frozen_tied_and_mixed_parameters():
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4).bfloat16()})
    net.tied = net["a"].weight
    net["a"].bias.requires_grad_(False)
    frozen, before = net["a"].bias.clone(), [param.detach().clone() for param in net.parameters()]
    optimizer = AdamW(net.parameters(), lr=0.1)
    (net["a"](torch.ones(2, 4)).sum() + net["b"](torch.ones(2, 4, dtype=torch.bfloat16)).float().sum()).backward()
    optimizer.step()
    assert torch.equal(net["a"].bias, frozen) and net["a"].bias not in optimizer.state
    assert optimizer.state[net.tied]["step"] == 1
    moved = [(a != b).all().item() for a, b in zip(before, net.parameters(), strict=True)]
    assert moved == [True, False, True, True]


def test_named_parameters():
    net = model()
    optimizer = AdamW(net.named_parameters())
    train(net, optimizer, range(1))
    assert optimizer.state_dict()["param_groups"][0]["param_names"][0] == "0.weight"


def test_transposed_parameters_with_contiguous_gradients():
    ours, theirs = ([torch.nn.Parameter(random(0, "cpu", ((5, 3), torch.float32))[0].T)] for _ in range(2))
    for params, kind in ((ours, AdamW), (theirs, torch.optim.AdamW)):
        optimizer = kind(params, lr=0.1)
        for seed in range(3):
            params[0].grad = random(seed, "cpu", ((3, 5), torch.float32))[0]
            optimizer.step()
    assert ours[0].stride() == (1, 3)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=60 * EPS)


def test_autograd_notices_a_step_between_forward_and_backward():
    weight = torch.nn.Parameter(torch.ones(3))
    loss = weight.square().sum()
    weight.grad = torch.ones(3)
    AdamW([weight]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- clipping ----


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clipping_in_the_step_is_clipping_before_it(max_norm):
    ours, theirs = model(), model()
    a, b = AdamW(ours.parameters(), lr=0.01), torch.optim.AdamW(theirs.parameters(), lr=0.01)
    for step in range(20):
        for net in (ours, theirs):
            give_gradients(net, step)
        norm, grad_scale = clip_grad_norm(ours.parameters(), max_norm)
        before = [param.grad.clone() for param in ours.parameters()]
        a.step(grad_scale=grad_scale)
        assert all(torch.equal(g, p.grad) for g, p in zip(before, ours.parameters(), strict=True))
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        b.step()
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    assert_close(ours, theirs, lr=0.01, steps=20)


def test_clip_of_no_gradients_and_of_one_parameter():
    norm, grad_scale = clip_grad_norm(model().parameters(), 1.0)
    assert norm == 0 and grad_scale == 1
    param = torch.nn.Parameter(torch.zeros(4))
    param.grad = torch.full((4,), 3.0)
    norm, grad_scale = clip_grad_norm(param, 3.0)
    assert norm == 6 and grad_scale == pytest.approx(0.5)
    param.grad[0] = float("nan")
    assert clip_grad_norm(param, 3.0)[1].isnan()


# ---- refusals ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1}, "lr is -1, expected a number >= 0"),
        ({"lr": float("nan")}, "lr is nan, expected a number >= 0"),
        ({"eps": -1e-8}, "eps is -1e-08, expected a number >= 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1, expected a number >= 0"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\), expected two numbers from 0 to below 1"),
        ({"betas": (-0.1, 0.9)}, r"betas are \(-0.1, 0.9\), expected two numbers"),
        ({"betas": (0.9,)}, r"betas are \(0.9,\), expected two numbers"),
        ({"stochastic_rounding": 2**64}, "stochastic_rounding is 18446744073709551616, expected a seed in"),
        ({"amsgrad": True}, "amsgrad is True, expected False; torch.optim.AdamW has it"),
        ({"capturable": True}, "capturable is True, expected False"),
        ({"differentiable": True}, "differentiable is True, expected False"),
    ],
    ids=str,
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match="llmsys.optim.AdamW: " + message):
        AdamW(model().parameters(), **settings)


def test_refuses_parameters():
    with pytest.raises(TypeError, match="parameter 0 of a group is torch.complex64, expected a float dtype"):
        AdamW([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    param = torch.nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="some are the same tensor"):
        AdamW([param, param])
    optimizer = AdamW([param])
    with pytest.raises(ValueError, match="lr is -1"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": -1})
    assert len(optimizer.param_groups) == 1


def test_refuses_sparse_gradients_and_a_scale_with_a_closure():
    table = torch.nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="torch.sparse_coo, expected a dense one"):
        AdamW(table.parameters()).step()
    with pytest.raises(ValueError, match="torch.sparse_coo, expected a dense one"):
        clip_grad_norm(table.parameters(), 1.0)
    with pytest.raises(ValueError, match="closure and grad_scale given, expected one"):
        AdamW(model().parameters()).step(lambda: 0, grad_scale=torch.ones(()))
    with pytest.raises(ValueError, match="max_norm is 0, expected a number > 0"):
        clip_grad_norm(model().parameters(), 0)
