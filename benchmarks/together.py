"""A round's local training, all clients together beside one after the other through PEFT:
`python -m benchmarks.together [rounds]`.

`digits` with its default options. The loop is the shortest there is: PEFT's forward and backward
and `torch.optim` (fused), a client at a time. Processor time of one thread, medians over rounds in
which the two alternate; both must give the same factors.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated

import torch
import typer
from torch.nn.functional import cross_entropy

from fedrot.config import load
from fedrot.factors import Factors
from fedrot.options import parse_overrides
from fedrot.report import markdown
from fedrot.simulation.adapter import get_factors, parameter_names, set_factors
from fedrot.simulation.local import draw_batches
from fedrot.simulation.participants import start
from fedrot.simulation.rounds import Federation, prepare, train_round
from fedrot.simulation.seeding import generator

CLIENTS = (10, 50)


def one_after_the_other(federation: Federation) -> list[Factors]:
    """What every client comes back with from the first round."""
    config, model, train = federation.config, federation.model, federation.data.train
    server, local = federation.start(), config.local
    names = [name for pair in parameter_names(model).values() for name in pair]
    uploads = []
    for client, examples in enumerate(federation.examples):
        set_factors(model, start(config, model, server, client, federation.head).factors)
        trained = [model.get_parameter(name).requires_grad_() for name in names]
        optimizer = torch.optim.SGD(trained, local.lr, fused=True)
        batches = draw_batches(examples, local, generator(config.seed, "batches", 0, client))
        for rows in batches:
            optimizer.zero_grad()
            output = model(pixel_values=train["pixel_values"][rows])
            cross_entropy(output.logits, train["labels"][rows]).backward()
            optimizer.step()
        uploads.append(get_factors(model))
        for p in trained:
            p.requires_grad_(False).grad = None
    return uploads


def compare(clients: int, rounds: int) -> list[str]:
    """A row of the table."""
    federation = prepare(load(parse_overrides([f"clients.count={clients}"])))
    server, seconds = federation.start(), ([], [])  # type: tuple[list[float], list[float]]
    for _ in range(rounds):
        before = time.process_time()
        loop = one_after_the_other(federation)
        between = time.process_time()
        together = train_round(federation, server).factors
        after = time.process_time()
        seconds[0].append(between - before)
        seconds[1].append(after - between)
    apart = [
        max(float((getattr(a, side)[m] - t).abs().max()) for m, t in getattr(b, side).items())
        for a, b in zip(loop, together, strict=True)
        for side in "AB"
    ]
    # Training amplifies rounding, of a few clients by far.
    assert statistics.median(apart) < 1e-4, apart
    ratios = sorted(a / b for a, b in zip(*seconds, strict=True))
    alone, grouped = (statistics.median(column) for column in seconds)
    return [
        str(clients),
        f"{alone:.2f} s",
        f"{grouped:.2f} s",
        f"{statistics.median(ratios):.1f}x ({ratios[0]:.1f} to {ratios[-1]:.1f})",
    ]


def main(rounds: Annotated[int, typer.Argument(min=1)] = 7) -> None:
    """Print a table of the medians over so many rounds."""
    torch.set_num_threads(1)
    rows = [compare(clients, rounds) for clients in CLIENTS]
    print(markdown.table(["clients", "one after the other", "together", "times as long"], rows))


if __name__ == "__main__":
    typer.run(main)
