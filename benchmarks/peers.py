"""Other people's implementations of the same ops. One that cannot run is listed with the reason, never dropped.

PyTorch's own formula of an op stands in the op's benchmark.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from llmsys import env


@dataclass(frozen=True)
class Peer:
    """`build()` gives a differentiable function with the op's forward arguments; it needs `package`."""

    name: str
    build: Callable[[], Callable]
    package: str = "torch"
    needs: str = "any"  # "cuda": runs on a GPU only; "cpu": on the CPU only

    def why_not(self, device: str) -> str | None:
        """None when it can run on `device`, else one short reason."""
        if not all(env.has(prefix) for prefix in _prefixes(self.package)):
            return "not installed"
        if self.needs not in ("any", torch.device(device).type):
            return f"runs on {self.needs} only"
        if self.name == "torch.compile":
            return compiler_missing(device)
        return None


def _prefixes(package: str) -> list[str]:
    """`a.b` as a, a.b: each is looked for inside the one before."""
    parts = package.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def compiler_missing(device: str) -> str | None:
    """What `torch.compile` lacks for `device`."""
    if torch.device(device).type == "cpu":
        found = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
        return None if found else "no C++ compiler found"
    return None if env.has("triton") else "triton is not installed"


def torch_peers(function: Callable) -> tuple[Peer, Peer]:
    """PyTorch eager and compiled."""
    compiled = partial(torch.compile, function, fullgraph=True, dynamic=False)
    return Peer("eager", lambda: function), Peer("torch.compile", compiled)


def _liger_rms_norm():
    from liger_kernel.transformers.functional import liger_rms_norm

    return lambda x, weight, eps, weight_offset: liger_rms_norm(x, weight, eps, weight_offset, in_place=False)


def _liger_add_rms_norm():
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm as fused

    return lambda x, residual, weight, eps, offset: fused(x, residual, weight, eps, offset, in_place=False)


def _liger_swiglu():
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu


def _apex_rms_norm():
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return lambda x, weight, eps, weight_offset: fused_rms_norm_affine(x, weight, weight.shape, eps)


def _flash_attn_rms_norm():
    from flash_attn.ops.triton.layer_norm import rms_norm_fn

    return lambda x, weight, eps, weight_offset: rms_norm_fn(x, weight, None, eps=eps)


def _flash_attn_add_rms_norm():
    from flash_attn.ops.triton.layer_norm import rms_norm_fn

    return lambda x, residual, weight, eps, weight_offset: rms_norm_fn(
        x, weight, None, residual=residual, eps=eps, prenorm=True
    )


def _flash_attn_swiglu():
    from flash_attn.ops.activations import swiglu

    return swiglu


def _flash_attn_rope():
    from flash_attn.layers.rotary import apply_rotary_emb

    return apply_rotary_emb


def _liger_cross_entropy():
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda logits, target, weight, ignore_index, smoothing, z_loss, softcap: liger_cross_entropy(
        logits.clone(), target, weight, ignore_index, z_loss, smoothing, "none", softcap or None
    )


def _deepspeed_adamw():
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return partial(DeepSpeedCPUAdam, adamw_mode=True)


def _apex_adamw():
    from apex.optimizers import FusedAdam

    return partial(FusedAdam, adam_w_mode=True)


def _apex_lamb():
    from apex.optimizers import FusedLAMB

    return FusedLAMB


RMS_NORM = (
    Peer("liger", _liger_rms_norm, "liger_kernel", "cuda"),
    Peer("apex", _apex_rms_norm, "apex.normalization", "cuda"),
    Peer("flash-attn", _flash_attn_rms_norm, "flash_attn.ops.triton", "cuda"),
)
ADD_RMS_NORM = (
    Peer("liger", _liger_add_rms_norm, "liger_kernel", "cuda"),
    Peer("flash-attn", _flash_attn_add_rms_norm, "flash_attn.ops.triton", "cuda"),
)
SWIGLU = (
    Peer("liger", _liger_swiglu, "liger_kernel", "cuda"),
    Peer("flash-attn", _flash_attn_swiglu, "flash_attn.ops.activations", "cuda"),
)
ROPE = (Peer("flash-attn", _flash_attn_rope, "flash_attn.layers.rotary", "cuda"),)
# Liger writes the gradient over the logits it is given, which the next round still needs: its copy counts.
CROSS_ENTROPY = (Peer("liger", _liger_cross_entropy, "liger_kernel", "cuda"),)
# Here `build()` gives what makes an optimizer of parameters and options.
ADAMW = (
    Peer("torch fused", lambda: partial(torch.optim.AdamW, fused=True)),
    Peer("torch default", lambda: torch.optim.AdamW),
    Peer("deepspeed", _deepspeed_adamw, "deepspeed", "cpu"),
    Peer("apex", _apex_adamw, "apex.optimizers", "cuda"),
)
LAMB = (Peer("apex", _apex_lamb, "apex.optimizers", "cuda"),)
SGD = (
    Peer("torch fused", lambda: partial(torch.optim.SGD, fused=True)),
    Peer("torch default", lambda: torch.optim.SGD),
)
MUON = (Peer("torch", lambda: torch.optim.Muon),)
