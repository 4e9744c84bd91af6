"""How tensors become rows that a kernel can read."""

import torch

from llmsys.ops._native import grouped_rows
from tests.harness import fused_projection, heads_first, same_bits


def test_heads_are_read_where_they_are():
    """Without a copy where two distances fit; and they say where each row starts."""
    x = torch.randn(2, 3, 4, 16)
    for given in (x, fused_projection(x), x[..., :8], x[:, :, ::2], x[:, :, :1].expand(2, 3, 4, 16)):
        inner, (same, stride, outer_stride), _ = grouped_rows(given, fused_projection(torch.zeros(given.shape)))
        assert same is given
        for row, values in enumerate(given.reshape(-1, given.shape[-1])):
            start = given.storage_offset() + row // inner * outer_stride + row % inner * stride
            assert same_bits(given.as_strided(values.shape, (1,), start), values)
    inner, (copy, _, _) = grouped_rows(heads_first(torch.randn(2, 3, 4, 16)))
    assert copy.is_contiguous()
