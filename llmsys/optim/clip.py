"""Clipping by the norm of all gradients together, without a pass over them of its own."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from llmsys.ops.grad_norm import grad_norm


def clip_grad_norm(
    parameters: torch.Tensor | Iterable[torch.Tensor], max_norm: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of all gradients, and the factor by which the step must scale them. The gradients stay as they are.

        norm, grad_scale = clip_grad_norm(model.parameters(), 1.0)
        optimizer.step(grad_scale=grad_scale)

        norm = ‖all gradients‖₂;  grad_scale = min(1, max_norm / (norm + 1e-6))

    Shapes     parameters of any shapes, those without a gradient left out → norm (), grad_scale (), both float32
    Numerics   as `torch.nn.utils.clip_grad_norm_`: a norm that is not finite gives NaN
    Cost       one read of the gradients
    Errors     ValueError unless max_norm > 0, or for a sparse gradient
    """
    if not max_norm > 0:
        raise ValueError(f"llmsys.optim.clip_grad_norm: max_norm is {max_norm}, expected a number > 0")
    if isinstance(parameters, torch.Tensor):
        parameters = [parameters]
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            if parameter.grad.layout != torch.strided:
                raise ValueError(
                    f"llmsys.optim.clip_grad_norm: a gradient of shape {tuple(parameter.grad.shape)} is "
                    f"{parameter.grad.layout}, expected a dense one"
                )
            by_device.setdefault(parameter.grad.device, []).append(parameter.grad)
    norms = [grad_norm(grads) for grads in by_device.values()]
    if len(norms) == 1:
        norm = norms[0]
    else:
        norm = grad_norm([each.to(norms[0].device) for each in norms])
    return norm, (max_norm / (norm + 1e-6)).clamp(max=1.0)
