"""What a run leaves in its folder, in which order, and what it finds there."""

from __future__ import annotations

import pickle

import pytest
import torch
import yaml
from safetensors.torch import save_file
from small import equal, small

from fedrot.config import load
from fedrot.errors import FedrotError, Refused
from fedrot.factors import Factors
from fedrot.files import new_file
from fedrot.methods import Server
from fedrot.options import merge
from fedrot.simulation import checkpoint, rounds, run_dir
from fedrot.simulation.adapter import draw_factors
from fedrot.simulation.rounds import federate, prepare
from fedrot.simulation.run_dir import RunDir, open_run
from fedrot.simulation.seeding import generator


def test_files_of_safetensors_are_as_readable_as_others(tmp_path):
    (tmp_path / "other").touch()
    with new_file(tmp_path / "tensors") as fresh:
        save_file({"a": torch.zeros(1)}, fresh)
    modes = {(tmp_path / name).stat().st_mode for name in ("other", "tensors")}
    assert len(modes) == 1


def test_run_folder(tmp_path):
    config = small("fedrot")
    summary = federate(config, tmp_path / "run")
    run = RunDir(tmp_path / "run")
    assert sorted(p.name for p in run.path.iterdir()) == [
        "accuracy.png",
        "adapter",
        "alignment.png",
        "config.yaml",
        "metrics.csv",
        "metrics.jsonl",
        "report.html",
        "summary.json",
    ]
    assert load(yaml.safe_load((run.path / "config.yaml").read_text())) == config
    rows = run.rows()
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert run.summary() == summary
    assert summary["accuracy"] == rows[-1]["accuracy"]
    assert sum(summary["client_examples"]) + summary["test_examples"] == 896  # digits 5-9
    assert all(row["seconds_local"] > 0 and row["seconds_aggregation"] > 0 for row in rows)
    # lam = 0.4 on clients that start together: a rotation close to none.
    assert 0 < rows[-1]["rotation_angle"] < 5


