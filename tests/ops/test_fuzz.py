"""Random shapes, strides, dtypes, options and instruction sets: no crash, no wrong answer, and no answer to a call that
cannot have one.

The same examples every time. Others, and more of them:

    pytest tests/ops/test_fuzz.py --hypothesis-profile=long --hypothesis-seed=1

Over 400 lines: what every op takes is drawn here, so that no op has a fuzzer of its own.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, strategies as st

import llmsys.ops
from llmsys import _C
from llmsys.ops._native import instruction_set
from llmsys.ops._op import InPlaceOp, ListOp, get, names, use
from llmsys.ops._verify import yardstick
from tests import harness
from tests.harness import DTYPES, guarded_allocations, same_bits

any_of = st.sampled_from

# ---- shapes ----

AROUND_VECTORS = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257)
few = any_of((0, 1, 1, 2, 3, 4, 5))
size = any_of(AROUND_VECTORS) | st.integers(1, 300)
size_or_none = size | st.just(0)
rows = st.lists(few, max_size=3).map(tuple)


def shapes(op: str) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes that the cases of `op` take."""
    if isinstance(get(op), ListOp):
        return st.lists(size_or_none, min_size=1, max_size=4).map(tuple)
    if op in ("rope", "rope_qk"):
        return st.tuples(few, few, few, size)
    if op == "attention":
        heads = any_of(((1, 1), (2, 2), (4, 2), (3, 1)))
        return st.tuples(few, size_or_none, size_or_none, heads, st.integers(3, 130), st.integers(1, 130)).map(
            lambda t: (*t[:3], *t[3], *t[4:])
        )
    if op == "attention_decode":
        heads = any_of(((1, 1), (2, 2), (4, 2), (3, 1), (16, 2)))
        return st.tuples(few, few, size_or_none, heads, st.integers(1, 256), st.integers(1, 256)).map(
            lambda t: (*t[:3], *t[3], *t[4:])
        )
    if op == "append_kv":
        return st.tuples(few, few, st.integers(0, 20), few, size, size).map(lambda t: (*t[:2], t[1] + t[2], *t[3:]))
    if op == "group_norm":
        channels = any_of((1, 2, 3, 4, 6, 8, 12, 32, 64))
        return st.tuples(few, channels, st.lists(any_of((1, 2, 3, 5, 9, 17)), max_size=2)).map(
            lambda t: (*t[:2], *t[2])
        )
    if op in (*POINTWISE, "dropout", "embedding"):
        last = size_or_none
    else:
        last = size.filter(lambda dim: dim > 2)  # gradients of shorter rows may be what rounding leaves of 0
    return st.tuples(rows, last).map(lambda t: (*t[0], t[1]))


# ---- options: every keyword of each op's `cases.inputs`; not relu of a product, whose slope near 0 is a matter of luck

