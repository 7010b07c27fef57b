"""Runs of an experiment on the cores there are; finished ones are kept."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedrot.config import Config
from fedrot.errors import Diverged, Refused
from fedrot.files import remove, write_json
from fedrot.options import Tree
from fedrot.progress import Track, no_progress
from fedrot.simulation.comparison import Variant
from fedrot.simulation.run_dir import RunDir, open_run
from fedrot.sweep.experiment import TUNE_SEED, Cell, Experiment
from fedrot.tasks import Task, TaskData

FAILED = "failed.json"  # in the folder of a run that diverged
Summary = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run and its folder."""

    config: Config
    path: Path


@dataclass(frozen=True)
class Tuned:
    """The trial that was best on validation, and what all of them reached there."""

    options: Tree
    scores: list[tuple[Tree, float | None]]  # None: diverged


@dataclass(frozen=True)
class Outcome:
    """One method in one cell: the tuned options, and a summary a seed (``None``: it failed)."""

    cell: Cell
    variant: Variant
    tuned: Tuned
    summaries: list[Summary | None]
    folders: list[Path]

    @property
    def complete(self) -> bool:
        return all(s is not None for s in self.summaries)


def run_experiment(
    experiment: Experiment,
    out: Path,
    workers: int,
    track: Track = no_progress,
    *,
    force: bool = False,
) -> list[Outcome]:
    """Tune every method in every cell, then run it over the seeds; a run that is already finished
    in ``out`` is kept, so an interrupted sweep goes on where it stopped. ``force``: all are
    removed first.

    Raises:
        FedrotError: ``out`` holds runs of another configuration, or data and options of a cell do
            not go together.
    """
    left = [cell for cell in experiment.cells if force or not _ended(experiment, out, cell)]
    _check_data(experiment, left, track)
    if force:
        from fedrot.simulation.rounds import prepare

        variant, seed = experiment.methods[0], experiment.first_seed
        trial = experiment.trials(variant)[0]
        for cell in experiment.cells:  # what only the model shows, while the earlier runs are there
            prepare(experiment.config(cell, variant, trial, seed, tuning=False), track)
        clear(out)
    pairs = [(cell, variant) for cell in experiment.cells for variant in experiment.methods]
    trials = {variant.label: experiment.trials(variant) for variant in experiment.methods}
    tuning: dict[tuple[str, str, int, int], Job] = {}
    for cell, variant in pairs:
        options = trials[variant.label]
        for index, trial in enumerate(options if len(options) > 1 else []):
            for seed in range(experiment.trial_seeds(variant)):
                config = experiment.config(cell, variant, trial, TUNE_SEED + seed, tuning=True)
                folder = out / "tuning" / cell.folder / variant.folder / f"trial-{index:02d}"
                tuning[cell.folder, variant.folder, index, seed] = Job(
                    config, folder / f"seed-{seed}"
                )
    found = _run(list(tuning.values()), workers, track, "tuning")

    chosen: dict[tuple[str, str], Tuned] = {}
    for cell, variant in pairs:
        scores: list[tuple[Tree, float | None]] = []
        for index, trial in enumerate(trials[variant.label]):
            jobs = [
                tuning.get((cell.folder, variant.folder, index, seed))
                for seed in range(experiment.trial_seeds(variant))
            ]
            values = [_score(found.get(job.path)) for job in jobs if job is not None]
            real = [v for v in values if v is not None]
            scores.append(
                (trial, statistics.fmean(real) if real and len(real) == len(values) else None)
            )
        best = max(scores, key=lambda pair: -1.0 if pair[1] is None else pair[1])
        chosen[cell.folder, variant.folder] = Tuned(best[0], scores)

    finals: dict[tuple[str, str], list[Job]] = {}
    for cell, variant in pairs:
        key = cell.folder, variant.folder
        finals[key] = [
            Job(
                experiment.config(cell, variant, chosen[key].options, seed, tuning=False),
                _folder(out, cell, variant, seed),
            )
            for seed in experiment.run_seeds
        ]
    found = _run([job for jobs in finals.values() for job in jobs], workers, track, "runs")
    return [
        Outcome(
            cell,
            variant,
            chosen[cell.folder, variant.folder],
            [found[job.path] for job in finals[cell.folder, variant.folder]],
            [job.path for job in finals[cell.folder, variant.folder]],
        )
        for cell, variant in pairs
    ]