def test_what_a_run_folder_refuses(tmp_path):
    config = small("fedit", "rounds=1").tree()
    path = tmp_path / "run"
    open_run(path, config).start(config)
    with pytest.raises(FedrotError, match=r"unfinished run; --resume continues it"):
        open_run(path, config)
    with pytest.raises(FedrotError, match=r"started with local\.lr=0\.3, now it is 0\.1"):
        open_run(path, merge(config, {"local": {"lr": 0.1}}), resume=True)
    older = merge(config, {})  # from before there was such an option: it has its default
    del older["local"]["micro_batch"], older["device"]
    (path / "config.yaml").write_text(yaml.safe_dump(older))
    assert open_run(path, config, resume=True).path == path
    with pytest.raises(FedrotError, match=r"started with device=cpu, now it is auto"):
        open_run(path, merge(config, {"device": "auto"}), resume=True)
    for text in ("local: {", "", "local: {lrr: 1}"):
        (path / "config.yaml").write_text(text)
        with pytest.raises(FedrotError, match=r"config\.yaml is corrupt .*--force starts"):
            open_run(path, config, resume=True)
    turned = small("fedrot", "rounds=1", "method.rotation=random").tree()
    older = merge(turned, {"method": {"lam": 1.0}})  # has no effect, and is refused today
    (path / "config.yaml").write_text(yaml.safe_dump(older))
    assert open_run(path, turned, resume=True).path == path
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    RunDir(path).finish({"accuracy": 1.0})
    with pytest.raises(FedrotError, match="finished run; --force replaces it"):
        open_run(path, config)
    assert open_run(path, config, resume=True).summary() == {"accuracy": 1.0}
    (path / "mine.txt").write_text("stays")
    assert open_run(path, config, force=True).finished  # nothing is removed yet
    open_run(path, config, force=True).start(config)
    assert not RunDir(path).finished
    assert (path / "mine.txt").read_text() == "stays"
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("stays")
    for flags in ({}, {"force": True}, {"resume": True}):
        with pytest.raises(FedrotError, match="is not empty and not a run"):
            open_run(other, config, **flags)
    assert [p.name for p in other.iterdir()] == ["mine.txt"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    """Names as ``new_file`` and ``new_folder`` give while they write."""
    config, path = small("fedit", "rounds=1"), tmp_path / "run"
    path.mkdir()
    (path / ".config.yaml.new-123").write_text("lora: {")  # killed with the first file
    open_run(path, config.tree()).start(config.tree())
    (path / ".metrics.csv.new-123").write_text("round")
    (path / ".adapter.old-123").mkdir()
    (path / "clients" / ".client-01.new-123").mkdir(parents=True)
    (path / ".mine.new-year").write_text("stays")
    with pytest.raises(FedrotError, match="unfinished run"):
        federate(config, path)
    assert (path / ".metrics.csv.new-123").exists()
    federate(config, path, resume=True)
    assert [p.name for p in path.rglob(".*")] == [".mine.new-year"]


def test_a_run_that_is_refused_leaves_what_was_there(tmp_path):
    """What only the data or the model show: the corrected line needs no --force."""
    wrong = small("fedit", "clients.partition=column", "clients.column=none")

    def refused(path, **options):
        with pytest.raises(FedrotError, match=r"clients\.column must name a column"):
            federate(wrong, path, **options)

    refused(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty")
    assert (tmp_path / "empty").is_dir() and not any((tmp_path / "empty").iterdir())
    (tmp_path / "mine").mkdir()
    text = "# my notes\n" + yaml.safe_dump(wrong.tree())
    (tmp_path / "mine" / "config.yaml").write_text(text)
    refused(tmp_path / "mine", resume=True)
    assert (tmp_path / "mine" / "config.yaml").read_text() == text
    federate(small("fedit", "rounds=1"), tmp_path / "done")
    before = {p: p.read_bytes() for p in (tmp_path / "done").rglob("*") if p.is_file()}
    refused(tmp_path / "done", force=True)
    assert {p: p.read_bytes() for p in (tmp_path / "done").rglob("*") if p.is_file()} == before


def test_a_run_that_another_process_began_meanwhile_is_left_alone(tmp_path, monkeypatch):
    path, first, second = tmp_path / "run", small("fedit"), small("fedit", "local.lr=0.01")

    def slow(config, track, prepare=rounds.prepare):
        if not path.exists():
            open_run(path, first.tree()).start(first.tree())
        return prepare(config, track)

    monkeypatch.setattr(rounds, "prepare", slow)
    with pytest.raises(FedrotError, match="holds an unfinished run"):
        federate(second, path)
    assert open_run(path, first.tree(), resume=True).started and not (path / "metrics.csv").exists()


def test_a_start_that_was_killed_is_not_continued_in_the_middle(tmp_path, monkeypatch, interrupt):
    """The checkpoint goes before the metrics that belong to it."""
    config, path = small("fedrot"), tmp_path / "run"
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        federate(config, path)
    removed = []
    monkeypatch.setattr(run_dir, "remove", lambda paths: removed.extend(p.name for p in paths))
    RunDir(path).start(config.tree())
    assert removed.index("checkpoint.safetensors") < removed.index("metrics.jsonl")


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    factors = Factors({"m": torch.ones(1, 2)}, {"m": torch.ones(2, 1)})
    checkpoint.save(tmp_path / "c", Server(factors, 1))

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(tmp_path / "c", Server(factors, 2))
    assert checkpoint.load(tmp_path / "c").rounds == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_new_run_removes_all_of_the_old_one(tmp_path):
    """Clients of a larger run would be merged with those of this one."""
    config, run = small("fedit").tree(), RunDir(tmp_path)
    for name in (*run_dir.OWN, "accuracy.png", "mine.txt"):
        (tmp_path / name).touch()
    for name in ("adapter", "clients/client-07", "tensorboard", "wandb"):
        (tmp_path / name).mkdir(parents=True)
    run.start(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "mine.txt"]


def test_what_is_written_first(tmp_path, monkeypatch):
    """Killed in between, a round is done again, and a run goes on: a line is never missing, nor is
    the checkpoint where there is no summary."""
    run, ahead = RunDir(tmp_path / "run"), []
    monkeypatch.setattr(
        rounds.checkpoint,
        "save",
        lambda path, server: ahead.append(len(run.rows()) - server.rounds),
    )
    federate(small("fedit", "rounds=2"), run.path, report=False)
    assert ahead == [0, 0]

    def full(path, content):
        raise OSError("no space left")

    monkeypatch.setattr(run_dir, "write_json", full)
    run.checkpoint.touch()
    with pytest.raises(OSError, match="no space"):
        run.finish({"accuracy": 1.0})
    assert run.checkpoint.exists()


def test_a_refusal_passes_between_processes(tmp_path):
    open_run(tmp_path / "run", small("fedit").tree()).start(small("fedit").tree())
    with pytest.raises(Refused) as error:
        open_run(tmp_path / "run", small("fedit").tree())
    again = pickle.loads(pickle.dumps(error.value))
    assert str(again) == str(error.value) and again.reason.endswith("holds an unfinished run")


def test_clients_in_order_beyond_a_hundred(tmp_path):
    run = RunDir(tmp_path)
    for i in (100, 11, 2, 10):
        run.client(i).mkdir(parents=True)
    assert run.clients() == [run.client(i) for i in (2, 10, 11, 100)]


def test_finished_run_is_reused_without_training(tmp_path, monkeypatch):
    config = small("fedit", "rounds=1")
    summary = federate(config, tmp_path / "run")
    monkeypatch.setattr(rounds, "train_clients", None)
    assert federate(config, tmp_path / "run", resume=True) == summary


def test_checkpoint_round_trip_and_corruption(tmp_path):
    federation = prepare(small())
    factors = draw_factors(federation.model, generator(0, "start", 0))
    file = tmp_path / "checkpoint.safetensors"
    checkpoint.save(file, Server(factors, 7))
    state = checkpoint.load(file)
    assert state.rounds == 7
    assert equal(state.factors.A, factors.A) and equal(state.factors.B, factors.B)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(FedrotError, match="corrupt checkpoint"):
        checkpoint.load(file)
