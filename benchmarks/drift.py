"""How much of what clients train is a rotation, and what else would lower the error of the average:
`python -m benchmarks.drift`.

Six rounds of a federation (`digits`, FedIT, ten seeds) are looked at, the first, in which `B` is
zero, left out. *Drift* is the share of a client's squared change that lies along the rotations at
its start, the tangent space of `(B R, R^T A)`. Errors are relative to plain averaging of the same
uploads: of the whole rotation fitted to A, B or both, of the rotations of least error, of the exact
truncation, and of the plain average with `B` fitted to the exact one (*refit*). Means of every seed
go to docs/findings/drift.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedrot.config import load
from fedrot.factors import Factors
from fedrot.files import write_json
from fedrot.methods import FedIT, FedRot, FlexLoRA
from fedrot.methods.base import stacked
from fedrot.metrics import aggregation_error, total
from fedrot.progress import progress
from fedrot.report import markdown
from fedrot.server import serve
from fedrot.simulation.rounds import prepare, train_round

OUT = Path(__file__).parents[1] / "docs" / "findings" / "drift.json"
SEEDS, ROUNDS = 10, 7
TRAINING = {"SGD": {"optimizer": "sgd", "lr": 0.3}, "Adam": {"optimizer": "adam", "lr": 0.01}}
CASES = [(name, r) for name in TRAINING for r in (4, 16)]
METHODS = {
    **{align: FedRot(1.0, align) for align in ("A", "B", "joint", "optimal")},
    "truncation": FlexLoRA("reference"),
}


def drift(start: Factors, upload: Factors) -> tuple[float, float]:
    """Squared length of a client's change, and of its part along the rotations, over all layers."""
    whole = along = 0.0
    for module, A in start.A.items():
        A, B = A.double(), start.B[module].double()
        change = torch.cat([upload.B[module] - B, (upload.A[module] - A).mT]).flatten()
        tangents = []
        for p in range(len(A)):
            for q in range(p):
                Omega = torch.zeros(len(A), len(A), dtype=torch.float64)
                Omega[p, q], Omega[q, p] = 1.0, -1.0
                tangents.append(torch.cat([B @ Omega, (-Omega @ A).mT]).flatten())
        basis = torch.linalg.qr(torch.stack(tangents, 1)).Q
        whole += float(change.square().sum())
        along += float((basis.mT @ change).square().sum())
    return whole, along


def refitted(uploads: list[Factors], mean: Factors) -> Factors:
    """``B`` of least squares for the ``A`` of an average: ``D A^T (A A^T)^-1``."""
    B: dict[str, Tensor] = {}
    for module, A in mean.A.items():
        left, right = stacked(uploads, module)
        A = A.double()
        B[module] = left.double() @ torch.linalg.lstsq(A.mT, right.double().mT).solution.mT
    return Factors(mean.A, B)


def measure(name: str, r: int, seed: int) -> dict[str, float]:
    """Means over the rounds after the first."""
    federation = prepare(
        load(
            {
                "seed": seed,
                "rounds": ROUNDS,
                "method": {"name": "fedit"},
                "lora": {"r": r, "alpha": 2 * r},
                "local": TRAINING[name],
            }
        )
    )
    server, config = federation.start(), federation.config
    rows: list[dict[str, float]] = []
    for round in range(ROUNDS):
        done = train_round(federation, server)
        if round:
            changes = [drift(server.factors, upload) for upload in done.factors]
            whole, along = (sum(part) for part in zip(*changes, strict=True))
            mean = FedIT().aggregate(done.factors, server.factors)
            averages = {
                key: method.aggregate(done.factors, server.factors)
                for key, method in METHODS.items()
            }
            averages["refit"] = refitted(done.factors, mean)
            plain = total(aggregation_error(done.factors, mean))
            errors = {
                key: total(aggregation_error(done.factors, average)) / plain
                for key, average in averages.items()
            }
            rows.append({"drift": along / whole, **errors})
        server = serve(config.method, config.server, server, done.clients).server
    return {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}


def table(found: Mapping[str, list[dict[str, float]]]) -> str:
    """Mean ± standard deviation over the seeds."""
    columns = list(next(iter(found.values()))[0])
    rows = []
    for case, seeds in found.items():
        cells = []
        for key in columns:
            values, unit = [s[key] for s in seeds], 100 if key == "drift" else 1
            mean, std = statistics.fmean(values) * unit, statistics.stdev(values) * unit
            cells.append(f"{mean:.3g} ± {std:.1g}{' %' if unit == 100 else ''}")
        rows.append([case, *cells])
    return markdown.table(["training", *columns], rows)


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {}
    with progress() as track:
        for name, r in CASES:
            label = f"{name}, r {r}"
            found[label] = [measure(name, r, seed) for seed in track(range(SEEDS), label)]
    write_json(OUT, {"seeds": SEEDS, "rounds": ROUNDS, "cases": found})
    print(table(found))


if __name__ == "__main__":
    main()
