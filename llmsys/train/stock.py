"""The same training step written with stock PyTorch alone: the baseline of `llmsys train --compare`."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmsys.models.llama import Attention, Llama
from llmsys.nn import MLP, RMSNorm
from llmsys.train.config import TrainConfig
from llmsys.train.engine import Clip, Engine
from llmsys.train.trainer import build_model, decay_groups


class StockRMSNorm(RMSNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None):  # type: ignore[override]
        if residual is None:
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        total = x + residual
        return F.rms_norm(total, self.normalized_shape, self.weight, self.eps), total


class StockAttention(Attention):
    @staticmethod
    def rotate(q_BTHK: Tensor, k_BTHK: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The pairs (i, i + K/2) of each head by its position's angles, as Hugging Face's Llama does it."""
        cos, sin = cos[:, None], sin[:, None]

        def rotated(x_BTHK: Tensor) -> Tensor:
            a, b = x_BTHK.chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BTHK.dtype)

        return rotated(q_BTHK), rotated(k_BTHK)

    @staticmethod
    def attend(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, *, causal: bool) -> Tensor:  # type: ignore[override]
        q_BHTK, k_BHTK, v_BHTK = (x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=causal, enable_gqa=True)
        return y_BHTK.transpose(1, 2)


class StockMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class StockLlama(Llama):
    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return F.cross_entropy(self(tokens_BT).flatten(0, -2).float(), targets_BT.flatten())


class StockAdamW(torch.optim.AdamW):
    """torch's fused AdamW; weights of lower precision get float32 masters by copies."""

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
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scale: None = None) -> Any:
        for master, weight in zip(self.masters, self.weights, strict=True):
            if master is not weight:
                master.grad, weight.grad = weight.grad.float(), None
        result = super().step(closure)
        for master, weight in zip(self.masters, self.weights, strict=True):
            if master is not weight:
                weight.copy_(master)
        return result


def clip(parameters: Iterable[Tensor], max_norm: float) -> tuple[Tensor, None]:
    """Scale the gradients in place; nothing is left for the step to scale."""
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm), None


def stock(config: TrainConfig, dtype: torch.dtype) -> Engine:
    """The model of `trainer.fused`, weight for weight, on PyTorch's own functions."""
    return _engine(config, build_model(config, dtype), clip)


def control(config: TrainConfig, dtype: torch.dtype) -> Engine:
    """The stock engine with other roundings, in the weights it starts from and in the norm of its gradients.

    Weights    each times 1 ± eps of its dtype, the sign at random: one or two roundings away
    Norm       summed in float64: `clip_grad_norm_` sums in float32, which for 800,000 float32 gradients is off by 3e-5
               (torch 2.13), and every later step of AdamW feels it
    """
    model = build_model(config, dtype)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for weight in model.parameters():
            signs = torch.randint(0, 2, weight.shape, generator=generator).to(weight.device) * 2 - 1
            weight.copy_(weight.double() * (1 + signs * torch.finfo(dtype).eps))
    return _engine(config, model, _clip_in_float64)


def _engine(config: TrainConfig, model: Llama, clip: Clip) -> Engine:
    classes = {Attention: StockAttention, RMSNorm: StockRMSNorm, MLP: StockMLP, Llama: StockLlama}
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
    c = config.optimizer
    optimizer = StockAdamW(decay_groups(model, c.weight_decay), lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps)
    return Engine(model, optimizer, clip)


@torch.no_grad()
def _clip_in_float64(parameters: Iterable[Tensor], max_norm: float) -> tuple[Tensor, None]:
    grads = [weight.grad for weight in parameters if weight.grad is not None]
    norm = torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt()
    for grad in grads:
        grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm, None
