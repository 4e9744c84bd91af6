"""One op with many options, its memory and the engine beneath it, hence the length: all parts share their inputs."""

import inspect

import pytest
import torch
import torch.nn.functional as F

import llmsys
from llmsys import linear_cross_entropy
from llmsys.ops._cases import random
from llmsys.ops._matmul import torch_matmul
from llmsys.ops._verify import judge
from llmsys.ops.cross_entropy.cases import classes_of
from llmsys.ops.linear_cross_entropy import OP, cases, chunked, engine
from tests.harness import DTYPES, checks, same_bits

SURFACE = {
    "linear_cross_entropy": "(input, linear_weight, target, linear_bias=None, *, weight=None, reduction='mean', "
    "ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0, token_weights=None, num_items=None, lora_a=None, "
    "lora_b=None, lora_scale=1.0)"
}
NAMES = ("input", "linear_weight", "linear_bias", "lora_a", "lora_b")


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


def tensors_of(dtype, rows=90, dim=24, classes=700, rank=4, seed=0):
    """A head of logits of deviation 1 or so, and targets."""
    drawn = random(
        seed, "cpu", ((rows, dim), dtype), ((classes, dim), dtype), ((classes,), dtype), ((rank, dim), dtype),
        ((classes, rank), dtype),
    )  # fmt: skip
    scales = (1.0, dim**-0.5, 0.3, dim**-0.5, 0.3)
    tensors = {name: tensor * scale for name, tensor, scale in zip(NAMES, drawn, scales, strict=True)}
    return tensors, classes_of(seed, "cpu", (rows,), classes)


def plain(t, target, *, reduction="mean", token_weights=None, num_items=None, **options):
    """The formula with all logits, in PyTorch's steps."""
    lora_scale = options.pop("lora_scale", 1.0)
    logits = F.linear(t["input"], t["linear_weight"], t.get("linear_bias"))
    if "lora_a" in t:
        logits = logits + lora_scale * F.linear(F.linear(t["input"], t["lora_a"]), t["lora_b"])
    with llmsys.use(cross_entropy="reference"):
        losses = llmsys.cross_entropy(logits, target, reduction="none", **options)
    tokens = torch.ones(target.shape) if token_weights is None else token_weights
    losses = losses * tokens
    if reduction == "none":
        return losses
    weight = options.get("weight")
    counts = (target != options.get("ignore_index", -100)).double()
    counts = counts if weight is None else counts * weight[target.clamp(0)]
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / ((counts * tokens).sum().to(losses.dtype) if num_items is None else num_items)


