"""The GPU backends on a GPU; without one, the checks themselves against the CPU backend."""

from __future__ import annotations

import importlib

import pytest
import torch
from gpu_checks import NAN_ON_A_GPU, checks

from fedrot_kernels.backends import cpu

FULL = dict(checks(full=True))
ON_THE_CPU = {n: c for n, c in checks(full=False) if not n.startswith(NAN_ON_A_GPU)}

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@needs_gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", FULL)
def test_on_a_gpu(name, backend):
    FULL[name](importlib.import_module(f"fedrot_kernels.backends.{backend}"), "cuda")


@pytest.mark.parametrize("name", ON_THE_CPU)
def test_the_checks_hold_for_the_cpu(name):
    ON_THE_CPU[name](cpu, "cpu")
