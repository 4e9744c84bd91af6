"""Logits that are not computed until something reads them: what a head returns to a loss that does not need them.

`Logits` stands for the head's result. Shape, dtype and device are known at once; a few steps between a head and a loss
(a softcap, a scale, a cast) are remembered; everything else makes the numbers, by the code that the head had.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree

# What is answered without numbers.
_KNOWN = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "is_cpu", "is_meta")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.is_floating_point, Tensor.__len__}
# What is remembered: a method, by every name it has, with one number or none.
_STEPS: dict[Callable, str] = {
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul), "mul"),
    **dict.fromkeys((Tensor.div, Tensor.__truediv__, torch.div), "div"),
    **dict.fromkeys((Tensor.tanh, torch.tanh), "tanh"),
    Tensor.float: "float",
}


Steps = tuple[tuple[str, tuple[float, ...]], ...]


class Logits(Tensor):
    """input · weightᵀ + bias and then `steps`, once something asks for it.

    Shapes     input (..., D); weight (V, D); bias (V,) or None → (..., V)
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    steps: Steps
    _computed: Tensor | None
    _versions: tuple[int, ...]

    @classmethod
    def of(cls, input: Tensor, weight: Tensor, bias: Tensor | None = None, steps: Steps = ()) -> Logits:
        made = _Deferred.apply(steps, input, weight, bias)
        made.input, made.weight, made.bias, made.steps, made._computed = input, weight, bias, steps, None
        made._versions = _versions(input, weight, bias)
        return made

    @property
    def made(self) -> bool:
        """Whether the numbers exist, and may have been changed in place."""
        with torch._C.DisableTorchFunctionSubclass():
            return self._computed is not None

    def compute(self) -> Tensor:
        """The numbers, with the gradient that the head's result has, whoever asks first.

        Errors     RuntimeError if what they are made of has changed since, as weights do in an optimizer's step
        """
        with torch._C.DisableTorchFunctionSubclass():
            if self._computed is None:
                if _versions(self.input, self.weight, self.bias) != self._versions:
                    raise RuntimeError(
                        "llmsys.accelerate: logits are read after the head's weight or input was changed in place, "
                        "expected before; read them before optimizer.step(), or call "
                        'llmsys.accelerate(model, exclude=["loss"])'
                    )
                with torch.set_grad_enabled(self.requires_grad):
                    self._computed = _compute(self.input, self.weight, self.bias, self.steps)
            return self._computed

    def softcap(self) -> float | None:
        """The cap c where the steps are c · tanh(logits / c), 0 where there are none; None for any others."""
        steps = [step for step in self.steps if step != ("float", ())]
        if not steps:
            return 0.0
        if [name for name, _ in steps] == ["div", "tanh", "mul"] and steps[0][1] == steps[2][1] and steps[0][1][0] > 0:
            return steps[0][1][0]
        return None

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in _KNOWN:
            return super().__torch_function__(function, types, args, kwargs)
        first, *rest = args or (None,)
        numbers = all(type(number) in (int, float) and math.isfinite(number) for number in rest)
        if function in _STEPS and isinstance(first, cls) and numbers and not kwargs and not first.made:
            with torch._C.DisableTorchFunctionSubclass():
                step = (_STEPS[function], tuple(rest))
                return cls.of(first.input, first.weight, first.bias, (*first.steps, step))
        args, kwargs = _with_values((args, kwargs or {}))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Code in C++ that was given logits asks here, below autograd."""
        args, kwargs = _with_values((args, kwargs or {}))
        return function(*args, **kwargs)


def _versions(*tensors: Tensor | None) -> tuple[int, ...]:
    """How often each tensor was changed in place, of those that count it."""
    return tuple(tensor._version for tensor in tensors if tensor is not None and not tensor.is_inference())


def _compute(input: Tensor, weight: Tensor, bias: Tensor | None, steps: Steps) -> Tensor:
    found = F.linear(input, weight, bias)
    for name, numbers in steps:
        found = getattr(found, name)(*numbers)
    return found


class _Deferred(torch.autograd.Function):
    """`_compute` later. Its gradient is for code that asks autograd alone, as another Function does."""

    @staticmethod
    def forward(ctx: Any, steps: Steps, *tensors: Tensor | None) -> Tensor:
        ctx.steps = steps
        ctx.save_for_backward(*tensors)
        input, weight, _ = tensors
        assert input is not None and weight is not None
        dtype = torch.float32 if ("float", ()) in steps else input.dtype
        shape = (*input.shape[:-1], weight.shape[0])
        return Tensor._make_wrapper_subclass(Logits, shape, dtype=dtype, device=input.device)  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> tuple:
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            tensors: list[Any] = [
                None if tensor is None else tensor.detach().requires_grad_(need)
                for tensor, need in zip(ctx.saved_tensors, needed, strict=True)
            ]
            input, weight, bias = tensors
            found = _compute(input, weight, bias, ctx.steps)
        wanted = [tensor for tensor, need in zip(tensors, needed, strict=True) if need]
        gradients = iter(torch.autograd.grad(found, wanted, dlogits))
        return None, *(next(gradients) if need else None for need in needed)


def _with_values(given: Any) -> Any:
    return _pytree.tree_map_only(Logits, Logits.compute, given)
