"""Optimisers: state, and the update of the tensors they are given."""

from llmsys.optim.adamw import AdamW
from llmsys.optim.adamw_8bit import AdamW8bit
from llmsys.optim.clip import clip_grad_norm

__all__ = ["AdamW", "AdamW8bit", "clip_grad_norm"]