flag = st.booleans()
scale = any_of((1e-3, 1.0, 4.0, 40.0))
float_dtype = any_of((None, torch.float32))
seed = st.integers(-(2**63), 2**63 - 1)
NORM = {"eps": any_of((0.0, 1e-12, 1e-6, 1e-2, 1.0)), "weight_dtype": float_dtype}
AFFINE = {**NORM, "has_weight": flag, "has_bias": flag, "offset": any_of((0.0, 300.0, -7.0))}
LOSS = {
    "weighted": flag,
    "label_smoothing": any_of((0.0, 0.1, 1.0)),
    "z_loss": any_of((0.0, 1e-2)),
    "softcap": any_of((0.0, 5.0, 30.0)),
}
ROPE = {
    "interleaved": flag,
    "rotary_fraction": any_of((0.0, 0.25, 0.5, 1.0)),
    "per_sequence": flag,
    "table_dtype": float_dtype,
}
OPTIMIZER = {
    "grad_dtype": any_of((None, *DTYPES)),
    "masters": flag,
    "lr": any_of((0.0, 1e-3, 0.1)),
    "weight_decay": any_of((0.0, 0.1)),
    "grad_scale": any_of((None, 0.125, 3.0)),
    "maximize": flag,
    "stochastic_rounding": st.none() | seed,
}
MOMENTS = {"beta1": any_of((0.0, 0.9)), "beta2": any_of((0.5, 0.95, 0.999))}
ADAM = {**OPTIMIZER, **MOMENTS, "eps": any_of((1e-8, 1e-3)), "step": any_of((1, 10, 100_000))}
POINTWISE: dict[str, dict] = {
    "silu": {"scale": scale},
    "relu2": {"scale": scale},
    "gelu": {"scale": scale, "approximate": any_of(("none", "tanh"))},
    "swiglu": {"scale": scale},
    "reglu": {"scale": scale},
    "geglu": {"scale": scale, "approximate": any_of(("none", "tanh"))},
    "clamped_swiglu": {"scale": scale, "limit": any_of((0.1, 0.75, 7.0)), "alpha": any_of((0.5, 1.0, 1.702))},
}
OPTIONS: dict[str, dict] = {
    **POINTWISE,
    "rms_norm": {**NORM, "weight_offset": any_of((0.0, 1.0, -0.5))},
    "add_rms_norm": {**NORM, "weight_offset": any_of((0.0, 1.0, -0.5))},
    "layer_norm": AFFINE,
    "add_layer_norm": AFFINE,
    "group_norm": {**AFFINE, "num_groups": any_of((None, 1))},
    "l2_norm": {"eps": any_of((1e-12, 8.0))},
    "softmax": {"spread": any_of((1e-3, 1.0, 30.0)), "masked": flag},
    "cross_entropy": {**LOSS, "scale": any_of((1.0, 20.0))},
    "linear_cross_entropy": {**LOSS, "bias": flag, "rank": any_of((0, 1, 3)), "reduced": flag},
    "dropout": {"p": any_of((0.0, 0.1, 0.5, 1.0)), "dropout_seed": seed, "offset": st.integers(0, 2**62)},
    "embedding": {
        "rows": any_of((None, 1, 5, 40)),
        "padding_idx": any_of((None, 0)),
        "ids_dtype": any_of((torch.int32, torch.int64)),
    },
    "linear": {
        "out_features": any_of((None, 0, 1, 5, 16, 19, 70)),
        "bias": flag,
        "activation": any_of((None, "relu2", "silu", "gelu", "gelu_tanh")),
        "residual": flag,
    },
    "lora_linear": {
        "rank": any_of((1, 3, 16)),
        "columns": any_of((None, 1, 7, 64)),
        "bias": flag,
        "scale": any_of((0.0, 0.5, -2.0)),
    },
    "mlp": {"activation": any_of(("silu", "gelu", "gelu_tanh"))},
    "rope": ROPE,
    "rope_qk": ROPE,
    "adamw": ADAM,
    "adamw_8bit": {key: strategy for key, strategy in ADAM.items() if key != "stochastic_rounding"},
    "lamb": ADAM,
    "lion": {**OPTIMIZER, **MOMENTS},
    "sgd": {
        **OPTIMIZER,
        "momentum": any_of((0.0, 0.9)),
        "dampening": any_of((0.0, 0.3)),
        "nesterov": flag,
        "step": any_of((1, 10)),
    },
    "muon": {
        **OPTIMIZER,
        "columns": any_of((None, 1, 3, 24)),
        "adjust_lr_fn": any_of(("original", "match_rms_adamw")),
        "momentum": any_of((0.0, 0.95)),
        "nesterov": flag,
        "coefficients": any_of(((3.4445, -4.775, 2.0315), (2.0, -1.5, 0.5))),
        "eps": st.just(1e-7),
        "ns_steps": any_of((1, 5)),
    },
    "attention": {
        "causal": flag,
        "window": st.tuples(any_of((-1, 0, 3, 70)), any_of((-1, 0, 2, 40))),
        "scale": any_of((None, 0.1, -0.3, 0.0)),
        "spread": any_of((1.0, 5.0)),
        "softcap": any_of((0.0, 2.0)),
        "alibi": flag,
        "sinks": flag,
        "bias": any_of(("", "full", "head", "padding")),
        "dropout_p": any_of((0.0, 0.3)),
        "packed": flag,
        "block_mask": flag,
    },
    "attention_decode": {
        "causal": flag,
        "window": st.tuples(any_of((-1, 0, 3, 70)), any_of((-1, 0, 2))),
        "scale": any_of((None, 0.1, -0.3, 0.0)),
        "spread": any_of((1.0, 5.0)),
        "softcap": any_of((0.0, 2.0)),
        "alibi": flag,
        "sinks": flag,
        "block_size": any_of((0, 1, 3, 16, 64)),
        "int8": flag,
        "uneven": flag,
        "full": flag,
    },
    "append_kv": {**ROPE, "block_size": any_of((0, 1, 3, 16)), "int8": flag},
    "grad_norm": {"scale": any_of((1e-12, 1.0, 1e12))},
}


