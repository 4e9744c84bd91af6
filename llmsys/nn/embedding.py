"""Embedding with a deterministic gradient."""

from typing import Any

import torch
from torch import Tensor

from llmsys.ops.embedding import embedding


class Embedding(torch.nn.Embedding):
    """A drop-in for `torch.nn.Embedding`: same arguments and `state_dict`, and `isinstance` holds. The gradient is
    dense and summed in float32, the same bits every time.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        **options: Any,
    ):
        for name, value in (("max_norm", max_norm), ("scale_grad_by_freq", scale_grad_by_freq), ("sparse", sparse)):
            if value not in (None, False):
                raise ValueError(f"llmsys.nn.Embedding: {name} is {value}, expected it left out: it is not supported")
        super().__init__(num_embeddings, embedding_dim, padding_idx, **options)

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        return embedding(ids, self.weight, self.padding_idx)
