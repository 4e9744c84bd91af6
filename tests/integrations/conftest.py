"""Settings of the tests that train tiny models."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models: threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
