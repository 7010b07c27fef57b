"""`fedrot train` and `fedrot compare`: what they print, write and refuse."""

from __future__ import annotations

import json
import math
import re
import statistics
from html.parser import HTMLParser

import pytest
import yaml
from small import SMALL, SMALL_ONE_SHOT
from typer.testing import CliRunner

from fedrot.cli import app
from fedrot.config import load
from fedrot.errors import FedrotError
from fedrot.methods import FedIT, FedRot
from fedrot.options import parse_overrides
from fedrot.report.pages import comparison_table
from fedrot.results import Comparison, Group
from fedrot.simulation import rounds
from fedrot.simulation.comparison import configure, merge_command, parse_variant
from fedrot.simulation.run_dir import RunDir
from fedrot.statistics import mean_std, paired
from fedrot.sweep.experiment import read_experiment

TINY = [*SMALL_ONE_SHOT, "rounds=1"]


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


class Page(HTMLParser):
    """Text, links and pictures of a page."""

    def __init__(self, path):
        super().__init__()
        self.texts, self.sources, self.open = [], [], 0
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag, attrs):
        self.sources += [v for k, v in attrs if k in ("src", "srcset", "href")]

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def check_self_contained(page: Page, pictures: int):
    assert len(page.sources) == 2 * pictures  # light and dark
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in page.sources)
    assert not re.search(r"https?://|url\(|@import|<script|<link", page.html)


