"""Fused kernels for FedRot-LoRA: importing this package gives ``torch.ops.fedrot.*``."""

from __future__ import annotations

from fedrot_kernels import backends
from fedrot_kernels.ops import align, align_aggregate, polar
from fedrot_kernels.plan import Plan

__all__ = ["__version__", "Plan", "align", "align_aggregate", "polar"]
__version__ = "0.1.0"

backends.register()
