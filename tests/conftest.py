"""Shared by all tests."""

import os

# Read when torch is loaded, also by the processes that tests start: a thread that waits for another
# sleeps. By default it spins, which on cores that are shared takes most of the time of all tests.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(scope="module")
def one_thread():
    """For problems so small that a second thread costs more than it gives.

    For a whole module, so that its fixtures train on as many threads as its tests: on some machines
    two threads round otherwise than one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