def results(function, tensors, target, incoming, **options):
    """(name, tensor) of the loss and every gradient."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    loss = function(leaves, target, **options)
    gradients = torch.autograd.grad(loss, list(leaves.values()), incoming.to(loss.dtype))
    return {"loss": loss.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


def ours(tensors, target, **options):
    return linear_cross_entropy(target=target, **tensors, **options)


OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smooth": {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0},
    "weighted": {"weight": torch.linspace(0.1, 2, 700)},
    "tokens": {"token_weights": torch.linspace(0, 2, 90)},
    "tokens_none": {"token_weights": torch.linspace(0, 2, 90), "reduction": "none"},
    "num_items": {"num_items": 1000},
    "ignore_index": {"ignore_index": 3},
    "lora_scale": {"lora_scale": 0.25},
}


@pytest.fixture(params=["one chunk", "chunks of 16"])
def chunks(request, monkeypatch):
    if request.param != "one chunk":
        monkeypatch.setattr(engine, "chunk_rows", lambda rows, row_bytes: 16)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_formula(chunks, dtype, options):
    check_formula(dtype, NAMES, options)


@pytest.mark.parametrize("head", [NAMES[:2], NAMES[:3]], ids=["weight", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_formula_without_lora(dtype, head):
    check_formula(dtype, head, {})


def check_formula(dtype, head, options):
    """By the rule of every op: three times the error of the formula in the same dtype, and a rounding."""
    incoming = torch.linspace(0.5, 1.5, 90) if options.get("reduction") == "none" else torch.tensor(0.75)
    triples = {}
    for seed in range(6):  # so that a sum on which the formula happens to be exact does not set the rule
        tensors, target = tensors_of(dtype, seed=seed)
        tensors = {name: tensors[name] for name in head}
        if "ignore_index" in options:
            target = target.clamp(min=0)
            target[::3] = 3
        found = results(ours, tensors, target, incoming, **options)
        same = results(plain, tensors, target, incoming, **options)
        wide = {name: tensor.double() for name, tensor in tensors.items()}
        truth = results(plain, wide, target, incoming.double(), **options)
        for name, true in truth.items():
            assert found[name].dtype == same[name].dtype
            triples.setdefault(name, []).append((found[name], same[name], true))
    for name, found in triples.items():
        verdict = judge("d" + name, found)
        assert verdict.right, verdict


def test_float64_is_the_formula():
    tensors, target = tensors_of(torch.float64)
    found, truth = (results(f, tensors, target, torch.tensor(0.75), **OPTIONS["smooth"]) for f in (ours, plain))
    for name, true in truth.items():
        torch.testing.assert_close(found[name], true, rtol=1e-11, atol=1e-13)


in_pytorch = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="this PyTorch has no linear_cross_entropy"
)


@in_pytorch
def test_is_pytorchs():
    tensors, target = tensors_of(torch.float32)
    args = tensors["input"], tensors["linear_weight"], target
    for options in ({}, {"reduction": "sum"}, {"weight": torch.rand(700)}, {"label_smoothing": 0.2}):
        expected = F.linear_cross_entropy(*args, linear_bias=tensors["linear_bias"], **options)
        torch.testing.assert_close(linear_cross_entropy(*args, tensors["linear_bias"], **options), expected)


@in_pytorch
def test_begins_as_pytorchs_signature():
    """Positions as there; its further names are names here, but `options`, which is about its own chunks."""
    theirs, mine = (inspect.signature(f).parameters for f in (F.linear_cross_entropy, linear_cross_entropy))
    assert list(mine)[:4] == list(theirs)[:4] and set(theirs) - set(mine) == {"options"}


def test_more_dimensions():
    tensors, target = tensors_of(torch.float32)
    loss = linear_cross_entropy(
        tensors["input"].view(9, 10, -1), tensors["linear_weight"], target.view(9, 10), reduction="none"
    )
    flat = linear_cross_entropy(tensors["input"], tensors["linear_weight"], target, reduction="none")
    assert loss.shape == (9, 10) and same_bits(loss.flatten(), flat)


def test_micro_batches_add_up():
    """With one count for all, the gradients of parts are those of the whole."""
    tensors, target = tensors_of(torch.float32)
    x, w = tensors["input"], tensors["linear_weight"].requires_grad_()
    (whole,) = torch.autograd.grad(linear_cross_entropy(x, w, target), w)
    count = (target != -100).sum()
    for rows in (slice(0, 20), slice(20, 90)):
        linear_cross_entropy(x[rows], w, target[rows], num_items=count).backward()
    torch.testing.assert_close(w.grad, whole)


# ---- what is not needed is not done ----


LOGITS, DINPUT, DWEIGHT = ((90, 24), (24, 700)), ((90, 700), (700, 24)), ((700, 90), (90, 24))


def products(monkeypatch, call):
    """The shapes of the matrices that `call` multiplies, in order."""
    made = []
    spy = lambda a, b, *args, **options: made.append((a.shape, b.shape)) or torch_matmul(a, b, *args, **options)  # noqa: E731
    monkeypatch.setitem(OP.implementations, "cpu", chunked.implementation("cpu", spy))
    with llmsys.use(linear_cross_entropy="cpu"):
        call()
    return made


@pytest.mark.parametrize(
    "needing, expected",
    [
        ((), [LOGITS]),
        (("input",), [LOGITS, DINPUT]),
        (("linear_weight",), [LOGITS, DWEIGHT]),
        (("input", "linear_weight"), [LOGITS, DINPUT, DWEIGHT]),
    ],
)
def test_products_that_nothing_needs(monkeypatch, needing, expected):
    tensors, target = tensors_of(torch.float32)
    args = [tensors[name].requires_grad_(name in needing) for name in NAMES[:2]]
    assert products(monkeypatch, lambda: linear_cross_entropy(*args, target)) == expected


def test_nothing_is_made_without_autograd(monkeypatch):
    tensors, target = tensors_of(torch.float32)
    args = [tensors[name].requires_grad_() for name in NAMES[:2]]
    with torch.no_grad():
        assert products(monkeypatch, lambda: linear_cross_entropy(*args, target)) == [LOGITS]


def test_frozen_head_with_lora(monkeypatch):
    """W is frozen: its gradient, the largest, is not made; those of A and B are."""
    tensors, target = tensors_of(torch.float32)
    leaves = {name: tensor.requires_grad_(name.startswith("lora")) for name, tensor in tensors.items()}
    made = products(monkeypatch, lambda: ours(leaves, target).backward())
    assert LOGITS in made and not {DINPUT, DWEIGHT} & set(made)
    assert [name for name, tensor in leaves.items() if tensor.grad is not None] == ["lora_a", "lora_b"]


def peak_bytes(call):
    """The most that torch's CPU allocator has given out at a time during `call`, beyond what was out before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest, kept


