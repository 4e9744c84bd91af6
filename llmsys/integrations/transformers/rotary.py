"""Rotary embedding: the function that an attention's forward calls to rotate q and k becomes `rope`.

The function is a global of the module that the attention is written in. This model's attention gets a forward of the
same code that finds ours under that name; other models and the global itself stay as they are.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator

import torch
from torch import nn

from llmsys.integrations.transformers import probe
from llmsys.integrations.transformers.classes import Swap, Swapped
from llmsys.ops.rope import reference, rope

# How the tables of R columns hold one angle for each pair, and which elements of a head are a pair.
LAYOUTS = (
    {"table": "halves", "interleaved": False},  # Llama
    {"table": "pairs", "interleaved": True},  # Cohere
    {"table": "halves", "interleaved": True},  # GLM
)


def rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
    *,
    table: str,
    interleaved: bool,
    promotes: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k rotated, as transformers' `apply_rotary_pos_emb` returns them.

    Shapes     q, k (B, H, T, K), or (B, T, H, K) with unsqueeze_dim=2; cos, sin (B or 1, T, R)
    """
    half = cos.shape[-1] // 2
    cos, sin = (t[..., :half] if table == "halves" else t[..., ::2] for t in (cos, sin))
    if cos.shape[0] == 1:
        cos, sin = cos[0], sin[0]
    return tuple(_rotated(x, cos, sin, unsqueeze_dim, interleaved, promotes) for x in (q, k))  # type: ignore[return-value]


def _rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads_dim: int, interleaved: bool, promotes: bool
) -> torch.Tensor:
    if x.dtype is not cos.dtype:
        if promotes:
            x = x.to(torch.promote_types(x.dtype, cos.dtype))
        cos, sin = (
            cos.to(torch.promote_types(x.dtype, torch.float32)),
            sin.to(torch.promote_types(x.dtype, torch.float32)),
        )
    if heads_dim == 2:
        return rope(x, cos, sin, interleaved=interleaved)
    return rope(x.transpose(1, 2), cos, sin, interleaved=interleaved).transpose(1, 2)


class Rotary(Swapped, nn.Module):
    """An attention whose forward calls `rotate` where it called the global `function`."""

    @classmethod
    def members(cls, original: type[nn.Module], *, function: str, **layout: object) -> dict[str, Callable]:
        return {"forward": _with_global(original.forward, function, functools.partial(rotate, **layout))}


def propose(module: nn.Module, model: nn.Module) -> Swap | str | None:
    """The swap for `module`, why it is left, or None if its forward rotates nothing."""
    found = _rotation(type(module).forward)
    if found is None:
        return None
    name, function = found
    if not _reaches_code(type(module).forward):
        return "its forward is wrapped by something that hides the code"
    weight = next(module.parameters(), None)
    if weight is None or (reason := probe.why_not([weight])):
        return "it has no weight" if weight is None else reason
    for layout in LAYOUTS:
        if all(_computes(function, layout, dtype, weight.device) for dtype in probe.dtypes(weight.dtype)):
            promotes = _promotes(function, weight.device)
            return _why_no_tables(model, layout["table"]) or Swap(
                "rope", Rotary, {"function": name, "promotes": promotes, **layout}
            )
    return f"{name} is no rotation that rope computes"


def _rotation(forward: Callable) -> tuple[str, Callable] | None:
    """The global that `forward` calls with (q, k, cos, sin, …), and its name."""
    code = inspect.unwrap(forward)
    for name in getattr(getattr(code, "__code__", None), "co_names", ()):
        function = code.__globals__.get(name)
        if inspect.isfunction(function) and [*inspect.signature(function).parameters][:4] == ["q", "k", "cos", "sin"]:
            return name, function
    return None


