"""Whole federations on the small base model: values, files, resume."""

from __future__ import annotations

import json
import pickle
import warnings

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small import equal, small

from fedrot.config import load
from fedrot.errors import FedrotError, Refused
from fedrot.factors import Factors
from fedrot.files import new_file
from fedrot.methods import FedRot, Server
from fedrot.options import merge
from fedrot.simulation import checkpoint, rounds, run_dir
from fedrot.simulation.adapter import draw_factors, load_adapter
from fedrot.simulation.rounds import federate, prepare, train_round
from fedrot.simulation.run_dir import RunDir, open_run
from fedrot.simulation.seeding import generator

TIMES = ("seconds_local", "seconds_aggregation")


def without_times(rows):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def adapter_tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_files_of_safetensors_are_as_readable_as_others(tmp_path):
    (tmp_path / "other").touch()
    with new_file(tmp_path / "tensors") as fresh:
        save_file({"a": torch.zeros(1)}, fresh)
    modes = {(tmp_path / name).stat().st_mode for name in ("other", "tensors")}
    assert len(modes) == 1


def test_fedit_is_the_mean_of_the_uploads(tmp_path):
    config = small("fedit", "rounds=1")
    federate(config, tmp_path / "run")
    federation = prepare(config)
    start = draw_factors(federation.model, generator(0, "start", 0))
    uploads = train_round(federation, Server(start)).factors
    merged = load_adapter(federation.model, tmp_path / "run" / "adapter")
    for name in start.A:
        mean_A = torch.stack([u.A[name] for u in uploads]).mean(0)
        mean_B = torch.stack([u.B[name] for u in uploads]).mean(0)
        torch.testing.assert_close(merged.A[name], mean_A, rtol=0, atol=1e-6)
        torch.testing.assert_close(merged.B[name], mean_B, rtol=0, atol=1e-6)
        assert float(mean_B.norm()) > 1e-2
    (row,) = RunDir(tmp_path / "run").rows()
    exact = 0.0
    for name in start.A:
        products = torch.stack([u.B[name].double() @ u.A[name].double() for u in uploads])
        error = products.mean(0) - merged.B[name].double() @ merged.A[name].double()
        exact += float(error.square().sum())
    assert row["aggregation_error"] == pytest.approx(exact**0.5, rel=1e-4)
    assert row["aggregation_error_plain"] == pytest.approx(row["aggregation_error"], rel=1e-6)


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


def test_adapter_loads_in_peft_and_gives_the_reported_accuracy(tmp_path):
    config = small()
    summary = federate(config, tmp_path / "run")
    folder = tmp_path / "run" / "adapter"
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    data = config.task.prepare(config.seed)
    assert base == str(data.base)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        model = PeftModel.from_pretrained(config.task.load_model(data), folder).eval()
    found = config.task.evaluate(model, data.test)
    assert found["accuracy"] == summary["accuracy"]
    assert found["loss"] == pytest.approx(summary["loss"], abs=1e-6)


