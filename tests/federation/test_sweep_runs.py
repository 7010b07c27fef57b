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
from fedrot.sweep.analysis import Results
from fedrot.sweep.experiment import TUNE_SEED, read_experiment
from fedrot.sweep.pages import failures, tables
from fedrot.sweep.runner import run_experiment
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
