"""Logs of a run: metrics.csv, TensorBoard and Weights & Biases, read back."""

from __future__ import annotations

import csv
import importlib.util
import struct
import sys
from pathlib import Path

import pytest
from small import SMALL, small
from typer.testing import CliRunner

from fedrot.cli import app
from fedrot.errors import FedrotError
from fedrot.simulation import loggers, rounds
from fedrot.simulation.rounds import federate
from fedrot.simulation.run_dir import RunDir, scalars


def federated(*args, **options):
    return federate(*args, report=False, **options)


def metrics(run):
    return [scalars(row) for row in RunDir(run).rows()]


def read_csv(run):
    with (run / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def read_tensorboard(run):
    """`{key: [(step, value)]}` of every event there is, whatever TensorBoard makes of them."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    found = {}
    for file in sorted((run / "tensorboard").iterdir()):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                item = make_ndarray(value.tensor).flatten()[0]
                found.setdefault(value.tag, []).append((event.step, item))
    return found


def read_wandb(run):
    """The records of the one offline run there: its `.wandb` file is a LevelDB log of them."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its service may still be writing after the run has finished
    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    data, at, part, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # a record does not start that late in a block
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            records.append(Record.FromString(part))
            part = b""
    return records


def history(records):
    """`[{key: value}]` of what was logged, without what W&B adds."""
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {(i.key or i.nested_key[0]): float(i.value_json) for i in record.history.item}
            assert items.pop("_step") == record.history.step.num
            rows.append({k: v for k, v in items.items() if not k.startswith("_")})
    return rows


def test_csv_holds_the_single_numbers_of_every_round(tmp_path):
    federated(small("fedit", "clients.participation=0.5"), tmp_path / "run")
    rows = RunDir(tmp_path / "run").rows()
    assert all(isinstance(row.pop("clients"), list) for row in rows)
    assert read_csv(tmp_path / "run") == rows
    lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len(lines) == 4 and lines[0].startswith("round,accuracy,loss,")


def test_a_column_that_a_round_lacks_is_empty(tmp_path):
    run = RunDir(tmp_path)
    run.write_rows([{"round": 1, "accuracy": 0.5}, {"round": 2, "extra": 0.25, "clients": [1]}])
    assert (tmp_path / "metrics.csv").read_text() == "round,accuracy,extra\n1,0.5,\n2,,0.25\n"


def test_tensorboard_over_an_interruption(tmp_path, interrupt):
    run = tmp_path / "run"
    interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        federated(small(), run, log=["tensorboard"])
    assert [step for step, _ in read_tensorboard(run)["accuracy"]] == [1, 2]
    # Interrupted once more, between metrics and checkpoint: that round is done again.
    RunDir(run).write_rows([*RunDir(run).rows(), {"round": 3, "accuracy": -1.0}])
    interrupt(0)
    federated(small(), run, resume=True, log=["tensorboard"])
    found, rows = read_tensorboard(run), metrics(run)
    assert "pretrain_steps: 60" in found.pop("config/text_summary")[0][1].decode()
    assert found.keys() == rows[0].keys()
    for key, values in found.items():
        assert [step for step, _ in values] == [1, 2, 3]
        assert [value for _, value in values] == pytest.approx([row[key] for row in rows])


def test_a_finished_run_gets_its_log_from_its_metrics(tmp_path, monkeypatch):
    run = tmp_path / "run"
    federated(small(), run)
    monkeypatch.setattr(rounds, "train_clients", None)
    for _ in range(2):
        federated(small(), run, resume=True, log=["tensorboard"])
        steps, values = zip(*read_tensorboard(run)["accuracy"], strict=True)
        assert steps == (1, 2, 3)
        assert values == pytest.approx([row["accuracy"] for row in metrics(run)])
    monkeypatch.undo()
    federated(small(), run, force=True)
    assert not (run / "tensorboard").exists()


def test_wandb_offline_over_an_interruption(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    run = RunDir(Path("runs/one"))
    run.path.mkdir(parents=True)
    rows = [{"round": i, "accuracy": i / 8, "clients": [i]} for i in (1, 2, 3)]
    config = small().tree()
    with (
        pytest.raises(KeyboardInterrupt),
        loggers.opened(["wandb"], run, config, []) as log,
    ):
        log(rows[0])
        log(rows[1])
        raise KeyboardInterrupt
    first = read_wandb(run.path)
    assert [row["round"] for row in history(first)] == [1, 2]
    assert next(r.exit.exit_code for r in first if r.WhichOneof("record_type") == "exit") == 1
    with loggers.opened(["wandb"], run, config, rows[:1]) as log:  # its checkpoint is of round 1
        log(rows[1])
        log(rows[2])
    records = read_wandb(run.path)
    assert history(records) == [{"round": i, "accuracy": i / 8} for i in (1, 2, 3)]
    begun, before = (
        next(r.run for r in found if r.WhichOneof("record_type") == "run")
        for found in (records, first)
    )
    assert (begun.project, begun.display_name) == ("fedrot", "runs/one")
    assert begun.run_id == before.run_id != ""
    found = {c.key: c.value_json for c in begun.config.update}
    assert found["rounds"] == "3" and '"fedit"' in found["method"]


def test_wandb_online_does_not_get_a_round_twice(tmp_path, monkeypatch):
    """W&B itself keeps what it was sent, and says with which step it goes on; here a stand-in for
    its server, which no test can reach."""
    import wandb

    sent, given = [], []

    class Run:
        step = 3  # it has rounds 1 and 2

        def log(self, row, step):
            sent.append((step, row["accuracy"]))

        def finish(self, exit_code):
            sent.append(exit_code)

    monkeypatch.setattr(wandb, "init", lambda **options: given.append(options) or Run())
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    rows = [{"round": i, "accuracy": i / 10} for i in (1, 2)]
    for _ in range(2):
        with loggers.opened(["wandb"], RunDir(tmp_path), {}, rows) as log:
            log({"round": 3, "accuracy": 0.3})
    assert sent == [(3, 0.3), 0] * 2
    assert [(g["mode"], g["project"], g["resume"]) for g in given] == [
        ("online", "mine", "allow")
    ] * 2
    assert given[0]["id"] == given[1]["id"]


def test_a_missing_package_is_one_line_before_anything_runs(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    missing = {"tensorboard", "wandb"}
    hidden = lambda name, *rest: None if name in missing else real(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    for command in (["train"], ["compare", "--settings", "rounds"]):
        out = tmp_path / command[0]
        args = [*command, "--output", str(out), "--log", "wandb", *SMALL]
        result = CliRunner().invoke(app, args)
        assert result.exit_code == 1 and not out.exists()
        assert result.stderr == (
            "fedrot: --log wandb needs a package that is not installed: "
            "pip install 'fedrot[wandb]'\n"
        )
    with pytest.raises(FedrotError, match=r"fedrot\[tensorboard\]"):
        loggers.check(["tensorboard"])
    with pytest.raises(FedrotError, match="unknown logger 'tensorbord'; did you mean"):
        loggers.check(["tensorbord"])


def test_a_folder_called_wandb_is_not_the_package(tmp_path, monkeypatch):
    """As W&B leaves one where it ran."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [n for n in sys.modules if n.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [importlib.machinery.PathFinder])
    with pytest.raises(FedrotError, match="not installed"):
        loggers.check(["wandb"])
