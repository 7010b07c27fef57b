"""Ranks by energy in a small federation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small import small

from fedrot.errors import FedrotError
from fedrot.factors import Factors, rank_of
from fedrot.simulation.adapter import load_adapter
from fedrot.simulation.participants import participants
from fedrot.simulation.rounds import federate, prepare, run_round, train_round
from fedrot.simulation.run_dir import RunDir

CHANGING = ("clients.ranks=[4,1,2]", "clients.ranks_change=true", "local.steps=10")


@pytest.mark.parametrize("gauge", ["singular", "reference"])
def test_ranks_by_energy_over_the_rounds(gauge, tmp_path):
    """Every layer gets the rank that the mean of the round's uploads needs; the next round's
    clients start from that, in their own rank where it is smaller."""
    options = ("method.energy=0.9", f"method.gauge={gauge}", "local.lr=1", *CHANGING)
    config = small("flexlora", *options)
    federation, run = prepare(config), RunDir(tmp_path / "none")
    server, seen = federation.start(), []
    for round in range(3):
        uploads = train_round(federation, server)
        for upload in uploads.clients:
            rank = config.clients.rank(upload.client, round)
            for m, A in upload.factors.A.items():
                assert A.shape[0] == min(rank, server.factors.A[m].shape[0])
        server, row = run_round(federation, run, server)
        lost = whole = 0.0
        for m, A in server.factors.A.items():
            mean = sum(u.B[m].double() @ u.A[m].double() for u in uploads.factors) / 4
            U, S, Vh = torch.linalg.svd(mean)
            kept = S.square().cumsum(0) / S.square().sum()
            rank = min(4, int((kept < 0.9).sum()) + 1)
            assert A.shape[0] == rank == row["ranks"][m]
            product = server.factors.B[m].double() @ A.double()
            assert float((product - (U[:, :rank] * S[:rank]) @ Vh[:rank]).norm()) < 1e-5 * S[0]
            lost += float(S[rank:].square().sum())
            whole += float(S.square().sum())
        assert row["rank"] == sum(row["ranks"].values()) / len(row["ranks"])
        assert row["energy"] == pytest.approx(1 - lost / whole, abs=1e-6)
        seen.append(row["ranks"])
    assert len({tuple(ranks.values()) for ranks in seen}) > 1
    summary = federate(config, tmp_path / "run")
    rows = RunDir(tmp_path / "run").rows()
    assert [row["ranks"] for row in rows] == seen and summary["ranks"] == seen[-1]
    assert summary["rank"] == pytest.approx(sum(row["rank"] for row in rows) / 3)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Ranks after the last round" in page and (tmp_path / "run" / "ranks.png").is_file()
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"rank", "energy"} < set(header) and "ranks" not in header
    # The folder has one rank for all layers; the rows beyond a layer's own are zero.
    stored = load_adapter(federation.model, tmp_path / "run" / "adapter")
    for m, rank in summary["ranks"].items():
        assert stored.A[m].shape[0] == 4 and torch.count_nonzero(stored.A[m][rank:]) == 0
        assert torch.equal(stored.A[m][:rank], server.factors.A[m])
        assert torch.equal(stored.B[m][:, :rank], server.factors.B[m])


def test_ranks_by_energy_in_one_shot(tmp_path):
    """No reference but the first client, of rank 1; the bound is lora.r."""
    chosen = {}
    for energy in (0.5, 1):
        options = ("clients.ranks=[1,4]", f"method.energy={energy}")
        source = tmp_path / "0.5" if chosen else None
        config = small("flexlora", *options, setting="one-shot")
        summary = federate(config, tmp_path / str(energy), uploads_from=source)
        chosen[energy] = set(summary["ranks"].values())
    assert max(chosen[0.5]) < 4 and chosen[1] == {4}


def test_hetlora_clients_prune_themselves(tmp_path):
    """For good, at most what `decay` cuts off in a round, and one that is left out waits."""
    options = ["method.decay=0.6", "method.penalty=0.2", "clients.ranks=[2,8]", "lora.r=8"]
    config = small("hetlora", *options, "rounds=6", "clients.participation=3")
    federation = prepare(config)
    server, ranks = federation.start(), {0: 2, 1: 8, 2: 2, 3: 8}
    for round in range(config.rounds):
        update, row = run_round(federation, RunDir(tmp_path), server)
        taking_part = participants(config, round)
        for client, rank in update.ranks.items():
            before = ranks[client]
            allowed = {before, max(1, int(0.6 * before))} if client in taking_part else {before}
            assert rank in allowed
        ranks |= update.ranks
        assert row["rank"] == pytest.approx(sum(ranks[i] for i in taking_part) / 3)
        server = update
    assert min(ranks[0], ranks[2]) == 1 and min(ranks[1], ranks[3]) < 8
    assert {A.shape[0] for A in server.factors.A.values()} == {8}  # the server's own stays


@pytest.mark.parametrize("personal", [False, True])
def test_hetlora_with_a_trained_head(tmp_path, personal):
    options = ["method.penalty=1", "local.head=true", f"local.personal_head={personal}".lower()]
    summary = federate(small("hetlora", *options, "lora.r=4"), tmp_path)
    ranks = [row["rank"] for row in RunDir(tmp_path).rows()]
    assert summary["rank"] == pytest.approx(sum(ranks) / 3) and ranks[-1] < 4
    assert "pruned themselves" in (tmp_path / "report.html").read_text()


def test_clients_that_prune_themselves_have_one_rank():
    options = ["clients.ranks=[4,1]", "clients.ranks_change=true", "lora.r=4"]
    with pytest.raises(FedrotError, match=r"ranks_change must be false, or method\.decay=1"):
        small("hetlora", *options)
    assert not small("hetlora", "method.decay=1", *options).method.prunes


def test_hetlora_trains_with_its_penalty():
    """Without it the tails of the first rounds grow, and nobody prunes."""

    def ranks(penalty):
        options = [f"method.penalty={penalty}", "method.decay=0.5", "lora.r=4"]
        federation = prepare(small("hetlora", *options))
        server = federation.start()
        B = {m: torch.full_like(B, 0.01) for m, B in server.factors.B.items()}
        server = replace(server, factors=Factors(server.factors.A, B))
        return [rank_of(upload) for upload in train_round(federation, server).factors]

    assert ranks(0) == [4, 4, 4, 4] and ranks(3) == [2, 2, 2, 2]


@pytest.mark.parametrize("attack", ["sign-flip", "noise"])
def test_an_attacker_may_prune_itself(tmp_path, attack):
    options = ["method.decay=0.5", "method.penalty=5", "lora.r=4", "clients.attackers=1"]
    config = small("hetlora", *options, f"clients.attack={attack}", "rounds=4")
    federation = prepare(config)
    server = federation.start()
    for _ in range(config.rounds):
        server, _ = run_round(federation, RunDir(tmp_path), server)
    assert server.ranks[3] == 1
