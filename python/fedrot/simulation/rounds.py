"""One federation, from the configuration to the finished run folder."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from fedrot import __version__
from fedrot.config import Config
from fedrot.errors import Diverged
from fedrot.factors import Factors
from fedrot.methods import FedIT
from fedrot.metrics import aggregation_error, rotation_angles, total
from fedrot.report.pages import write_run_report
from fedrot.simulation import checkpoint
from fedrot.simulation.adapter import (
    adapt,
    draw_factors,
    load_adapter,
    save_adapter,
    set_factors,
)
from fedrot.simulation.checkpoint import Checkpoint
from fedrot.simulation.gauge import regauge
from fedrot.simulation.local import draw_batches, train_clients
from fedrot.simulation.run_dir import Row, RunDir, open_run
from fedrot.simulation.seeding import generator
from fedrot.tasks import TaskData
from fedrot.tasks.base import Track, no_progress
from fedrot.tasks.partition import dirichlet


@dataclass(frozen=True)
class Federation:
    """What stays the same over the rounds."""

    config: Config
    data: TaskData
    model: PeftModel
    examples: list[Tensor]  # per client its rows of data.train

    def evaluate(self, factors: Factors) -> dict[str, float]:
        return self.config.task.evaluate(set_factors(self.model, factors), self.data.test)


@dataclass(frozen=True)
class Uploads:
    """What the clients hand in after local training, and what it took."""

    factors: list[Factors]
    reference: Factors  # toward which the server aligns them
    train_loss: float
    seconds: float


def federate(
    config: Config,
    path: Path,
    *,
    resume: bool = False,
    force: bool = False,
    uploads_from: Path | None = None,
    track: Track = no_progress,
) -> dict[str, Any]:
    """Run a federation into the folder ``path`` and return its summary.

    A finished run is returned as it is under ``resume``. ``uploads_from``: a finished one-shot
    run of the same configuration, save the method, whose uploads are taken instead of training.

    Raises:
        FedrotError: the folder must not be touched, the configuration differs from the one to
            resume, or local training diverged.
    """
    run = open_run(path, config.tree(), resume=resume, force=force)
    if run.finished:
        return run.summary()
    with _threads(config.threads):
        federation = prepare(config, track)
        state = _start(federation, run)
        rows = run.rows()[: state.rounds]
        for round in track(range(state.rounds, config.rounds), "rounds"):
            state, row = run_round(federation, run, round, state.factors, uploads_from, track)
            rows.append(row)
            run.write_rows(rows)
            checkpoint.save(run.checkpoint, state)
        return _finish(federation, run, state.factors, rows)


def prepare(config: Config, track: Track = no_progress) -> Federation:
    """Data, partition and adapted model of a configuration."""
    data = config.task.prepare(config.seed, track)
    if config.validation:
        data = hold_out(data, config.validation, config.seed)
    base = config.task.load_model(data.base)
    model = adapt(base, config.lora, config.task.lora_targets(base))
    clients = config.clients
    examples = dirichlet(data.labels, clients.count, clients.alpha, config.seed)
    return Federation(config, data, model, examples)


def hold_out(data: TaskData, fraction: float, seed: int) -> TaskData:
    """The same task with a part of its training examples in the place of the test part."""
    order = torch.randperm(len(data.labels), generator=generator(seed, "validation"))
    count = max(1, round(fraction * len(order)))
    held, kept = order[:count].sort().values, order[count:].sort().values
    return replace(
        data,
        train={key: value[kept] for key, value in data.train.items()},
        test={key: value[held] for key, value in data.train.items()},
        labels=data.labels[kept],
    )


def run_round(
    federation: Federation,
    run: RunDir,
    round: int,
    factors: Factors,
    uploads_from: Path | None = None,
    track: Track = no_progress,
) -> tuple[Checkpoint, Row]:
    """Local training, aggregation and evaluation of one round, ``round`` from 0."""
    config = federation.config
    if uploads_from is None:
        uploads = train_round(federation, round, factors, track)
    else:
        uploads = _read_uploads(federation, RunDir(uploads_from))
    if config.start == "own":
        _write_clients(federation.model, run, uploads.factors)
    began = time.perf_counter()
    factors = config.method.aggregate(uploads.factors, uploads.reference, round=round)
    seconds = time.perf_counter() - began
    row = {
        "round": round + 1,
        **federation.evaluate(factors),
        "train_loss": uploads.train_loss,
        **_alignment(uploads, factors, round),
        "seconds_local": uploads.seconds,
        "seconds_aggregation": seconds,
    }
    if config.start == "own":
        row["client_accuracies"] = [federation.evaluate(f)["accuracy"] for f in uploads.factors]
    return Checkpoint(round + 1, factors), row


def train_round(
    federation: Federation, round: int, factors: Factors, track: Track = no_progress
) -> Uploads:
    """Local training of every client from the global factors, or from its own start."""
    config, model = federation.config, federation.model
    seed, clients = config.seed, range(config.clients.count)
    began = time.perf_counter()
    starts = [factors for _ in clients]
    if config.start == "own":
        starts = [draw_factors(model, generator(seed, "start", i + 1)) for i in clients]
    batches = [
        draw_batches(federation.examples[i], config.local, generator(seed, "batches", round, i))
        for i in clients
    ]
    done = train_clients(model, starts, federation.data.train, batches, config.local, track=track)
    trained, losses = done.factors, done.losses
    _check_converging(losses, round, config.local.lr)
    if config.regauge:
        trained = [regauge(f, generator(seed, "gauge", round, i)) for i, f in enumerate(trained)]
    reference = trained[0] if config.start == "own" else factors
    return Uploads(trained, reference, float(losses.mean()), time.perf_counter() - began)


def _start(federation: Federation, run: RunDir) -> Checkpoint:
    if run.checkpoint.is_file():
        return checkpoint.load(run.checkpoint)
    config = federation.config
    return Checkpoint(0, draw_factors(federation.model, generator(config.seed, "start", 0)))


def _alignment(uploads: Uploads, factors: Factors, round: int) -> Row:
    """How far the uploads were apart, and what the method and plain averaging lose on them."""
    plain = FedIT().aggregate(uploads.factors, uploads.reference, round=round)
    angles = rotation_angles(uploads.factors, uploads.reference)
    return {
        "aggregation_error": total(aggregation_error(uploads.factors, factors)),
        "aggregation_error_plain": total(aggregation_error(uploads.factors, plain)),
        "rotation_angle": float(angles.mean()),
    }


def _write_clients(model: PeftModel, run: RunDir, uploads: Sequence[Factors]) -> None:
    for index, factors in enumerate(uploads):
        save_adapter(model, factors, run.client(index))


def _read_uploads(federation: Federation, run: RunDir) -> Uploads:
    factors = [load_adapter(federation.model, folder) for folder in run.clients()]
    (row,) = run.rows()
    return Uploads(factors, factors[0], row["train_loss"], row["seconds_local"])


def _finish(
    federation: Federation, run: RunDir, factors: Factors, rows: list[Row]
) -> dict[str, Any]:
    config, last = federation.config, rows[-1]
    start = draw_factors(federation.model, generator(config.seed, "start", 0))
    summary = {
        "method": config.method.name,
        "setting": config.setting,
        "synthetic": config.synthetic,
        "seed": config.seed,
        "rounds": config.rounds,
        "accuracy": last["accuracy"],
        "loss": last["loss"],
        "start": federation.evaluate(start),
        "client_examples": [len(examples) for examples in federation.examples],
        "test_examples": len(federation.data.test["labels"]),
        **_means(rows, "aggregation_error", "aggregation_error_plain", "rotation_angle"),
        "seconds_local": math.fsum(row["seconds_local"] for row in rows),
        "seconds_aggregation": math.fsum(row["seconds_aggregation"] for row in rows),
        **federation.data.facts,
        "version": __version__,
    }
    if "client_accuracies" in last:
        scores = last["client_accuracies"]
        summary["client_accuracy"] = math.fsum(scores) / len(scores)
    save_adapter(federation.model, factors, run.adapter)
    write_run_report(run.path, config, summary, rows)
    run.finish(summary)
    return summary


def _means(rows: list[Row], *keys: str) -> dict[str, float]:
    return {key: math.fsum(row[key] for row in rows) / len(rows) for key in keys}


def _check_converging(losses: Tensor, round: int, lr: float) -> None:
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise Diverged(
            f"local training of client {bad[0]} diverged in round {round + 1}: "
            f"its loss is not finite; lower local.lr={lr}"
        )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
