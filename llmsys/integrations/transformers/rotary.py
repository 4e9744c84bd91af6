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
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmsys.integrations.transformers import probe
from llmsys.integrations.transformers.classes import Swap, Swapped
from llmsys.ops.rope import reference, rope


@dataclass(frozen=True)
class Layout:
    """Where tables of R columns hold the angle of a pair twice, and which elements of a head are a pair."""

    table: str  # "halves": in columns i and i + R/2; "pairs": in 2i and 2i + 1
    interleaved: bool

    def angles(self, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The R/2 columns that hold every angle, and those that hold it again."""
        half = table.shape[-1] // 2
        if self.table == "halves":
            return table[..., :half], table[..., half:]
        return table[..., ::2], table[..., 1::2]

    def doubled(self, angles: torch.Tensor) -> torch.Tensor:
        """The table of R columns that holds these angles."""
        return torch.cat((angles, angles), -1) if self.table == "halves" else angles.repeat_interleave(2, -1)


LLAMA, COHERE, GLM = Layout("halves", False), Layout("pairs", True), Layout("halves", True)


def rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
    *,
    layout: Layout,
    promotes: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k rotated, as transformers' `apply_rotary_pos_emb` returns them.

    Shapes     q, k (B, H, T, K), or (B, T, H, K) with unsqueeze_dim=2; cos, sin (B or 1, T, R)
    """
    (cos, _), (sin, _) = layout.angles(cos), layout.angles(sin)
    if cos.shape[0] == 1:
        cos, sin = cos[0], sin[0]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        if promotes:
            x = x.to(torch.promote_types(x.dtype, cos.dtype))
        # What rope takes: tables of x's dtype, or float32.
        dtype = x.dtype if cos.dtype is x.dtype else torch.promote_types(x.dtype, torch.float32)
        tables = cos.to(dtype), sin.to(dtype)
        if unsqueeze_dim % 4 == 2:  # of the four dimensions of x, counted from either end
            return rope(x, *tables, interleaved=layout.interleaved)
        return rope(x.transpose(1, 2), *tables, interleaved=layout.interleaved).transpose(1, 2)

    return rotated(q), rotated(k)


class Rotary(Swapped):
    """An attention whose forward calls `rotate` where it called the global `function`."""

    @classmethod
    def members(cls, original: type[nn.Module], attributes: dict[str, Any]) -> dict[str, Any]:
        ours = functools.partial(rotate, layout=attributes["layout"], promotes=attributes["promotes"])
        return {"forward": _with_global(original.forward, attributes["function"], ours)}


def propose(module: nn.Module, model: nn.Module) -> Swap | str | None:
    """The swap for `module`, why it is left, or None if its forward rotates nothing."""
    found = _rotation(type(module).forward)
    if found is None:
        return None
    name, function = found
    if not _reaches_code(type(module).forward):
        return "its forward is wrapped by something that hides the code"
    weight = next(module.parameters(), torch.empty(0))
    if weight.is_meta:
        return probe.why_not([weight])
    for layout in (LLAMA, COHERE, GLM):
        if all(_computes(function, layout, dtype, weight.device) for dtype in (torch.float32, torch.bfloat16)):
            promotes = _promotes(function, weight.device)
            attributes = {"function": name, "layout": layout, "promotes": promotes}
            return _why_no_tables(model, layout) or Swap("rope", Rotary, attributes)
    return f"{name} is no rotation that rope computes"


def _rotation(forward: Callable) -> tuple[str, Callable] | None:
    """The global that `forward` calls with (q, k, cos, sin, …), and its name."""
    code = inspect.unwrap(forward)
    for name in getattr(getattr(code, "__code__", None), "co_names", ()):
        function = code.__globals__.get(name)
        if inspect.isfunction(function) and [*inspect.signature(function).parameters][:4] == ["q", "k", "cos", "sin"]:
            return name, function
    return None


def _computes(function: Callable, layout: Layout, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `function` rotates q and k as `rotate` does with this layout."""
    q, k, angles = (
        probe.numbers(*shape, seed=seed, dtype=dtype, device=device)
        for seed, shape in enumerate([(2, 3, 4, 8), (2, 1, 4, 8), (2, 4, 4)])
    )
    cos, sin = angles.cos(), angles.sin()
    given = probe.outcome(function, q, k, layout.doubled(cos), layout.doubled(sin))
    if not isinstance(given, tuple) or len(given) != 2:
        return False

    def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return reference.forward(x.transpose(1, 2), cos, sin, layout.interleaved).transpose(1, 2)

    return all(
        probe.agrees(g, rotated(x.double(), cos.double(), sin.double()), rotated(x, cos, sin), roundings=3)
        for g, x in zip(given, (q, k), strict=True)
    )


def _promotes(function: Callable, device: torch.device) -> bool:
    """Whether bfloat16 heads rotated by float32 tables come out in float32."""
    x = torch.ones(1, 1, 1, 2, dtype=torch.bfloat16, device=device)
    table = torch.ones(1, 1, 2, device=device)
    return function(x, x, table, table)[0].dtype is torch.float32


def _why_no_tables(model: nn.Module, layout: Layout) -> str | None:
    """Why tables may not hold each angle twice, as `layout` says; None if every module that makes tables does so."""
    makers = [
        m for m in model.modules() if any(name.endswith("inv_freq") for name, _ in m.named_buffers(recurse=False))
    ]
    if not makers:
        return "no module that makes its tables (with a buffer inv_freq) is in what was given"
    for maker in makers:
        for made in _tables_of(maker):
            if not isinstance(made, tuple) or len(made) != 2:
                return f"{type(maker).__name__} makes no pair of tables that could be checked ({made})"
            if not all(torch.equal(*layout.angles(table)) for table in made):
                return f"the tables of {type(maker).__name__} hold more than one angle for each pair"
    return None


def _tables_of(maker: nn.Module) -> Iterator[object]:
    """What `maker` gives for the first positions, once for each type of layer that it knows.

    A copy is asked: with some scalings a table module remembers the longest sequence it has seen.
    """
    device = next(buffer.device for _, buffer in maker.named_buffers(recurse=False))
    x, positions = torch.zeros(1, 5, 1, device=device), torch.arange(5, device=device)[None]
    by_layer_type = "layer_type" in inspect.signature(maker.forward).parameters
    layer_types: Any = maker.layer_types if by_layer_type else ()
    for more in [{"layer_type": layer_type} for layer_type in layer_types] or [{}]:
        yield probe.outcome(copy.deepcopy(maker).forward, x, position_ids=positions, **more)


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
