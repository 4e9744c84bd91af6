"""Is a module what its shape suggests? Ask it: run its own code on small random numbers and compare.

What is run is a twin that shares nothing with the module but its class and its plain attributes. Its tensors are
random, its submodules are stand-ins, and no hook fires; the module itself and the random state stay as they were.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
from torch import nn

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def numbers(*shape: int, seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Standard normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def dtypes(own: torch.dtype) -> tuple[torch.dtype, ...]:
    """The dtypes to ask in: float32, and the module's own where that is narrow.

    Not float64: much of transformers computes in float32 whatever it is given. Float32 tells more than narrow ones.
    """
    return (torch.float32, own) if own in (torch.bfloat16, torch.float16) else (torch.float32,)


def twin(module: nn.Module, tensors: dict[str, torch.Tensor], submodules: dict[str, nn.Module]) -> nn.Module:
    """`module` on other tensors and submodules, in evaluation, without hooks."""
    made = copy.copy(module)
    drawn = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    made._parameters = {**dict.fromkeys(module._parameters), **drawn}
    made._modules = dict(submodules)
    made._forward_hooks, made._forward_pre_hooks = OrderedDict(), OrderedDict()
    made.training = False
    return made


def outcome(run: Callable, *args: object, **options: object) -> object:
    """What `run` returns, or a sentence that says what it raised.

    `run` is code that we have never seen. It may raise anything; then it is not what it was taken for, and no choice of
    a backend hides behind it.
    """
    try:
        with torch.no_grad():
            return run(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


def agrees(given: object, truth: torch.Tensor, reference: torch.Tensor, roundings: int) -> bool:
    """Whether `given` is `truth`, up to what arithmetic in its dtype loses.

    It may err by twice what the reference errs in the same dtype, and by so many roundings of the largest element: code
    that rounds between its steps rounds that often. Another formula is off by far more.
    """
    if not isinstance(given, torch.Tensor) or given.shape != truth.shape or given.dtype != reference.dtype:
        return False
    rounding = torch.finfo(reference.dtype).eps / 2 * truth.abs().max()
    allowed = 2 * (reference.double() - truth).abs().max() + roundings * rounding
    return bool(((given.double() - truth).abs() <= allowed).all())


def why_not(tensors: Iterable[torch.Tensor]) -> str | None:
    """Why nothing can be tried with these tensors, or None."""
    for tensor in tensors:
        if type(tensor) not in (torch.Tensor, nn.Parameter):
            return f"its weight is a {type(tensor).__name__}, expected a plain tensor"
        if tensor.is_meta:
            return "it is on the meta device, where nothing can be tried: accelerate the model once it has its weights"
        if tensor.dtype not in FLOATS:
            return f"its weight is {tensor.dtype}"
    return None
