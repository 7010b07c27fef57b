"""The numbers of a round and of a run: what aggregation lost, ranks, the summary."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from fedrot import __version__
from fedrot.factors import Factors, rank_of
from fedrot.methods import FedIT
from fedrot.metrics import aggregation_error, rotation_angles, total
from fedrot.server import Update
from fedrot.simulation.run_dir import Row

if TYPE_CHECKING:
    from fedrot.simulation.rounds import Federation, Uploads


def alignment(uploads: Uploads, update: Update) -> Row:
    """How far the uploads were apart, and what the method and plain averaging lose on them."""
    factors, weights = uploads.factors, uploads.weights
    plain = FedIT().aggregate(factors, uploads.reference, weights)
    error = aggregation_error(factors, update.aggregate, weights, update.folded)
    return {
        "aggregation_error": total(error),
        "aggregation_error_plain": total(aggregation_error(factors, plain, weights)),
        "rotation_angle": float(rotation_angles(factors, uploads.reference).mean()),
    }


def mean_rank(uploads: Uploads) -> float:
    """The mean rank of what clients hand in."""
    return math.fsum(rank_of(factors) for factors in uploads.factors) / len(uploads.factors)


def chosen_ranks(uploads: Uploads, update: Update) -> Row:
    """The ranks that a method chose, their mean over the layers, and the share of the squared
    singular values of the exact average that they keep, over all layers together."""
    aggregate = update.aggregate
    ranks = {module: A.shape[0] for module, A in aggregate.A.items()}
    nothing = Factors(
        {module: torch.zeros_like(A) for module, A in aggregate.A.items()}, aggregate.B
    )
    error, norm = (
        total(aggregation_error(uploads.factors, against, uploads.weights))
        for against in (aggregate, nothing)
    )
    kept = 1 - (error / norm) ** 2 if norm else 1.0
    return {"rank": math.fsum(ranks.values()) / len(ranks), "energy": kept, "ranks": ranks}


def summarised(federation: Federation, rows: list[Row]) -> dict[str, Any]:
    """What ``summary.json`` holds: scores after the last round, means over the rounds."""
    config, last = federation.config, rows[-1]
    scores = [key for key in last if key.startswith(("accuracy", "loss"))]
    summary = {
        "method": config.method.name,
        "setting": config.setting,
        "synthetic": config.synthetic,
        "seed": config.seed,
        "rounds": config.rounds,
        **{key: last[key] for key in scores},
        "start": federation.evaluate(federation.start()),
        "client_examples": [len(examples) for examples in federation.examples],
        "test_examples": len(federation.data.test["labels"]),
        **_means(rows, "aggregation_error", "aggregation_error_plain", "rotation_angle"),
        **(_means(rows, "rank") if "rank" in last else {}),
        **({**_means(rows, "energy"), "ranks": last["ranks"]} if "ranks" in last else {}),
        "seconds_local": math.fsum(row["seconds_local"] for row in rows),
        "seconds_aggregation": math.fsum(row["seconds_aggregation"] for row in rows),
        **federation.data.facts,
        "device": str(federation.model.device),
        "version": __version__,
    }
    if "client_accuracies" in last:
        alone = last["client_accuracies"]
        summary["client_accuracy"] = math.fsum(alone) / len(alone)
    return summary


def _means(rows: list[Row], *keys: str) -> dict[str, float]:
    return {key: math.fsum(row[key] for row in rows) / len(rows) for key in keys}
