"""How far to turn: soft rotations, and the ``lam`` of least aggregation error."""

from __future__ import annotations

import torch
from torch import Tensor

from fedrot_kernels.checks import check_fraction
from fedrot_kernels.rspace.blocks import Blocks, least, times

AUTO = ("auto", "auto-client")
"""What ``lam`` may be instead of a number."""


def soften(R: Tensor, lam: float | Tensor, *, proper: bool = True) -> Tensor:
    """``polar((1 - lam) I + lam R)`` of rotations ``(..., r, r)``; ``lam`` broadcasts against
    them."""
    if isinstance(lam, float) and lam == 1.0:
        return R
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    return torch.ops.fedrot.polar((1 - lam) * eye + lam * R, proper=proper)


def found_lam(blocks: Blocks, R: Tensor, lam: str, *, proper: bool = True) -> Tensor:
    """What ``lam`` of ``AUTO`` stands for: :func:`auto_lam` as ``(L, 1)``, or :func:`client_lam`
    ``(L, N)``."""
    if lam == "auto-client":
        return client_lam(blocks, R, proper=proper)
    return auto_lam(blocks, R, proper=proper)[:, None]


def auto_lam(blocks: Blocks, R: Tensor, *, proper: bool = True) -> Tensor:
    """``lam`` ``(L,)`` in [0, 1], to about 0.01, that minimises the aggregation error of
    ``soften(R, lam)`` in each layer: the best of six, and of its neighbours at half the distance,
    four times. 0 and 1 are among them, so neither is better. Errors are compared in float64: near
    clients differ little beside what they have in common."""
    wide = blocks.double()
    grid = torch.linspace(0, 1, 6, dtype=R.dtype, device=R.device)
    best, error = _best_lam(wide, R, grid.expand(len(R), -1), proper)
    around = torch.tensor([-0.2, 0.2], dtype=R.dtype, device=R.device)
    for halving in range(1, 5):
        grid = (best[:, None] + around / 2**halving).clamp(0, 1)
        lam, found = _best_lam(wide, R, grid, proper)
        best, error = torch.where(found < error, lam, best), torch.minimum(found, error)
    return best


def _best_lam(blocks: Blocks, R: Tensor, grid: Tensor, proper: bool) -> tuple[Tensor, Tensor]:
    """Of ``grid`` ``(L, C)`` the one of least error in each layer, the first of equals, and its
    ``excess``."""
    # Rounded as the result will be: at lam = 1/2 a polar factor may hang on that.
    candidates = turned(R[:, None], grid[:, :, None], proper=proper).double()
    best, error = least(blocks, candidates)
    return grid.gather(1, best[:, None]).squeeze(1), error


def turned(R: Tensor, lam: Tensor, *, proper: bool = True) -> Tensor:
    """``soften`` for ``lam`` one dimension pair short of ``R``, and exactly ``I`` and ``R`` at the
    ends, which ``polar`` would round."""
    lam = lam[..., None, None]
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    soft = soften(R, lam, proper=proper)
    return torch.where(lam == 1, R, torch.where(lam == 0, eye, soft))


def client_lam(blocks: Blocks, R: Tensor, *, proper: bool = True) -> Tensor:
    """``lam`` ``(L, N)`` in [0, 1] of every client in each layer, for less aggregation error than
    one for all of them, :func:`auto_lam`, from which it starts.

    Coordinate descent: one client after the other gets the best of its own and six others, until
    none changes, at most four times; then of its neighbours at half the distance, four times. A
    minimum with respect to each client alone, not over all. In float64; a layer in which the error
    is not below that of one ``lam`` for all keeps that.
    """
    layers, clients, _ = blocks.shape
    one = auto_lam(blocks, R, proper=proper)[:, None].expand(-1, clients)
    descent = _Descent(blocks.double(), R.double(), one.double(), proper)
    for _ in range(4):
        before = descent.lam
        descent.sweep(
            torch.linspace(0, 1, 6, dtype=torch.float64, device=R.device).expand(
                layers, clients, -1
            )
        )
        if torch.equal(before, descent.lam):
            break
    around = torch.tensor([-0.2, 0.2], dtype=torch.float64, device=R.device)
    for halving in range(1, 5):
        descent.sweep((descent.lam[..., None] + around / 2**halving).clamp(0, 1))
    found = descent.lam.to(R.dtype)
    errors = [blocks.error_square(turned(R, lam, proper=proper)) for lam in (found, one)]
    return torch.where((errors[0] < errors[1])[:, None], found, one)


