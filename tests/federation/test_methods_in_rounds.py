"""Every method in a small federation: its invariant over the rounds, and what a run leaves."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small import equal, small

from fedrot.config import load
from fedrot.errors import Diverged, FedrotError
from fedrot.factors import Factors
from fedrot.methods import METHODS, Server
from fedrot.server import serve
from fedrot.simulation import checkpoint, rounds
from fedrot.simulation.adapter import load_adapter
from fedrot.simulation.participants import participants
from fedrot.simulation.rounds import federate, prepare, run_round, train_round
from fedrot.simulation.run_dir import RunDir
from fedrot.simulation.seeding import generator

TIMES = ("seconds_local", "seconds_aggregation")


def one_round(federation, server):
    """The uploads of a round, and the server after it."""
    config = federation.config
    uploads = train_round(federation, server)
    update = serve(
        config.method,
        config.server,
        server,
        uploads.clients,
        uploads.weights,
        generator=generator(config.seed, "server", server.rounds),
    )
    return uploads, update.server


def test_ffa_and_rolora_train_one_factor():
    for name, trained in (("ffa", "BBB"), ("rolora", "BAB")):
        federation = prepare(small(name))
        server = federation.start()
        for part in trained:
            uploads, after = one_round(federation, server)
            other = "A" if part == "B" else "B"
            for factors in [*uploads.factors, after.factors]:
                for module, start in getattr(server.factors, part).items():
                    assert not torch.equal(getattr(factors, part)[module], start)
                assert equal(getattr(factors, other), getattr(server.factors, other))
            server = after


def test_fedsa_keeps_B_with_the_client_over_the_rounds():
    federation = prepare(small("fedsa", "clients.participation=2"))
    server, seen = federation.start(), {}
    for _ in range(3):
        method, clients = federation.config.method, participants(federation.config, server.rounds)
        for client in range(4):
            start = method.download(server, client)
            assert equal(start.A, server.factors.A)
            zero = {m: torch.zeros_like(B) for m, B in start.B.items()}
            assert equal(start.B, seen.get(client, zero))
        uploads, server = one_round(federation, server)
        assert [u.client for u in uploads.clients] == clients
        seen.update({u.client: u.factors.B for u in uploads.clients})
        assert server.personal.keys() == seen.keys()
    assert len(seen) > 2 and not equal(*list(seen.values())[:2])
    scores = federation.evaluate(server)
    own = [federation.score(method.download(server, i), {})["accuracy"] for i in range(4)]
    assert scores["accuracy"] == pytest.approx(sum(own) / 4)
    assert scores["accuracy_averaged"] == federation.score(server.factors, {})["accuracy"]


def logits(federation, factors=None, dense=None):
    """Of the test part, with an adapter, or with dense updates of the pristine weights."""
    zero = Factors(
        {m: torch.zeros_like(A) for m, A in federation.start().factors.A.items()},
        federation.start().factors.B,
    )
    federation.frozen.set(dense or {})
    rounds.set_factors(federation.model, factors or zero)
    with torch.no_grad():
        return federation.model(pixel_values=federation.data.test["pixel_values"]).logits


@pytest.mark.parametrize("name", ["fedex", "flora"])
def test_the_global_model_is_the_exact_average(name):
    """Through PEFT's forward, over two rounds: the sum of all exact averages, nothing lost.

    For FedEx-LoRA a round's average holds the last factors, which the clients started from; for
    FLoRA the clients' products come on top of what was folded before.
    """
    federation = prepare(small(name, "clients.weights=samples", "local.steps=10"))
    server, total = federation.start(), {}
    pristine = logits(federation)
    for _ in range(2):
        before = server
        uploads, server = one_round(federation, server)
        w = uploads.weights.double() / uploads.weights.double().sum()
        for m in server.factors.A:
            mean = sum(
                w[i] * u.B[m].double() @ u.A[m].double() for i, u in enumerate(uploads.factors)
            )
            total[m] = before.merged.get(m, 0) + mean
        total = {m: t.float() for m, t in total.items()}
    federation.frozen.set(server.merged)
    found = logits(federation, server.factors, server.merged)
    wanted = logits(federation, dense=total)
    assert float((wanted - pristine).abs().max()) > 0.05
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    # With the scaling left out, or applied twice, it would show.
    wrong = logits(federation, server.factors, {m: 2 * t for m, t in server.merged.items()})
    assert float((wrong - wanted).abs().max()) > 1e-3
    assert torch.equal(logits(federation), pristine)


def test_flora_starts_every_round_afresh():
    federation = prepare(small("flora"))
    server = federation.start()
    after = one_round(federation, server)[1]
    assert all(float(B.abs().max()) == 0 for B in after.factors.B.values())
    assert not any(torch.equal(after.factors.A[m], A) for m, A in server.factors.A.items())
    again = one_round(federation, server)[1]
    assert equal(after.factors.A, again.factors.A)
    row = run_round(federation, RunDir(Path()), server)[1]  # writes nothing
    assert row["aggregation_error"] < 1e-5 < row["aggregation_error_plain"]


def test_flexlora_truncates_the_average_of_the_uploads():
    federation = prepare(small("flexlora", "clients.ranks=[4,1,2]"))
    server = federation.start()
    for _ in range(2):
        uploads, server = one_round(federation, server)
        ranks = [next(iter(f.A.values())).shape[0] for f in uploads.factors]
        assert ranks == [4, 1, 2, 4]
        for m, A in server.factors.A.items():
            mean = sum(u.B[m].double() @ u.A[m].double() for u in uploads.factors) / 4
            U, S, Vh = torch.linalg.svd(mean)
            best = (U[:, :4] * S[:4]) @ Vh[:4]
            product = server.factors.B[m].double() @ A.double()
            assert float((product - best).norm()) < 1e-5 * float(S[0])


@pytest.mark.parametrize("method", ["fedrot", "flexlora"])
def test_a_client_of_another_rank_every_round(method):
    """Its start is cut from the global factors of that round, whatever rank it had before."""
    options = ("clients.ranks=[4,1,2]", "clients.ranks_change=true", "clients.participation=3")
    federation = prepare(small(method, *options))
    config, server = federation.config, federation.start()
    for round, by_client in enumerate(([4, 1, 2, 4], [1, 2, 4, 1], [2, 4, 1, 2], [4, 1, 2, 4])):
        uploads, server = one_round(federation, server)
        found = {u.client: {A.shape[0] for A in u.factors.A.values()} for u in uploads.clients}
        assert found == {i: {by_client[i]} for i in participants(config, round)}
        assert len(found) == 3
        expected = config.method.aggregate(uploads.factors, uploads.reference, round=round)
        for m, A in server.factors.A.items():
            assert A.shape[0] == 4 and torch.equal(A, expected.A[m])
    assert load(config.tree()) == config


@pytest.mark.parametrize("name", METHODS)
def test_mixed_ranks_weights_and_partial_participation_run(name, tmp_path):
    options = ("clients.ranks=[2,4]", "clients.weights=samples", "clients.participation=0.5")
    summary = federate(small(name, *options, "rounds=2"), tmp_path / "run")
    rows = RunDir(tmp_path / "run").rows()
    assert [len(row["clients"]) for row in rows] == [2, 2]
    assert summary["method"] == METHODS[name].name
    assert all(row["aggregation_error"] >= 0 for row in rows)


STATES = {
    "fedex": ("head", ["local.head=true"]),
    "flora": ("merged", []),
    "fedsa": ("personal", ["clients.participation=2"]),
    "fedrot": ("past", ["method.lag=2", "method.rotation=random"]),
    "flexlora": (
        "past",
        ["method.energy=0.8", "clients.ranks=[4,1]", "clients.ranks_change=true"],
    ),
    "rolora": ("optimizer", ["server.optimizer=fedyogi", "local.head=true"]),
    "hetlora": (
        "ranks",
        ["method.decay=0.8", "method.penalty=3", "clients.ranks=[1,4]", "lora.r=4"],
    ),
    "lora-fair": ("optimizer", ["server.optimizer=fedavgm", "server.lr=0.5"]),
    "fedit": (
        "heads",
        ["local.head=true", "local.personal_head=true", "clients.participation=2"],
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_resume_bit_for_bit(name, tmp_path, interrupt):
    """With every kind of state that a checkpoint holds."""
    kind, options = STATES[name]
    config = small(name, *options)
    whole = federate(config, tmp_path / "whole", report=False)
    interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        federate(config, tmp_path / "run", report=False)
    run = RunDir(tmp_path / "run")
    assert getattr(checkpoint.load(run.checkpoint), kind)
    again = federate(config, run.path, resume=True, report=False)
    assert all(again[key] == value for key, value in whole.items() if key not in TIMES)
    for file in ("adapter/adapter_model.safetensors", "merged.safetensors"):
        if (tmp_path / "whole" / file).exists():
            assert equal(load_file(tmp_path / "whole" / file), load_file(run.path / file))
    rows, same = (
        [{k: v for k, v in row.items() if k not in TIMES} for row in r.rows()]
        for r in (run, RunDir(tmp_path / "whole"))
    )
    assert rows == same and len(rows) == 3


def test_checkpoint_keeps_the_order_of_layers(tmp_path):
    """A safetensors file sorts its keys: layer 10 would come before layer 2."""
    names = ["layer.2", "layer.10"]
    factors = Factors({n: torch.ones(1, 2) for n in names}, {n: torch.ones(3, 1) for n in names})
    server = Server(factors, 4, (Server(factors, 3),), personal={11: factors.B, 2: factors.B})
    checkpoint.save(tmp_path / "c", server)
    read = checkpoint.load(tmp_path / "c")
    assert list(read.factors.A) == list(read.past[0].factors.B) == names and read.rounds == 4
    assert read.personal.keys() == {2, 11}
    assert all(list(B) == names for B in read.personal.values())


@pytest.mark.parametrize("name", ["fedex", "flora", "ffa"])
def test_what_a_run_leaves_gives_the_reported_accuracy(name, tmp_path):
    """The base model, plus merged.safetensors, under the adapter with its head, by PEFT alone."""
    config = small(name, "local.head=true", "local.steps=10", "local.lr=0.5")
    summary = federate(config, tmp_path / "run")
    data = config.task.prepare(config.seed)
    base = config.task.load_model(data)
    merged = tmp_path / "run" / "merged.safetensors"
    assert merged.exists() == (name != "ffa")
    if merged.exists():
        with torch.no_grad():
            for parameter, change in load_file(merged).items():
                base.get_parameter(parameter).add_(change)
    head = {n: p.clone() for n, p in base.named_parameters() if n.startswith("classifier")}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        model = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    found = config.task.evaluate(model, data.test)
    assert found["accuracy"] == summary["accuracy"]
    assert found["loss"] == pytest.approx(summary["loss"], abs=1e-5)
    trained = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for parameter, before in head.items():
        change = trained[f"base_model.model.{parameter}"] - before
        assert float(change.norm()) > 1e-3


def test_sample_weights_weigh_by_examples():
    federation = prepare(small("fedit", "clients.weights=samples"))
    uploads, server = one_round(federation, federation.start())
    counts = [len(rows) for rows in federation.examples]
    assert len(set(counts)) > 1 and uploads.weights.tolist() == counts
    for m, A in server.factors.A.items():
        mean = sum(n * u.A[m] for n, u in zip(counts, uploads.factors, strict=True)) / sum(counts)
        torch.testing.assert_close(A, mean, rtol=0, atol=1e-6)


def test_server_optimizer_in_a_federation():
    """FedAvg with half a step ends half-way between the start and FedIT's aggregate."""
    federation = prepare(small("fedit", "server.lr=0.5"))
    start = federation.start()
    uploads, server = one_round(federation, start)
    for m, B in server.factors.B.items():
        mean = sum(u.B[m] for u in uploads.factors) / 4
        torch.testing.assert_close(B, (start.factors.B[m] + mean) / 2, rtol=0, atol=1e-7)


