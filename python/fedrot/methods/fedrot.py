"""FedRot-LoRA, and the variants with which its paper takes it apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedrot.factors import Factors
from fedrot.gauge import regauge
from fedrot.methods.base import (
    Method,
    Server,
    average,
    average_with_lam,
    drawing,
    in_rspace,
    wide,
)
from fedrot_kernels import ALIGN_MODES, rspace


@dataclass(frozen=True)
class FedRot(Method):
    """Rotate each client toward the reference, then average (FedRot-LoRA, arXiv 2602.23638).

    ``align``: what the rotation is fitted to, ``"joint"``, ``"A"``, ``"B"``, or the paper's
    ``"alternate"``: round 0 unaligned, then A in odd and B in even rounds. Beyond the paper,
    ``"gpa"``: the mean of the aligned clients, and ``"optimal"``: the aggregation error itself;
    both take no more than the basis of the result from the reference. ``lam``: how far to turn,
    or ``"auto"``: in each layer the value of least aggregation error, or ``"auto-client"``: one for
    every client there.

    For ablations, ``rotation``: ``"random"`` turns every client by a rotation of its own,
    ``"scale"`` replaces the rotation by the scalar ``s`` that fits ``s A_i`` to ``A_ref`` (or
    ``s B_i`` to ``B_ref``), to the power ``lam``, the other factor being divided by it;
    ``"shifted"`` is ``polar(M + eps |M| I)`` in the place of the soft rotation. ``lam`` is nothing
    to ``"random"`` and ``"shifted"``, ``align`` to the former, ``eps`` to all but the latter: there
    they must keep their defaults. ``lag=2``: the reference is the global adapter of a round before
    the one that the clients started from.
    """

    name: ClassVar[str] = "FedRot-LoRA"

    lam: float | str = 0.4
    align: str = "joint"
    proper: bool = True
    rotation: str = "procrustes"
    lag: int = 1
    eps: float = 0.03

    def __post_init__(self) -> None:
        rspace.check_lam(self.lam)
        if self.align not in (*rspace.ALIGN, "alternate"):
            known = ", ".join(rspace.ALIGN)
            raise ValueError(f"align must be {known} or alternate, got {self.align!r}")
        if self.rotation not in ("procrustes", "random", "scale", "shifted"):
            raise ValueError(
                f"rotation must be procrustes, random, scale or shifted, got {self.rotation!r}"
            )
        if self.rotation == "scale" and self.align not in ("A", "B", "alternate"):
            raise ValueError(
                f"align must be A, B or alternate for rotation=scale, got {self.align!r}"
            )
        if self.rotation == "scale" and isinstance(self.lam, str):
            raise ValueError(f"lam must be a number for rotation=scale, got {self.lam!r}")
        if self.rotation == "shifted" and self.align in ("gpa", "optimal"):
            raise ValueError(
                f"align must be joint, A, B or alternate for rotation=shifted, got {self.align!r}"
            )
        if not 0 <= self.eps < float("inf"):
            raise ValueError(f"eps must be finite and not negative, got {self.eps}")
        used = self.takes({"rotation": self.rotation})
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in used and value != f.default:
                raise ValueError(
                    f"{f.name} has no effect with rotation={self.rotation}, got {value!r}"
                )
        if self.lag not in (1, 2):
            raise ValueError(f"lag must be 1 or 2, got {self.lag}")

    @classmethod
    def takes(cls, given: Mapping[str, Any]) -> set[str]:
        rotation = given.get("rotation", cls.rotation)
        idle = {"random": {"lam", "align", "eps"}, "shifted": {"lam"}}
        return super().takes(given) - idle.get(str(rotation), {"eps"})

    @classmethod
    def one_by_one(cls, lam: float, align: str, proper: bool) -> FedRot:
        """For engines that see a client at a time.

        Raises:
            ValueError: an option is out of its range, or looks at all clients at once.
        """
        at_once = "what looks at all clients at once is not for an engine that never has them"
        if align not in (*ALIGN_MODES, "alternate"):
            raise ValueError(f"align must be joint, A, B or alternate, got {align!r}; {at_once}")
        if lam in rspace.AUTO:
            raise ValueError(f"lam must be a number, got {lam!r}; {at_once}")
        return cls(lam, align, proper)

    def check_stateless(self) -> None:
        if self.lag != 1:
            raise ValueError(
                f"method: {self.name} with lag={self.lag} needs the global factors of an earlier "
                "round"
            )

    def reference(self, server: Server) -> Factors:
        return server.past[0].factors if self.lag == 2 and server.past else server.factors

    def schedule(self, round: int) -> tuple[float | str, str]:
        """``lam`` and ``align`` of a round, from 0, as the operator takes them."""
        if self.align != "alternate":
            return self.lam, self.align
        return (0.0 if round == 0 else self.lam), ("A" if round % 2 else "B")

    def aggregate(
        self,
        uploads: Sequence[Factors],
        reference: Factors,
        weights: Tensor | None = None,
        *,
        round: int = 1,
        generator: torch.Generator | None = None,
    ) -> Factors:
        lam, align = self.schedule(round)
        if self.rotation == "random":
            generator = drawing(generator, round)
            uploads = [regauge(u, generator, proper=self.proper) for u in uploads]
        elif self.rotation == "scale":
            uploads = [_scaled(u, reference, align, float(lam)) for u in uploads]
        elif self.rotation == "shifted" and lam != 0.0:  # 0 in the first round of `alternate`
            return in_rspace(uploads, reference, weights, self._shifted(align))
        if self.rotation != "procrustes":
            return average(uploads, reference, weights)
        return average(uploads, reference, weights, lam=lam, align=align, proper=self.proper)

    def aggregate_with_lam(
        self,
        uploads: Sequence[Factors],
        reference: Factors,
        weights: Tensor | None = None,
        *,
        round: int = 1,
    ) -> tuple[Factors, Tensor | None]:
        lam, align = self.schedule(round)
        if not isinstance(lam, str):
            return super().aggregate_with_lam(uploads, reference, weights, round=round)
        return average_with_lam(
            uploads, reference, weights, lam=lam, align=align, proper=self.proper
        )

    def _shifted(self, align: str) -> rspace.Solver:
        def solve(blocks: rspace.Blocks) -> tuple[Tensor, Tensor]:
            U = blocks.stacked(rspace.shifted(blocks, self.eps, align, proper=self.proper))
            return U, U

        return solve


def _scaled(upload: Factors, reference: Factors, align: str, lam: float) -> Factors:
    A, B = {}, {}
    for module in upload.A:
        ours, theirs = (wide(getattr(f, align)[module]) for f in (upload, reference))
        rank = upload.A[module].shape[0]
        theirs = theirs[:rank] if align == "A" else theirs[:, :rank]
        s = (ours * theirs).sum() / ours.square().sum()
        # Nothing to fit to, as B_ref = 0, or a fit that turns the sign: leave it as it is.
        s = s**lam if s.isfinite() and s > 0 else torch.ones_like(s)
        A[module] = upload.A[module] * (s if align == "A" else 1 / s)
        B[module] = upload.B[module] * (s if align == "B" else 1 / s)
    return Factors(A, B)
