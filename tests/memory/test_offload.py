"""Copies between the host and a device; here the device is the host."""

import torch

from llmsys.memory.offload import Ferry


def test_copies_there_and_back():
    ferry, x = Ferry(torch.device("cpu")), torch.arange(5.0)
    kept = ferry.empty(5, torch.bfloat16)
    assert kept.device.type == "cpu" and kept.shape == (5,) and kept.dtype == torch.bfloat16
    ferry.copy(kept, x).wait_on_host()
    back = torch.empty(5)
    ferry.copy(back, kept).wait_on_device()
    torch.testing.assert_close(back, x, rtol=0, atol=0)