def test_train(tmp_path):
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump({"setting": "regauge", "seed": 4}))
    args = ["train", "--method", "fedrot", "--config", config, "--output", tmp_path, *SMALL]
    result = run(*args)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "fedrot-regauge-4"
    assert "FedRot-LoRA, regauge (synthetic), seed 4: accuracy 0." in result.stdout
    assert f"adapter  {folder / 'adapter'}" in result.stdout
    assert f"report   {folder / 'report.html'}" in result.stdout
    assert result.stderr == ""  # no bars off a terminal

    summary = json.loads((folder / "summary.json").read_text())
    page = Page(folder / "report.html")
    check_self_contained(page, pictures=2)
    assert "FedRot-LoRA, setting regauge (synthetic), seed 4" in page.text
    assert f"final test accuracy {summary['accuracy']:.3f}" in page.text
    assert "Synthetic: every client hands in" in page.text and "pretrain_steps: 60" in page.text
    for row in RunDir(folder).rows():
        assert f"{row['round']} {row['accuracy']:.3f} {row['loss']:.3f}" in page.text
    for name in ("accuracy.png", "alignment.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")

    again = run(*args)
    assert again.exit_code == 1 and again.stdout == ""
    assert again.stderr == f"fedrot: {folder} holds a finished run; --force replaces it\n"
    changed = run(*args, "--resume", "local.lr=0.2")
    assert changed.exit_code == 1
    assert "started with local.lr=0.3, now it is 0.2" in changed.stderr
    assert run(*args, "--resume").stdout == result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["rouns=3"], "unknown option 'rouns'; did you mean 'rounds'?"),
        (["--method", "fedrott"], "unknown method 'fedrott'; did you mean 'fedrot'?"),
        (["--method", "fedit", "method.lam=1"], "unknown option 'method.lam'"),
        (["--setting", "round"], "unknown setting 'round'; did you mean 'rounds'?"),
        (["--task", "digit"], "unknown task 'digit'; did you mean 'digits'?"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["clients.count=5000"], "clients.count is 5000, but there are"),
        (["--name", "../r"], "--name must be the name of a folder under --output, got '../r'"),
    ],
)
def test_train_errors(tmp_path, args, message):
    result = run("train", "--output", tmp_path, *TINY, *args)
    assert result.exit_code == 1
    assert result.stderr.startswith("fedrot: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_compare(tmp_path, monkeypatch):
    out = tmp_path / "c"
    args = ["compare", "--methods", "fedit,fedrot,fedrot:lam=0.5", "--seeds", "2", "--output", out]
    args += ["--settings", "rounds,regauge,one-shot", *TINY]
    trained, real = [], rounds.train_clients

    def counted(*a, **options):
        trained.append(1)
        return real(*a, **options)

    monkeypatch.setattr(rounds, "train_clients", counted)
    result = run(*args)
    assert result.exit_code == 0, result.output
    # rounds and regauge train for every method, one-shot once a seed for all of them.
    assert len(trained) == 2 * 3 + 2 * 3 + 2

    summary = json.loads((out / "summary.json").read_text())
    groups = {(g["setting"], g["method"]): g for g in summary["groups"]}
    methods = ["FedIT", "FedRot-LoRA", "FedRot-LoRA lam=0.5"]
    assert list(groups) == [
        *((s, m) for s in ("rounds", "regauge") for m in methods),
        *(("one-shot", m) for m in [*methods, "one client alone"]),
    ]
    for (setting, method), group in groups.items():
        accuracy, first = group["accuracy"], groups[setting, "FedIT"]["accuracy"]["values"]
        assert accuracy["mean"] == pytest.approx(statistics.fmean(accuracy["values"]))
        assert accuracy["std"] == pytest.approx(statistics.stdev(accuracy["values"]))
        text = f"{accuracy['mean']:.3f} ± {accuracy['std']:.3f}"
        assert re.search(rf"{method} +{text}", result.stdout)
        if method != "FedIT":
            deltas = [a - b for a, b in zip(accuracy["values"], first, strict=True)]
            assert group["accuracy_difference"]["mean"] == pytest.approx(statistics.fmean(deltas))
            assert group["accuracy_difference"]["std"] == pytest.approx(statistics.stdev(deltas))
        for folder in group["runs"]:
            run_summary = RunDir(out.__class__(folder)).summary()
            assert run_summary["accuracy"] in accuracy["values"]
    # Paired: the same uploads reach every method in the one merge.
    plain = [groups["one-shot", m]["aggregation_error_plain"]["values"] for m in methods]
    assert (
        plain[0]
        == plain[1]
        == plain[2]
        == groups["one-shot", "FedIT"]["aggregation_error"]["values"]
    )
    settings = [
        yaml.safe_load((out / "rounds" / m / "seed-1" / "config.yaml").read_text())
        for m in ("fedit", "fedrot", "fedrot-lam-0.5")
    ]
    assert [s["method"].get("lam") for s in settings] == [None, 0.4, 0.5]
    assert all({**s, "method": 0} == {**settings[0], "method": 0} for s in settings)

    page = Page(out / "report.html")
    check_self_contained(page, pictures=2)
    assert (
        "regauge (synthetic) FedRot-LoRA" in page.text
        and "Synthetic: every client hands in" in page.text
    )
    run_folder = out / "one-shot" / "fedrot-lam-0.5" / "seed-0"
    assert result.stdout.splitlines()[-1] == (
        f"next     fedrot aggregate {run_folder}/clients/client-* --lam 0.5 -o {run_folder}/merged"
    )

    trained.clear()
    assert run(*args, "--resume").stdout == result.stdout
    assert trained == []
    again = run(*args)
    assert again.exit_code == 1 and "holds a finished run" in again.stderr


@pytest.mark.parametrize(
    "method",
    [
        "fedrot",
        "robust:rule=trimmed:attackers=1:align=A:proper=true",
        "robust:rule=clip:bound=0.5",
        "flexlora:gauge=reference",
    ],
)
def test_the_line_that_compare_prints_gives_the_same_adapter(tmp_path, method):
    from safetensors.torch import load_file

    out = tmp_path / "c"
    args = ["compare", "--methods", f"fedit,{method}", "--settings", "one-shot", "--seeds", "1"]
    result = run(*args, "--output", out, *TINY)
    assert result.exit_code == 0, result.output
    words = result.stdout.splitlines()[-1].split()
    assert words[:3] == ["next", "fedrot", "aggregate"]
    (folder,) = (out / "one-shot").glob(f"{method.partition(':')[0]}*/seed-0")
    assert words[3] == f"{folder}/clients/client-*"
    merged = run("aggregate", *RunDir(folder).clients(), *words[4:])
    assert merged.exit_code == 0, merged.output
    ours = load_file(folder / "adapter" / "adapter_model.safetensors")
    theirs = load_file(folder / "merged" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(bool((ours[k] == theirs[k]).all()) for k in ours)


def test_no_such_line_for_a_method_that_aggregate_does_not_have(tmp_path):
    out = tmp_path / "c"
    methods = "fedex,hetlora:norm_weights=false,robust:rule=clip"
    args = ["compare", "--methods", methods, "--settings", "one-shot", "local.head=true"]
    result = run(*args, "--seeds", "1", "--output", out, *TINY)
    assert result.exit_code == 0, result.output
    assert "fedrot aggregate" not in result.stdout
    assert (out / "one-shot" / "fedex" / "seed-0" / "merged.safetensors").is_file()
    wrong = run("compare", "--methods", "fedit,ffa", "--output", tmp_path / "d", *TINY)
    assert wrong.exit_code == 1 and not (tmp_path / "d").exists()
    assert "FFA-LoRA has one A for all clients, regauge gives each its own" in wrong.stderr
    assert wrong.stderr.endswith("(FFA-LoRA in the setting regauge)\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--methods", "fedit,fedavg"], "unknown method 'fedavg'; "),
        (["--methods", "fedit,fedit"], "--methods names FedIT twice"),
        (["--methods", ","], "--methods must name at least one"),
        (["--settings", "rounds,reguage"], "unknown setting 'reguage'; did you mean 'regauge'?"),
        (["--methods", "fedit", "method.lam=1"], "none of the compared methods has the option"),
        (
            ["--methods", "fedrot:rotation=random", "method.lam=1"],
            "none of the compared methods has",
        ),
        (["--methods", "fedrot:lam=3"], "method.lam must lie in [0, 1], got 3.0"),
        (["seed=4"], "seed is set by the comparison itself (--seeds)"),
        (["setting=one-shot"], "setting is set by the comparison itself (--settings)"),
        (["method.name=ffa"], "method.name is set by the comparison itself (--methods)"),
    ],
)
def test_compare_errors_before_anything_runs(tmp_path, args, message):
    result = run("compare", "--output", tmp_path / "c", *TINY, *args)
    assert result.exit_code == 1
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "c").exists()


