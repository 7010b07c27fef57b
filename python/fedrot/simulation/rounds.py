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
from safetensors.torch import save_file
from torch import Tensor

from fedrot.config import Config
from fedrot.errors import Diverged, FedrotError
from fedrot.factors import Factors, padded, truncate
from fedrot.files import new_file
from fedrot.gauge import regauge
from fedrot.methods import Server
from fedrot.progress import Track, no_progress
from fedrot.server import Upload, serve
from fedrot.simulation import attacks, checkpoint, loggers
from fedrot.simulation.adapter import (
    FrozenWeights,
    adapt,
    draw_factors,
    get_head,
    load_adapter,
    load_head,
    save_adapter,
    set_factors,
    set_head,
)
from fedrot.simulation.data import divide
from fedrot.simulation.grouped import mixed_layer
from fedrot.simulation.local import draw_batches, train_clients
from fedrot.simulation.measures import alignment, chosen_ranks, mean_rank, summarised
from fedrot.simulation.memory import Memory, remember
from fedrot.simulation.participants import own_model, participants, start
from fedrot.simulation.run_dir import Row, RunDir, open_run
from fedrot.simulation.seeding import generator
from fedrot.tasks import TaskData


@dataclass(frozen=True)
class Federation:
    """What stays the same over the rounds."""

    config: Config
    data: TaskData
    model: PeftModel
    frozen: FrozenWeights
    head: dict[str, Tensor]  # as it was before training; empty where it stays frozen
    examples: list[Tensor]  # per client its rows of data.train
    memory: Memory
    local_tests: list[Tensor]  # per client its rows of data.test; empty unless it is asked for

    def start(self) -> Server:
        """Before the first round."""
        factors = draw_factors(self.model, generator(self.config.seed, "start", 0))
        return Server(factors, head=self.head)

    def score(
        self, factors: Factors, head: dict[str, Tensor], rows: Tensor | None = None
    ) -> dict[str, float]:
        """Of one model on the test part, or on some rows of it."""
        set_head(self.model, head)
        test = self.data.test
        if rows is not None:
            test = {key: value[rows] for key, value in test.items()}
        return self.config.task.evaluate(set_factors(self.model, factors), test)

    def evaluate(self, server: Server) -> dict[str, float]:
        """Of the global model; where clients keep their B or head, the mean over the clients'
        models, and that of the averaged B or head as ``..._averaged``. Of the clients' models on
        their local tests, the mean as ``..._local``. Attackers' own models do not count."""
        self.frozen.set(server.merged)
        scores, clients = self.score(server.factors, server.head), self.config.clients.honest
        if server.personal or server.heads:
            averaged = {f"{key}_averaged": value for key, value in scores.items()}
            scores = {**_means([self.score_own(server, i) for i in clients]), **averaged}
        if self.local_tests:
            local = [self.score_own(server, i, self.local_tests[i]) for i in clients]
            scores |= {f"{key}_local": value for key, value in _means(local).items()}
        return scores

    def score_own(
        self, server: Server, client: int, rows: Tensor | None = None
    ) -> dict[str, float]:
        """As :meth:`score`, of a client's own model."""
        own = own_model(self.config, server, client, self.head)
        return self.score(own.factors, own.head, rows)


@dataclass(frozen=True)
class Uploads:
    """What the participants of a round hand in, and what it took."""

    clients: list[Upload]
    reference: Factors  # toward which the server aligns them
    weights: Tensor | None
    train_loss: float
    seconds: float

    @property
    def factors(self) -> list[Factors]:
        return [upload.factors for upload in self.clients]


