"""Options: sources, types, ranges, and errors that name the nearest key."""

from __future__ import annotations

import pytest
import yaml

from fedrot.config import load
from fedrot.errors import FedrotError
from fedrot.methods import FedIT, FedRot, Robust
from fedrot.options import build, first_difference, flatten, merge, parse_overrides, read_yaml
from fedrot.simulation.comparison import configure, parse_variant


def test_defaults_are_the_rounds_setting():
    config = load()
    assert (config.setting, config.rounds, config.start, config.regauge) == (
        "rounds",
        12,
        "shared",
        False,
    )
    assert (config.local.optimizer, config.local.lr, config.local.steps) == ("sgd", 0.3, 20)
    assert config.method == FedRot(lam=0.4)
    assert (config.threads, config.device) == (1, "cpu")  # the same numbers on every machine


@pytest.mark.parametrize(
    ("setting", "lam", "rounds", "optimizer"),
    [("rounds", 0.4, 12, "sgd"), ("regauge", 1.0, 12, "sgd"), ("one-shot", 1.0, 1, "adam")],
)
def test_settings(setting, lam, rounds, optimizer):
    config = load({"setting": setting})
    assert config.method == FedRot(lam=lam)
    assert (config.rounds, config.local.optimizer) == (rounds, optimizer)
    assert config.regauge == (setting == "regauge")
    assert config.start == ("own" if setting == "one-shot" else "shared")


def test_what_is_stronger():
    """A setting than the task's preset (a rate of .1), a method's own options than common ones."""
    assert load({"task": {"name": "strings"}}).local.lr == 0.1
    assert load({"task": {"name": "strings"}, "setting": "one-shot"}).local.lr == 1e-2
    common = {"method": {"lam": 0.3, "align": "A"}}
    assert configure(common, parse_variant("fedrot:lam=0.5")).method == FedRot(0.5, "A")


def test_a_setting_leaves_methods_their_own_defaults():
    assert load({"method": {"name": "robust"}}).method == Robust()
    assert load({"setting": "regauge", "method": {"name": "fedit"}}).method == FedIT()


def test_preset_leaves_out_what_the_method_does_not_have():
    assert load({"setting": "regauge", "method": {"name": "fedit"}}).method == FedIT()


def test_overrides_win_over_file_over_setting(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("setting: one-shot\nlocal.lr: 1e-3\nlocal: {steps: 7}\nclients:\n  alpha: 1\n")
    config = load(read_yaml(file), parse_overrides(["local.steps=9", "method.lam=.25"]))
    assert (config.local.lr, config.local.steps, config.local.optimizer) == (1e-3, 9, "adam")
    assert config.clients.alpha == 1.0 and isinstance(config.clients.alpha, float)
    assert config.method == FedRot(lam=0.25)


def test_tree_round_trips_through_yaml():
    config = load({"setting": "one-shot", "seed": 3, "method": {"name": "fedit"}})
    tree = yaml.safe_load(yaml.safe_dump(config.tree()))
    assert tree["method"] == {"name": "fedit"}
    assert load(tree) == config
    assert build(type(config), tree) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=0.1", "unknown option 'lr'; did you mean 'local.lr'?"),
        ("local.step=3", "unknown option 'local.step'; did you mean 'local.steps'?"),
        ("round=3", "unknown option 'round'; did you mean 'rounds'?"),
        ("method.energy=0.9", "unknown option 'method.energy' of fedrot; it is of flexlora"),
        ("method.lamb=1", "unknown option 'method.lamb'; did you mean 'method.lam'?"),
        ("task.pretrain_step=3", "did you mean 'task.pretrain_steps'?"),
        ("method.name=fedrto", "unknown method 'fedrto'; did you mean 'fedrot'?"),
        ("task.name=digit", "unknown task 'digit'; did you mean 'digits'?"),
        ("setting=oneshot", "unknown setting 'oneshot'; did you mean 'one-shot'?"),
        ("setting=[]", "unknown setting"),
        ("rounds=0", "rounds must be at least 1, got 0"),
        ("rounds=2.5", "rounds must be a whole number, got 2.5"),
        ("rounds=true", "rounds must be a whole number, got True"),
        ("rounds=null", "rounds must be a whole number, got None"),
        ("regauge=1", "regauge must be true or false, got 1"),
        ("local.lr=fast", "local.lr must be a number, got 'fast'"),
        ("local.lr=.nan", "local.lr must be finite, got nan"),
        ("local.lr=0", "local.lr must be above 0, got 0.0"),
        ("local.optimizer=sdg", "local.optimizer must be one of sgd, adam, adamw, got 'sdg'"),
        ("task.test_fraction=1", "task.test_fraction must be below 1, got 1.0"),
        ("method.lam=2", "method.lam must lie in [0, 1], got 2.0"),
        ("method.align=C", "method.align must be joint, A, B, gpa, optimal or alternate, got 'C'"),
        ("method=fedit", "method must hold options such as method.name, got 'fedit'"),
        ("local=3", "local must hold options, got 3"),
        ("start=own", "start=own merges once, so rounds must be 1, got 12"),
        ("rounds", "'rounds' is not an override; write key=value"),
        ("rounds=[", "'rounds=[': the value is not valid YAML"),
    ],
)
def test_errors(override, message):
    with pytest.raises(FedrotError) as error:
        load(parse_overrides([override]))
    assert message in str(error.value)


