"""Every peer that can run here computes the op it stands beside; the others say why they cannot."""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch

from benchmarks import peers
from benchmarks.gate import copied, tensors
from benchmarks.peers import Peer
from llmsys.ops._op import get
from llmsys.perf.cli import Checkout

BENCHES = [Checkout().bench(name) for name in Checkout().ops()]
EVERY = [pytest.param(bench.op, peer, id=f"{bench.op}-{peer.name}") for bench in BENCHES for peer in bench.peers]


def computed(op: str, function: Callable, args: tuple) -> list[torch.Tensor]:
    """What `function` returns, and what it writes where the op does, from copies of `args`."""
    args = copied(args)
    return tensors(function(*args)) + tensors([args[i] for i in get(op).written])


@pytest.mark.parametrize("op, peer", EVERY)
def test_peer_computes_the_op(op, peer):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = peer.why_not(device)
    if reason:
        pytest.skip(f"{peer.name}: {reason}")
    cases = import_module(f"llmsys.ops.{op}.cases")
    args = cases.inputs(cases.SMALL[-1], torch.float32, device)
    found = computed(op, peer.build(), args)
    expected = computed(op, get(op).implementations["reference"].forward, args)[: len(found)]
    assert found
    if op == "dropout":  # the mask comes from another generator: what both keep is the same
        kept = [(ours != 0) & (theirs != 0) for ours, theirs in zip(expected, found, strict=True)]
        assert all(mask.any() for mask in kept)
        expected, found = ([t[mask] for t, mask in zip(ts, kept, strict=True)] for ts in (expected, found))
    torch.testing.assert_close(found, expected)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(peers.env, "has", lambda package: package in ("torch", "apex"))
    reasons = {peer.name: peer.why_not("cpu") for peer in (*peers.torch_peers(lambda x: x), *peers.RMS_NORM)}
    assert reasons["eager"] is None
    assert reasons["apex"] == "not installed", "the unrelated PyPI package of this name has no apex.normalization"
    assert reasons["liger"] == reasons["flash-attn"] == "not installed"


def test_a_package_for_another_device_is_not_tried():
    assert Peer("gpu only", lambda: None, "torch", "cuda").why_not("cpu") == "runs on cuda only"


def test_compile_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    _, compiled = peers.torch_peers(lambda x: x)
    assert compiled.why_not("cpu") == "no C++ compiler found"
