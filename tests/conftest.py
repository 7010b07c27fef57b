"""Shared by all tests."""

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture
def one_thread():
    """For problems so small that a second thread costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
