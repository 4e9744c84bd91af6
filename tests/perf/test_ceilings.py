import pytest
import torch

from llmsys.perf import ceilings


@pytest.fixture
def small(monkeypatch):
    """Buffers of 64 MiB and GEMMs of 64: what is tested is the bookkeeping, not the figures."""
    monkeypatch.setattr(ceilings, "last_level_cache_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(ceilings, "TRIES", 2)
    monkeypatch.setattr(ceilings, "GEMM_SHAPES", ((64, 64, 64), (32, 64, 128)))
    ceilings._bandwidth.cache_clear()
    ceilings._gemm_rate.cache_clear()
    yield
    ceilings._bandwidth.cache_clear()
    ceilings._gemm_rate.cache_clear()


def test_bandwidth_is_the_best_way_and_cached(small):
    measured = ceilings.bandwidth()
    for kind in ("read", "write", "copy"):
        rates = [rate for way, rate in measured.ways.items() if way.startswith(f"{kind}:")]
        assert len(rates) >= 1
        assert getattr(measured, kind) == max(rates) > 0
    assert ceilings.bandwidth() is measured


def test_libc_ways_touch_every_byte():
    source = torch.arange(100_003, dtype=torch.int32)
    target = torch.full_like(source, -1)
    ways = ceilings._libc_ways(source, target)
    ways["copy: libc memmove"]()
    assert torch.equal(source, target)
    ways["write: libc memset"]()
    assert not target.any()


@pytest.mark.skipif(ceilings._native_cpu() is None, reason="llmsys._C is not built")
def test_native_ways_touch_every_byte():
    source = torch.randint(0, 255, (3 * ceilings.NATIVE_BLOCK_BYTES,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    ways = ceilings._native_ways(source, target)
    ways["copy: native"]()
    assert torch.equal(source, target)
    ways["write: native"]()
    assert not target.any()


def test_copier_owns_its_buffers():
    copy = ceilings.copier(3 << 20)
    others = [torch.zeros(3 << 19, dtype=torch.uint8) for _ in range(8)]
    copy()
    assert not any(other.any() for other in others), "it must not write where memory has a new owner"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemm_rate(small, dtype):
    assert 1e6 < ceilings.gemm_rate(dtype) < 1e15


def test_gemm_rate_refuses_integers():
    with pytest.raises(ValueError, match="int64, expected a floating-point dtype"):
        ceilings.gemm_rate(torch.int64)
