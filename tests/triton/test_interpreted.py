"""What the tests of each op do not reach in the Triton kernels: long rows, and the pieces that the kernels share."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from llmsys import env  # noqa: E402
from llmsys.ops._activation_triton import exp_negative  # noqa: E402
from llmsys.ops._triton import load, store  # noqa: E402
from llmsys.ops._verify import verify  # noqa: E402
from llmsys.ops.add_rms_norm import OP, cases  # noqa: E402
from llmsys.ops.group_norm import OP as GROUP_NORM, cases as group_norm_cases  # noqa: E402
from llmsys.ops.swiglu import triton_kernels as swiglu  # noqa: E402

DEVICE = "cpu" if env.triton_interpreted() else "cuda"


@triton.jit
def convert_kernel(source_ptr, result_ptr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    store(result_ptr + index, load(source_ptr + index, index >= 0), index >= 0)


@triton.jit
def exp_kernel(x_ptr, result_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(result_ptr + index, exp_negative(tl.load(x_ptr + index)))


def converted(source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    result = torch.empty(source.shape, dtype=dtype, device=DEVICE)
    convert_kernel[(source.numel() // 4096,)](source.to(DEVICE), result, 4096)
    return result.cpu()


def test_every_bfloat16_is_read_as_it_is():
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    torch.testing.assert_close(converted(every, torch.float32), every.float(), rtol=0, atol=0, equal_nan=True)


def test_bfloat16_is_rounded_to_nearest_even():
    """Every upper half of a float32, with lower halves around the tie."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    for lower in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (upper | lower).view(torch.float32)
        torch.testing.assert_close(converted(values, torch.bfloat16), values.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_exp_is_within_two_ulp():
    x = -torch.linspace(0, 87, 2**16, dtype=torch.float64).float()
    result = torch.empty(x.shape, device=DEVICE)
    exp_kernel[(1,)](x.to(DEVICE), result, x.numel())
    true = x.double().exp()
    ulp = torch.exp2(true.log2().floor() - 23)
    assert ((result.cpu().double() - true).abs() / ulp).max() <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(5, 4097), (9, 5120), (3, 8192), (3, 16400), (2, 40000)], ids=str)
def test_long_rows(shape, dtype):
    """Read again after the sum, or looped over: lengths on both sides of what fits in registers."""
    for verdict in verify(OP, cases, "triton", shape, dtype, device=DEVICE):
        assert verdict.right, verdict


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 6, 9000), (2, 6, 4100), (1, 70, 300)], ids=str)
def test_groups_of_several_tiles(shape, dtype):
    """A channel in several, and several channels."""
    for offset in (0.0, 300.0):
        for verdict in verify(GROUP_NORM, group_norm_cases, "triton", shape, dtype, device=DEVICE, offset=offset):
            assert verdict.right, verdict


def test_swiglu_vanishes_far_below_zero():
    """Where exp underflows, so does the result, and no NaN arises."""
    gate = torch.tensor([-104.0, -120.0, -1e4, -3e38, 3e38], device=DEVICE)
    one = torch.ones_like(gate)
    assert swiglu.forward(gate, one).abs().tolist()[:4] == [0.0, 0.0, 0.0, 0.0]
    dgate, dup = swiglu.backward(one, gate, one)
    assert dgate.tolist() == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert dup.isfinite().all()
