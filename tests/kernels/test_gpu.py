"""The GPU backends on a GPU; without one, the checks themselves against the CPU backend."""

from __future__ import annotations

import importlib

import pytest
import torch
from gpu_checks import NAN_ON_A_GPU, block_checks, checks

from fedrot_kernels.backends import cpu, matmul

FULL, FULL_BLOCKS = dict(checks(full=True)), dict(block_checks(full=True))
BLOCKS = dict(block_checks(full=False))
SMALL = {**dict(checks(full=False)), **BLOCKS}
ON_THE_CPU = {name: check for name, check in SMALL.items() if not name.startswith(NAN_ON_A_GPU)}

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@needs_gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", FULL)
def test_on_a_gpu(name, backend):
    FULL[name](importlib.import_module(f"fedrot_kernels.backends.{backend}"), "cuda")


@needs_gpu
@pytest.mark.parametrize("backend", ["triton", "matmul"])
@pytest.mark.parametrize("name", FULL_BLOCKS)
def test_blocks_on_a_gpu(name, backend):
    FULL_BLOCKS[name](importlib.import_module(f"fedrot_kernels.backends.{backend}"), "cuda")


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_by_matrix_products(name):
    BLOCKS[name](matmul, "cpu")


@pytest.mark.parametrize("name", ON_THE_CPU)
def test_the_checks_hold_for_the_cpu(name):
    ON_THE_CPU[name](cpu, "cpu")
