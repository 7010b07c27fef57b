"""`FedLoRAAggregator`: methods that look at all clients of a round."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

pytest.importorskip(
    "nvflare.apis", reason="NVFLARE is not installed: pip install 'fedrot[nvflare]'"
)

from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from two_clients import (
    EYE,
    FIRST,
    GLOBAL,
    HEAD,
    QUARTER,
    SECOND,
    A,
    B,
    averaged,
    check,
    client,
    of_two,
    send,
)

from fedrot.errors import FedrotError
from fedrot.factors import Factors
from fedrot.methods import FedRot, Robust
from fedrot.nvflare import FedLoRAAggregator, FedRotAggregator

# In a basis of its own again, and far off: aligned it is 100 times the global model.
BAD = {A: 100 * QUARTER, B: 100 * QUARTER.T, HEAD: torch.tensor([2.0, 6.0])}
THREE = (client(FIRST, 3), client(SECOND, 1, "site-2"), client(BAD, 8, "site-3"))


@pytest.mark.parametrize("rule", ["median", "trimmed"])
def test_the_middle_of_three_by_hand(rule):
    """Aligned they are 2, 4 and 100 times the global factors, one vote each."""
    aggregator = FedLoRAAggregator("robust", {"rule": rule})
    send(aggregator, GLOBAL)
    params = averaged(aggregator, *THREE).params
    check(params, A=4 * EYE, B=4 * EYE, head=torch.tensor([2.0, 1.0]))
    assert list(params) == [A, B, HEAD]


def test_krum_by_hand():
    """Products 4 I, 5 I, 3 I, 6 I and 10^4 I: with one attacker of five a score is that of the two
    nearest others, 1 + 1, 1 + 1, 1 + 4 and 1 + 4 |I|^2. The first two are equal, and the first
    name wins."""
    scales = [(2.0, 2.0), (5.0, 1.0), (3.0, 1.0), (6.0, 1.0), (100.0, 100.0)]
    honest = [
        client({A: a * R.T, B: b * R, HEAD: torch.zeros(2)}, 1, f"site-{i}")
        for i, ((a, b), R) in enumerate(
            zip(scales, (EYE, QUARTER, -EYE, QUARTER, EYE), strict=True), 1
        )
    ]
    results = []
    for order in itertools.permutations(honest):
        aggregator = FedLoRAAggregator("robust", {"rule": "krum"})
        send(aggregator, GLOBAL)
        results.append(averaged(aggregator, *order).params)
    for params in results:  # whoever comes first
        check(params, A=2 * EYE, B=2 * EYE)


def test_clipping_by_hand():
    """Changes of the reference: I and 3 I in both factors, lengths 2 and 6. With bound 3 the second
    is halved, and (3 I + 1.5 I) / 4 = 1.125 I is what is left. The heads, [1, -1] and [3, 1], have
    the lengths 2^.5 and 10^.5: 3 / 10^.5 of the second."""
    aggregator = FedLoRAAggregator("robust", {"rule": "clip", "bound": 3.0})
    head = (3 * FIRST[HEAD] + 3 / 10**0.5 * SECOND[HEAD]) / 4
    check(of_two(aggregator), A=2.125 * EYE, B=2.125 * EYE, head=head)
    # Without a bound, the median of the lengths, 4: 2 / 3 of the second, (3 I + 2 I) / 4.
    aggregator = FedLoRAAggregator("robust", {"rule": "clip"})
    head = (3 * FIRST[HEAD] + (2**0.5 + 10**0.5) / 2 / 10**0.5 * SECOND[HEAD]) / 4
    check(of_two(aggregator), A=2.25 * EYE, B=2.25 * EYE, head=head)


@pytest.mark.parametrize("rule", ["median", "krum", "clip", "bound"])
def test_the_rule_is_for_what_is_beside_the_factors_too(rule):
    """A head that started from [5, 5]; whole parameters and differences give the same. A counter
    is no vector to have a vote on."""
    options = {"rule": rule}
    if rule == "bound":
        options = {"rule": "clip", "bound": 2.0}
    elif rule == "krum":
        options["attackers"] = 0
    sent = {**GLOBAL, HEAD: torch.tensor([5.0, 5.0]), "count": torch.tensor(10)}
    heads = [[6.0, 5.0], [6.0, 6.0], [5.0, 6.5], [5.0, 905.0]]
    # Krum: squared distances to the two nearest others are 4.25, 2.25, 4.5 and a large one. Clip
    # leaves the medians of 1, 2^.5, 1.5, 900, or 2, of the last.
    middle = (2**0.5 + 1.5) / 2
    cut = [1.0, 2**0.5, middle, middle] if rule == "clip" else [1.0, 2**0.5, 1.5, 2.0]
    wanted = {"median": torch.tensor([5.5, 6.25]), "krum": torch.tensor([6.0, 6.0])}.get(rule)
    if wanted is None:
        changes = [torch.tensor(h) - 5 for h in heads]
        pairs = zip(cut, changes, strict=True)
        wanted = 5 + torch.stack([c * d / d.norm() for c, d in pairs]).mean(0)
    for params_type in ("FULL", "DIFF"):
        aggregator = FedLoRAAggregator("robust", options)
        send(aggregator, sent)
        diff = params_type == "DIFF"
        clients = []
        for i, head in enumerate(heads):
            own = {A: (1 + i) * EYE, B: EYE, HEAD: torch.tensor(head), "count": torch.tensor(12)}
            own = {key: t - sent[key] if diff else t for key, t in own.items()}
            clients.append(client(own, 1, f"site-{i}", params_type=params_type))
        params = averaged(aggregator, *clients).params
        start = sent[HEAD] if diff else torch.zeros(2)
        torch.testing.assert_close(params[HEAD] + start, wanted, rtol=0, atol=1e-6)
        assert int(params["count"]) == (2 if diff else 12)


@pytest.mark.parametrize(("bound", "kept"), [(3.0, False), (0.0, True)])
def test_only_clipping_by_a_bound_needs_no_client_for_long(bound, kept):
    aggregator = FedLoRAAggregator("robust", {"rule": "clip", "bound": bound})
    send(aggregator, GLOBAL)
    aggregator.accept_model(client(FIRST, 3))
    tensor = 4 * QUARTER.T
    memory = StorageWeakRef(tensor.untyped_storage())
    aggregator.accept_model(client({**SECOND, A: tensor}, 1, "site-2"))
    del tensor
    gc.collect()
    assert memory.expired() != kept
    aggregator.aggregate_model()
    gc.collect()
    assert memory.expired()


@pytest.mark.parametrize(("energy", "rank"), [(0.55, 1), (0.56, 2)])
def test_ranks_by_energy_by_hand(energy, rank):
    """(diag(8, 0) + 3 diag(0, 3)) / 4 = diag(2, 2.25), .559 of whose squares are in the second."""
    aggregator = FedLoRAAggregator("flexlora", {"energy": energy})
    send(aggregator, GLOBAL)
    one = {A: 2 * EYE, B: torch.tensor([[4.0, 0], [0, 0]]), HEAD: torch.zeros(2)}
    other = {A: torch.tensor([[0.0, 3], [0, 0]]), B: torch.tensor([[0.0, 0], [1, 0]])}
    two = client(one, 1), client({**other, HEAD: torch.zeros(2)}, 3, "site-2")
    params = averaged(aggregator, *two).params
    mean = torch.tensor([2.0 if rank == 2 else 0.0, 2.25]).diag()
    torch.testing.assert_close(params[B] @ params[A], mean, rtol=0, atol=1e-6)
    assert params[A].shape == (2, 2) and torch.count_nonzero(params[A][rank:]) == 0
    assert torch.count_nonzero(params[B][:, rank:]) == 0


@pytest.mark.parametrize("params_type", ["FULL", "DIFF"])
@pytest.mark.parametrize(
    ("name", "options", "method"),
    [
        ("fedrot", {"lam": "auto", "align": "gpa"}, FedRot("auto", "gpa")),
        ("fedrot", {"lam": 1.0, "align": "optimal"}, FedRot(1.0, "optimal")),
        ("fedrot", {"lam": 0.7, "align": "alternate"}, FedRot(0.7, "alternate")),
        ("robust", {"rule": "multi-krum", "attackers": 1}, Robust("multi-krum", 1)),
    ],
)
def test_same_as_the_method(name, options, method, params_type):
    g = torch.Generator().manual_seed(0)

    def draw():
        return {A: torch.randn(3, 5, generator=g), B: torch.randn(4, 3, generator=g)}

    start, clients, steps = draw(), [draw() for _ in range(5)], [1.0, 2.0, 5.0, 1.0, 4.0]
    aggregator = FedLoRAAggregator(name, options)
    send(aggregator, start, 2)
    difference = params_type == "DIFF"
    sent = [
        client(
            {key: value - start[key] if difference else value for key, value in params.items()},
            step,
            f"site-{i}",
            params_type=params_type,
        )
        for i, (params, step) in enumerate(zip(clients, steps, strict=True))
    ]
    found = averaged(aggregator, *reversed(sent)).params
    uploads = [Factors({"q": p[A]}, {"q": p[B]}) for p in clients]
    reference = Factors({"q": start[A]}, {"q": start[B]})
    wanted = method.aggregate(uploads, reference, torch.tensor(steps), round=2)
    for key, tensor in ((A, wanted.A["q"]), (B, wanted.B["q"])):
        got = found[key] + start[key] if difference else found[key]
        torch.testing.assert_close(got, tensor, rtol=0, atol=2e-5 if difference else 0)


def test_not_finite():
    bad = client({**SECOND, B: torch.full((2, 2), float("nan"))}, 1, "site-2")
    aggregator = FedLoRAAggregator("robust")
    send(aggregator, GLOBAL)
    with pytest.raises(ValueError, match=r"client 'site-2': lora_B of layer .*q has values that"):
        aggregator.accept_model(bad)
    with pytest.raises(ValueError, match="not finite"):
        aggregator.aggregate_model()
    aggregator = FedLoRAAggregator("robust", nonfinite="drop")
    send(aggregator, GLOBAL)
    check(averaged(aggregator, bad, client(FIRST, 3)).params, A=2 * EYE, B=2 * EYE)
    send(aggregator, GLOBAL, 1)
    with pytest.raises(ValueError, match="at least one client"):
        averaged(aggregator, bad)


def test_too_few_clients_end_the_job():
    with pytest.raises(
        ValueError, match="rule=krum with attackers=1 needs at least 5 clients, got 2"
    ):
        of_two(FedLoRAAggregator("robust", {"rule": "krum"}))
    aggregator = FedLoRAAggregator("robust", {"rule": "median"})
    send(aggregator, GLOBAL)
    with pytest.raises(ValueError, match="all 1 are zero"):
        averaged(aggregator, client(FIRST, 0))


def test_alternate_needs_the_round():
    aggregator = FedLoRAAggregator("fedrot", {"align": "alternate"})
    with pytest.raises(ValueError, match="align=alternate needs current_round"):
        of_two(aggregator, round=None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("robbust",), "unknown method 'robbust'; did you mean 'robust'"),
        (("robust", {"rule": "mean"}), r"options.rule must be median, .*, got 'mean'"),
        (("robust", {"rules": "krum"}), "unknown option 'options.rules'; did you mean"),
        (("flexlora", {"energy": 2}), "options.energy must be above 0 and at most 1, got 2.0"),
        (("flora",), "method: FLoRA folds into the frozen weights"),
        (("fedsa",), "method: FedSA-LoRA leaves B with the clients"),
        (("ffa",), "method: FFA-LoRA trains one factor at a time"),
        (("fedrot", {"lag": 2}), "FedRot-LoRA with lag=2 needs the global factors of an earlier"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        FedLoRAAggregator(*arguments)
    assert isinstance(caught.value, FedrotError) or "method:" in message or "lag" in message


def test_options_survive_the_job_configuration(tmp_path):
    import json

    from nvflare.app_common.workflows.fedavg import FedAvg
    from nvflare.job_config.api import FedJob

    options = {"method": "robust", "options": {"rule": "krum", "attackers": 2}, "nonfinite": "drop"}
    job = FedJob("job")
    job.set_app_packages(["fedrot"])
    job.to_server(FedAvg(aggregator=FedLoRAAggregator(**options)))
    job.export_job(str(tmp_path))
    config = json.loads((tmp_path / "job/app_server/config/config_fed_server.json").read_text())
    assert config["workflows"][0]["args"]["aggregator"] == {
        "path": "fedrot.nvflare.FedLoRAAggregator",
        "args": options,
    }


def test_the_paper_s_method_is_that_of_the_other_aggregator():
    check(of_two(FedLoRAAggregator("fedrot", {"lam": 1.0})), A=2.5 * EYE, B=2.5 * EYE)
    check(of_two(FedRotAggregator(lam=1.0)), A=2.5 * EYE, B=2.5 * EYE)


@pytest.mark.parametrize(("name", "wanted"), [("fedit", 37.0), ("robust", 10.0)])
def test_scatter_and_gather_gives_no_names(name, wanted):
    """Every client is "unknown" there: none may take another's place."""
    for heads in itertools.permutations((1.0, 10.0, 100.0)):
        aggregator = FedLoRAAggregator(name, {"rule": "median"} if name == "robust" else {})
        send(aggregator, GLOBAL)
        for head in heads:
            model = FLModel(
                params={A: EYE, B: EYE, HEAD: torch.full((2,), head)},
                params_type="FULL",
                current_round=0,
            )
            assert aggregator.accept(FLModelUtils.to_shareable(model), FLContext())
        result = FLModelUtils.from_shareable(aggregator.aggregate(FLContext()))
        torch.testing.assert_close(result.params[HEAD], torch.full((2,), wanted))
