"""Optimisers: state, and the update of the tensors they are given."""

from llmsys.optim.adamw import AdamW
from llmsys.optim.adamw_8bit import AdamW8bit
from llmsys.optim.clip import clip_grad_norm
from llmsys.optim.lamb import Lamb
from llmsys.optim.lion import Lion
from llmsys.optim.muon import Muon
from llmsys.optim.sgd import SGD

__all__ = ["SGD", "AdamW", "AdamW8bit", "Lamb", "Lion", "Muon", "clip_grad_norm"]
