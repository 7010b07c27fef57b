"""Experiments: equal budgets, runs that are kept, and numbers that are those of the runs."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small import SMALL_ONE_SHOT
from typer.testing import CliRunner

from fedrot.cli import app
from fedrot.errors import FedrotError
from fedrot.options import flatten, merge, parse_overrides
from fedrot.simulation.run_dir import RunDir
from fedrot.statistics import paired
from fedrot.sweep.experiment import TUNE_SEED, file_names, read_experiment
from fedrot.sweep.runner import run_experiment

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
TINY = {
    "title": "A try",
    "claim": "None.",
    "options": {
        **flatten(parse_overrides(SMALL_ONE_SHOT)),
        "rounds": 2,
        "clients.local_test": True,
    },
    "vary": {"clients.alpha": [0.3, 10.0]},
    "methods": ["fedit", "fedrot", "fedrot:lam=0.5:align=A"],
    "tune": {"local.lr": [0.1, 1.0], "method.lam": [0.4, 1.0]},
    "tune_seeds": 1,
    "seeds": 2,
}


def write(folder, **changes):
    path = folder / "try.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False))
    return path


def test_every_method_is_tuned_on_the_same_values_with_as_many_runs(tmp_path):
    experiment = read_experiment(
        write(tmp_path, tune={"local.lr": [0.1, 0.3, 1.0], "method.lam": [0.4, 1.0]})
    )
    fedit, fedrot, fixed = experiment.methods
    assert experiment.trials(fedrot) == [
        {"local.lr": 0.1, "method.lam": 0.4},
        {"local.lr": 0.1, "method.lam": 1.0},
        {"local.lr": 0.3, "method.lam": 0.4},
        {"local.lr": 0.3, "method.lam": 1.0},
        {"local.lr": 1.0, "method.lam": 0.4},
        {"local.lr": 1.0, "method.lam": 1.0},
    ]
    rates = [{"local.lr": 0.1}, {"local.lr": 0.3}, {"local.lr": 1.0}]
    assert experiment.trials(fedit) == experiment.trials(fixed) == rates
    assert [experiment.trial_seeds(v) for v in experiment.methods] == [2, 1, 2]  # tune_seeds is 1
    untuned = read_experiment(write(tmp_path, tune={}))
    assert untuned.trials(fedit) == [{}] and untuned.trial_seeds(fedit) == 1


def test_tuning_sees_neither_the_test_part_nor_the_seeds(tmp_path):
    experiment = read_experiment(write(tmp_path))
    cell, variant = experiment.cells[1], experiment.methods[2]
    trial = {"local.lr": 0.1}
    tuning = experiment.config(cell, variant, trial, TUNE_SEED, tuning=True)
    final = experiment.config(cell, variant, trial, 1, tuning=False)
    assert (tuning.validation, final.validation) == (0.2, 0.0)
    assert tuning.seed >= TUNE_SEED > final.seed
    for config in (tuning, final):
        assert config.clients.alpha == 10.0 and config.local.lr == 0.1 and config.local.steps == 3
        assert (config.method.lam, config.method.align) == (0.5, "A")


def test_a_cell_may_be_several_options(tmp_path):
    training = [{"local.optimizer": "adam", "local.lr": 0.01}, {"local.lr": 0.2}]
    vary = {"training": training, "clients.alpha": [0.3]}
    experiment = read_experiment(write(tmp_path, vary=vary, tune={}))
    assert [cell.label for cell in experiment.cells] == [
        "training adam 0.01, alpha 0.3",
        "training 0.2, alpha 0.3",
    ]
    assert experiment.cells[0].folder == "training-adam-0.01_alpha-0.3"
    configs = [
        experiment.config(cell, experiment.methods[0], {}, 0, tuning=False)
        for cell in experiment.cells
    ]
    assert [(c.local.optimizer, c.local.lr) for c in configs] == [("adam", 0.01), ("sgd", 0.2)]


def cells(folder, **vary):
    experiment = read_experiment(write(folder, vary=vary, tune={}))
    return [(cell.label, cell.folder) for cell in experiment.cells]


def test_the_options_of_a_value_are_named_where_their_values_do_not_tell(tmp_path):
    assert cells(tmp_path, x=[{"local.lr": 0.1}, {"local.prox": 0.1}, {}]) == [
        ("x lr 0.1", "x-lr-0.1"),
        ("x prox 0.1", "x-prox-0.1"),
        ("x default", "x-default"),
    ]
    nested = [{"clients": {"alpha": 4}}, {"lora": {"alpha": 4}}]
    assert [label for label, _ in cells(tmp_path, x=nested)] == [
        "x clients.alpha 4",
        "x lora.alpha 4",
    ]
    both = {"clients.alpha": [4.0], "lora.alpha": [8], "clients.ranks": [[1, 2]]}
    label, folder = cells(tmp_path, **both)[0]
    assert label == "clients.alpha 4.0, lora.alpha 8, ranks [1, 2]"
    assert folder == "clients.alpha-4.0_lora.alpha-8_ranks-[1,-2]"


def test_folders_of_any_text_are_safe_and_differ():
    texts = ["x 0.1", "m a/b", "m a:b", "m a-c", "m a c", "m A-c", ".m", "m/../m", "/", "é" * 300]
    names = file_names([*texts, "n" * 300, "n" * 301])
    assert names[0] == "x-0.1" and names[1].startswith("m-a-b-")
    assert len({name.lower() for name in names}) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9][\w.-]{,99}", name, re.ASCII) for name in names)
    assert names == file_names([*texts, "n" * 300, "n" * 301])


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    path = write(
        tmp_path,
        vary={"clients.alpha": ["3e-1", 10], "clients.column": ["1e5"]},
        methods=["fedit", "fedrot"],
        tune={"local.lr": ["1e-2", 0.3], "method.lam": ["auto", "4e-1"]},
    )
    experiment = read_experiment(path)
    assert experiment.vary["clients.alpha"] == [0.3, 10]
    assert experiment.vary["clients.column"] == ["1e5"]  # a text to the option as well
    assert experiment.tune == {"local.lr": [0.01, 0.3], "method.lam": ["auto", 0.4]}
    assert experiment.cells[0].folder == "alpha-0.3_column-1e5"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": ["fedit"]}, "unknown key 'method'"),
        ({"methods": []}, "methods is missing"),
        ({"methods": ["fedti"]}, "unknown method 'fedti'; did you mean 'fedit'?"),
        ({"methods": ["fedit", "fedit"]}, "methods names FedIT twice"),
        (
            {"methods": ["fedrot:lam=0.5", "fedrot:lam=.5"]},
            "methods: FedRot-LoRA lam=.5 is the same as FedRot-LoRA lam=0.5 (alpha 0.3)",
        ),
        ({"vary": {"seed": [1, 2]}}, "seed is set by the sweep itself"),
        (
            {"vary": {"method.lam": [0.4, 1.0]}, "tune": {}},
            "vary sets method.lam, which FedRot-LoRA lam=0.5 align=A sets itself",
        ),
        (
            {"vary": {"x": [{"lora.r": 4}, {"lora.r": 4, "lora.alpha": 8}]}},
            "vary: x 4 and x 4 8 are the same for every method",
        ),
        ({"vary": {"clients.alpha": 3}}, "vary.clients.alpha must be a list of values, got 3"),
        ({"vary": {"clients.alpa": [3]}}, "FedIT, alpa 3: unknown option 'clients.alpa'"),
        ({"tune": {"local.lr": [0.0, 1.0]}}, "local.lr must be above 0"),
        (
            {"vary": {"clients.attack": ["noise", "labels"]}},
            "FedIT, attack noise: clients.attack=noise needs clients.attackers",
        ),
        ({"seeds": 0}, "seeds must be a whole number of at least 1"),
        ({"seeds": "x"}, "seeds must be a whole number of at least 1, got 'x'"),
        ({"tune_seeds": True}, "tune_seeds must be a whole number of at least 1, got True"),
        ({"first_seed": "a"}, "first_seed must be a whole number of at least 0, got 'a'"),
        ({"first_seed": 9999}, "first_seed + seeds must be at most 10000"),
        ({"title": 3}, "title must be text, got 3"),
        ({"claim": ["a"]}, "claim must be text, got ['a']"),
        ({"options": [1, 2]}, "options must be keys and values, as {rounds: 12}, got [1, 2]"),
        ({"options": {"method": "fedit"}}, "none of the methods has the option 'method'"),
        ({"options": {"clients": {1: 2}}}, "unknown option 'clients.1'"),
        ({"methods": "fedit"}, "methods must be a list of methods, as [fedit, fedrot], got 'fedit"),
        ({"methods": ["fedit", {"fedrot": 1}]}, "methods must be text, as 'fedrot:lam=0.5', got {"),
        ({"vary": [1]}, "vary must be keys and lists of values"),
        ({"vary": {"clients.alpha": []}}, "vary.clients.alpha must be a list of values, got []"),
        ({"vary": {1: [{2: 3}]}}, "FedIT, 1 3: unknown option '2'"),
        (
            {"vary": {"method.name": ["ffa", "fedit"]}},
            "none of the methods has the option 'method.name'",
        ),
        ({"tune": 3}, "tune must be keys and lists of values"),
        ({"tune": {"local": {"lr": 0.1}}}, "tune.local.lr must be a list of values, got 0.1"),
        ({"tune": {"local.lr": {}}}, "tune.local.lr must be a list of values, got {}"),
        (
            {"options": {"local.lr": 0.1, "local": {"lr": 0.2}}, "tune": {}},
            "local.lr stands there twice",
        ),
        (
            {"tune": {"local.lr": [0.1, 0.3], "local": {"lr": [0.5]}}},
            "local.lr stands there twice",
        ),
        ({"tune": {"local.lr": [1, "1e0"]}}, "tune.local.lr holds 1.0 twice"),
        ({"vary": {"clients.delay": [0, 0]}}, "vary.clients.delay holds 0 twice"),
        (
            {"vary": {"x": [{"clients.alpha": 3, "lora.r": 2}, {"lora.r": 2, "clients.alpha": 3}]}},
            "vary.x holds {'lora.r': 2, 'clients.alpha': 3} twice",
        ),
        (
            {"vary": {"x": [{"clients.alpha": 0.3}], "local.lr": [0.1]}},
            "vary.local.lr and tune.local.lr both set local.lr",
        ),
    ],
    ids=str,
)
def test_errors(tmp_path, changes, message):
    with pytest.raises(FedrotError) as error:
        read_experiment(write(tmp_path, **changes))
    assert message in str(error.value) and "try.yaml" in str(error.value)


def test_cells_and_methods_that_share_a_name_are_refused(tmp_path):
    vary = {"x": [{"clients.column": None}, {"clients.column": "None"}]}
    with pytest.raises(FedrotError) as error:
        read_experiment(write(tmp_path, vary=vary))
    assert str(error.value).endswith(
        "vary: {'x': {'clients.column': None}} and {'x': {'clients.column': 'None'}} share the "
        "label 'x column None'"
    )
    # Folders that differ in case only are the same on some systems.
    methods = ["fedrot:proper=true", "fedrot:proper=True"]
    with pytest.raises(FedrotError) as error:
        read_experiment(write(tmp_path, methods=methods))
    assert str(error.value).endswith(
        "methods: {'name': 'fedrot', 'proper': True} and {'name': 'fedrot', 'proper': True} share "
        "the folder 'fedrot-proper-true'"
    )


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.rglob("*.yaml")), ids=lambda file: file.stem)
def test_experiments_of_the_repository(file):
    """Every configuration of every cell and trial can be built; five seeds or more."""
    experiment = read_experiment(file)
    assert experiment.seeds >= 5 and experiment.claim
    given = merge(experiment.options, *(cell.tree for cell in experiment.cells))
    assert (file.parent.name == "full") == ("task" in given)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"options": {"task.name": "sst2"}, "vary": {}}, "FacebookAI/roberta-large"),
        ({"options": {}, "vary": {"task.name": ["digits", "gsm8k"]}}, "meta-llama/Meta-Llama-3-8B"),
        (
            {"options": {"task": {"data": "acme/own"}}, "vary": {"x": [{"task.name": "text"}]}},
            "acme/own",
        ),
    ],
)
def test_what_is_missing_is_said_at_once(tmp_path, changes, missing):
    """Before torch is imported and any configuration is built."""
    code = (
        "import sys; from typer.testing import CliRunner; from fedrot.cli import app\n"
        "from fedrot import hub; hub._answers = lambda endpoint: False\n"
        "out = CliRunner().invoke(app, ['sweep', sys.argv[1]])\n"
        "print(out.exit_code, 'torch' in sys.modules); print(out.output)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    path = write(tmp_path, **changes)
    found = subprocess.run(
        [sys.executable, "-c", code, path], env=environment, capture_output=True, text=True
    )
    first, line = found.stdout.strip().splitlines()
    assert first == "1 False"
    assert line.startswith(f"fedrot: {missing} is not in the cache") and "`hf download" in line
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    result = CliRunner().invoke(
        app, ["sweep", str(write(folder)), "--output", str(folder / "out"), "--workers", "1"]
    )
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_the_numbers_are_those_of_the_runs(finished):
    folder, output = finished
    found = json.loads((folder / "out" / "results.json").read_text())
    text = (folder / "out" / "report.md").read_text()
    assert len(found["results"]) == 2 * 3

    def tuning_of(runs):
        return folder / "out" / "tuning" / runs.relative_to(folder / "out" / "runs")

    for row in found["results"]:
        name = {"FedIT": "fedit", "FedRot-LoRA": "fedrot"}.get(
            row["method"], "fedrot-lam-0.5-align-A"
        )
        runs = folder / "out" / "runs" / f"alpha-{row['cell']['clients.alpha']}" / name
        summaries = [RunDir(runs / f"seed-{seed}").summary() for seed in range(2)]
        accuracies = [s["accuracy"] for s in summaries]
        assert row["accuracy"]["values"] == accuracies
        assert row["accuracy"]["mean"] == pytest.approx(statistics.fmean(accuracies))
        best = max(t["validation_accuracy"] for t in row["trials"])
        chosen = next(t for t in row["trials"] if t["options"] == row["tuned"])
        assert chosen["validation_accuracy"] == best
        first = tuning_of(runs) / "trial-00" / "seed-0"
        score = row["trials"][0]["validation_accuracy"]
        if row["method"] == "FedRot-LoRA":  # of two options, so of one seed
            assert score == RunDir(first).summary()["accuracy_local"]
        local = [s["accuracy_local"] for s in summaries]
        assert row["accuracy_local"]["values"] == local
        shown = f"{statistics.fmean(local):.3f} ± {statistics.stdev(local):.3f}"
        assert shown in text.split("own mix of labels\n")[1].split("##")[0]
        trials = 4 if row["method"] == "FedRot-LoRA" else 2
        assert len(row["trials"]) == trials
        assert len(list(tuning_of(runs).glob("trial-*/seed-*"))) == 4
        config = flatten(yaml.safe_load((runs / "seed-1" / "config.yaml").read_text()))
        assert {key: config[key] for key in row["tuned"]} == row["tuned"]
        ratios = [s["aggregation_error"] / s["aggregation_error_plain"] for s in summaries]
        assert row["error_ratio"]["values"] == pytest.approx(ratios)
        if row["method"] == "FedIT":
            assert row["error_ratio"]["values"] == pytest.approx([1.0, 1.0])
    assert "A try: Accuracy" in output and "FedRot-LoRA lam=0.5 align=A" in output
    assert "## The same, difference to FedIT" in text
    assert "## Tuned options (4 runs a method and cell)" in text
    accuracies = ("accuracy.png", "differences.png", "rounds-alpha-0.3.png")
    for picture in (*accuracies, *(f"local-{name}" for name in accuracies), "error-ratio.png"):
        assert (folder / "out" / picture).read_bytes().startswith(b"\x89PNG")
        assert picture in text
    assert (folder / "out" / "report.html").read_text().count("<figure>") == 9


def test_finished_runs_are_kept(finished, monkeypatch):
    folder, _ = finished
    experiment = read_experiment(folder / "try.yaml")
    monkeypatch.setattr("fedrot.sweep.runner._one", None)  # nothing is left to run
    with monkeypatch.context() as patch:
        patch.setattr("fedrot.tasks.Digits.prepare", None)  # so no data are needed
        outcomes = run_experiment(experiment, folder / "out", workers=1)
    assert all(outcome.complete for outcome in outcomes)
    changed = read_experiment(write(folder / "out", options={**TINY["options"], "rounds": 3}))
    message = "was started with rounds=2, now it is 3; --force removes the runs of this sweep"
    with pytest.raises(FedrotError, match=message) as error:
        run_experiment(changed, folder / "out", workers=1)
    assert "--resume" not in str(error.value)
    none = {**TINY["options"], "clients.partition": "column", "clients.column": "none"}
    wrong = read_experiment(write(folder / "out", options=none))
    with pytest.raises(FedrotError, match=r"clients\.column must name a column"):
        run_experiment(wrong, folder / "out", workers=1, force=True)
    run_experiment(experiment, folder / "out", workers=1)  # nothing was removed


def test_a_sweep_over_any_text_is_reported(tmp_path):
    """Slashes, brackets and dollars in values, numbers as text, and a word that tuning chooses."""
    columns = ["models/roberta", "FacebookAI/$\\frac$[/b]", "n" * 300]
    path = write(
        tmp_path,
        title="A [/b] try",
        vary={"clients.column": columns},
        methods=["fedit", "fedrot"],
        tune={"local.lr": ["1e-1"], "method.lam": ["auto", "auto-client"]},
        seeds=1,
    )
    out = tmp_path / "out"
    command = ["sweep", str(path), "-o", str(out), "--workers", "1"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "A [/b] try" in result.output
    found = json.loads((out / "results.json").read_text())["results"]
    assert [row["cell"]["clients.column"] for row in found[::2]] == columns
    assert all(row["tuned"]["local.lr"] == 0.1 for row in found)
    text = (out / "report.md").read_text()
    assert "lr 0.1, lam auto" in text
    pictures = sorted(out.glob("rounds-*.png"))
    assert len(pictures) == 3 and all(f"({picture.name})" in text for picture in pictures)


def test_paired_interval_by_hand():
    """Differences 1, 2, 3: mean 2, std 1, t(0.975, 2) = 4.3027, half width 4.3027 / sqrt(3)."""
    found = paired([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.pairs == 3
    assert found.low == pytest.approx(2 - 4.30265 / 3**0.5, abs=1e-4)
    assert not found.certain and paired([1.0, 1.1, 0.9]).certain
    assert paired([1.0]) is None
