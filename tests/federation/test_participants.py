"""Who trains in a round and from what: delayed clients, and clients that begin anew."""

from __future__ import annotations

import pytest
import torch
from small import SMALL, equal, small

from fedrot.config import load
from fedrot.errors import FedrotError
from fedrot.options import parse_overrides
from fedrot.simulation import rounds
from fedrot.simulation.local import train_clients
from fedrot.simulation.participants import Start, participants
from fedrot.simulation.rounds import federate, prepare, run_round, train_round
from fedrot.simulation.run_dir import RunDir
from fedrot.simulation.seeding import generator


def rounds_of(federation, count, tmp_path):
    """The servers before each round, and after the last."""
    run, servers = RunDir(tmp_path), [federation.start()]
    for _ in range(count):
        servers.append(run_round(federation, run, servers[-1])[0])
    return servers


def starts(federation, server):
    """What every client trains from in the next round: as training itself is called."""
    seen = []

    def spy(model, starts, *args, heads, **options):
        seen.extend(zip(starts, heads, strict=True))
        return train_clients(model, starts, *args, heads=heads, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "train_clients", spy)
        train_round(federation, server)
    return [Start(*start) for start in seen]


def test_participants_follow_the_seed_and_the_round():
    config = small("fedit", "clients.count=20", "clients.participation=0.25")
    drawn = [participants(config, t) for t in range(40)]
    assert drawn == [participants(config, t) for t in range(40)]
    assert all(len(set(d)) == 5 and d == sorted(d) for d in drawn)
    assert {i for d in drawn for i in d} == set(range(20))
    other = small("fedit", "clients.count=20", "clients.participation=5", "seed=1")
    assert [participants(other, t) for t in range(40)] != drawn
    assert len(participants(other, 0)) == 5
    assert participants(small("fedit"), 3) == [0, 1, 2, 3]
    assert len(participants(small("fedit", "clients.participation=0.01"), 0)) == 1
    assert len(participants(small("fedit", "clients.participation=0.45"), 0)) == 2  # of 1.8


def test_every_draw_of_a_round_has_a_generator_of_its_own(tmp_path, monkeypatch):
    """Of the seed, what it is for, the round and the client: none repeats another."""
    seen = []

    def spy(*of, **options):
        seen.append(of)
        return generator(*of, **options)

    monkeypatch.setattr(rounds, "generator", spy)
    attack = ("clients.attackers=1", "clients.attack=noise")
    federation = prepare(small("fedit", "seed=3", "regauge=true", "lora.dropout=0.1", *attack))
    rounds_of(federation, 2, tmp_path)
    own = ("batches", "dropout", "gauge", "attack")
    of_clients = [(3, what, t, i) for what in own for t in range(2) for i in range(4)]
    assert sorted(seen) == sorted(
        [(3, "start", 0), (3, "server", 0), (3, "server", 1), *of_clients]
    )


def test_delayed_clients_start_from_the_factors_of_that_time(tmp_path):
    federation = prepare(small("fedit", "clients.count=8", "clients.delay=2", "local.head=true"))
    servers = rounds_of(federation, 4, tmp_path)
    found = []
    for t, server in enumerate(servers):
        for s in starts(federation, server):
            # Two rounds back at the most, and not before the first.
            near = [u for u in servers[max(0, t - 2) : t + 1] if equal(u.factors.B, s.factors.B)]
            assert len(near) == 1 and equal(near[0].factors.A, s.factors.A)
            assert equal(near[0].head, s.head)
            found.append(t - near[0].rounds)
    assert set(found[-16:]) == {0, 1, 2} and set(found[:8]) == {0}
    heads = [s.head["classifier.weight"] for s in servers]
    assert not any(torch.equal(heads[i], heads[i + 1]) for i in range(4))


def test_without_delay_all_start_from_the_latest(tmp_path):
    federation = prepare(small("fedit"))
    server = rounds_of(federation, 2, tmp_path)[-1]
    assert all(equal(s.factors.B, server.factors.B) for s in starts(federation, server))
    assert len(server.past) == 1


def test_clients_that_begin_anew_train_from_factors_of_their_own(tmp_path):
    federation = prepare(small("fedit", "clients.count=8", "clients.restarts=0.5"))
    servers = rounds_of(federation, 3, tmp_path)
    seen, own = [], 0
    for server in servers[1:]:
        for s in starts(federation, server):
            if equal(s.factors.B, server.factors.B):
                assert equal(s.factors.A, server.factors.A)
                continue
            assert all(not B.any() for B in s.factors.B.values())
            assert not any(equal(s.factors.A, A) for A in seen)  # no two of them alike
            seen.append(s.factors.A)
            own += 1
    assert 6 <= own <= 18
    always = prepare(small("fedit", "clients.restarts=1", "clients.ranks=[4,2]"))
    found = starts(always, always.start())
    assert [{A.shape[0] for A in s.factors.A.values()} for s in found] == [{4}, {2}, {4}, {2}]
    assert not any(equal(s.factors.A, always.start().factors.A) for s in found)


def test_clients_that_begin_anew_have_the_untrained_head(tmp_path):
    federation = prepare(small("fedit", "clients.restarts=1", "local.head=true"))
    server = rounds_of(federation, 1, tmp_path)[-1]
    assert not equal(server.head, federation.head)
    assert all(equal(s.head, federation.head) for s in starts(federation, server))


def test_resume_with_delayed_clients_gives_the_same_numbers(tmp_path, interrupt):
    config = small("fedrot", "rounds=4", "clients.delay=3", "local.head=true")
    federate(config, tmp_path / "whole", report=False)
    interrupt(4)
    with pytest.raises(KeyboardInterrupt):
        federate(config, tmp_path / "run", report=False)
    federate(config, tmp_path / "run", resume=True, report=False)
    whole, resumed = RunDir(tmp_path / "whole").rows(), RunDir(tmp_path / "run").rows()
    for key in ("accuracy", "loss", "train_loss", "aggregation_error", "rotation_angle"):
        assert [row[key] for row in whole] == [row[key] for row in resumed]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("clients.restarts=1.5",), "clients.restarts must be at most 1, got 1.5"),
        (("clients.delay=-1",), "clients.delay must be at least 0, got -1"),
        (
            ("clients.delay=2", "start=own", "rounds=1"),
            "clients.delay=2: start=own has nothing global to miss",
        ),
        (
            ("method.name=fedex", "clients.restarts=0.5"),
            "clients.restarts=0.5: FedEx-LoRA folds into the frozen weights",
        ),
        (
            ("method.name=fedsa", "clients.restarts=0.5"),
            "clients.restarts=0.5: FedSA-LoRA leaves B with the clients",
        ),
        (
            ("method.name=fedsa", "clients.delay=1"),
            "clients.delay=1: FedSA-LoRA leaves B with the clients",
        ),
        (
            ("method.name=rolora", "clients.delay=1"),
            "clients.delay=1: RoLoRA trains one factor in a round",
        ),
        (
            ("method.name=ffa", "clients.restarts=0.5"),
            "FFA-LoRA has one A for all clients, clients.restarts gives some their own",
        ),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(FedrotError, match=message):
        load(parse_overrides([*SMALL, *options]))