def _computes(function: Callable, layout: dict, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `function` rotates q and k as `rotate` does with this layout."""
    q, k, angles = (
        probe.numbers(*shape, seed=seed, dtype=dtype, device=device)
        for seed, shape in enumerate([(2, 3, 4, 8), (2, 1, 4, 8), (2, 4, 4)])
    )
    cos, sin = angles.cos(), angles.sin()
    wide = torch.cat if layout["table"] == "halves" else lambda pair, dim: torch.stack(pair, dim).flatten(-2)
    given = probe.outcome(lambda: function(q, k, wide((cos, cos), -1), wide((sin, sin), -1)))
    if not isinstance(given, tuple) or len(given) != 2:
        return False

    def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return reference.forward(x.transpose(1, 2), cos, sin, layout["interleaved"]).transpose(1, 2)

    return all(
        probe.agrees(g, rotated(x.double(), cos.double(), sin.double()), rotated(x, cos, sin), roundings=3)
        for g, x in zip(given, (q, k), strict=True)
    )


def _promotes(function: Callable, device: torch.device) -> bool:
    """Whether bfloat16 heads rotated by float32 tables come out in float32."""
    x = torch.ones(1, 1, 1, 2, dtype=torch.bfloat16, device=device)
    table = torch.ones(1, 1, 2, device=device)
    return function(x, x, table, table)[0].dtype is torch.float32


def _why_no_tables(model: nn.Module, table: str) -> str | None:
    """Why tables may not hold each angle twice, as `table` says; None if every module that makes tables does so."""
    makers = [
        m for m in model.modules() if any(name.endswith("inv_freq") for name, _ in m.named_buffers(recurse=False))
    ]
    if not makers:
        return "no module that makes its tables (with a buffer inv_freq) is in what was given"
    for maker in makers:
        for made in _tables_of(maker):
            if not isinstance(made, tuple) or len(made) != 2:
                return f"{type(maker).__name__} makes no pair of tables that could be checked ({made})"
            for tensor in made:
                half = tensor.shape[-1] // 2
                first, second = (
                    (tensor[..., :half], tensor[..., half:])
                    if table == "halves"
                    else (tensor[..., ::2], tensor[..., 1::2])
                )
                if not torch.equal(first, second):
                    return f"the tables of {type(maker).__name__} hold more than one angle for each pair"
    return None


def _tables_of(maker: nn.Module) -> Iterator[object]:
    """What `maker` gives for the first positions, once for each type of layer that it knows.

    A copy is asked: with some scalings a table module remembers the longest sequence it has seen.
    """
    device = next(buffer.device for _, buffer in maker.named_buffers(recurse=False))
    x, positions = torch.zeros(1, 5, 1, device=device), torch.arange(5, device=device)[None]
    types_of_layers = maker.layer_types if "layer_type" in inspect.signature(maker.forward).parameters else [None]
    for layer_type in types_of_layers:
        more = {} if layer_type is None else {"layer_type": layer_type}
        yield probe.outcome(lambda more=more: copy.deepcopy(maker).forward(x, position_ids=positions, **more))


def _reaches_code(function: Callable) -> bool:
    """Whether every wrapper around a function's code holds what it wraps where it can be exchanged."""
    while (inner := getattr(function, "__wrapped__", None)) is not None:
        if not any(cell.cell_contents is inner for cell in getattr(function, "__closure__", None) or ()):
            return False
        function = inner
    return inspect.isfunction(function)


def _with_global(function: Callable, name: str, value: Callable) -> Callable:
    """`function`, its wrappers included, with `value` as what its code finds under the global `name`."""
    assert isinstance(function, types.FunctionType)
    closure, seen = function.__closure__, function.__globals__
    inner = getattr(function, "__wrapped__", None)
    if inner is not None:
        changed = _with_global(inner, name, value)
        closure = tuple(types.CellType(changed) if c.cell_contents is inner else c for c in closure or ())
    else:
        # Only what the code reads, and no __name__: torch.compile would look for the globals in the module so named.
        seen = {key: seen[key] for key in (*_names(function.__code__), "__builtins__") if key in seen} | {name: value}
    made = types.FunctionType(function.__code__, seen, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__, made.__qualname__, made.__module__ = (
        function.__kwdefaults__,
        function.__qualname__,
        function.__module__,
    )
    made.__annotations__, made.__doc__ = function.__annotations__, function.__doc__
    made.__dict__.update(function.__dict__)
    if inner is not None:
        made.__wrapped__ = changed  # type: ignore[attr-defined]
    return made


def _names(code: types.CodeType) -> Iterator[str]:
    """The globals and attributes that `code` and the functions inside it name."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