def test_option_of_another_method_is_unknown():
    theirs = r"unknown option 'method\.lam' of fedit; it is of fedrot, robust"
    with pytest.raises(FedrotError, match=theirs):
        load({"method": {"name": "fedit", "lam": 0.5}})
    with pytest.raises(FedrotError, match=r"unknown option 'method\.speed'; method has none"):
        load({"method": {"name": "fedit", "speed": 0.5}})


def test_a_test_part_too_small_for_its_digits_names_the_option():
    with pytest.raises(FedrotError, match=r"task\.test_fraction=0\.001 does not do: "):
        load({"task": {"test_fraction": 0.001, "pretrain_steps": 1}}).task.prepare(0)


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "a: [\n"])
def test_bad_file_is_named(tmp_path, text):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(FedrotError, match=r"bad\.yaml"):
        read_yaml(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "rounds: 3\nlocal: {lr: 1}\nrounds: 4\n",
            r"rounds stands there twice .* line 3, column 1",
        ),
        ("local:\n  lr: 1\n  lr: 2\n", r"lr stands there twice .* line 3"),
        ("local: {lr: 1, steps: 2}\nlocal.lr: 2\n", "local.lr stands there twice"),
    ],
)
def test_a_key_that_stands_twice(tmp_path, text, message):
    """YAML itself takes the last."""
    file = tmp_path / "twice.yaml"
    file.write_text(text)
    with pytest.raises(FedrotError, match=f"twice.yaml.*{message}"):
        read_yaml(file)
    file.write_text("a: &a {x: 1}\nb:\n  inner: &b\n    <<: *a\n    x: 2\nc:\n  <<: *b\n")
    assert read_yaml(file) == {"a": {"x": 1}, "b": {"inner": {"x": 2}}, "c": {"x": 2}}
    file.write_text("a: !!map 3\n")
    with pytest.raises(FedrotError, match="not valid YAML"):
        read_yaml(file)
    file.write_text("local: {lr: 1}\nlocal.steps: 2\n")
    assert read_yaml(file) == {"local": {"lr": 1, "steps": 2}}


def test_trees():
    tree = merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4})
    assert tree == {"a": {"b": 3, "c": 2}, "d": 4}
    assert flatten(tree) == {"a.b": 3, "a.c": 2, "d": 4}
    assert first_difference(tree, tree) is None
    assert first_difference(tree, {"a": {"b": 3, "c": 2}, "d": 5}) == ("d", 4, 5)
    assert first_difference({"a": 1}, {"a": 1, "e": 2}) == ("e", None, 2)
