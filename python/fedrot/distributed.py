"""``align_aggregate`` for clients that are spread over the ranks of ``torch.distributed``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fedrot.factors import Factors
from fedrot.streaming import StreamingAggregator, check_total
from fedrot_kernels import checks


def align_aggregate(
    uploads: Iterable[tuple[Factors, float]],
    reference: Factors,
    *,
    group: dist.ProcessGroup | None = None,
    lam: float = 0.4,
    align: str = "joint",
    proper: bool = True,
    nonfinite: str = "raise",
) -> Factors:
    """Align this rank's clients, and average those of all ranks.

    A collective of all ranks of the group: they exchange a short report, and then there is one
    all-reduce of the size of the adapter, in float32 (float64 for a float64 reference), whatever
    the number of clients.

    Args:
        uploads: this rank's clients and their weights, any number, also none. Read one by one, so a
            generator may train each client when its turn comes; it must not call collectives of
            this group.
        reference: the factors from which the clients started the round, the same on every rank.
        group: ``None`` is all ranks. Its backend need not reach the device of the reference.
        lam, align, proper: as for :func:`fedrot_kernels.align_aggregate`, the same on every rank.
        nonfinite: as for :class:`~fedrot.streaming.StreamingAggregator`.

    Returns:
        The same factors on every rank, in the dtype and on the device of its reference.

    Raises:
        RuntimeError: reading ``uploads``, or a client, failed on some rank. Every rank raises it,
            and says which rank and why; on the rank itself the cause is chained. The group stays
            usable.
        ValueError: on every rank: ranks differ in reference or options, no rank has a client with
            a positive weight, or the weights or the result overflow; on this rank alone: it is not
            in the group.

    A rank that dies, or never calls, is found out by the timeout of the group alone.
    """
    if dist.get_rank(group) < 0:  # raises where there is no group at all
        raise ValueError(f"group: rank {dist.get_rank()} is not in it")
    cause = None
    try:
        aggregator = StreamingAggregator(
            reference, lam=lam, align=align, proper=proper, nonfinite=nonfinite
        )
        for client, weight in uploads:
            aggregator.accept(client, weight)
        first = next(iter(reference.A.values()))
        mean = aggregator.mean(checks.accumulate_dtype(first.dtype))
        flat = torch.cat([t.flatten() for t in mean]).to(_reachable(first.device, group))
        agreement = bytes(aggregator.fingerprint().tolist()), flat.device.type
        report = _Report(agreement, aggregator.weight, aggregator.clients)
    except Exception as error:  # whatever it is: the others wait to hear of it
        cause, report = error, _Report(failure=f"{type(error).__name__}: {error}")
    total = _agree(report, cause, group)
    flat.mul_(report.weight / total)
    dist.all_reduce(flat, group=group)
    parts = flat.split([t.numel() for t in mean])
    return aggregator.as_factors(
        [part.view_as(t).to(t.device) for part, t in zip(parts, mean, strict=True)]
    )


@dataclass(frozen=True)
class _Report:
    """What a rank tells the others before anything is summed."""

    agreement: tuple[bytes, str] = (b"", "")  # must be the same everywhere
    weight: float = 0.0
    clients: int = 0
    failure: str | None = None


def _agree(report: _Report, cause: Exception | None, group: dist.ProcessGroup | None) -> float:
    """The sum of the weights of all ranks; or every rank raises the same error."""
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    reports: list[_Report] = [report] * len(ranks)
    dist.all_gather_object(reports, report, group=group)
    failures = [f"rank {r}: {x.failure}" for r, x in zip(ranks, reports, strict=True) if x.failure]
    if failures:
        raise RuntimeError("; ".join(failures)) from cause
    for r, other in zip(ranks, reports, strict=True):
        if other.agreement != reports[0].agreement:
            raise ValueError(
                "every rank must have the same reference, on the same kind of device, and the same "
                f"options: rank {r} differs from rank {ranks[0]}"
            )
    total = sum(r.weight for r in reports)
    if not math.isfinite(total):
        raise ValueError(f"weights must have a finite sum, got {total} over all ranks")
    check_total(sum(r.clients for r in reports), total)
    return total


def _reachable(device: torch.device, group: dist.ProcessGroup | None) -> torch.device:
    """``device``, or where the group's backend works instead: NCCL on GPUs alone, for one."""
    backends = dist.get_backend_config(group).split(",")  # as "cpu:gloo,cuda:nccl"
    kinds = [backend.partition(":")[0] for backend in backends]
    return device if device.type in kinds else torch.device("cpu" if "cpu" in kinds else kinds[0])
