import pytest

from llmsys.ops.attention import OP, cases
from tests.harness import checks

SURFACE = {
    "attention": "(q, k, v, *, causal=False, scale=None, window=(-1, -1), softcap=0.0, alibi_slopes=None, sinks=None, "
    "bias=None, block_mask=None, block_size=64, dropout_p=0.0, seed=None, cu_seqlens_q=None, cu_seqlens_k=None, "
    "return_lse=False)"
}


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()
