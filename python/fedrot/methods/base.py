"""What a federated LoRA method is: a small frozen object that turns uploads into global factors.

Everything that lasts from one round to the next is in :class:`Server`; a method holds options only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedrot.factors import Factors, client_major, naming_layers, truncate
from fedrot_kernels import ALIGN_MODES, rspace
from fedrot_kernels.checks import check_weight_values, check_weights


@dataclass(frozen=True)
class Server:
    """What the server keeps between rounds, and a checkpoint holds.

    ``merged``: per module the sum of what was folded into its frozen weight, ``(d, k)``, on the
    scale of ``B A``; the LoRA scaling is applied where a weight is changed. ``personal``: per
    client the ``B`` that stays with it. ``head``: trained parameters outside the adapter, and
    ``heads``, per client, where they stay with it (``head`` is their mean then, which nobody starts
    from). ``past``: factors and head of earlier rounds, the latest first, as many as are needed.
    ``ranks``: per client, where they prune themselves, that of its last upload.
    """

    factors: Factors
    rounds: int = 0  # finished ones
    past: tuple[Server, ...] = ()
    merged: dict[str, Tensor] = field(default_factory=dict)
    personal: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)  # of the server, flat
    ranks: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Method(ABC):
    """What clients train and start from, and what the server makes of their uploads.

    Class attributes say what goes together with what: ``folds``, the difference between the exact
    average and the aggregate goes into the frozen weights; ``personal``, every client keeps its
    ``B``; ``same_A``, factors mean nothing unless all clients hold one ``A``; ``truncates``,
    clients may have a larger rank than the reference.
    """

    name: ClassVar[str]
    folds: ClassVar[bool] = False
    personal: ClassVar[bool] = False
    same_A: ClassVar[bool] = False
    truncates: ClassVar[bool] = False

    @property
    def steady_basis(self) -> bool:
        """Whether the aggregate stays in the basis of the last one, so that a server optimizer
        can follow it."""
        return not self.folds  # what was folded belongs to the factors as they are

    @property
    def chooses_ranks(self) -> bool:
        """Whether layers of the aggregate may have a smaller rank than the reference."""
        return False

    @property
    def prunes(self) -> bool:
        """Whether a client may hand in a smaller rank than it started from, and keeps that."""
        return False

    @classmethod
    def takes(cls, given: Mapping[str, Any]) -> set[str]:
        """The options, by name, that have an effect beside the ``given`` ones."""
        return {f.name for f in fields(cls)}

    def check_stateless(self) -> None:
        """For engines that keep no :class:`Server`: raise ValueError unless the new global adapter
        is all that the next round needs."""
        for reason, found in (
            ("folds into the frozen weights, which stay with the clients", self.folds),
            ("leaves B with the clients", self.personal),
            ("trains one factor at a time, which is the clients' part", self.same_A),
        ):
            if found:
                raise ValueError(f"method: {self.name} {reason}")

    def check_clients(self, count: int) -> None:
        """Raise ValueError where so many clients in a round are too few for the method."""
        return  # none are

    def parts(self, round: int) -> str:
        """Which factors the clients train in a round (from 0): ``"AB"``, ``"A"`` or ``"B"``."""
        return "AB"

    def download(self, server: Server, client: int, rank: int | None = None) -> Factors:
        """What a client starts the round from; ``rank``, where it is below the global one."""
        return truncate(server.factors, rank)

    def regularizer(
        self, A: Mapping[str, Tensor], B: Mapping[str, Tensor], ranks: Sequence[int]
    ) -> Tensor | None:
        """What clients add to their losses, ``(N,)``, if anything.

        Args:
            A, B: the factors of all of them by module, ``(N, r, k)`` and ``(N, d, r)``, zero beyond
                a client's rank.
            ranks: of every client.
        """
        return None

    def hand_in(self, start: Factors, trained: Factors) -> Factors:
        """What a client makes of its factors before it uploads them."""
        return trained

    def reference(self, server: Server) -> Factors:
        """What :meth:`aggregate` gets as ``reference``."""
        return server.factors

    @abstractmethod
    def aggregate(
        self,
        uploads: Sequence[Factors],
        reference: Factors,
        weights: Tensor | None = None,
        *,
        round: int = 1,
        generator: torch.Generator | None = None,
    ) -> Factors:
        """The new global factors.

        Args:
            uploads: one :class:`Factors` per client, the layers of ``reference``; a client may
                have a smaller rank, and a larger one where the method ``truncates``.
            reference: the global factors from which the clients started the round.
            weights: ``(N,)``, non-negative; ``None`` is uniform.
            round: number of the round, from 0.
            generator: for methods that draw; ``None`` gives one that depends on ``round`` alone.
        """

    def aggregate_with_lam(
        self,
        uploads: Sequence[Factors],
        reference: Factors,
        weights: Tensor | None = None,
        *,
        round: int = 1,
    ) -> tuple[Factors, Tensor | None]:
        """:meth:`aggregate`, and the ``lam`` that it found: ``(L, 1)``, or ``(L, N)`` where every
        client has its own; ``None`` where there was none to find."""
        return self.aggregate(uploads, reference, weights, round=round), None

    def average_rest(
        self,
        rest: Sequence[Mapping[str, Tensor]],
        like: Mapping[str, Tensor],
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What becomes of parameters beside the factors, as a trained head or biases: by name, in
        float64 on the CPU. Here their weighted mean.

        Args:
            rest: per client the tensors of the names of ``like``.
            like: what the clients started from.
            weights: as for :meth:`aggregate`.

        Raises:
            ValueError: a value is not finite.
        """
        for i, own in enumerate(rest):
            for name, t in own.items():
                if not torch.isfinite(t).all():
                    raise ValueError(f"client {i}: {name} is not finite")
        own_like, *on_cpu = ({name: own[name].cpu() for name in like} for own in (like, *rest))
        return self._rest(on_cpu, own_like, normalised(weights, len(rest)))

    def _rest(
        self, rest: Sequence[Mapping[str, Tensor]], like: Mapping[str, Tensor], weights: Tensor
    ) -> dict[str, Tensor]:
        """:meth:`average_rest` with weights that sum to 1."""
        w, means = weights.tolist(), {}
        for name, t in like.items():
            means[name] = torch.zeros(t.shape, dtype=torch.float64)
            for weight, own in zip(w, rest, strict=True):
                means[name] += weight * own[name].double()
        return means

    def fold(
        self, uploads: Sequence[Factors], aggregate: Factors, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What to add to the frozen weights beside the new factors: ``(d, k)`` by module, to be
        multiplied by the LoRA scaling; empty unless the method ``folds``."""
        return residual(uploads, aggregate, weights) if self.folds else {}


def average(
    uploads: Sequence[Factors],
    reference: Factors,
    weights: Tensor | None = None,
    *,
    lam: float | str = 0.0,
    align: str = "joint",
    proper: bool = True,
) -> Factors:
    """``torch.ops.fedrot.align_aggregate`` on :class:`Factors`; ``lam=0`` is the plain mean. What
    the operator has no rotation for, ``rspace.aggregate`` finds."""
    operator = align in ALIGN_MODES and not isinstance(lam, str)
    function = torch.ops.fedrot.align_aggregate if operator else rspace.aggregate
    given = arguments(uploads, reference)
    with naming_layers(reference):
        result = function(*given, weights, lam=lam, align=align, proper=proper)
    return _factors(reference, result)


def average_with_lam(
    uploads: Sequence[Factors],
    reference: Factors,
    weights: Tensor | None = None,
    *,
    lam: str,
    align: str = "joint",
    proper: bool = True,
) -> tuple[Factors, Tensor]:
    """``rspace.aggregate_with_lam`` on :class:`Factors`."""
    given = arguments(uploads, reference)
    with naming_layers(reference):
        A, B, found = rspace.aggregate_with_lam(
            *given, weights, lam=lam, align=align, proper=proper
        )
    return _factors(reference, (A, B)), found


def in_rspace(
    uploads: Sequence[Factors],
    reference: Factors,
    weights: Tensor | None,
    solve: rspace.Solver,
) -> Factors:
    """``rspace.combined`` on :class:`Factors`."""
    given = arguments(uploads, reference)
    with naming_layers(reference):
        result = rspace.combined(*given, weights, solve)
    return _factors(reference, result)


def arguments(
    uploads: Sequence[Factors], reference: Factors
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """What the operators take.

    Raises:
        ValueError: clients differ in their layers, from each other or from the reference.
    """
    lora_A, lora_B = client_major(uploads)
    if list(uploads[0].A) != list(reference.A):
        raise ValueError(
            f"clients have layers {list(uploads[0].A)}, the reference has {list(reference.A)}"
        )
    return lora_A, lora_B, list(reference.A.values()), list(reference.B.values())


def checked_weights(
    uploads: Sequence[Factors], reference: Factors, weights: Tensor | None
) -> list[float]:
    """The weights as floats that sum to 1, uniform for ``None``, of clients with the layers of the
    reference.

    Raises:
        ValueError, TypeError: as ``arguments``; there is not one weight for each client, or they
            are not finite, non-negative and of a positive sum.
    """
    lora_A, *_ = arguments(uploads, reference)
    check_weights(weights, len(uploads), lora_A[0].device)
    return check_weight_values(weights, len(uploads))


def _factors(like: Factors, result: tuple[list[Tensor], list[Tensor]]) -> Factors:
    A, B = result
    return Factors(dict(zip(like.A, A, strict=True)), dict(zip(like.B, B, strict=True)))


def stacked(
    uploads: Sequence[Factors], module: str, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(left, right)`` with ``left @ right = sum_i w_i B_i A_i``: ``(d, R)`` and ``(R, k)``,
    ``R`` the sum of the ranks, in float32 or wider."""
    w = check_weight_values(weights, len(uploads))
    left = torch.cat([w[i] * wide(u.B[module]) for i, u in enumerate(uploads)], 1)
    return left, torch.cat([wide(u.A[module]) for u in uploads])


def residual(
    uploads: Sequence[Factors], aggregate: Factors, weights: Tensor | None = None
) -> dict[str, Tensor]:
    """``sum_i w_i B_i A_i - B A`` of every module, ``(d, k)``."""
    out = {}
    for module, B in aggregate.B.items():
        left, right = stacked(uploads, module, weights)
        A = aggregate.A[module]
        exact = torch.cat([left, -wide(B)], 1) @ torch.cat([right, wide(A)])
        out[module] = exact.to(B.dtype)
    return out


def normalised(weights: Tensor | None, clients: int) -> Tensor:
    """The weights with sum 1, in float64 on the CPU; uniform for ``None``."""
    return torch.tensor(check_weight_values(weights, clients), dtype=torch.float64)


def wide(t: Tensor) -> Tensor:
    """The dtype to compute in: float64 stays, all else is float32."""
    return t if t.dtype == torch.float64 else t.float()


def drawing(generator: torch.Generator | None, round: int) -> torch.Generator:
    """The generator, or where none was given one that the round decides."""
    return generator or torch.Generator().manual_seed(round)
