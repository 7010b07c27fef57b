"""What users would write without fedrot, in one place. Checked against the reference by tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def loop(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    ref_A: Sequence[Tensor],
    ref_B: Sequence[Tensor],
    weights: Tensor | None = None,
    *,
    lam: float = 0.4,
    align: str = "joint",
    proper: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """The per-layer, per-client loop of the paper's description: one SVD for the rotation and,
    for the soft rotation, a second one. Equal ranks only; arguments as ``align_aggregate``."""
    layers = len(ref_A)
    clients = len(lora_A) // layers
    w = torch.ones(clients) if weights is None else weights
    w = w / w.sum()
    out_A = [torch.zeros_like(A) for A in ref_A]
    out_B = [torch.zeros_like(B) for B in ref_B]
    for layer in range(layers):
        identity = torch.eye(ref_A[layer].shape[0])
        for i in range(clients):
            A, B = lora_A[i * layers + layer], lora_B[i * layers + layer]
            M = torch.zeros_like(identity)
            if align in ("A", "joint"):
                M = M + A @ ref_A[layer].T
            if align in ("B", "joint"):
                M = M + B.T @ ref_B[layer]
            U, _, Vh = torch.linalg.svd(M)
            if proper and torch.linalg.det(U @ Vh) < 0:
                U[:, -1] = -U[:, -1]
            R = U @ Vh
            if lam < 1:
                U, _, Vh = torch.linalg.svd((1 - lam) * identity + lam * R)
                R = U @ Vh
            out_A[layer] += w[i] * (R.T @ A)
            out_B[layer] += w[i] * (B @ R)
    return out_A, out_B


def batched(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    ref_A: Sequence[Tensor],
    ref_B: Sequence[Tensor],
    weights: Tensor | None = None,
    *,
    lam: float = 0.4,
    align: str = "joint",
    proper: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """The strongest form in plain PyTorch: layers of one shape stacked, ``bmm`` and one batched
    SVD per shape. Equal ranks only; arguments as ``align_aggregate``."""
    layers = len(ref_A)
    clients = len(lora_A) // layers
    w = torch.ones(clients) if weights is None else weights
    w = (w / w.sum()).view(-1, 1, 1, 1)
    out_A, out_B = list(ref_A), list(ref_B)
    groups: dict[tuple[int, int, int], list[int]] = {}
    for layer in range(layers):
        r, k = ref_A[layer].shape
        groups.setdefault((ref_B[layer].shape[0], k, r), []).append(layer)
    for (_, _, r), members in groups.items():
        A = torch.stack(
            [torch.stack([lora_A[i * layers + m] for m in members]) for i in range(clients)]
        )
        B = torch.stack(
            [torch.stack([lora_B[i * layers + m] for m in members]) for i in range(clients)]
        )
        M = torch.zeros(clients, len(members), r, r)
        if align in ("A", "joint"):
            M = M + A @ torch.stack([ref_A[m] for m in members]).mT
        if align in ("B", "joint"):
            M = M + B.mT @ torch.stack([ref_B[m] for m in members])
        U, _, Vh = torch.linalg.svd(M)
        if proper:
            U[..., -1] *= torch.linalg.det(U @ Vh).sign().unsqueeze(-1)
        R = U @ Vh
        if lam < 1:
            U, _, Vh = torch.linalg.svd((1 - lam) * torch.eye(r) + lam * R)
            R = U @ Vh
        for m, mean_A, mean_B in zip(
            members, (w * (R.mT @ A)).sum(0), (w * (B @ R)).sum(0), strict=True
        ):
            out_A[m], out_B[m] = mean_A, mean_B
    return out_A, out_B


def plain_mean(lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], layers: int) -> list[Tensor]:
    """Factor-wise uniform averaging without any alignment (FedIT), stacked per layer."""
    return [
        torch.stack(list(tensors[layer::layers])).mean(0)
        for tensors in (lora_A, lora_B)
        for layer in range(layers)
    ]