def federate(
    config: Config,
    path: Path,
    *,
    resume: bool = False,
    force: bool = False,
    uploads_from: Path | None = None,
    report: bool = True,
    log: Sequence[str] = (),
    track: Track = no_progress,
) -> dict[str, Any]:
    """Run a federation into the folder ``path`` and return its summary.

    A finished run is returned as it is under ``resume``. ``uploads_from``: a finished one-shot
    run of the same configuration, save the method, whose uploads are taken instead of training.
    ``report``: with pictures and ``report.html``. ``log``: names of ``loggers.LOGGERS`` that get
    the metrics too; a finished run's are written from its metrics.

    Raises:
        FedrotError: the folder must not be touched, the configuration differs from the one to
            resume, a logger's package is missing, or local training diverged.
    """
    loggers.check(log)
    run = open_run(path, config.tree(), resume=resume, force=force)
    if run.finished and not force:
        with loggers.opened(log, run, config.tree(), run.rows()):
            return run.summary()
    with _threads(config.threads):
        federation = prepare(config, track)  # before anything of an earlier run is removed
        open_run(path, config.tree(), resume=resume, force=force)  # nobody has begun meanwhile
        if force or not run.started:
            run.start(config.tree())
        run.tidy()
        resumed = run.checkpoint.is_file()
        server = checkpoint.load(run.checkpoint) if resumed else federation.start()
        rows = run.rows()[: server.rounds]
        with loggers.opened(log, run, config.tree(), rows) as logged:
            for _ in track(range(server.rounds, config.rounds), "rounds"):
                server, row = run_round(federation, run, server, uploads_from, track)
                rows.append(row)
                run.write_rows(rows)
                checkpoint.save(run.checkpoint, server)
                logged(row)
        summary = summarised(federation, rows)
        _save_model(federation, run, server)
        if report:
            # Here, as matplotlib takes a second to import, which the runs of a sweep save.
            from fedrot.report.pages import write_run_report

            write_run_report(run.path, config, summary, rows)
        run.finish(summary)
        return summary


def prepare(config: Config, track: Track = no_progress) -> Federation:
    """Data, partition and adapted model of a configuration."""
    device = device_of(config.device)
    data = config.task.prepare(config.seed, track, config.clients.by_column)
    data, examples, local_tests = divide(data, config)
    base = config.task.load_model(data).to(device)
    model = adapt(base, config.lora, config.task.lora_targets(base))
    if layer := mixed_layer(model, data.train):
        if config.local.together not in (None, 1):
            raise FedrotError(
                f"local.together must be 1 for this model, got {config.local.together}: the input "
                f"of {layer} is not a row an example"
            )
        config = replace(config, local=replace(config.local, together=1))
    head = get_head(model) if config.local.head else {}
    return Federation(
        config,
        data,
        model,
        FrozenWeights(model),
        head,
        examples,
        remember(model, data.train),
        local_tests,
    )


