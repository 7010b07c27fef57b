"""Parts that stay with their clients: heads; and tests on what the clients have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import PeftModel
from small import equal, small
from test_participants import rounds_of, starts

from fedrot.config import Lora
from fedrot.errors import FedrotError
from fedrot.factors import Factors
from fedrot.methods import FedIT, Server
from fedrot.optimizers import ServerOptimizer
from fedrot.server import Upload, serve
from fedrot.simulation.adapter import adapt, get_head, set_factors
from fedrot.simulation.participants import participants
from fedrot.simulation.rounds import federate, prepare
from fedrot.simulation.run_dir import RunDir
from fedrot.tasks.partition import split_test

PERSONAL = ("local.head=true", "local.personal_head=true", "local.lr=0.1")


def test_the_server_keeps_them_apart_and_does_not_step():
    """By hand: two clients, half a step of the server optimizer, which moves the factors alone."""

    def factors(a, b):
        return Factors({"m": torch.tensor([[float(a)]])}, {"m": torch.tensor([[float(b)]])})

    def head(h):
        return {"bias": torch.tensor([float(h)])}

    server = Server(factors(0, 0), head=head(1), heads={7: head(5), 3: head(9)})
    uploads = [Upload(2, factors(2, 4), head(-2)), Upload(7, factors(4, 8), head(6))]
    weights = torch.tensor([3.0, 1.0])
    optimizer = ServerOptimizer("fedavgm", 0.5, momentum=0.5)
    update = serve(FedIT(), optimizer, server, uploads, weights, personal_head=True)
    new = update.server
    assert {i: float(h["bias"]) for i, h in new.heads.items()} == {2: -2, 3: 9, 7: 6}
    assert float(new.head["bias"]) == 0.75 * -2 + 0.25 * 6  # the mean, of which nothing is a step
    assert float(new.factors.A["m"]) == 0.5 * (0.75 * 2 + 0.25 * 4)
    assert not any("head" in key for key in new.optimizer)
    assert server.heads.keys() == {7, 3}


def test_clients_start_from_their_own(tmp_path):
    federation = prepare(small("fedit", *PERSONAL, "clients.participation=2"))
    servers, own = rounds_of(federation, 3, tmp_path), {}
    for server in servers:
        clients = participants(federation.config, server.rounds)
        assert server.heads.keys() == own.keys()
        for client, start in zip(clients, starts(federation, server), strict=True):
            assert equal(start.factors.A, server.factors.A)
            assert equal(start.head, own.get(client, federation.head))
        if server is not servers[-1]:
            own |= {i: servers[server.rounds + 1].heads[i] for i in clients}
    assert len(own) > 2
    first, second = list(own.values())[:2]
    assert not equal(first, second) and not equal(first, federation.head)


def test_late_clients_have_their_latest_and_new_ones_the_untrained(tmp_path):
    late = prepare(small("fedit", *PERSONAL, "clients.delay=2", "clients.count=8"))
    server = rounds_of(late, 3, tmp_path)[-1]
    found = starts(late, server)
    assert all(equal(s.head, server.heads[i]) for i, s in enumerate(found))
    assert not all(equal(s.factors.B, server.factors.B) for s in found)
    anew = prepare(small("fedit", *PERSONAL, "clients.restarts=1"))
    server = rounds_of(anew, 1, tmp_path)[-1]
    assert all(equal(s.head, anew.head) for s in starts(anew, server))


@pytest.mark.parametrize("method", ["fedrot", "fedsa"])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_scores_are_those_of_the_clients_models(method, tmp_path):
    """Of the folders that a run leaves, through PEFT, and of the one with the mean head."""
    config = small(method, *PERSONAL, "rounds=2", "clients.ranks=[4,2]")
    summary = federate(config, tmp_path / "run")
    run, data = RunDir(tmp_path / "run"), config.task.prepare(config.seed)

    def accuracy(folder):
        model = PeftModel.from_pretrained(config.task.load_model(data), folder).eval()
        return config.task.evaluate(model, data.test)["accuracy"]

    own = [accuracy(folder) for folder in run.clients()]
    assert len(own) == 4 and len(set(own)) > 1
    assert summary["accuracy"] == pytest.approx(sum(own) / 4)
    assert summary["accuracy_averaged"] == accuracy(run.adapter) != summary["accuracy"]


def test_who_never_took_part_is_scored_with_the_untrained_head(tmp_path):
    federation = prepare(small("fedit", *PERSONAL, "clients.participation=2"))
    server = rounds_of(federation, 1, tmp_path)[-1]
    heads = [server.heads.get(i, federation.head) for i in range(4)]
    assert sum(head is federation.head for head in heads) == 2
    scores = [federation.score(server.factors, head)["loss"] for head in heads]
    assert federation.evaluate(server)["loss"] == pytest.approx(sum(scores) / 4)


@pytest.mark.parametrize("method", ["fedit", "fedsa"])
def test_local_tests_have_the_clients_labels(method, tmp_path):
    """Scores of every client's model on them, the mean as ``..._local``."""
    config = small(method, "clients.local_test=true", "clients.alpha=0.3", "clients.ranks=[4,2]")
    federation = prepare(config)
    train, test = (part["labels"] for part in (federation.data.train, federation.data.test))
    for rows, examples in zip(federation.local_tests, federation.examples, strict=True):
        shares = [t.bincount(minlength=5).double() / len(t) for t in (train[examples], test[rows])]
        torch.testing.assert_close(*shares, rtol=0, atol=0.5 * 5 / len(rows))
        assert bool((rows.diff() > 0).all())
    assert len({len(rows) for rows in federation.local_tests}) > 1
    server = rounds_of(federation, 1, tmp_path)[-1]
    scores = federation.evaluate(server)
    method, clients = config.method, config.clients
    local = []
    for i, rows in enumerate(federation.local_tests):
        part = {key: value[rows] for key, value in federation.data.test.items()}
        model = set_factors(federation.model, method.download(server, i, clients.rank(i)))
        local.append(config.task.evaluate(model, part))
    for key in ("accuracy", "loss"):
        assert scores[f"{key}_local"] == pytest.approx(sum(s[key] for s in local) / 4)
    assert scores["accuracy_local"] != scores["accuracy"]


