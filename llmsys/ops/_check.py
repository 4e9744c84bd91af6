"""Checks of a public function's arguments that several ops share. Each message says what was given and what works."""

from __future__ import annotations

from collections.abc import Callable

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def norm(op: str, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """x (..., D) of a float dtype, weight (D,) of the same dtype or float32, on one device; D > 0; eps >= 0."""
    dtype, shape, weight_shape = x.dtype, x.shape, weight.shape
    if dtype not in FLOATS:
        raise TypeError(f"llmsys.{op}: x is {dtype}, expected one of {_names(FLOATS)}")
    if weight.dtype is not dtype and (weight.dtype is not torch.float32 or dtype is torch.float64):
        raise TypeError(f"llmsys.{op}: weight is {weight.dtype}, expected {dtype} (x's) or torch.float32")
    if len(weight_shape) != 1 or not shape or shape[-1] != weight_shape[0] or weight_shape[0] == 0:
        raise ValueError(
            f"llmsys.{op}: x has shape {tuple(shape)} and weight {tuple(weight_shape)}, "
            "expected x (..., D) and weight (D,) with D > 0"
        )
    if x.device != weight.device:
        raise ValueError(f"llmsys.{op}: x is on {x.device} and weight on {weight.device}, expected one device")
    if not eps >= 0:
        raise ValueError(f"llmsys.{op}: eps is {eps}, expected a number >= 0")


def rows(op: str, x: torch.Tensor) -> None:
    """x (..., D) of a float dtype, D > 0."""
    same(op, x=x)
    if x.shape[-1] == 0:
        raise ValueError(f"llmsys.{op}: x has shape {tuple(x.shape)}, expected (..., D) with D > 0")


def affine(
    op: str, x: torch.Tensor, size: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> None:
    """weight and bias None or (size,), of x's dtype or both of float32, on x's device; eps >= 0."""
    dtype = x.dtype
    for name, given in (("weight", weight), ("bias", bias)):
        if given is None:
            continue
        if given.dtype is not dtype and (given.dtype is not torch.float32 or dtype is torch.float64):
            raise TypeError(f"llmsys.{op}: {name} is {given.dtype}, expected {dtype} (x's) or torch.float32")
        if given.shape != (size,):
            raise ValueError(
                f"llmsys.{op}: x has shape {tuple(x.shape)} and {name} {tuple(given.shape)}, expected {name} ({size},)"
            )
        if given.device != x.device:
            raise ValueError(f"llmsys.{op}: x is on {x.device} and {name} on {given.device}, expected one device")
    if weight is not None and bias is not None and weight.dtype is not bias.dtype:
        raise TypeError(f"llmsys.{op}: weight is {weight.dtype} and bias {bias.dtype}, expected one dtype")
    if not eps >= 0:
        raise ValueError(f"llmsys.{op}: eps is {eps}, expected a number >= 0")


def same(op: str, **tensors: torch.Tensor) -> None:
    """Tensors (..., D) of one shape, float dtype and device."""
    (first_name, first), *others = tensors.items()
    dtype, shape, device = first.dtype, first.shape, first.device
    if dtype not in FLOATS:
        raise TypeError(f"llmsys.{op}: {first_name} is {dtype}, expected one of {_names(FLOATS)}")
    if not shape:
        raise ValueError(f"llmsys.{op}: {first_name} has no dimension, expected (..., D)")
    for name, tensor in others:
        if tensor.dtype is not dtype:
            raise TypeError(f"llmsys.{op}: {name} is {tensor.dtype}, expected {dtype}, as {first_name} is")
        if tensor.shape != shape or tensor.device != device:
            raise ValueError(
                f"llmsys.{op}: {name} has shape {tuple(tensor.shape)} on {tensor.device}, "
                f"expected {tuple(shape)} on {device}, as {first_name} has"
            )


def approximate(op: str, given: str) -> None:
    """GELU's two formulas, as torch names them."""
    if given not in ("none", "tanh"):
        raise ValueError(f"llmsys.{op}: approximate is {given!r}, expected 'none' or 'tanh'")


def out(op: str, given: torch.Tensor, like: torch.Tensor) -> None:
    """A result shaped like `like` can be written to `given`."""
    fits = given.shape == like.shape and given.dtype == like.dtype and given.device == like.device
    negated = not torch.compiler.is_compiling() and given.is_neg()
    if negated or not (fits and given.is_contiguous()):
        strides = f"{given.stride()}, negated" if negated else given.stride()
        raise ValueError(
            f"llmsys.{op}: out is {tuple(given.shape)} {given.dtype} on {given.device}, strides {strides}, "
            f"expected contiguous {tuple(like.shape)} {like.dtype} on {like.device}"
        )


def lists(
    op: str,
    given: dict[str, list[torch.Tensor]],
    dtypes: dict[str, tuple[torch.dtype, ...]],
    *,
    optional: tuple[str, ...] = (),
    shapes: dict[str, Callable[[torch.Tensor], tuple[int, ...]]] | None = None,
) -> None:
    """Lists of one length, or empty where `optional`: each of one of its `dtypes`, all on one device, the i-th tensors
    of the shape of params[i], or of `shapes[name](params[i])`.
    """
    lengths = {name: len(tensors) for name, tensors in given.items() if tensors or name not in optional}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{length} {name}" for name, length in lengths.items())
        instead = f", or no {' or '.join(optional)}" if optional else ""
        raise ValueError(f"llmsys.{op}: {counts}, expected lists of one length{instead}")
    params = given["params"]
    for name, tensors in given.items():
        for i, tensor in enumerate(tensors):
            if tensor.dtype not in dtypes[name]:
                expected = " or ".join(map(str, dtypes[name]))
                raise TypeError(f"llmsys.{op}: {name}[{i}] is {tensor.dtype}, expected {expected}")
            if tensor.dtype != tensors[0].dtype:
                raise TypeError(
                    f"llmsys.{op}: {name}[{i}] is {tensor.dtype}, expected {tensors[0].dtype}, as {name}[0] is; "
                    "call once for each dtype, as llmsys.optim does"
                )
            shape = shapes[name](params[i]) if shapes and name in shapes else params[i].shape
            if tensor.shape != shape or tensor.device != params[0].device:
                raise ValueError(
                    f"llmsys.{op}: {name}[{i}] has shape {tuple(tensor.shape)} on {tensor.device}, "
                    f"expected {tuple(shape)} on {params[0].device}"
                )


def optimizer_dtypes(given: dict[str, list[torch.Tensor]]) -> dict[str, tuple[torch.dtype, ...]]:
    """The dtypes of an optimizer's lists: states wide, params and grads as narrow as they come; float64 all or none."""
    double = len(given["params"]) > 0 and given["params"][0].dtype == torch.float64
    wide = (torch.float64,) if double else (torch.float32,)
    narrow = wide if double else (torch.float32, torch.bfloat16, torch.float16)
    return dict.fromkeys(given, wide) | {"params": FLOATS, "grads": narrow}


def betas(op: str, **given: float) -> None:
    """Decay rates of moments: in [0, 1), as a moment that never changes is no moment."""
    for name, beta in given.items():
        if not 0 <= beta < 1:
            raise ValueError(f"llmsys.{op}: {name} is {beta}, expected a number in [0, 1)")


def grad_scale(op: str, given: torch.Tensor, param: torch.Tensor) -> None:
    """A factor for gradients: () float32, or the dtype of a float64 param, where the params are."""
    if not isinstance(given, torch.Tensor):
        raise TypeError(
            f"llmsys.{op}: grad_scale is a {type(given).__name__}, expected a tensor of shape (), torch.float32"
        )
    if given.dtype not in (torch.float32, torch.promote_types(param.dtype, torch.float32)):
        raise TypeError(f"llmsys.{op}: grad_scale is {given.dtype}, expected torch.float32")
    if given.ndim or given.device != param.device:
        raise ValueError(
            f"llmsys.{op}: grad_scale has shape {tuple(given.shape)} on {given.device}, "
            f"expected () on {param.device}, as params[0] is"
        )


def stochastic_rounding(op: str, given: int | None, lists: dict[str, list[torch.Tensor]]) -> int | None:
    """A seed for bfloat16 params without masters, or None; as a signed number of 64 bits."""
    if given is None:
        return None
    if not -(2**63) <= given < 2**64:
        raise ValueError(f"llmsys.{op}: stochastic_rounding is {given}, expected a seed in [-2**63, 2**64), or None")
    if lists["params"][0].dtype != torch.bfloat16:
        raise TypeError(
            f"llmsys.{op}: params[0] is {lists['params'][0].dtype} with stochastic_rounding, expected torch.bfloat16"
        )
    if lists["masters"]:
        raise ValueError(
            f"llmsys.{op}: {len(lists['masters'])} masters with stochastic_rounding, expected one or the other"
        )
    return given if given < 2**63 else given - 2**64


def _names(dtypes: tuple) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
