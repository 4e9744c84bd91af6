"""The same training step written with stock PyTorch alone: the baseline of `llmsys train --compare`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmsys.models.llama import Llama
from llmsys.nn import MLP, RMSNorm
from llmsys.train.config import TrainConfig
from llmsys.train.trainer import decay_groups


class StockRMSNorm(RMSNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None):  # type: ignore[override]
        if residual is None:
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        total = x + residual
        return F.rms_norm(total, self.normalized_shape, self.weight, self.eps), total


class StockMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class StockAdamW(torch.optim.AdamW):
    """`clip_grad_norm_`'s scaling, then torch's fused AdamW; bfloat16 weights get float32 masters by copies."""

    def __init__(self, groups: list[dict[str, Any]], **settings: Any):
        self.weights = [weight for group in groups for weight in group["params"]]
        masters = {
            weight: weight if weight.dtype == torch.float32 else weight.detach().float() for weight in self.weights
        }
        self.masters = list(masters.values())
        super().__init__(
            [group | {"params": [masters[weight] for weight in group["params"]]} for group in groups],
            fused=True,
            **settings,
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scale: Tensor | None = None) -> Any:
        for master, weight in zip(self.masters, self.weights, strict=True):
            if master is not weight:
                master.grad, weight.grad = weight.grad.float(), None
        if grad_scale is not None:
            torch._foreach_mul_([master.grad for master in self.masters], grad_scale)
        result = super().step(closure)
        for master, weight in zip(self.masters, self.weights, strict=True):
            if master is not weight:
                weight.copy_(master)
        return result


def stock(config: TrainConfig, dtype: torch.dtype) -> tuple[Llama, StockAdamW]:
    """The model of `trainer.fused`, weight for weight, on PyTorch's own functions."""
    model = Llama(config.model, seed=config.seed, device=config.device, dtype=dtype)
    classes = {RMSNorm: StockRMSNorm, MLP: StockMLP}
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
    c = config.optimizer
    return model, StockAdamW(decay_groups(model, c.weight_decay), lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps)