def test_variants():
    variant = parse_variant("fedrot:lam=0.5:align=A")
    assert variant.label == "FedRot-LoRA lam=0.5 align=A"
    assert variant.folder == "fedrot-lam-0.5-align-A"
    assert variant.options == {"name": "fedrot", "lam": 0.5, "align": "A"}
    with pytest.raises(FedrotError, match="write key=value"):
        parse_variant("fedrot:0.5")


def test_common_options_reach_the_methods_that_have_use_for_them(tmp_path):
    common = parse_overrides(["method.lam=1", "method.eps=0.1"])
    for text, method in (
        ("fedit", FedIT()),
        ("fedrot", FedRot(1.0)),
        ("fedrot:rotation=random", FedRot(rotation="random")),
        ("fedrot:rotation=shifted", FedRot(rotation="shifted", eps=0.1)),
    ):
        assert configure(common, parse_variant(text)).method == method
    common = parse_overrides(["method.rotation=shifted", "method.eps=0.1"])
    found = configure(common, parse_variant("fedrot")).method
    assert found == FedRot(rotation="shifted", eps=0.1)
    with pytest.raises(FedrotError, match=r"method.lam has no effect with rotation=random, got 1"):
        configure({}, parse_variant("fedrot:rotation=random:lam=1"))

    file = tmp_path / "sweep.yaml"
    sweep = {
        "title": "t",
        "options": {"method.eps": 0.1},
        "vary": {"method.rotation": ["procrustes", "shifted"]},
        "methods": ["fedit", "fedrot"],
    }
    file.write_text(yaml.safe_dump(sweep))
    experiment = read_experiment(file)
    fedrot = experiment.methods[1]
    configs = [experiment.config(c, fedrot, {}, 0, tuning=False) for c in experiment.cells]
    assert [config.method for config in configs] == [FedRot(), found]
    file.write_text(yaml.safe_dump({**sweep, "tune": {"method.eps": [0.1, 0.2]}, "options": {}}))
    with pytest.raises(FedrotError, match=r"tune: method.eps has an effect on .* in some cells"):
        read_experiment(file)
    for other in ("method.eps", "method.lam"):
        tune = {"method.rotation": ["procrustes", "shifted"], other: [0.2, 0.6]}
        file.write_text(yaml.safe_dump({**sweep, "vary": {}, "tune": tune, "options": {}}))
        with pytest.raises(FedrotError, match=rf"{other} .* hangs on method.rotation, which"):
            read_experiment(file)
    attacked = {"options": {"clients.attack": "noise"}, "tune": {"clients.attackers": [0, 1]}}
    file.write_text(yaml.safe_dump({"title": "t", "methods": ["fedit"], **attacked}))
    assert len(read_experiment(file).trials(fedrot)) == 2
    sweep = {"title": "t", "methods": ["fedit", "fedrot", "fedrot:rotation=random"]}
    file.write_text(yaml.safe_dump({**sweep, "tune": {"method.lam": [0.2, 0.6]}}))
    experiment = read_experiment(file)
    assert [len(experiment.trials(v)) for v in experiment.methods] == [1, 2, 1]
    assert [experiment.trial_seeds(v) for v in experiment.methods] == [4, 2, 4]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (["method.align=A", "method.lam=auto"], "--lam auto --align A"),
        (["method.rotation=shifted"], "--rotation shifted --eps 0.03"),
        (
            ["method.rotation=shifted", "method.eps=0.1", "method.align=B", "method.proper=false"],
            "--rotation shifted --eps 0.1 --align B --improper",
        ),
        (["method.rotation=shifted", "method.align=alternate"], "--lam 0.0"),  # round 0
        (["method.rotation=random"], None),
        (["method.name=robust", "method.rule=krum"], "--lam 1.0 --rule krum"),
        (["clients.weights=samples"], None),  # which the folders do not tell
        (["method.name=robust", "method.rule=clip", "local.head=true"], None),
    ],
)
def test_the_command_that_merges_once_more(tmp_path, method, options):
    tree = load(parse_overrides(["setting=one-shot", *method])).tree()
    (tmp_path / "clients" / "client-00").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    group = Group("one-shot", "m", [{}], [], [tmp_path])
    line = merge_command(Comparison("t", [0], ["one-shot"], ["m"], [group]))
    command = f"fedrot aggregate {tmp_path}/clients/client-* {options} -o {tmp_path}/merged"
    assert line == (options and command)


