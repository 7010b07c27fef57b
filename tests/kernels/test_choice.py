"""Which backend runs, and what is said where none does."""

from __future__ import annotations

import subprocess
import sys

import pytest

# A build of torch for GPUs with the Triton of torch 2.6 beside it, and no nvcc at install.
NO_KERNELS = """
import importlib.metadata, torch
torch.backends.cuda.is_built = lambda: True
torch.cuda.device_count = lambda: {gpus}
torch.version.cuda = None
importlib.metadata.version = lambda name: "3.2.0"
import fedrot_kernels.backends
assert fedrot_kernels.backends.chosen == {{"cpu": "cpu", "cuda": "reference"}}
"""


@pytest.mark.parametrize("gpus", [0, 1])
def test_missing_gpu_kernels_are_said_where_there_is_a_gpu(gpus):
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-W",
            "default:fedrot",
            "-c",
            NO_KERNELS.format(gpus=gpus),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert ("fedrot has no kernels for GPU tensors here" in done.stderr) == bool(gpus)
