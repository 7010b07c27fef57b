"""Averages that a few bad clients cannot spoil, taken in aligned coordinates.

Rules that compare clients coordinate by coordinate suppose that coordinate 3 means the same for all
of them. For LoRA factors it does so only after the rotation: two honest clients with one product
``B_i A_i`` in two bases look like outliers to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from fedrot.factors import HUGE, Factors, largest, naming_layers, within_range
from fedrot.methods.base import Method, arguments, average, checked_weights, normalised, wide
from fedrot_kernels import ALIGN_MODES, rspace

T = TypeVar("T")
WITHSTANDS = ("trimmed", "krum", "multi-krum")  # a number of bad clients
ONE_VOTE = ("median", "trimmed", "krum")  # whatever a client's weight
RULES = ("median", *WITHSTANDS, "clip")


@dataclass(frozen=True)
class Robust(Method):
    """Rotate each client toward the reference, then combine by a rule that outliers cannot move.

    ``rule``, with ``f`` = ``attackers``, the number of bad clients to withstand (1 for ``None``):

    - ``"median"`` of every coordinate, ``"trimmed"``: its mean without the ``f`` largest and the
      ``f`` smallest values (arXiv 1803.01498).
    - ``"krum"``: the one client that is closest to its ``N - f - 2`` nearest others,
      ``"multi-krum"``: the mean of the ``N - f`` best by that score (arXiv 1703.02757). Distances
      are ``||B_i A_i - B_j A_j||_F``, the same in any basis. Both need ``2 f + 3`` clients: of
      fewer, bad ones that send the same are each other's nearest and win.
    - ``"clip"``: the mean of the changes of the reference, none longer than ``bound``; 0 stands for
      the median of their lengths (norm clipping, arXiv 1911.07963).

    ``"multi-krum"`` and ``"clip"`` average with the clients' weights. The others give every client
    one vote, since a weight is as easily forged as an update; one of weight 0 has none.

    What lies beside the factors (a trained head, biases) is combined by the same rule, as one more
    vector that needs no rotation: Krum may take it from another client, and it is clipped to a
    length of its own.

    ``lam``, ``align``, ``proper``: as for FedRot-LoRA. ``lam`` is 1: what a soft rotation leaves of
    the bases' difference would count as disagreement, and so would a reflection, so ``proper`` is
    false. ``align="gpa"`` and ``"optimal"``, which take their target from all clients, are not for
    this.
    """

    name: ClassVar[str] = "Robust FedRot-LoRA"

    rule: str = "median"
    attackers: int | None = None
    bound: float = 0.0
    lam: float | str = 1.0  # a number
    align: str = "joint"
    proper: bool = False

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule must be {', '.join(RULES)}, got {self.rule!r}")
        if self.attackers is not None and not isinstance(self.attackers, int):
            raise ValueError(f"attackers must be a whole number, got {self.attackers!r}")
        if self.attackers is not None and self.attackers < 0:
            raise ValueError(f"attackers must not be negative, got {self.attackers}")
        if self.attackers is not None and self.rule not in WITHSTANDS:
            raise ValueError(
                f"attackers={self.attackers} is for {', '.join(WITHSTANDS)}; "
                f"{self.rule} has no number"
            )
        if not 0 <= self.bound < float("inf"):
            raise ValueError(f"bound must be finite and not negative, got {self.bound}")
        if self.bound and self.rule != "clip":
            raise ValueError(f"bound={self.bound} is for rule=clip, got rule={self.rule}")
        if self.align not in ALIGN_MODES:
            raise ValueError(f"align must be joint, A or B, got {self.align!r}")
        if isinstance(self.lam, str):
            raise ValueError(f"lam must be a number, got {self.lam!r}")
        rspace.check_lam(self.lam)

    @property
    def withstands(self) -> int:
        """``f``, the number of bad clients."""
        return 1 if self.attackers is None else self.attackers

    def check_clients(self, count: int) -> None:
        f = self.withstands
        by_krum = 2 * f + 3
        fewest = {"trimmed": 2 * f + 1, "krum": by_krum, "multi-krum": by_krum}.get(self.rule, 1)
        if count < fewest:
            raise ValueError(
                f"rule={self.rule} with attackers={f} needs at least {fewest} clients, got {count}"
            )

    def aggregate(
        self,
        uploads: Sequence[Factors],
        reference: Factors,
        weights: Tensor | None = None,
        *,
        round: int = 1,
        generator: torch.Generator | None = None,
    ) -> Factors:
        values = checked_weights(uploads, reference, weights)  # checks the layers, too
        device = next(iter(reference.A.values())).device
        uploads, w = self._voters(uploads, torch.tensor(values, dtype=torch.float64))
        uploads = outliers_within_range(uploads)
        w = w.to(device)
        if self.rule in ("krum", "multi-krum"):
            best = self._best(product_distances(uploads, reference))
            return self._mean([uploads[i] for i in best], reference, w[best])
        if self.rule == "clip":
            return self._clipped(uploads, reference, w)
        cut, rotations = self._cut(len(uploads)), self._rotations(uploads, reference)
        return self._each(uploads, reference, rotations, lambda t, like: trimmed_mean(t, cut))

    def _rest(
        self, rest: Sequence[Mapping[str, Tensor]], like: Mapping[str, Tensor], weights: Tensor
    ) -> dict[str, Tensor]:
        if not like:
            return {}
        rest, w = self._voters(rest, weights)
        if self.rule in ("krum", "multi-krum"):
            best = self._best(distances(rest, like))
            return super()._rest([rest[i] for i in best], like, normalised(w[best], len(best)))
        if self.rule == "clip":
            start = {name: t.double() for name, t in like.items()}
            changes = [{name: own[name].double() - t for name, t in start.items()} for own in rest]
            squares = [[t.square().sum() for t in change.values()] for change in changes]
            lengths = torch.tensor(squares, dtype=torch.float64).view(len(rest), -1).sum(1).sqrt()
            share = self._shares(lengths, w).tolist()
            for part, change in zip(share, changes, strict=True):
                start = {name: t + part * change[name] for name, t in start.items()}
            return start
        cut = self._cut(len(rest))
        return {
            name: trimmed_mean(torch.stack([own[name].double() for own in rest]), cut)
            for name in like
        }

    def _voters(self, clients: Sequence[T], weights: Tensor) -> tuple[list[T], Tensor]:
        """Those of a weight above 0, and their weights."""
        voters = [i for i, weight in enumerate(weights.tolist()) if weight > 0]
        self.check_clients(len(voters))
        return [clients[i] for i in voters], weights[voters]

    def _best(self, squares: Tensor) -> list[int]:
        order = krum(squares, self.withstands)
        return order[:1] if self.rule == "krum" else sorted(order[: len(order) - self.withstands])

    def _cut(self, clients: int) -> int:
        return (clients - 1) // 2 if self.rule == "median" else self.withstands

    def _shares(self, lengths: Tensor, w: Tensor) -> Tensor:
        """What remains of every client's change, times its weight."""
        bound = self.bound or trimmed_mean(lengths, (len(lengths) - 1) // 2)
        return w.to(lengths) * (bound / lengths).clamp(max=1).nan_to_num(1)  # a length may be 0

    def _mean(
        self, uploads: Sequence[Factors], reference: Factors, weights: Tensor | None = None
    ) -> Factors:
        return average(
            uploads, reference, weights, lam=self.lam, align=self.align, proper=self.proper
        )

    def _clipped(self, uploads: Sequence[Factors], reference: Factors, w: Tensor) -> Factors:
        rotations = self._rotations(uploads, reference)
        squares: list[Tensor] = []

        def measure(t: Tensor, like: Tensor) -> Tensor:
            squares.append((t - wide(like)).flatten(1).double().square().sum(1))
            return like

        self._each(uploads, reference, rotations, measure)
        share = self._shares(torch.stack(squares).sum(0).sqrt(), w)

        def clip(t: Tensor, like: Tensor) -> Tensor:
            change = (share.to(t)[:, None, None] * (t - wide(like))).sum(0)
            return wide(like) + change

        return self._each(uploads, reference, rotations, clip)

    def _rotations(self, uploads: Sequence[Factors], reference: Factors) -> list[Tensor]:
        given = arguments(uploads, reference)
        options = {"lam": self.lam, "align": self.align, "proper": self.proper}
        with naming_layers(reference):
            return torch.ops.fedrot.align(*given, **options)

    def _each(
        self,
        uploads: Sequence[Factors],
        reference: Factors,
        rotations: list[Tensor],
        rule: Callable[[Tensor, Tensor], Tensor],
    ) -> Factors:
        """``rule`` on the aligned clients ``(N, r, k)`` and the reference ``(r, k)`` of every
        ``A``, and so for ``B``; one layer in memory at a time."""
        A, B = {}, {}
        for i, module in enumerate(reference.A):
            R = rotations[i :: len(reference.A)]
            like_A, like_B = reference.A[module], reference.B[module]
            turned_A = [r.mT @ wide(u.A[module]) for r, u in zip(R, uploads, strict=True)]
            turned_B = [wide(u.B[module]) @ r for r, u in zip(R, uploads, strict=True)]
            A[module] = rule(torch.stack(turned_A), like_A).to(like_A.dtype)
            B[module] = rule(torch.stack(turned_B), like_B).to(like_B.dtype)
        return Factors(A, B)


def outliers_within_range(uploads: Sequence[Factors]) -> Sequence[Factors]:
    """The clients, huge ones scaled down (:func:`~fedrot.factors.within_range`).

    One that sends the largest number there is shall be an outlier as any other, and not end the
    round by an overflow: it is still far off, in the same direction. Where half of the clients are
    so large, they are not outliers, and stay as they are.
    """
    huge = [HUGE < largest(u) < float("inf") for u in uploads]
    if 2 * sum(huge) >= len(uploads):
        return uploads
    return [within_range(u) if large else u for u, large in zip(uploads, huge, strict=True)]


def trimmed_mean(values: Tensor, cut: int) -> Tensor:
    """Mean over the first dimension without the ``cut`` largest and smallest; with
    ``cut = (N - 1) // 2`` the median, between two middle values their mean."""
    return values.sort(0).values[cut : len(values) - cut].mean(0)


def krum(squares: Tensor, attackers: int) -> list[int]:
    """The clients from the best to the worst: by the sum of their squared distances ``(N, N)`` to
    the ``N - attackers - 2`` nearest others, of which there must be one. Ties go to the lower
    number."""
    nearest = len(squares) - attackers - 2
    others = squares.clone().fill_diagonal_(float("inf"))
    scores = others.sort(1).values[:, :nearest].sum(1)
    return scores.argsort(stable=True).tolist()


def distances(rest: Sequence[Mapping[str, Tensor]], names: Iterable[str]) -> Tensor:
    """Squared distances of all tensors together, ``(N, N)``, float64."""
    squares = torch.zeros(len(rest), len(rest), dtype=torch.float64)
    for name in names:
        flat = torch.stack([own[name].double().flatten().cpu() for own in rest])
        for i, one in enumerate(flat):
            squares[i] += (flat - one).square().sum(1)
    return squares


def product_distances(uploads: Sequence[Factors], reference: Factors) -> Tensor:
    """``||B_i A_i - B_j A_j||_F^2`` over all layers, ``(N, N)``, float64, from Gram blocks: no
    ``d x k`` matrix is formed."""
    clients = len(uploads)
    inner = torch.zeros(clients, clients, dtype=torch.float64)
    with naming_layers(reference):
        for _, _, blocks in rspace.batches(*arguments(uploads, reference)):
            products = (blocks.A.double() * blocks.B.double()).sum(0)
            inner += products.view(clients, len(products) // clients, clients, -1).sum((1, 3)).cpu()
    inner = (inner + inner.T) / 2  # a tie must not be decided by rounding
    norms = inner.diagonal()
    return (norms[:, None] + norms - 2 * inner).clamp_min(0)