def inputs_of(op: str) -> Any:
    return importlib.import_module(f"llmsys.ops.{op}.cases")


def consistent(options: dict) -> dict:
    """Without what an optimizer refuses together."""
    if options.get("masters"):
        options.pop("stochastic_rounding", None)
    if options.get("momentum") == 0 or options.get("dampening"):
        options.pop("nesterov", None)
    return options


# ---- layouts: besides those of the harness ----


def stepped(tensor: torch.Tensor) -> torch.Tensor:
    """Every third element."""
    if tensor.dim() == 0:
        return tensor
    wide = tensor.new_full((*tensor.shape[:-1], 3 * tensor.shape[-1]), 77)
    wide[..., 1::3] = tensor
    return wide[..., 1::3]


def negated(tensor: torch.Tensor) -> torch.Tensor:
    """Minus what is in memory, as the imaginary part of a conjugate is."""
    return torch._neg_view(-tensor) if tensor.is_floating_point() else tensor


LAYOUTS = {
    "contiguous": harness.contiguous,
    **harness.LAYOUTS,
    "heads_first": harness.heads_first,
    "fused_projection": harness.fused_projection,
    "stepped": stepped,
    "negated": negated,
}
WRITABLE = {name: LAYOUTS[name] for name in ("contiguous", "offset", "stepped")}


@dataclass(frozen=True)
class Layout:
    """Tensors of one shape in one layout, those of another in another."""

    names: tuple[str, ...]

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return LAYOUTS[self.names[sum(tensor.shape) % len(self.names)]](tensor)


# ---- right, or not at all ----


