"""``gram`` and ``combine`` by PyTorch's matrix products, where there is no kernel for them: one
product a layer, from factors that are widened and stacked first. Reads no values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedrot_kernels.checks import check, check_mix
from fedrot_kernels.ops import implement


def gram(lora_A, lora_B, ref_A, ref_B) -> tuple[Tensor, Tensor]:
    problem = check(lora_A, lora_B, ref_A, ref_B, None, 0.0, "joint")
    layers = problem.layers
    blocks_A, blocks_B = [], []
    for layer in range(layers):
        rows = _wide([*lora_A[layer::layers], ref_A[layer]], problem.compute_dtype)
        columns = _wide([*lora_B[layer::layers], ref_B[layer]], problem.compute_dtype)
        A = torch.cat([pad(t, (0, 0, 0, problem.rank - t.shape[0])) for t in rows])
        B = torch.cat([pad(t, (0, problem.rank - t.shape[1])) for t in columns], 1)
        blocks_A.append(_symmetric(A @ A.mT))
        blocks_B.append(_symmetric(B.mT @ B))
    return torch.stack(blocks_A), torch.stack(blocks_B)


def combine(lora_A, lora_B, ref_A, ref_B, mix_A, mix_B) -> tuple[list[Tensor], list[Tensor]]:
    problem = check(lora_A, lora_B, ref_A, ref_B, None, 0.0, "joint")
    layers, dtype = problem.layers, problem.compute_dtype
    shape = (layers, problem.clients, problem.rank, problem.rank)
    check_mix(shape, dtype, problem.device, mix_A, mix_B)
    A, B = [], []
    for layer, (_, _, r) in enumerate(problem.shapes):
        ranks = problem.ranks[layer::layers]
        rows = torch.cat(_wide(lora_A[layer::layers], dtype))
        columns = torch.cat(_wide(lora_B[layer::layers], dtype), 1)
        left, right = (
            torch.cat([mix[layer, i, :r_i, :r] for i, r_i in enumerate(ranks)])
            for mix in (mix_A, mix_B)
        )
        A.append((left.mT @ rows).to(problem.out_dtype))
        B.append((columns @ right).to(problem.out_dtype))
    return A, B


def _wide(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype) for t in tensors]


def _symmetric(G: Tensor) -> Tensor:
    """To the bit: a product of transposes is so to rounding only."""
    lower = G.tril()
    return lower + lower.tril(-1).mT


def register_blocks(dispatch_key: str) -> None:
    """Make this the implementation of both for one dispatch key."""
    for function in (gram, combine):
        implement(function.__name__, dispatch_key, function)