def test_small_errors_are_not_printed_as_none():
    def row(error):
        found = {"accuracy": 0.5, "aggregation_error": error}
        group = Group("rounds", "a", [found], [], [])
        header, (cells,) = comparison_table(Comparison("t", [0], ["rounds"], ["a"], [group]))
        return dict(zip(header, cells, strict=True))["error"]

    assert [row(error) for error in (0.0, 2.34e-7, 0.0126)] == ["0.000", "2e-07", "0.013"]


def test_paired_interval():
    def group(method, values):
        return Group("rounds", method, [{"accuracy": v} for v in values], [], [])

    first, second = group("a", [0.1, 0.2, 0.6]), group("b", [0.3, 0.5, 0.7])
    result = Comparison("t", [0, 1, 2], ["rounds"], ["a", "b"], [first, second])
    assert result.differences(first) == [] and paired([]) is None and paired([0.1]) is None
    differences = result.differences(second)
    assert mean_std(differences) == (pytest.approx(0.2), pytest.approx(0.1))
    assert mean_std([0.5, float("inf")]) == (float("inf"), None)  # an error that overflows
    both = mean_std([float("inf"), -float("inf")])
    assert math.isnan(both[0]) and both[1] is None
    half = 4.302653 * 0.1 / math.sqrt(3)  # Student's t, 2 degrees of freedom, two-sided 95 %
    found = paired(differences)
    assert (found.low, found.high) == (pytest.approx(0.2 - half), pytest.approx(0.2 + half))
    assert (found.pairs, found.certain) == (3, False)
