"""What rotations found in r-space cost beside ``align_aggregate`` with the reference, in turns:

python -m benchmarks.rotations [ROUNDS]

Two kinds of clients: near (those of ``fedrot bench``, one adapter in several bases, where the first
alignment is as good as any) and apart (little in common, where the solvers take all their steps).
Seconds of processor time over all threads, so that other work on the machine counts less.
"""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import replace
from typing import Annotated

import torch
import typer

import fedrot_kernels
from fedrot.bench.cases import Case, Factors, copies, factors, select
from fedrot.bench.machine import cold_bytes
from fedrot_kernels import rspace

NAMES = ["roberta-large-r4-n10", "roberta-large-r4-n50", "llama-8b-qv-r16-n10"]
FORMS = {
    "align_aggregate": functools.partial(fedrot_kernels.align_aggregate, lam=1.0, align="joint"),
    "gram": fedrot_kernels.gram,
    "gpa": functools.partial(rspace.aggregate, align="gpa"),
    "optimal": functools.partial(rspace.aggregate, align="optimal"),
    "lam auto": functools.partial(rspace.aggregate, align="joint", lam="auto"),
}


def apart(case: Case) -> Factors:
    """Clients of which an eighth of the variance is common."""
    g = torch.Generator().manual_seed(1)
    lora_A, lora_B, ref_A, ref_B = factors(case)
    for t, like in zip(
        [*lora_A, *lora_B], case.clients * ref_A + case.clients * ref_B, strict=True
    ):
        t.add_(torch.randn(t.shape, generator=g), alpha=2.6 * float(like.square().mean().sqrt()))
    return lora_A, lora_B, ref_A, ref_B


def main(rounds: Annotated[int, typer.Argument(min=1)] = 9) -> None:
    """Print the medians of so many rounds."""
    print(f"{torch.get_num_threads()} threads, median of {rounds}, times align_aggregate's")
    for case in [replace(case, align="joint") for case in select(NAMES)]:
        for kind, make in (("near", factors), ("apart", apart)):
            inputs = copies(make(case), case.bytes, cold_bytes("cpu"))
            times: dict[str, list[float]] = {name: [] for name in FORMS}
            for turn in range(rounds + 1):
                for name, form in FORMS.items():
                    began = time.process_time()
                    form(*inputs[turn % len(inputs)])
                    times[name].append(time.process_time() - began)
            median = {name: statistics.median(t[1:]) for name, t in times.items()}
            base = median["align_aggregate"]
            ratios = ", ".join(f"{name} {t / base:.1f}" for name, t in median.items())
            print(f"{case.name}, {kind}: {ratios} ({1e3 * base:.1f} ms)", flush=True)


if __name__ == "__main__":
    typer.run(main)
