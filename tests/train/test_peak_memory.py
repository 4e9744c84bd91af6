import torch

from llmsys.train.peak_memory import PeakMemory


def test_sees_what_was_held_and_given_back():
    torch.ones(96 << 18).sum()  # 96 MiB before it starts do not count
    memory = PeakMemory()
    held = torch.ones(64 << 18)
    assert held.sum() == 64 << 18
    del held
    assert abs(memory.extra_bytes() - (64 << 20)) < 2 << 20  # the kernel counts in batches per thread: proc(5)