def device_of(name: str) -> torch.device:
    """The device of ``cpu``, ``cuda`` or ``auto``: CUDA where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise FedrotError("device=cuda, but PyTorch finds no CUDA device; device=cpu needs none")
    cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if cuda else "cpu")


def run_round(
    federation: Federation,
    run: RunDir,
    server: Server,
    uploads_from: Path | None = None,
    track: Track = no_progress,
) -> tuple[Server, Row]:
    """Local training, aggregation and evaluation of one round."""
    config = federation.config
    if uploads_from is None:
        uploads = train_round(federation, server, track)
    else:
        uploads = _read_uploads(federation, RunDir(uploads_from))
    if config.start == "own":
        _write_clients(federation.model, run, uploads.clients)
    began = time.perf_counter()
    update = serve(
        config.method,
        config.server,
        server,
        uploads.clients,
        uploads.weights,
        reference=uploads.reference,
        generator=generator(config.seed, "server", server.rounds),
        past=max(1, config.clients.delay),
        personal_head=config.local.personal_head,
    )
    seconds = time.perf_counter() - began
    row: Row = {
        "round": update.server.rounds,
        **federation.evaluate(update.server),
        "train_loss": uploads.train_loss,
        **alignment(uploads, update),
        **(chosen_ranks(uploads, update) if config.method.chooses_ranks else {}),
        **({"rank": mean_rank(uploads)} if config.method.prunes else {}),
        "seconds_local": uploads.seconds,
        "seconds_aggregation": seconds,
    }
    for key, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise Diverged(
                f"{config.method.name} diverged in round {row['round']}: {key} is {value}"
            )
    if config.clients.per_round < config.clients.count:
        row["clients"] = [upload.client for upload in uploads.clients]
    if config.start == "own":
        federation.frozen.set({})
        scores = [federation.score(u.factors, u.head) for u in uploads.clients]
        row["client_accuracies"] = [score["accuracy"] for score in scores]
    return update.server, row


def train_round(federation: Federation, server: Server, track: Track = no_progress) -> Uploads:
    """Local training of the round's participants, from the server or each from its own start."""
    config, model, round = federation.config, federation.model, server.rounds
    seed, clients, method = config.seed, participants(config, round), config.method
    shared = config.start == "own"  # by all methods that are compared
    began = time.perf_counter()
    federation.frozen.set(server.merged)
    starts = [start(config, model, server, i, federation.head) for i in clients]
    batches = [
        draw_batches(federation.examples[i], config.local, generator(seed, "batches", round, i))
        for i in clients
    ]
    done = train_clients(
        model,
        [start.factors for start in starts],
        federation.data.train,
        batches,
        config.local,
        parts="AB" if shared else method.parts(round),
        heads=[start.head for start in starts],
        memory=federation.memory,
        dropout=[generator(seed, "dropout", round, i, device=model.device) for i in clients],
        regularizer=None if shared else method.regularizer,
        track=track,
    )
    _check_converging(clients, done.losses, round, config.local.lr)
    ends = done.factors
    if not shared:
        ends = [method.hand_in(s.factors, f) for s, f in zip(starts, ends, strict=True)]
    trained = [Upload(*upload) for upload in zip(clients, ends, done.heads, strict=True)]
    uploads = [
        attacks.spoiled(u, old, config.clients, generator(seed, "attack", round, u.client))
        for u, old in zip(trained, starts, strict=True)
    ]
    if config.local.personal_head:  # which nobody hands in
        uploads = [replace(u, head=own.head) for u, own in zip(uploads, trained, strict=True)]
    if config.regauge:
        gauges = [generator(seed, "gauge", round, i) for i in clients]
        uploads = [
            replace(u, factors=regauge(u.factors, gauge))
            for u, gauge in zip(uploads, gauges, strict=True)
        ]
    loss, seconds = float(done.losses.mean()), time.perf_counter() - began
    return _uploads(federation, uploads, method.reference(server), loss, seconds)


def _uploads(
    federation: Federation, clients: list[Upload], reference: Factors, loss: float, seconds: float
) -> Uploads:
    config, weights = federation.config, None
    if config.clients.weights == "samples":
        weights = torch.tensor([float(len(federation.examples[u.client])) for u in clients])
    if config.start == "own":
        reference = clients[0].factors
    # Chosen ranks may be smaller; the next ones may be as large as those of the model.
    reference = padded(reference, config.lora.r)
    return Uploads(clients, reference, weights, loss, seconds)


def _write_clients(model: PeftModel, run: RunDir, uploads: Sequence[Upload]) -> None:
    for upload in uploads:
        save_adapter(model, upload.factors, run.client(upload.client), upload.head)


def _read_uploads(federation: Federation, run: RunDir) -> Uploads:
    clients = participants(federation.config, 0)
    uploads = []
    for client, folder in zip(clients, run.clients(), strict=True):
        factors = load_adapter(federation.model, folder)
        own = truncate(factors, federation.config.clients.rank(client))
        uploads.append(Upload(client, own, load_head(folder)))
    (row,) = run.rows()
    return _uploads(
        federation, uploads, uploads[0].factors, row["train_loss"], row["seconds_local"]
    )


def _save_model(federation: Federation, run: RunDir, server: Server) -> None:
    """The global adapter; the changed frozen weights and the clients' own adapters if any."""
    save_adapter(federation.model, server.factors, run.adapter, server.head)
    if server.merged:
        scaled = federation.frozen.scaled
        changes = {f"{m}.weight": scaled(m, t).contiguous() for m, t in server.merged.items()}
        with new_file(run.merged) as fresh:
            save_file(changes, fresh)
    for client in sorted({*server.personal, *server.heads}):
        own = own_model(federation.config, server, client, federation.head)
        save_adapter(federation.model, own.factors, run.client(client), own.head)


def _check_converging(clients: Sequence[int], losses: Tensor, round: int, lr: float) -> None:
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise Diverged(
            f"local training of client {clients[bad[0]]} diverged in round {round + 1}: "
            f"its loss is not finite; lower local.lr={lr}"
        )


def _means(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: math.fsum(s[key] for s in scores) / len(scores) for key in scores[0]}


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