def test_poisoned_labels_do_not_change_the_local_tests():
    """A client whose training labels are wrong is tested on those that it had."""
    plain = prepare(small("fedit", "clients.local_test=true"))
    attack = ("clients.attackers=2", "clients.attack=labels")
    poisoned = prepare(small("fedit", "clients.local_test=true", *attack))
    assert not torch.equal(plain.data.train["labels"], poisoned.data.train["labels"])
    for rows, same in zip(plain.local_tests, poisoned.local_tests, strict=True):
        assert torch.equal(rows, same)


def test_attackers_own_models_do_not_count(tmp_path):
    attack = ("clients.attackers=1", "clients.attack=labels", "clients.local_test=true")
    federation = prepare(small("fedit", *PERSONAL, *attack, "rounds=1"))
    server = rounds_of(federation, 1, tmp_path)[-1]
    found, tests = federation.evaluate(server), federation.local_tests
    for key, rows in (("loss", [None] * 4), ("loss_local", tests)):
        losses = [
            federation.score(server.factors, server.heads[i], rows[i])["loss"] for i in range(4)
        ]
        assert found[key] == pytest.approx(sum(losses[:3]) / 3)
        assert found[key] != pytest.approx(sum(losses) / 4, rel=1e-2)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("Llama", {"tie_word_embeddings": True}, "has no parameters of its own"),
        ("Roberta", {}, "lm_head.bias of this model's head belongs to RobertaLMHead"),
    ],
)
def test_heads_that_cannot_be_trained_are_refused(model, options, message):
    size = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 11}
    config = getattr(transformers, f"{model}Config")(**size, intermediate_size=8, **options)
    kind = {"Llama": "LlamaForCausalLM", "Roberta": "RobertaForMaskedLM"}[model]
    base = getattr(transformers, kind)(config)
    targets = ["q_proj"] if model == "Llama" else ["query"]
    with pytest.raises(FedrotError, match=message):
        get_head(adapt(base, Lora(), targets))


def test_refused():
    with pytest.raises(FedrotError, match=r"local\.personal_head=true needs local\.head=true"):
        small("fedit", "local.personal_head=true")
    with pytest.raises(FedrotError, match="start=own merges once, and every upload has its own"):
        small("fedit", *PERSONAL, "start=own", "rounds=1")
    data = SimpleNamespace(train={"labels": torch.zeros(4, 3)}, test={"labels": torch.zeros(4, 3)})
    with pytest.raises(FedrotError, match="by their classes, and this task has none"):
        split_test(data, [torch.arange(2), torch.arange(2, 4)])
    data = SimpleNamespace(
        train={"labels": torch.tensor([0, 1, 2, 2])}, test={"labels": torch.tensor([0, 1])}
    )
    with pytest.raises(FedrotError, match="no test example has a label of client 1"):
        split_test(data, [torch.arange(2), torch.arange(2, 4)])
