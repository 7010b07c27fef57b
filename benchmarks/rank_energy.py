"""What a rank chosen by energy loses, by the energy: `python -m benchmarks.rank_energy`.

Adapters of ten clients that trained apart (the setting `one-shot` on `digits`) are merged at every
energy; the merged update is added to the frozen weights, so that any rank can be scored. Accuracies
are beside those of the exact mean (energy 1) of the same clients.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer

import fedrot
from fedrot.cli._run import user_errors
from fedrot.config import Config, load
from fedrot.options import parse_overrides
from fedrot.simulation.rounds import federate, prepare
from fedrot.simulation.run_dir import RunDir

ENERGIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
SEEDS = 10


def measure(config: Config) -> list[tuple[float, float]]:
    """Accuracy and mean rank at every energy, of one seed."""
    with tempfile.TemporaryDirectory() as folder:
        federate(config, Path(folder) / "run", report=False)
        clients = RunDir(Path(folder) / "run").clients()
        merges = [fedrot.aggregate(clients, rank="auto", energy=energy) for energy in ENERGIES]
    federation, rows = prepare(config), []
    start = federation.start()  # B = 0
    for merged in merges:
        # The merged adapter has the scaling of the model's own.
        factors = merged.factors
        changes = {module: B @ factors.A[module] for module, B in factors.B.items()}
        federation.frozen.set(changes)
        accuracy = federation.score(start.factors, start.head)["accuracy"]
        rows.append((accuracy, statistics.mean(A.shape[0] for A in factors.A.values())))
    return rows


@user_errors
def main(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """Print a table; options as of `fedrot train`, for instance `clients.ranks=[2,4,8]`."""
    torch.set_num_threads(1)
    given = parse_overrides(overrides or [])
    seeds = [measure(load({"setting": "one-shot", "seed": seed}, given)) for seed in range(SEEDS)]
    print("| energy | mean rank | accuracy | beside the exact mean |\n| --- | --- | --- | --- |")
    for energy, rows in zip(ENERGIES, zip(*seeds, strict=True), strict=True):
        accuracies = [accuracy for accuracy, _ in rows]
        paired = [a - exact[-1][0] for a, exact in zip(accuracies, seeds, strict=True)]
        cells = (
            f"{statistics.mean(x):.3f} ± {statistics.stdev(x):.3f}" for x in (accuracies, paired)
        )
        rank = statistics.mean(rank for _, rank in rows)
        print(f"| {energy:g} | {rank:.1f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    typer.run(main)
