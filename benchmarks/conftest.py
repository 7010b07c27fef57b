"""Problems of the sizes that people have."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    name: str
    clients: int
    rank: int
    shapes: tuple[tuple[int, int], ...]  # (d, k) of each adapted layer


ROBERTA_LARGE = ((1024, 1024),) * 48  # query and value of 24 layers
LLAMA_8B_QV = ((4096, 4096), (1024, 4096)) * 32

CASES = [
    Case("roberta-large-r4-n10", 10, 4, ROBERTA_LARGE),
    Case("roberta-large-r4-n50", 50, 4, ROBERTA_LARGE),
    Case("llama-8b-qv-r8-n6", 6, 8, LLAMA_8B_QV),
    Case("llama-8b-qv-r16-n10", 10, 16, LLAMA_8B_QV),
]


def factors(case: Case, seed: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Clients near the reference, float32: ``lora_A, lora_B, ref_A, ref_B``."""
    g = torch.Generator().manual_seed(seed)
    ref_A = [torch.randn(case.rank, k, generator=g) for _, k in case.shapes]
    ref_B = [torch.randn(d, case.rank, generator=g) for d, _ in case.shapes]
    lora_A = [A + torch.randn(A.shape, generator=g) for _ in range(case.clients) for A in ref_A]
    lora_B = [B + torch.randn(B.shape, generator=g) for _ in range(case.clients) for B in ref_B]
    return lora_A, lora_B, ref_A, ref_B


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param
