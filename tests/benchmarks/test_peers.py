"""Every peer that can run here computes the op it stands beside; the others say why they cannot."""

import pytest
import torch

from benchmarks import peers
from benchmarks.gate import tensors
from benchmarks.peers import Peer
from llmsys.ops._op import get

OPS = {"rms_norm": peers.RMS_NORM, "add_rms_norm": peers.ADD_RMS_NORM, "swiglu": peers.SWIGLU, "rope": peers.ROPE}
ARGS = {
    "rms_norm": lambda x: (x[0], x[1, 0], 1e-6, 0.0),
    "add_rms_norm": lambda x: (x[0], x[1], x[2, 0], 1e-6, 0.0),
    "swiglu": lambda x: (x[0], x[1]),
    "rope": lambda x: (x[None], x[:, 0, :12], x[:, 1, :12], False),
}
EVERY = [pytest.param(op, peer, id=f"{op}-{peer.name}") for op, listed in OPS.items() for peer in listed]


@pytest.mark.parametrize("op, peer", EVERY)
def test_peer_computes_the_op(op, peer):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = peer.why_not(device)
    if reason:
        pytest.skip(f"{peer.name}: {reason}")
    torch.manual_seed(0)
    args = ARGS[op](torch.randn(3, 4, 32, device=device))
    results = get(op).implementations["reference"].forward(*args)
    expected = tensors(results)[: len(tensors(peer.build()(*args)))]
    torch.testing.assert_close(tensors(peer.build()(*args)), expected)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(peers.env, "has", lambda package: package in ("torch", "apex"))
    reasons = {peer.name: peer.why_not("cpu") for peer in peers.RMS_NORM}
    assert reasons["eager"] is None
    assert reasons["apex"] == "not installed", "the unrelated PyPI package of this name has no apex.normalization"
    assert reasons["liger"] == reasons["flash-attn"] == "not installed"


def test_a_package_for_another_device_is_not_tried():
    assert Peer("gpu only", lambda: None, "torch", "cuda").why_not("cpu") == "runs on cuda only"


def test_compile_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    compiled = next(peer for peer in peers.RMS_NORM if peer.name == "torch.compile")
    assert compiled.why_not("cpu") == "no C++ compiler found"
