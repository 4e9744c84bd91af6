import mmap

from llmsys.train.peak_memory import PeakMemory

PAGES = 16_384  # 64 MiB


def touch_and_give_back():
    with mmap.mmap(-1, PAGES * 4096) as memory:  # straight from the system: no allocator keeps it
        for page in range(PAGES):
            memory[page * 4096] = 1


def test_sees_what_was_held_and_given_back():
    touch_and_give_back()
    memory = PeakMemory()
    before = memory.extra_bytes()
    touch_and_give_back()
    assert before < 2 << 20  # the kernel counts in batches per thread: proc(5)
    assert abs(memory.extra_bytes() - (64 << 20)) < 2 << 20