def test_one_shot_merges_by_every_method_that_can(tmp_path):
    """All methods on the uploads of the first; the exact ones lose less than the mean."""
    errors, alone = {}, []
    for name in ("fedit", "fedex", "flora", "flexlora", "lora-fair", "hetlora"):
        source = None if name == "fedit" else tmp_path / "fedit"
        config = small(name, "clients.ranks=[4,2]", setting="one-shot")
        federate(config, tmp_path / name, uploads_from=source, report=False)
        (row,) = RunDir(tmp_path / name).rows()
        errors[name] = row["aggregation_error"]
        assert row["aggregation_error_plain"] == pytest.approx(errors["fedit"], rel=1e-6)
        alone.append(row["client_accuracies"])  # without what the server folded
    assert alone == [alone[0]] * len(alone)
    assert max(errors["fedex"], errors["flora"]) < 1e-4 * errors["fedit"]
    assert errors["flexlora"] < errors["lora-fair"] < errors["fedit"]
    model = prepare(small("fedit", setting="one-shot")).model
    clients = [load_adapter(model, folder) for folder in RunDir(tmp_path / "flora").clients()]
    columns = [next(iter(c.B.values())).abs().sum(0) for c in clients]
    ranks = [int((norms > 0).sum()) for norms in columns]
    assert ranks == [4, 2, 4, 2]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("flora", ["server.optimizer=fedadam"], "FLoRA cannot go with server.optimizer=fedadam"),
        ("fedex", ["server.lr=0.5"], "FedEx-LoRA cannot go with server.optimizer=fedavg, lr 0.5"),
        ("flexlora", ["server.optimizer=fedavgm"], "FlexLoRA cannot go with"),
        (
            "flexlora",
            ["server.optimizer=fedavgm", "method.gauge=reference", "method.energy=0.9"],
            "its factors change basis or rank every round",
        ),
        ("flexlora", ["method.energy=0"], "method.energy must be above 0 and at most 1, got 0.0"),
        ("flexlora", ["method.energy=all"], "method.energy must be a number, got 'all'"),
        ("fedit", ["method.energy=0.9"], "unknown option 'method.energy' of fedit; it is of flex"),
        ("ffa", ["regauge=true"], "FFA-LoRA has one A for all clients, regauge gives each its"),
        ("rolora", ["start=own", "rounds=1"], "RoLoRA has one A for all clients, start=own gives"),
        ("fedsa", ["start=own", "rounds=1"], "FedSA-LoRA leaves B with the clients"),
        ("fedit", ["start=own", "rounds=1", "server.lr=2"], "lr 2 steps from the global factors"),
        ("fedit", ["clients.ranks=[4,8]"], "clients.ranks must not exceed lora.r=4, got 8"),
        ("fedit", ["clients.ranks=[4,0]"], "clients.ranks[1] must be at least 1, got 0"),
        ("fedit", ["clients.ranks_change=true"], "ranks_change=true needs clients.ranks"),
        (
            "fedsa",
            ["clients.ranks=[1,2]", "clients.ranks_change=true"],
            "FedSA-LoRA leaves B with the clients, which has one rank: clients.ranks_change",
        ),
        ("fedit", ["clients.ranks=4"], "clients.ranks must be a list such as [1, 2], got 4"),
        ("fedit", ["clients.ranks=[2.5]"], "clients.ranks[0] must be a whole number, got 2.5"),
        ("fedit", ["clients.participation=1.5"], "a whole number from 2 to clients.count=4"),
        ("fedit", ["clients.participation=5"], "from 2 to clients.count=4, got 5"),
        ("fedit", ["clients.weights=size"], "clients.weights must be one of uniform, samples"),
        ("lora-fair", ["method.regularization=-1"], "method.regularization must not be negative"),
        ("fedrot", ["method.rotation=scale"], "method.align must be A, B or alternate"),
    ],
)
def test_combinations_that_make_no_sense(method, options, message):
    with pytest.raises(FedrotError) as error:
        small(method, *options)
    assert message in str(error.value)


def test_lists_round_trip():
    config = small("hetlora", "clients.ranks=[1,2]", "server.optimizer=fedyogi")
    tree = config.tree()
    assert tree["clients"]["ranks"] == [1, 2] and load(tree) == config


def test_a_global_model_that_diverges_is_named(tmp_path, monkeypatch):
    scores = {"accuracy": 0.1, "loss": float("nan")}
    monkeypatch.setattr(rounds.Federation, "evaluate", lambda self, server: scores)
    with pytest.raises(Diverged, match="FedIT diverged in round 1: loss is nan"):
        federate(small("fedit"), tmp_path / "run")
