"""Planted attackers in a run: who they are, and what they hand in."""

from __future__ import annotations

import statistics

import pytest
import torch
from small import SMALL, small

from fedrot.config import load
from fedrot.errors import FedrotError
from fedrot.options import parse_overrides
from fedrot.simulation.rounds import federate, prepare, train_round


def trained(*options):
    federation = prepare(load(parse_overrides([*SMALL, *options])))
    server = federation.start()
    return federation, server, train_round(federation, server).factors


@pytest.fixture(scope="module")
def honest():
    return trained()


def test_sign_flip_goes_back_as_often_as_it_says(honest):
    _, server, plain = honest
    _, _, found = trained("clients.attackers=1", "clients.attack_strength=3")
    for mine, theirs in zip(plain[:3], found[:3], strict=True):
        assert all(torch.equal(mine.B[m], theirs.B[m]) for m in mine.B)
    for side in "AB":
        for module, start in getattr(server.factors, side).items():
            change = getattr(plain[3], side)[module] - start
            torch.testing.assert_close(getattr(found[3], side)[module], start - 3 * change)


def test_noise_is_as_large_as_it_says(honest):
    _, server, plain = honest
    _, _, found = trained(
        "clients.attackers=2", "clients.attack=noise", "clients.attack_strength=5"
    )
    for client in (2, 3):
        for module, start in server.factors.B.items():
            added = found[client].B[module] - plain[client].B[module]
            change = plain[client].B[module] - start
            ratio = added.square().mean().sqrt() / change.square().mean().sqrt()
            assert 3.5 < float(ratio) < 6.5
    added = [found[i].B[module] - plain[i].B[module] for i in (2, 3)]
    added = [t / t.norm() for t in added]  # sizes differ with what was trained
    assert abs(float((added[0] * added[1]).sum())) < 0.7


def test_labels_are_turned_around_for_attackers_alone(honest):
    before, _, plain = honest
    after, _, found = trained("clients.attackers=1", "clients.attack=labels")
    labels = before.data.train["labels"]
    for client in range(3):
        assert torch.equal(before.examples[client], after.examples[client])
        assert all(torch.equal(plain[client].B[m], found[client].B[m]) for m in plain[0].B)
    wrong = after.data.train["labels"][after.examples[3]]
    assert torch.equal(wrong, labels.max() - labels[before.examples[3]])
    assert torch.equal(after.data.train["labels"][: len(labels)], labels)
    assert any(not torch.equal(plain[3].B[m], found[3].B[m]) for m in plain[0].B)


def test_heads_are_spoiled_too_unless_they_stay_with_the_client():
    head = ("local.head=true", "local.lr=0.1", "clients.attackers=1", "clients.attack_strength=3")

    def upload(*options):
        federation = prepare(load(parse_overrides([*SMALL, *head, *options])))
        return federation, train_round(federation, federation.start()).clients[3].head

    federation, plain = upload("clients.attackers=0")
    _, found = upload()
    _, kept = upload("local.personal_head=true")
    for name, start in federation.head.items():
        assert float((plain[name] - start).abs().max()) > 1e-3
        torch.testing.assert_close(found[name], start - 3 * (plain[name] - start))
        assert torch.equal(kept[name], plain[name])


def test_wrong_labels_spoil_the_mean_and_unaligned_rules(tmp_path):
    """Four of eleven clients, in bases of their own, four seeds: as sign flips and noise in
    ``tests/methods/test_robust_methods.py``, but with uploads that training made."""
    options = (
        *("clients.count=11", "clients.partition=iid", "clients.attackers=4"),
        *("clients.attack=labels", "regauge=true", "rounds=4", "local.steps=20"),
    )

    def accuracy(method, *more):
        options_of_all = ("task.pretrain_steps=200", *options, *more)
        found = []
        for seed in range(4):
            config = small(method, f"seed={seed}", *options_of_all)
            folder = tmp_path / "-".join([method, *more, str(seed)])
            found.append(federate(config, folder, report=False)["accuracy"])
        return statistics.mean(found)

    plain, median = accuracy("fedrot", "method.lam=1.0"), accuracy("robust")
    assert accuracy("fedrot", "method.lam=1.0", "clients.attackers=0") > plain + 0.03
    assert median > plain + 0.03
    assert accuracy("robust", "method.lam=0.0") < plain - 0.3  # the rule without the rotation
    krum = accuracy("robust", "method.rule=multi-krum", "method.attackers=4")
    assert krum > plain + 0.03


def test_none_beside_an_attack_is_a_baseline():
    """Where a sweep varies how many attack, and what a finished run's config.yaml says."""
    config = load(parse_overrides([*SMALL, "clients.attackers=0", "clients.attack=noise"]))
    assert list(config.clients.honest) == [0, 1, 2, 3]
    assert load(config.tree()) == config


def test_what_is_refused():
    with pytest.raises(FedrotError, match=r"clients.attackers must be below clients.count=4"):
        load(parse_overrides([*SMALL, "clients.attackers=4"]))
    for attack in ("attack=labels", "attack=sign-flip", "attack_strength=3"):
        with pytest.raises(FedrotError, match=f"clients.{attack} needs clients.attackers, how"):
            load(parse_overrides([*SMALL, f"clients.{attack}"]))
    labels = [*SMALL, "clients.attackers=1", "clients.attack=labels"]
    with pytest.raises(FedrotError, match=r"clients\.attack=labels has none, got 3"):
        load(parse_overrides([*labels, "clients.attack_strength=3"]))
    config = load(parse_overrides(labels))
    assert load(config.tree()) == config
    few = [*SMALL, "method.name=robust", "clients.participation=3"]
    for rule, message in [
        ("krum", "method: rule=krum with attackers=1 needs at least 5 clients, got 3 in a round"),
        (
            "multi-krum",
            "rule=multi-krum with attackers=1 needs at least 5 clients, got 3 in a round",
        ),
        ("trimmed", "rule=trimmed with attackers=2 needs at least 5 clients, got 3 in a round"),
    ]:
        options = [f"method.rule={rule}", *(["method.attackers=2"] if rule == "trimmed" else [])]
        with pytest.raises(FedrotError, match=message):
            load(parse_overrides([*few, *options]))
    with pytest.raises(FedrotError, match="labels needs a task that classifies"):
        prepare(
            load(
                {"task": {"name": "strings"}},
                parse_overrides(
                    [
                        "task.pretrain_steps=1",
                        "clients.count=3",
                        "clients.partition=iid",
                        "clients.attackers=1",
                        "clients.attack=labels",
                    ]
                ),
            )
        )