def test_same_seed_same_numbers_other_seed_others(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        federate(small("fedit", f"seed={seed}", "rounds=1"), tmp_path / name)
    a, b, c = (adapter_tensors(tmp_path / n / "adapter") for n in "abc")
    assert equal(a, b)
    assert not equal(a, c)
    rows = [without_times(RunDir(tmp_path / n).rows()) for n in "abc"]
    assert rows[0] == rows[1] != rows[2]


def test_resume_after_an_interruption_gives_the_same_bits(tmp_path, interrupt):
    config = small("fedrot")
    whole = federate(config, tmp_path / "whole")
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        federate(config, tmp_path / "run")
    run = RunDir(tmp_path / "run")
    assert not run.finished and run.checkpoint.is_file() and len(run.rows()) == 1
    # A stop between metrics and checkpoint leaves a line too many; it is cut off.
    run.write_rows([*run.rows(), {"round": 2, "accuracy": -1.0}])
    summary = federate(config, run.path, resume=True)
    assert {k: v for k, v in summary.items() if k not in TIMES} == {
        k: v for k, v in whole.items() if k not in TIMES
    }
    assert without_times(run.rows()) == without_times(RunDir(tmp_path / "whole").rows())
    assert equal(adapter_tensors(run.adapter), adapter_tensors(tmp_path / "whole" / "adapter"))
    assert not run.checkpoint.exists()


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


def test_who_diverged_is_named_by_the_number_of_the_client():
    losses = torch.tensor([0.5, torch.inf])
    with pytest.raises(FedrotError, match=r"client 5 diverged in round 3"):
        rounds._check_converging([2, 5], losses, 2, 0.1)


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


def test_errors_have_the_weights_of_the_average(tmp_path):
    """And a summary their mean over the rounds."""
    config = small("fedit", "clients.weights=samples", "rounds=2")
    summary = federate(config, tmp_path / "run", report=False)
    rows, federation = RunDir(tmp_path / "run").rows(), prepare(config)
    uploads = train_round(federation, federation.start())
    w = uploads.weights.double() / uploads.weights.double().sum()
    assert float(w.max() - w.min()) > 0.05
    square = 0.0
    for name in uploads.factors[0].A:
        A, B = ([getattr(u, s)[name].double() for u in uploads.factors] for s in "AB")
        mean = sum(x * b for x, b in zip(w, B, strict=True)) @ sum(
            x * a for x, a in zip(w, A, strict=True)
        )
        exact = sum(x * b @ a for x, b, a in zip(w, B, A, strict=True))
        square += float((exact - mean).square().sum())
    for key in ("aggregation_error", "aggregation_error_plain"):
        assert rows[0][key] == pytest.approx(square**0.5, rel=1e-4)
        assert summary[key] == pytest.approx((rows[0][key] + rows[1][key]) / 2)
        assert rows[0][key] != pytest.approx(rows[1][key], rel=1e-3)


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


def test_device():
    options = ("rounds=1", "local.steps=2")
    here = prepare(small("fedit", *options))
    if not torch.cuda.is_available():
        with pytest.raises(FedrotError, match="device=cuda, but PyTorch finds no CUDA device"):
            prepare(small("fedit", "device=cuda"))
        assert prepare(small("fedit", "device=auto")).model.device.type == "cpu"
        return
    there = prepare(small("fedit", "device=cuda", *options))
    assert there.model.device.type == "cuda"
    start = here.start()
    pairs = zip(train_round(here, start).factors, train_round(there, start).factors, strict=True)
    for a, b in pairs:
        for name in a.B:
            torch.testing.assert_close(a.B[name], b.B[name], rtol=0, atol=1e-4)
    assert there.evaluate(start)["loss"] == pytest.approx(here.evaluate(start)["loss"], rel=1e-4)


def test_divergence_is_named(tmp_path):
    config = small("fedit", "local.lr=1e30")
    with pytest.raises(FedrotError, match=r"client \d diverged in round 1.*lower local\.lr=1e\+30"):
        federate(config, tmp_path / "run")


def test_one_shot_uploads_merge_to_the_same_adapter(tmp_path):
    """The clients on disk, merged outside the federation, give the run's adapter bit for bit."""
    fedit, fedrot = (small(m, setting="one-shot") for m in ("fedit", "fedrot"))
    federate(fedit, tmp_path / "fedit")
    federate(fedrot, tmp_path / "fedrot", uploads_from=tmp_path / "fedit")
    federation = prepare(fedrot)
    runs = [RunDir(tmp_path / name) for name in ("fedit", "fedrot")]
    for first, second in zip(runs[0].clients(), runs[1].clients(), strict=True):
        assert equal(adapter_tensors(first), adapter_tensors(second))
    uploads = [load_adapter(federation.model, folder) for folder in runs[1].clients()]
    assert len(uploads) == 4
    merged = FedRot(lam=1.0).aggregate(uploads, uploads[0])
    stored = load_adapter(federation.model, runs[1].adapter)
    assert equal(merged.A, stored.A) and equal(merged.B, stored.B)
    row, plain = runs[1].rows()[0], runs[0].rows()[0]
    assert row["client_accuracies"] == plain["client_accuracies"]
    assert row["aggregation_error"] < 0.95 * row["aggregation_error_plain"]
    assert row["aggregation_error_plain"] == plain["aggregation_error"]
    assert row["rotation_angle"] > 30
    summary = runs[1].summary()
    assert summary["client_accuracy"] == pytest.approx(sum(row["client_accuracies"]) / 4)


def test_regauge_destroys_plain_averaging_and_not_fedrot(tmp_path):
    """The regression test of the whole path, at reduced size."""
    options = ("rounds=4", "local.steps=20", "local.batch_size=16", "task.pretrain_steps=60")
    results = {
        name: federate(small(method, *options, setting=setting), tmp_path / name)
        for name, method, setting in (
            ("shared", "fedit", "rounds"),
            ("plain", "fedit", "regauge"),
            ("aligned", "fedrot", "regauge"),
        )
    }
    shared, plain, aligned = (results[n]["accuracy"] for n in ("shared", "plain", "aligned"))
    assert plain < 0.35 and aligned > plain + 0.3
    assert abs(aligned - shared) < 0.1
    rows = RunDir(tmp_path / "aligned").rows()
    # Rotations alone cannot undo a reflection; it costs most in the first rounds.
    assert all(row["aggregation_error"] < 0.5 * row["aggregation_error_plain"] for row in rows)
    assert rows[-1]["aggregation_error"] < 0.15 * rows[-1]["aggregation_error_plain"]
