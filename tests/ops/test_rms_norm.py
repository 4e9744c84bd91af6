import pytest
import torch

from llmsys import rms_norm
from llmsys.ops._verify import verify
from llmsys.ops.rms_norm import OP, cases
from tests.harness import DTYPES, checks, fused_projection, heads_first, runners

SURFACE = {"rms_norm": "(x, weight, eps=1e-06, *, weight_offset=0.0, out=None)"}


@pytest.mark.parametrize("check", checks(OP, cases), ids=str)
def test_op(check):
    check()


@pytest.mark.parametrize("runner", runners(OP), ids=lambda runner: runner.name)
@pytest.mark.parametrize("layout", [fused_projection, heads_first])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads(runner, layout, dtype):
    """Queries and keys (B, T, H, K) as a fused projection leaves them, each head normalised apart."""
    if runner.why_not:
        pytest.skip(runner.why_not)
    options = {"device": runner.device, "layout": layout}
    with runner.selected():
        for shape in ((2, 3, 4, 33), (1, 5, 2, 64)):
            for verdict in verify(OP, cases, runner.implementation, shape, dtype, **options):
                assert verdict.right, f"{shape}: {verdict}"


def test_heads_are_not_copied():
    """Reading the queries of a fused projection takes no memory but the result's."""
    qkv, weight = torch.randn(64, 8, 3, 16, 64), torch.ones(64)
    with torch.profiler.profile(profile_memory=True) as profile:
        rms_norm(qkv[:, :, 0], weight)
    allocated = sum(event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0)
    assert allocated == qkv[:, :, 0].numel() * 4
