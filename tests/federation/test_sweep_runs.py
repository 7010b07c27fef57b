"""The runs of a sweep: on several processes, diverged, and killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil  # peft needs it
import pytest
from test_sweep import TINY, write

from fedrot.errors import FedrotError
from fedrot.sweep import runner
from fedrot.sweep.analysis import Results
from fedrot.sweep.experiment import TUNE_SEED, read_experiment
from fedrot.sweep.pages import failures, tables
from fedrot.sweep.runner import Outcome, Tuned, run_experiment
from fedrot.tasks import Digits


def test_several_workers_give_the_same_numbers(tmp_path):
    experiment = read_experiment(write(tmp_path, tune={}, vary={}, methods=["fedit", "fedrot"]))
    alone = run_experiment(experiment, tmp_path / "one", workers=1)
    together = run_experiment(experiment, tmp_path / "two", workers=2)
    for a, b in zip(alone, together, strict=True):
        assert [s["accuracy"] for s in a.summaries] == [s["accuracy"] for s in b.summaries]
        assert [s["loss"] for s in a.summaries] == [s["loss"] for s in b.summaries]


@pytest.mark.parametrize(
    ("tune", "count", "examples"),
    [({}, 100_000, 716), ({"local.lr": [0.1, 1.0]}, 600, 573)],  # 573: without the validation part
)
def test_what_the_data_refuse_is_found_before_the_first_run(
    tmp_path, monkeypatch, tune, count, examples
):
    """In any cell; the data are prepared once, with the seed of the first run."""
    prepare, seeds = Digits.prepare, []

    def counted(task, seed, *rest):
        seeds.append(seed)
        return prepare(task, seed, *rest)

    options = {**TINY["options"], "clients.local_test": False, "task.pretrain_seed": 0}
    changes = {"options": options, "vary": {"clients.count": [3, count]}, "methods": ["fedit"]}
    experiment = read_experiment(write(tmp_path, tune=tune, **changes))
    monkeypatch.setattr(Digits, "prepare", counted)
    message = f"clients.count is {count}, but there are {examples} examples"
    with pytest.raises(FedrotError, match=message):
        run_experiment(experiment, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    assert seeds == [TUNE_SEED if tune else 0]


def test_what_the_data_refuse_of_a_later_trial_is_found_too(tmp_path):
    options = {**TINY["options"], "clients.local_test": False, "task.pretrain_seed": 0}
    tune = {"clients.count": [3, 3000]}
    changes = {"options": options, "vary": {}, "methods": ["fedit"], "tune": tune}
    with pytest.raises(FedrotError, match=r"clients\.count is 3000, but there are 573 examples"):
        run_experiment(read_experiment(write(tmp_path, **changes)), tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_a_run_that_diverges_is_left_out_and_named(tmp_path):
    options = {**TINY["options"], "local.lr": 1e30}
    experiment = read_experiment(
        write(
            tmp_path,
            options=options,
            tune={},
            vary={},
            methods=["fedit", "fedrot"],
            first_seed=7,
        )
    )
    results = Results(experiment, run_experiment(experiment, tmp_path / "out", workers=1))
    assert [o.complete for o in results.outcomes] == [False, False]
    assert failures(results)[0] == "FedIT: 2 of 2 runs diverged and are left out."
    assert tables(results)[0][2] == [["FedIT", "-"], ["FedRot-LoRA", "-"]]
    rows = results.as_tree()["results"]
    assert [row["failed_seeds"] for row in rows] == [[7, 8], [7, 8]]
    again = run_experiment(experiment, tmp_path / "out", workers=1)
    assert [o.summaries for o in again] == [[None, None], [None, None]]
    experiment.options["local"]["lr"] = 0.1
    with pytest.raises(FedrotError, match=r"was started with local\.lr=1e\+30, now it is 0\.1"):
        run_experiment(experiment, tmp_path / "out", workers=1)


def test_a_trial_is_chosen_by_all_its_seeds(tmp_path, monkeypatch):
    """By its mean on validation; one seed that diverges rules it out. The runs begin at
    ``first_seed``, those of tuning have seeds of their own."""
    reached = {0.3: [0.9, None], 0.1: [0.5, 0.6], 1.0: [0.2, 0.7]}  # accuracy by rate and seed
    ran = []

    def one(job):
        config = job.config
        ran.append((config.local.lr, config.seed, config.validation))
        if not config.validation:
            return {"accuracy": 0.8}
        accuracy = reached[config.local.lr][config.seed - TUNE_SEED]
        return None if accuracy is None else {"accuracy": accuracy}

    monkeypatch.setattr(runner, "_one", one)
    monkeypatch.setattr(runner, "_check_data", lambda *given: None)
    monkeypatch.setattr(Digits, "prepare", lambda *given: None)
    changes = {"tune": {"local.lr": [*reached]}, "tune_seeds": 2, "vary": {}, "methods": ["fedit"]}
    experiment = read_experiment(write(tmp_path, first_seed=7, **changes))
    (outcome,) = run_experiment(experiment, tmp_path / "out", workers=1)
    assert outcome.tuned.options == {"local.lr": 0.1}
    scores = [score for _, score in outcome.tuned.scores]
    assert scores == [None, pytest.approx(0.55), pytest.approx(0.45)]
    tuning = [(lr, TUNE_SEED + seed, 0.2) for lr in reached for seed in (0, 1)]
    assert ran == [*tuning, (0.1, 7, 0.0), (0.1, 8, 0.0)]
    (heading, _, rows) = tables(Results(experiment, [outcome]))[-1]
    assert heading.startswith("Tuned options") and rows == [["FedIT", "lr 0.1 (0.550)"]]


def test_what_force_removes(tmp_path):
    for name in ("tuning", "runs", "mine"):
        (tmp_path / name / "a").mkdir(parents=True)
    runner.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_differences_are_to_the_first_method_of_the_cell_seed_by_seed(tmp_path):
    experiment = read_experiment(write(tmp_path, tune={}, methods=["fedit", "fedrot"], seeds=3))
    accuracies = {
        (0, "FedIT"): [0.5, 0.6, 0.4],
        (0, "FedRot-LoRA"): [0.7, 0.5, 0.6],
        (1, "FedIT"): [0.1, None, 0.2],
        (1, "FedRot-LoRA"): [0.4, 0.9, 0.5],
    }
    outcomes = [
        Outcome(
            experiment.cells[cell],
            next(v for v in experiment.methods if v.label == label),
            Tuned({}, []),
            [
                a and {"accuracy": a, "aggregation_error": 1e-8, "aggregation_error_plain": 2e-8}
                for a in seeds
            ],
            [],
        )
        for (cell, label), seeds in accuracies.items()
    ]
    results = Results(experiment, outcomes)
    first, second = (results.difference(cell, "FedRot-LoRA") for cell in results.cells)
    assert first.mean == pytest.approx(0.1) and first.pairs == 3
    assert second.mean == pytest.approx(0.3) and second.pairs == 2  # FedIT's second seed failed
    assert second.low == pytest.approx(0.3) and not second.certain
    _, _, rows = tables(results)[1]
    assert rows[1][2] == "+0.300 (+0.300 to +0.300)"  # two seeds: no star
    assert failures(results) == ["FedIT (alpha 10.0): 1 of 3 runs diverged and are left out."]
    assert results.values(results.cells[0], "FedIT", "error_ratio") == []  # rounding of zero
    assert [row["failed_seeds"] for row in results.as_tree()["results"]] == [[], [], [1], []]


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_a_sweep_that_is_killed(tmp_path, kill):
    options = {**TINY["options"], "rounds": 100_000}
    path = write(tmp_path, options=options, tune={}, vary={}, methods=["fedit", "fedrot"])
    code = "from fedrot.cli import main; main()"
    command = ["sweep", str(path), "--output", str(tmp_path / "out"), "--workers", "2"]
    sweep = subprocess.Popen([sys.executable, "-c", code, *command])
    try:
        checkpoints, deadline = [], time.monotonic() + 120
        while len(checkpoints) < 2:  # both are at work
            assert time.monotonic() < deadline and sweep.poll() is None
            time.sleep(0.2)
            checkpoints = [*(tmp_path / "out").rglob("checkpoint*")]
        workers = [
            process
            for process in psutil.Process(sweep.pid).children()
            if "spawn_main" in " ".join(process.cmdline())
        ]
        assert len(workers) == 2
    finally:
        sweep.send_signal(kill)
        sweep.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    for process in alive:
        process.kill()
    assert not alive
