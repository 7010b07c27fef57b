"""Fused kernels for FedRot-LoRA: importing this package gives ``torch.ops.fedrot.*``."""

from __future__ import annotations

from fedrot_kernels import backends, rspace
from fedrot_kernels.checks import ALIGN_MODES
from fedrot_kernels.ops import align, align_aggregate, combine, gram, polar
from fedrot_kernels.plan import Plan

__all__ = [
    "ALIGN_MODES",
    "Plan",
    "__version__",
    "align",
    "align_aggregate",
    "combine",
    "gram",
    "polar",
    "rspace",
]
__version__ = "0.1.0"

backends.register()
