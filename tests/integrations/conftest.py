"""These tests need transformers, and PEFT where they say so; without, they are skipped and say why."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models: threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