@dataclass(frozen=True)
class Case:
    """One call of an op's implementation."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    options: dict
    layout: Layout
    implementation: str
    isa: str


@st.composite
def cases(draw: Callable, op: str, implementations: tuple[str, ...]) -> Case:
    layouts = WRITABLE if isinstance(get(op), InPlaceOp) else LAYOUTS
    if op == "adamw_8bit":
        layouts = {name: layout for name, layout in layouts.items() if name != "stepped"}  # it takes no gaps
    case = Case(
        draw(shapes(op)),
        draw(any_of(DTYPES)),
        consistent(draw(st.fixed_dictionaries({}, optional=OPTIONS[op]))),
        Layout(draw(st.lists(any_of(sorted(layouts)), min_size=1, max_size=4).map(tuple))),
        draw(any_of(implementations)),
        draw(any_of(_C.cpu.isas())),
    )
    implementation = get(op).implementations[case.implementation]
    assume(implementation.why_not(*inputs_of(op).inputs(case.shape, case.dtype, **case.options)) is None)
    return case


NATIVE = {op: tuple(name for name in ("cpu", "torch") if name in get(op).implementations) for op in names()}


def test_every_option_is_drawn():
    for op in names():
        known = inspect.signature(inputs_of(op).inputs).parameters.values()
        keywords = {p.name for p in known if p.kind is p.KEYWORD_ONLY}
        assert keywords <= set(OPTIONS[op]), op
    assert set(OPTIONS) == set(names())


def check(op: str, case: Case) -> None:
    """By twice the rule of `llmsys.ops._verify`, which in a thousand cases is missed now and then: what it allows, it
    measures on a few hundred elements. Nothing outside a buffer is written, no input is.
    """
    measure = yardstick(get(op), inputs_of(op), case.shape, case.dtype, layout=case.layout, **case.options)
    before = [[arg.clone() for arg in draw.args if isinstance(arg, torch.Tensor)] for draw in measure.draws]
    with instruction_set(case.isa), guarded_allocations():
        verdicts = measure.verdicts(case.implementation)
    for verdict in verdicts:
        assert verdict.special and verdict.error <= 2 * verdict.allowed, verdict
    for draw, were in zip(measure.draws, before, strict=True):
        after = [arg for arg in draw.args if isinstance(arg, torch.Tensor)]
        assert all(same_bits(arg.resolve_neg(), was.resolve_neg()) for arg, was in zip(after, were, strict=True))


@pytest.mark.parametrize("op", [op for op in names() if NATIVE[op]])
@given(data=st.data())
def test_right(op, data):
    check(op, data.draw(cases(op, NATIVE[op])))


# ---- calls of public functions, one argument spoiled: refused in our words, or answered as the reference answers ----


def shorter(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[..., :-1] if tensor.dim() else tensor[None]


def longer(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor[..., :1]], -1) if tensor.dim() else tensor[None]


DTYPES_OF_TORCH = (
    "bool",
    "uint8",
    "int32",
    "int64",
    "float8_e4m3fn",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex64",
)
SPOILS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{name: (lambda t, name=name: t.to(getattr(torch, name))) for name in DTYPES_OF_TORCH},
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "first dimension": lambda t: t[None],
    "last dimension": lambda t: t[..., None],
    "repeated": lambda t: t.expand(2, *t.shape),
    "flat": lambda t: t.flatten(),
    "transposed": lambda t: t.transpose(0, -1) if t.dim() else t,
    "empty": lambda t: t.flatten()[:0],
    "no rows": lambda t: t[:0] if t.dim() else t[None],
    "huge": lambda t: torch.full_like(t, 1 << 30 if t.dtype in (torch.int32, torch.int64) else 100),
    "negative": lambda t: torch.full_like(t, 1) - 2 if t.dtype in (torch.int32, torch.int64) else -t,
    "shorter": shorter,
    "longer": longer,
    "stepped": stepped,
    "negated": negated,
    "expanded": harness.expanded,
}
PYTORCH_REFUSES = ("sparse", "negated")  # in its own words; negated tensors only where they are to be written
LIST_SPOILS: dict[str, Callable[[list], list]] = {
    "fewer": lambda ts: ts[:-1],
    "more": lambda ts: [*ts, ts[0]],
    "none": lambda ts: [],
}
FLOATS = (-1.0, 0.0, 0.5, 2.0, 1e30, float("nan"), float("inf"), float("-inf"))
INTEGERS = (-(2**70), -(2**63), -101, -1, 0, 1, 3, 2**31, 2**63, 2**70)
STRINGS = ("", "none", "tanh", "silu", "banana")


def head(shape: tuple, dtype: torch.dtype) -> dict:
    """Arguments of linear_cross_entropy."""
    input, weight, bias, a, b = (
        torch.randn(5, 6),
        torch.randn(9, 6),
        torch.randn(9),
        torch.randn(2, 6),
        torch.randn(9, 2),
    )
    tensors = {"input": input, "linear_weight": weight, "linear_bias": bias, "lora_a": a, "lora_b": b}
    options = {"ignore_index": -100, "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 5.0, "lora_scale": 0.5}
    counts = {"token_weights": torch.rand(5), "num_items": 4, "weight": torch.rand(9), "reduction": "mean"}
    return {name: t.to(dtype) for name, t in tensors.items()} | {"target": torch.arange(5)} | options | counts


def lora(shape: tuple, dtype: torch.dtype) -> dict:
    shapes = {"weight": (7, 5), "lora_a": (2, 5), "lora_b": (7, 2)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()} | {"scale": 0.5}


def parts(shape: tuple, dtype: torch.dtype) -> dict:
    logits = torch.randn(3, 5).to(dtype)
    return {"logits": logits, "target": torch.arange(3), "first_class": 1, "ignore_index": -100, "softcap": 2.0}


def tables(shape: tuple, dtype: torch.dtype) -> dict:
    return {"positions": torch.arange(5), "dim": 8, "base": 10000.0}


OTHERS = {
    "linear_cross_entropy": head,
    "lora_merge": lora,
    "lora_unmerge": lambda shape, dtype: {"merged" if k == "weight" else k: v for k, v in lora(shape, dtype).items()},
    "cross_entropy_parts": parts,
    "rope_tables": tables,
}


def arguments(function: str, shape: tuple, dtype: torch.dtype, options: dict) -> dict:
    """A call of a public function that works, by name."""
    if function in OTHERS:
        return OTHERS[function](shape, dtype)
    values = dict(
        zip(get(function).forward_schema.names, inputs_of(function).inputs(shape, dtype, **options), strict=True)
    )
    if function == "muon":
        values["ns_coefficients"] = tuple(values.pop(name) for name in "abc")
    if function == "attention_decode":
        values["window"] = (values.pop("window_left"), values.pop("window_right"))
    if function == "attention":
        values["window"] = (values.pop("window_left"), values.pop("window_right"))
        if values["cu_seqlens_q"] is not None:
            values |= {name: values[name][0] for name in "qkv"}
    return values


@dataclass(frozen=True)
class Spoiled:
    """A call of a public function that works but for one argument: `how` it is changed, or its value."""

    function: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    options: dict
    argument: str
    how: Any

    def values(self) -> dict:
        values = arguments(self.function, self.shape, self.dtype, self.options)
        if self.argument == "out":
            with torch.no_grad():
                out = getattr(llmsys.ops, self.function)(**values)
            values["out"] = (SPOILS[self.how](out[0]), *out[1:]) if isinstance(out, tuple) else SPOILS[self.how](out)
            return values
        value = values[self.argument]
        if isinstance(value, torch.Tensor):
            value = SPOILS[self.how](value)
        elif not isinstance(value, list):
            value = self.how
        elif self.how in LIST_SPOILS:
            value = LIST_SPOILS[self.how](value)
        else:
            value = [*value[:-1], SPOILS[self.how](value[-1])]
        return {**values, self.argument: value}


@st.composite
def spoiled(draw: Callable, function: str) -> Spoiled:
    case: tuple = (), torch.float32, {}
    if function not in OTHERS:
        options = consistent(draw(st.fixed_dictionaries({}, optional=OPTIONS[function])))
        case = draw(shapes(function)), draw(any_of(DTYPES)), options
    values = arguments(function, *case)
    names = [name for name, value in values.items() if not isinstance(value, (bool, tuple, type(None)))]
    if "out" in inspect.signature(getattr(llmsys.ops, function)).parameters:
        names.append("out")
    name = draw(any_of(names))
    value = values.get(name)
    if name == "out" or isinstance(value, torch.Tensor):
        ways = list(SPOILS)
    elif isinstance(value, list):
        ways = [*SPOILS, *LIST_SPOILS] if value else ["none"]
    elif isinstance(value, str):
        ways = STRINGS
    elif isinstance(value, float):
        ways = FLOATS
    else:
        ways = INTEGERS[:7] if name in ("ns_steps", "dim") else INTEGERS  # those are counts of work to do
    return Spoiled(function, *case, name, draw(any_of(ways)))


def answer(function: str, values: dict) -> list[torch.Tensor]:
    """What a call returns, or what it leaves in its arguments."""
    with torch.no_grad():
        result = getattr(llmsys.ops, function)(**values)
    found = result
    if result is None:
        given = (value if isinstance(value, list) else [value] for value in values.values())
        found = [value for some in given for value in some if isinstance(value, torch.Tensor)]
    return list(found) if isinstance(found, (list, tuple)) else [found]


@pytest.mark.parametrize("function", sorted({*names(), *OTHERS}))
@given(data=st.data())
def test_refuses_or_answers(function, data):
    call = data.draw(spoiled(function))
    values, again = call.values(), call.values()
    try:
        found = answer(function, values)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        assert str(error).startswith("llmsys.") or call.how in PYTORCH_REFUSES, repr(error)
        return
    if function in OTHERS:
        return
    with use(**{function: "reference"}):
        expected = answer(function, again)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.device == theirs.device
        if ours.device.type == "meta":
            continue
        ours, theirs = ours.double(), theirs.double()
        assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())
        ours, theirs = ours[theirs.isfinite()], theirs[theirs.isfinite()]
        if len(theirs):
            assert (ours - theirs).abs().max() <= theirs.abs().max() / 16 + 1e-6  # not what lay in memory