class _Descent:
    """The average as it is, and what becomes of its error if one client turns otherwise.

    For client ``i`` with ``V = w_i R_i``, and ``U`` the others', ``X = G_A U``, ``Y = G_B U``:

        B^T B = U^T Y + V^T Y_i + Y_i^T V + V^T G_B,ii V,        so for A A^T with X, G_A,
        <D, B A> = <Y, W X> + <V, G_B,i W X + G_A,i W Y> + <V, (G_B W G_A)_ii V>

    where a lone index takes the ``r`` rows of a client. Candidates cost ``r x r`` products each.
    """

    def __init__(self, blocks: Blocks, R: Tensor, lam: Tensor, proper: bool) -> None:
        self.blocks, self.R, self.lam, self.proper = blocks, R, lam.clone(), proper
        self.at = turned(R, lam, proper=proper)
        size, r = blocks.A.shape[1], R.shape[-1]
        both = blocks.B @ blocks.weighted(blocks.A)
        self.own = [both[:, i : i + r, i : i + r] for i in range(0, size, r)]

    def sweep(self, others: Tensor) -> None:
        """Let every client in turn have the best of its ``lam`` and ``others`` ``(L, N, C)``; of
        equals its own."""
        grid = torch.cat([self.lam[..., None], others], 2)
        candidates = turned(self.R[:, :, None], grid, proper=self.proper)
        candidates[:, :, 0] = self.at
        U = self.blocks.stacked(self.at)
        X, Y = times(self.blocks.A, U), times(self.blocks.B, U)
        P, Q = U.mT @ Y, U.mT @ X
        lam, at = self.lam.clone(), self.at.clone()
        for i, weight in enumerate(self.blocks.weights.tolist()):
            best, X, Y, P, Q = self._turn(i, weight * candidates[:, i], X, Y, P, Q)
            lam[:, i] = grid[:, i].gather(1, best[:, None]).squeeze(1)
            at[:, i] = candidates[torch.arange(len(best)), i, best]
        self.lam, self.at = lam, at

    def _turn(
        self, i: int, V: Tensor, X: Tensor, Y: Tensor, P: Tensor, Q: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Which of ``V`` ``(L, C, r, r)``, the first being the present one, is best for client
        ``i``; then ``X``, ``Y``, ``P = B^T B`` and ``Q = A A^T`` with that."""
        blocks, r = self.blocks, V.shape[-1]
        rows = slice(i * r, (i + 1) * r)
        G_A, G_B = blocks.A[:, rows], blocks.B[:, rows]  # (L, r, S)
        X, Y = X - G_A.mT @ V[:, 0], Y - G_B.mT @ V[:, 0]
        T = G_B @ blocks.weighted(X) + G_A @ blocks.weighted(Y)
        grown = []
        for G, others, sum_of_all in ((G_B, Y, P), (G_A, X, Q)):
            cross = V.mT @ others[:, None, rows]
            change = cross + cross.mT + V.mT @ G[:, None, :, rows] @ V
            grown.append(sum_of_all[:, None] - change[:, :1] + change)
        pull = (V * (T[:, None] + self.own[i][:, None] @ V)).sum((2, 3))
        excess = (grown[0] * grown[1]).sum((2, 3)) - 2 * pull
        best = excess.argmin(1)
        layers = torch.arange(len(best))
        X, Y = X + G_A.mT @ V[layers, best], Y + G_B.mT @ V[layers, best]
        return best, X, Y, grown[0][layers, best], grown[1][layers, best]


def check_lam(lam: float | str) -> None:
    """Raise ValueError unless ``lam`` is in [0, 1] or of ``AUTO``, TypeError where it is neither a
    number nor a name."""
    if isinstance(lam, str):
        if lam not in AUTO:
            raise ValueError(
                f"lam must be a number or auto, got {lam!r} (auto-client: one for every client)"
            )
    else:
        check_fraction("lam", lam)