def _check_data(experiment: Experiment, cells: Sequence[Cell], track: Track) -> None:
    """Whether data and options of the cells go together, with a validation part and without.

    Cells of one task share its data, of the seed that runs first: the base model that is made where
    it is missing is that of the first run.
    """
    from fedrot.simulation.data import divide

    tuned = [v for v in experiment.methods if len(experiment.trials(v)) > 1]
    variant = [*tuned, experiment.methods[0]][0]
    seed = TUNE_SEED if tuned else experiment.first_seed
    found: dict[tuple[Task, str | None], TaskData] = {}
    for cell in cells:
        for tuning in (True, False) if tuned else (False,):
            for trial in experiment.trials(variant):
                config = experiment.config(cell, variant, trial, seed, tuning)
                key = config.task, config.clients.by_column
                if key not in found:
                    found[key] = config.task.prepare(seed, track, config.clients.by_column)
                divide(found[key], config)


def _folder(out: Path, cell: Cell, variant: Variant, seed: int) -> Path:
    return out / "runs" / cell.folder / variant.folder / f"seed-{seed}"


def _ended(experiment: Experiment, out: Path, cell: Cell) -> bool:
    """Whether all runs of a cell have finished or failed."""
    folders = (
        _folder(out, cell, variant, seed)
        for variant in experiment.methods
        for seed in experiment.run_seeds
    )
    return all(RunDir(path).finished or (path / FAILED).is_file() for path in folders)


def clear(out: Path) -> None:
    """Remove the runs of an earlier sweep, and nothing else."""
    remove(out / name for name in ("tuning", "runs"))


def _score(summary: Summary | None) -> float | None:
    """What a trial is chosen by: the accuracy, on the clients' local tests where there are some."""
    if summary is None:
        return None
    return float(summary["accuracy_local" if "accuracy_local" in summary else "accuracy"])


def _run(jobs: Sequence[Job], workers: int, track: Track, label: str) -> dict[Path, Summary | None]:
    """The summary of every job by its folder; ``None`` where local training diverged."""
    found: dict[Path, Summary | None] = {}
    todo = []
    for job in jobs:
        if (failure := _failure(job)) is not None:
            found[job.path] = None if failure else RunDir(job.path).summary()
        else:
            todo.append(job)
    if todo:
        # What is downloaded or refused, once and not in every process.
        first = todo[0].config
        first.task.prepare(first.seed, track, first.clients.by_column)
    for job, summary in track(_Finished(todo, workers), label):
        found[job.path] = summary
    return found


def _failure(job: Job) -> bool | None:
    """``None``: still to run; else whether it has failed. A run that is there must be the same."""
    if (job.path / FAILED).is_file():
        failed = json.loads((job.path / FAILED).read_text(encoding="utf-8"))
        if failed["config"] == job.config.tree():
            return True
    if not job.path.exists():
        return None
    try:
        run = open_run(job.path, job.config.tree(), resume=True)
    except Refused as error:  # with the advice of `fedrot train`
        advice = "--force removes the runs of this sweep, another --output keeps them"
        raise Refused(error.reason, advice) from error
    return False if run.finished else None


class _Finished:
    """The jobs with their summaries, in the order in which they finish."""

    def __init__(self, jobs: Sequence[Job], workers: int) -> None:
        self.jobs, self.workers = jobs, workers

    def __len__(self) -> int:
        return len(self.jobs)

    def __iter__(self) -> Iterator[tuple[Job, Summary | None]]:
        if self.workers == 1 or len(self.jobs) < 2:
            for job in self.jobs:
                yield job, _one(job)
            return
        # Not forked: PyTorch's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        workers = min(self.workers, len(self.jobs))
        with ProcessPoolExecutor(workers, context, _end_with_parent) as pool:
            futures = {pool.submit(_one, job): job for job in self.jobs}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _end_with_parent() -> None:
    """In a worker: do not go on, nor wait for more, when the sweep has been killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _one(job: Job) -> Summary | None:
    from fedrot.simulation.rounds import federate

    try:
        return federate(job.config, job.path, resume=True, report=False)
    except Diverged as error:
        write_json(job.path / FAILED, {"config": job.config.tree(), "error": str(error)})
        return None