@pytest.mark.parametrize("needing", [(), ("input",), ("input", "linear_weight")], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_memory_is_an_eighth_of_the_logits(dtype, needing):
    """Beside the gradients, which for the weight are summed in float32."""
    rows, dim, classes = 2048, 64, 16384
    tensors, target = tensors_of(dtype, rows, dim, classes)
    x, w = (tensors[name].requires_grad_(name in needing) for name in NAMES[:2])
    logits_bytes = rows * classes * x.element_size()
    gradient_bytes = x.nbytes * ("input" in needing) + w.numel() * 4 * ("linear_weight" in needing)
    highest, _ = peak_bytes(lambda: linear_cross_entropy(x, w, target))
    assert highest - gradient_bytes <= max(logits_bytes // 8, engine.SMALL_BYTES)
    if needing:
        loss = linear_cross_entropy(x, w, target)
        rounded_bytes = w.nbytes * ("linear_weight" in needing and dtype != torch.float32)
        highest, _ = peak_bytes(lambda: loss.backward())
        assert highest <= rounded_bytes + 4096


def test_eager_takes_more():
    """The measure sees what it is for: the logits of the plain formula."""
    tensors, target = tensors_of(torch.float32, 512, 64, 4096)
    highest, _ = peak_bytes(lambda: plain({name: tensors[name] for name in NAMES[:2]}, target))
    assert highest >= 512 * 4096 * 4


# ---- another loss on the same engine ----


class Divergence:
    """KL(teacher ‖ student) of each row, the teacher's logits made chunk by chunk as well."""

    def __init__(self, teacher_input, teacher_weight):
        self.input, self.weight = teacher_input, teacher_weight

    def __call__(self, logits, rows, scale):
        teacher = F.log_softmax(F.linear(self.input[rows], self.weight).float(), -1)
        student = F.log_softmax(logits.float(), -1)
        if scale is not None:
            logits.copy_((student.exp() - teacher.exp()) * scale[:, None])
        return (teacher.exp() * (teacher - student)).sum(-1)


def test_another_loss(chunks):
    tensors, _ = tensors_of(torch.float32)
    other, _ = tensors_of(torch.float32, seed=1)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    scale = torch.linspace(0, 1, 90)
    with torch.no_grad():
        head = engine.Head(torch_matmul, *leaves.values(), 0.5)
        gradients = engine.Gradients(head, [True] * 5, torch.float32)
        losses = engine.run(head, Divergence(other["input"], other["linear_weight"]), scale, gradients)
    logits = F.linear(leaves["input"], leaves["linear_weight"], leaves["linear_bias"])
    logits = logits + 0.5 * F.linear(F.linear(leaves["input"], leaves["lora_a"]), leaves["lora_b"])
    teacher = F.log_softmax(F.linear(other["input"], other["linear_weight"]), -1)
    by_row = F.kl_div(F.log_softmax(logits, -1), teacher, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(losses, by_row)
    expected = torch.autograd.grad((by_row * scale).sum(), list(leaves.values()))
    for mine, other_way in zip(gradients.of.values(), expected, strict=True):
        torch.testing.assert_close(mine, other_way, rtol=1e-4, atol=1e-6)


# ---- determinism, limits, errors ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_again(dtype):
    tensors, target = tensors_of(dtype)
    first, again = (results(ours, tensors, target, torch.tensor(1.0)) for _ in range(2))
    assert all(same_bits(first[name], again[name]) for name in first)


def test_no_rows_and_none_that_count():
    tensors, target = tensors_of(torch.float32)
    x, w = tensors["input"].requires_grad_(), tensors["linear_weight"].requires_grad_()
    empty = linear_cross_entropy(x[:0], w, target[:0], reduction="sum")
    assert empty == 0 and torch.autograd.grad(empty, w)[0].eq(0).all()
    assert linear_cross_entropy(x, w, torch.full((90,), -100)).isnan()
    ignored = linear_cross_entropy(x, w, torch.full((90,), -100), num_items=5)
    assert ignored == 0 and torch.autograd.grad(ignored, x)[0].eq(0).all()


def test_small_gradients_in_float16():
    """A token of many has a gradient that float16 cannot hold; scaled as a scaler does, it is there."""
    tensors, target = tensors_of(torch.float16)
    x = tensors["input"].requires_grad_()
    loss = linear_cross_entropy(x, tensors["linear_weight"], target, num_items=2**20) * 2.0**16
    expected = linear_cross_entropy(x, tensors["linear_weight"], target, num_items=2**4)
    (scaled,), (direct,) = torch.autograd.grad(loss, x), torch.autograd.grad(expected, x)
    torch.testing.assert_close(scaled, direct)


@pytest.mark.filterwarnings("error:.*may not alias")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_is_one_node_of_a_graph(dtype, options):
    """The public function in one graph, whose compiler sees neither chunks nor kernels."""
    torch.compiler.reset()
    tensors, target = tensors_of(dtype)
    target = target.clamp(min=0) if "ignore_index" in options else target
    incoming = torch.linspace(0.5, 1.5, 90) if options.get("reduction") == "none" else torch.tensor(0.75)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    eager, traced = (results(f, tensors, target, incoming, **options) for f in (ours, compiled))
    assert all(same_bits(traced[name], eager[name]) for name in eager)


def test_compiles():
    """Of an input that the graph makes, with a frozen weight, twice through one loss."""
    torch.compiler.reset()
    tensors, target = tensors_of(torch.float32)
    x, w = tensors["input"].requires_grad_(), tensors["linear_weight"]
    plus = lambda x: linear_cross_entropy(x * 2, w, target) * 3  # noqa: E731
    compiled, loss = torch.compile(plus, fullgraph=True)(x), plus(x)
    torch.testing.assert_close(compiled, loss)
    (expected,) = torch.autograd.grad(loss, x)
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(compiled, x, retain_graph=True)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.75])
def test_backward_twice(dtype, factor):
    """What was kept stays as it is while the graph does, whatever becomes of the gradients made from it."""
    tensors, target = tensors_of(dtype)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    loss, given = ours(leaves, target), torch.tensor(factor)
    rounds = []
    for keep in (True, True, False):
        found = torch.autograd.grad(loss, list(leaves.values()), given, retain_graph=keep)
        rounds.append([gradient.clone() for gradient in found])
        for gradient in found:
            gradient.fill_(7.0)
    assert all(same_bits(a, b) for others in rounds[1:] for a, b in zip(rounds[0], others, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative(reduction):
    """By the formula, whose logits are made for it."""
    tensors, target = tensors_of(torch.float64)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    seconds = []
    for function in (ours, plain):
        loss = function(leaves, target, reduction=reduction).sum()
        (dx,) = torch.autograd.grad(loss, leaves["input"], create_graph=True)
        seconds.append(torch.autograd.grad(dx.square().sum(), list(leaves.values())))
    torch.testing.assert_close(*seconds)


def test_chosen_and_forced():
    tensors, target = tensors_of(torch.float32)
    args = tensors["input"], tensors["linear_weight"], target
    assert llmsys.explain("linear_cross_entropy", *args).chosen == "cpu"
    assert (
        llmsys.explain("linear_cross_entropy", *(t.double() if t is not target else t for t in args)).chosen == "torch"
    )
    loss = linear_cross_entropy(tensors["input"].requires_grad_(), *args[1:])
    with llmsys.use(linear_cross_entropy="reference"):
        forced = linear_cross_entropy(*args)
    assert loss.grad_fn.implementation.name == "cpu" and forced.grad_fn.implementation.name == "reference"


X, W, TARGET = torch.randn(3, 4), torch.randn(8, 4), torch.tensor([0, 7, -100])
ERRORS = {
    "integer_input": ({"input": X.long()}, TypeError, "input is torch.int64, expected float32"),
    "widths": (
        {"input": torch.randn(3, 5)},
        ValueError,
        r"input has shape \(3, 5\), linear_weight \(8, 4\) and target",
    ),
    "target_shape": ({"target": TARGET[:2]}, ValueError, r"target \(2,\), expected \(..., D\), \(V, D\)"),
    "weight_dtype": ({"linear_weight": W.half()}, TypeError, "linear_weight is torch.float16, expected torch.float32"),
    "bias_shape": ({"linear_bias": torch.ones(4)}, ValueError, r"linear_bias has shape \(4,\) .* expected \(8,\)"),
    "only_a": ({"lora_a": torch.ones(2, 4)}, ValueError, "lora_a without lora_b, expected both or neither"),
    "only_b": ({"lora_b": torch.ones(8, 2)}, ValueError, "lora_b without lora_a"),
    "ranks": ({"lora_a": torch.ones(2, 4), "lora_b": torch.ones(8, 3)}, ValueError, r"lora_b has .* expected \(8, 2\)"),
    "target": ({"target": torch.tensor([0, 8, 1])}, ValueError, "target has 8, expected classes from 0 to 7"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction is 'avg', expected"),
    "num_items": ({"reduction": "sum", "num_items": 3}, ValueError, "num_items with reduction 'sum', expected 'mean'"),
    "tokens": ({"token_weights": torch.ones(2)}, ValueError, r"token_weights has shape \(2,\) .* expected \(3,\)"),
    "token_grad": ({"token_weights": torch.ones(3).requires_grad_()}, ValueError, "token_weights requires a gradient"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error(name):
    changed, error, message = ERRORS[name]
    with pytest.raises(error, match="llmsys.linear_cross_entropy: .*" + message):
        linear_cross_entropy(**{"input": X, "linear_weight": W, "target": TARGET, **changed})


def test_one_row_without_a_dimension_of_rows():
    t, target = tensors_of(torch.float32, rows=1)
    row = {**t, "input": t["input"][0]}
    assert same_bits(ours(row, target[0]), ours(t, target))


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_negated_views_are_read_as_what_they_are(reduction):
    t, target = tensors_of(torch.float32)
    tokens = torch.rand(90)
    negated = {name: torch._neg_view(-tensor) for name, tensor in {**t, "token_weights": tokens}.items()}
    assert same_bits(
        ours(negated, target, reduction=reduction), ours({**t, "token_weights": tokens}, target, reduction=reduction)
    )
