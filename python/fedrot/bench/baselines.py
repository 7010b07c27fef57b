"""What users would write without fedrot, each form in one place; tests check them against the
reference. Equal ranks only; arguments, results and dtypes as for ``align_aggregate``: narrow
factors are computed with in float32, as the operator does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedrot.errors import first_line

Tensors = Sequence[Tensor]
Means = tuple[list[Tensor], list[Tensor]]


def loop(
    lora_A: Tensors,
    lora_B: Tensors,
    ref_A: Tensors,
    ref_B: Tensors,
    weights: Tensor | None = None,
    *,
    lam: float = 0.4,
    align: str = "joint",
    proper: bool = True,
) -> Means:
    """The per-layer, per-client loop of the paper's description: one SVD for the rotation and
    another for the soft rotation."""
    layers, clients = len(ref_A), len(lora_A) // len(ref_A)
    w = _normalised(weights, clients, ref_A[0])
    out_A, out_B = [], []
    for layer in range(layers):
        A_ref, B_ref = _wide(ref_A[layer]), _wide(ref_B[layer])
        mean_A, mean_B = torch.zeros_like(A_ref), torch.zeros_like(B_ref)
        for i in range(clients):
            A, B = _wide(lora_A[i * layers + layer]), _wide(lora_B[i * layers + layer])
            M = torch.zeros_like(A_ref[:, : len(A_ref)])
            if align in ("A", "joint"):
                M = M + A @ A_ref.T
            if align in ("B", "joint"):
                M = M + B.T @ B_ref
            R = _soft_rotation(M, lam, proper)
            mean_A += w[i] * (R.T @ A)
            mean_B += w[i] * (B @ R)
        out_A.append(mean_A.to(ref_A[layer].dtype))
        out_B.append(mean_B.to(ref_B[layer].dtype))
    return out_A, out_B


def per_layer(
    lora_A: Tensors,
    lora_B: Tensors,
    ref_A: Tensors,
    ref_B: Tensors,
    weights: Tensor | None = None,
    *,
    lam: float = 0.4,
    align: str = "joint",
    proper: bool = True,
) -> Means:
    """The clients of a layer concatenated along the rank, so that covariance and apply are one
    product a layer and stay in cache; the SVDs of all layers in one batch. Layers of one rank."""
    layers, clients = len(ref_A), len(lora_A) // len(ref_A)
    r = ref_A[0].shape[0]
    w = _normalised(weights, clients, ref_A[0]).view(-1, 1, 1)
    A = [_wide(torch.cat(list(lora_A[layer::layers]))) for layer in range(layers)]  # (N r, k)
    B = [_wide(torch.cat(list(lora_B[layer::layers]), 1)) for layer in range(layers)]  # (d, N r)
    terms = []
    if align in ("A", "joint"):
        terms.append(torch.stack([X @ _wide(ref).T for X, ref in zip(A, ref_A, strict=True)]))
    if align in ("B", "joint"):
        terms.append(torch.stack([X.T @ _wide(ref) for X, ref in zip(B, ref_B, strict=True)]))
    M = torch.stack(terms).sum(0).view(layers, clients, r, r)
    R = (w * _soft_rotation(M, lam, proper)).view(layers, clients * r, r)
    out_A = [(R[layer].T @ X).to(ref_A[layer].dtype) for layer, X in enumerate(A)]
    out_B = [(X @ R[layer]).to(ref_B[layer].dtype) for layer, X in enumerate(B)]
    return out_A, out_B


def _aligned_means(
    A: Tensor,  # (L, N, r, k)
    B: Tensor,  # (L, N, d, r)
    ref_A: Tensor,  # (L, r, k)
    ref_B: Tensor,  # (L, d, r)
    w: Tensor,  # (N, 1, 1)
    lam: float,
    align: str,
    proper: bool,
) -> tuple[Tensor, Tensor]:
    dtype_A, dtype_B = ref_A.dtype, ref_B.dtype
    A, B, ref_A, ref_B = _wide(A), _wide(B), _wide(ref_A), _wide(ref_B)
    M = A.new_zeros(())
    if align in ("A", "joint"):
        M = M + (A.flatten(1, 2) @ ref_A.mT).unflatten(1, A.shape[1:3])
    if align in ("B", "joint"):
        M = M + B.mT @ ref_B.unsqueeze(1)
    R = w * _soft_rotation(M, lam, proper)
    mean_A = R.flatten(1, 2).mT @ A.flatten(1, 2)
    mean_B = (B @ R).sum(1)
    return mean_A.to(dtype_A), mean_B.to(dtype_B)


def stacked(
    lora_A: Tensors,
    lora_B: Tensors,
    ref_A: Tensors,
    ref_B: Tensors,
    weights: Tensor | None = None,
    *,
    lam: float = 0.4,
    align: str = "joint",
    proper: bool = True,
    core: Callable[..., tuple[Tensor, Tensor]] = _aligned_means,
) -> Means:
    """Layers of one shape stacked: batched products and one batch of SVDs a shape."""
    layers, clients = len(ref_A), len(lora_A) // len(ref_A)
    w = _normalised(weights, clients, ref_A[0]).view(-1, 1, 1)
    out_A, out_B = list(ref_A), list(ref_B)
    groups: dict[tuple[int, int, int], list[int]] = {}
    for layer in range(layers):
        groups.setdefault((len(ref_B[layer]), *ref_A[layer].shape), []).append(layer)
    for (d, r, k), members in groups.items():
        order = [i * layers + m for m in members for i in range(clients)]
        A = torch.stack([lora_A[j] for j in order]).view(len(members), clients, r, k)
        B = torch.stack([lora_B[j] for j in order]).view(len(members), clients, d, r)
        refs = (torch.stack([ref[m] for m in members]) for ref in (ref_A, ref_B))
        means_A, means_B = core(A, B, *refs, w, lam, align, proper)
        for m, mean_A, mean_B in zip(members, means_A, means_B, strict=True):
            out_A[m], out_B[m] = mean_A, mean_B
    return out_A, out_B


def compiled() -> Callable[..., Means]:
    """:func:`stacked` with everything behind the stacking under ``torch.compile``; a fresh one
    for each case, since each compiles for its own shapes."""
    torch._dynamo.reset()
    return functools.partial(
        stacked, core=torch.compile(_aligned_means, dynamic=False, fullgraph=True)
    )


def compiler_missing() -> str | None:
    """Why ``torch.compile`` does not work here; ``None`` where it does."""
    try:
        torch.compile(torch.square)(torch.ones(2))
    except Exception as error:  # whatever the compiler at hand may raise
        return f"torch.compile does not work here: {first_line(error)}"
    return None


def mean(lora_A: Tensors, lora_B: Tensors, ref_A: Tensors, ref_B: Tensors) -> Means:
    """Factor-wise uniform averaging without any alignment (FedIT): stack and mean by layer."""
    layers = len(ref_A)
    out_A, out_B = (
        [torch.stack(list(tensors[layer::layers])).mean(0) for layer in range(layers)]
        for tensors in (lora_A, lora_B)
    )
    return out_A, out_B


def foreach_mean(lora_A: Tensors, lora_B: Tensors, ref_A: Tensors, ref_B: Tensors) -> Means:
    """The same with one running sum and the private ``torch._foreach`` calls that optimisers
    use, which copy nothing. Rounds at every step: for float32 and float64 only."""
    layers = len(ref_A)
    sums = []
    for tensors in (lora_A, lora_B):
        total = [t.clone() for t in tensors[:layers]]
        for start in range(layers, len(tensors), layers):
            torch._foreach_add_(total, list(tensors[start : start + layers]))
        torch._foreach_mul_(total, layers / len(tensors))
        sums.append(total)
    return sums[0], sums[1]


def truncate_dense(A: Tensor, B: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """FlexLoRA's exact truncation of one layer: SVD of the dense ``sum_i w_i B_i A_i``.

    ``A`` ``(N, r, k)``, ``B`` ``(N, d, r)``, ``weights`` ``(N,)`` of sum 1; returns the best
    factors of rank ``r``, ``(r, k)`` and ``(d, r)``.
    """
    clients, r, k = A.shape
    wide_B = (weights.view(-1, 1, 1) * B).transpose(0, 1).reshape(-1, clients * r)
    U, S, Vh = torch.linalg.svd(wide_B @ A.reshape(clients * r, k), full_matrices=False)
    return Vh[:r], U[:, :r] * S[:r]


def truncate_qr(A: Tensor, B: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The same without a ``(d, k)`` matrix: QR of the stacked factors, SVD of the small core."""
    clients, r, k = A.shape
    wide_B = (weights.view(-1, 1, 1) * B).transpose(0, 1).reshape(-1, clients * r)
    Q_B, R_B = torch.linalg.qr(wide_B)
    Q_A, R_A = torch.linalg.qr(A.reshape(clients * r, k).T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Vh[:r] @ Q_A.T, Q_B @ (U[:, :r] * S[:r])


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _normalised(weights: Tensor | None, clients: int, like: Tensor) -> Tensor:
    """The weights, uniform for ``None``, with sum 1."""
    w = torch.ones(clients, device=like.device) if weights is None else weights
    w = _wide(w.to(torch.float64 if like.dtype == torch.float64 else torch.float32))
    return w / w.sum()


def _soft_rotation(M: Tensor, lam: float, proper: bool) -> Tensor:
    """``polar((1 - lam) I + lam polar(M))`` of ``M`` ``(..., r, r)`` by two SVDs."""
    U, _, Vh = torch.linalg.svd(M)
    if proper:
        sign = det_sign(U @ Vh)
        U = torch.cat([U[..., :-1], U[..., -1:] * sign[..., None, None]], -1)
    R = U @ Vh
    if lam < 1:
        identity = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
        U, _, Vh = torch.linalg.svd((1 - lam) * identity + lam * R)
        R = U @ Vh
    return R


def det_sign(M: Tensor) -> Tensor:
    """The sign of each determinant; large matrices one by one, since PyTorch's batched LU on
    several threads hangs there (pytorch issue 142815)."""
    if M.shape[-1] <= 128:
        return torch.linalg.det(M).sign()
    signs = [torch.linalg.det(matrix).sign() for matrix in M.flatten(0, -3)]
    return torch.stack(signs).view(M.shape[:-2])
