"""One module a backend; each only registers its implementations. Which one runs is decided here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import warnings

import torch

BACKENDS = ("cpu", "cuda", "triton", "reference")

chosen: dict[str, str] = {}
"""The backend that runs for each kind of device: ``{"cpu": "cpu", "cuda": "triton"}``."""


def register() -> None:
    """Register the backends: native kernels for CPU tensors; for CUDA (and ROCm) tensors the
    native CUDA kernels where they were built, else Triton's, which ``gram`` and ``combine`` are in
    either case; the reference everywhere else.

    The environment variable ``FEDROT_BACKEND`` forces one: ``cuda`` and ``triton`` for GPU tensors
    (``triton`` for CPU tensors too where ``TRITON_INTERPRET=1`` makes that possible),
    ``reference`` for all, ``cpu`` nothing but the CPU kernels.

    Raises:
        ValueError: ``FEDROT_BACKEND`` names no backend.
        ImportError: the backend that it names is not installed.
    """
    from fedrot_kernels.backends import cpu, reference

    forced = os.environ.get("FEDROT_BACKEND") or None
    if forced not in (None, *BACKENDS):
        raise ValueError(f"FEDROT_BACKEND must be one of {', '.join(BACKENDS)}, got {forced!r}")
    reference.register("CompositeExplicitAutograd")
    chosen.update(cpu="reference", cuda="reference")
    if forced == "reference":
        return
    if forced == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        _register_triton("cpu")
    else:
        cpu.register()
        chosen["cpu"] = "cpu"
    if forced == "cpu":
        return
    if forced == "cuda" or (forced is None and torch.version.cuda and _installed("_cuda")):
        from fedrot_kernels.backends import cuda

        cuda.register()
        chosen["cuda"] = "cuda"
        _register_blocks(triton=forced is None and _triton_is_new_enough())
    elif forced == "triton" or (torch.backends.cuda.is_built() and _triton_is_new_enough()):
        _register_triton("cuda")
    elif torch.backends.cuda.is_built() and torch.cuda.device_count():
        warnings.warn(
            "fedrot has no kernels for GPU tensors here: they run the float64 reference on the "
            "CPU. Install torch 2.9 or newer, which brings Triton 3.5, or fedrot where nvcc is "
            "found",
            stacklevel=2,
        )


def _register_triton(device_type: str) -> None:
    from fedrot_kernels.backends import triton

    triton.register(device_type.upper())
    chosen[device_type] = "triton"


def _register_blocks(*, triton: bool) -> None:
    """``gram`` and ``combine``, which the CUDA kernels lack."""
    if triton:
        from fedrot_kernels.backends.triton import register_blocks
    else:
        from fedrot_kernels.backends.matmul import register_blocks
    register_blocks("CUDA")


def _triton_is_new_enough() -> bool:
    """Triton 3.4 does not compile all of the kernels."""
    try:
        major, minor = importlib.metadata.version("triton").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (3, 5)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(f"fedrot_kernels.{module}") is not None
