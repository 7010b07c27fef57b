"""`FedRotAggregator` in process: two clients whose average is known by hand."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip(
    "nvflare.apis", reason="NVFLARE is not installed: pip install 'fedrot[nvflare]'"
)

from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from two_clients import (
    EYE,
    FIRST,
    GLOBAL,
    HEAD,
    HEAD_MEAN,
    PLAIN_A,
    PLAIN_B,
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

from fedrot.nvflare import FedRotAggregator


def test_aligned_average_by_number_of_steps():
    result = of_two(FedRotAggregator(lam=1.0))
    check(result, A=2.5 * EYE, B=2.5 * EYE, head=HEAD_MEAN)
    assert list(result) == [A, B, HEAD]


def test_plain_average_at_lam_0():
    check(of_two(FedRotAggregator(lam=0.0)), A=PLAIN_A, B=PLAIN_B, head=HEAD_MEAN)


def test_clients_that_give_no_steps_count_the_same():
    aggregator = FedRotAggregator(lam=1.0)
    send(aggregator, GLOBAL)
    result = averaged(aggregator, client(FIRST, None), client(SECOND, None, "site-2"))
    check(result.params, A=3 * EYE, B=3 * EYE, head=torch.tensor([2.0, 0.0]))


def test_a_client_of_no_steps_counts_nothing():
    aggregator = FedRotAggregator(lam=1.0)
    send(aggregator, GLOBAL)
    result = averaged(aggregator, client(FIRST, 2), client(SECOND, 0, "site-2"))
    check(result.params, A=2 * EYE, B=2 * EYE, head=FIRST[HEAD])


def test_alternate_follows_the_round():
    aggregator = FedRotAggregator(lam=1.0, align="alternate")
    check(of_two(aggregator, round=0), A=PLAIN_A, B=PLAIN_B)
    check(of_two(aggregator, round=1), A=2.5 * EYE, B=2.5 * EYE)
    # B is aligned in even rounds: toward B_ref = -I that is half a turn more.
    other = {**GLOBAL, B: -EYE}
    check(of_two(aggregator, other, round=1), A=2.5 * EYE, B=2.5 * EYE)
    check(of_two(aggregator, other, round=2), A=-2.5 * EYE, B=-2.5 * EYE)
    with pytest.raises(ValueError, match="align=alternate needs current_round"):
        of_two(aggregator, round=None)


def test_the_reference_is_what_was_sent_last():
    aggregator = FedRotAggregator(lam=1.0)
    of_two(aggregator)
    turned = {**GLOBAL, A: QUARTER.T, B: QUARTER}
    check(of_two(aggregator, turned, round=1), A=2.5 * QUARTER.T, B=2.5 * QUARTER)


def test_the_reference_is_what_the_first_client_of_the_round_got():
    aggregator = FedRotAggregator(lam=1.0)
    sent = dict(GLOBAL)
    send(aggregator, sent)
    sent[A] = -EYE  # the controller's dictionary, changed after sending
    aggregator.accept_model(client(FIRST, 3))
    send(aggregator, {**GLOBAL, A: -EYE})  # another client fetches the same task
    aggregator.accept_model(client(SECOND, 1, "site-2"))
    check(aggregator.aggregate_model().params, A=2.5 * EYE, B=2.5 * EYE)


def test_differences():
    aggregator = FedRotAggregator(lam=1.0)
    start = {**GLOBAL, HEAD: torch.ones(2)}
    send(aggregator, start)
    result = averaged(
        aggregator,
        *(
            client({key: p[key] - start[key] for key in p}, steps, name, params_type="DIFF")
            for p, steps, name in ((FIRST, 3, "site-1"), (SECOND, 1, "site-2"))
        ),
    )
    assert result.params_type == ParamsType.DIFF
    check(result.params, A=1.5 * EYE, B=1.5 * EYE, head=HEAD_MEAN - 1)
    controllers = FLModelUtils.update_model(FLModel(params=dict(start)), result)
    check(controllers.params, A=2.5 * EYE, B=2.5 * EYE, head=HEAD_MEAN)


def test_numpy_gives_the_same_as_torch():
    sent, first, second = ({k: v.numpy() for k, v in p.items()} for p in (GLOBAL, FIRST, SECOND))
    first[A].setflags(write=False)
    aggregator = FedRotAggregator(lam=1.0)
    send(aggregator, sent)
    result = averaged(aggregator, client(first, 3), client(second, 1, "site-2")).params
    assert all(
        isinstance(value, np.ndarray) and value.dtype == np.float32 for value in sent.values()
    )
    assert all(type(result[key]) is np.ndarray and result[key].dtype == np.float32 for key in sent)
    check({k: torch.tensor(v) for k, v in result.items()}, A=2.5 * EYE, B=2.5 * EYE, head=HEAD_MEAN)
    # NumPy from a client where the server keeps torch.
    send(aggregator, GLOBAL, 1)
    result = averaged(aggregator, client(first, 3), client(SECOND, 1, "site-2")).params
    check(result, A=2.5 * EYE, B=2.5 * EYE, head=HEAD_MEAN)


def test_tensors_that_nvflare_has_left_on_disk():
    class Lazy:
        def __init__(self, value: Tensor) -> None:
            self.materialize = lambda: value

    aggregator = FedRotAggregator(lam=1.0)
    send(aggregator, GLOBAL)
    lazy = client({key: Lazy(value) for key, value in FIRST.items()}, 3)
    result = averaged(aggregator, lazy, client(SECOND, 1, "site-2"))
    check(result.params, A=2.5 * EYE, B=2.5 * EYE, head=HEAD_MEAN)


def test_frozen_weights_may_stay_with_the_server(monkeypatch):
    warnings: list[str] = []
    aggregator = FedRotAggregator(lam=1.0)
    monkeypatch.setattr(aggregator, "warning", warnings.append)
    send(aggregator, {**GLOBAL, "base_model.model.q.base_layer.weight": torch.ones(2, 2)})
    result = averaged(aggregator, client(FIRST, 3), client(SECOND, 1, "site-2"))
    assert list(result.params) == [A, B, HEAD]
    assert warnings == [
        "1 parameters stay with the server, as 'base_model.model.q.base_layer.weight'"
    ]


def test_metrics_are_averaged_as_nvflare_does():
    aggregator = FedRotAggregator()
    send(aggregator, GLOBAL)
    one = client(FIRST, 3, metrics={"accuracy": 0.5, "confusion": [1, 2]})
    two = client(SECOND, 1, "site-2", metrics={"accuracy": 0.9})
    assert averaged(aggregator, one, two).metrics == pytest.approx({"accuracy": 0.6})
    send(aggregator, GLOBAL, 1)
    assert averaged(aggregator, one, client(SECOND, 1, "site-2")).metrics is None


def test_types_of_the_global_model_are_kept():
    count = "base_model.model.norm.num_batches_tracked"
    sent = {
        A: EYE.bfloat16(),
        B: EYE.bfloat16(),
        HEAD: torch.zeros(2).half(),
        count: torch.tensor(0),
    }
    first = {**FIRST, count: torch.tensor(2**40)}
    second = {**SECOND, count: torch.tensor(2**40 + 2)}
    aggregator = FedRotAggregator(lam=1.0)
    send(aggregator, sent)
    result = averaged(aggregator, client(first, 3), client(second, 1, "site-2")).params
    assert {key: value.dtype for key, value in result.items()} == {
        key: value.dtype for key, value in sent.items()
    }
    check({A: result[A].float(), B: result[B].float()}, A=2.5 * EYE, B=2.5 * EYE)
    assert result[count].item() == 2**40 + 0 and result[count].shape == ()


def test_inputs_stay_as_they_are():
    sent, first = ({k: v.clone() for k, v in p.items()} for p in (GLOBAL, FIRST))
    aggregator = FedRotAggregator(lam=1.0)
    send(aggregator, sent)
    result = averaged(aggregator, client(first)).params
    for value in result.values():
        value.add_(7)
    assert all(torch.equal(sent[key], GLOBAL[key]) for key in sent)
    assert all(torch.equal(first[key], FIRST[key]) for key in first)


def test_clients_are_not_kept():
    aggregator = FedRotAggregator()
    send(aggregator, GLOBAL)
    kept = []
    for name in ("site-1", "site-2"):
        params = {key: value.clone() for key, value in FIRST.items()}
        kept += [weakref.ref(value) for value in params.values()]
        aggregator.accept_model(client(params, 1, name))
        del params
    assert [ref() for ref in kept] == [None] * 6


def test_names_of_adapters_convolutions_and_biases():
    conv_A, conv_B = "m.conv.lora_A.default.weight", "m.conv.lora_B.default.weight"
    bias = "m.conv.lora_B.default.bias"

    def conv(a: Tensor, b: Tensor, c: list[float]) -> dict[str, Tensor]:
        stored = {conv_A: a.reshape(2, 2, 1, 1), conv_B: b.reshape(2, 2, 1, 1)}
        return {**stored, bias: torch.tensor(c)}

    aggregator = FedRotAggregator(lam=1.0)
    send(aggregator, conv(EYE, EYE, [0.0, 0.0]))
    first = client(conv(2 * EYE, 2 * EYE, [1.0, 3.0]), 3)
    second = client(conv(4 * QUARTER.T, 4 * QUARTER, [5.0, 3.0]), 1, "site-2")
    result = averaged(aggregator, first, second).params
    for key, value in conv(2.5 * EYE, 2.5 * EYE, [2.0, 3.0]).items():
        torch.testing.assert_close(result[key], value)


def test_reset_forgets_the_clients():
    aggregator = FedRotAggregator(lam=1.0)
    send(aggregator, GLOBAL)
    aggregator.accept_model(client(SECOND, 9))
    aggregator.reset_stats()
    check(averaged(aggregator, client(FIRST)).params, A=2 * EYE, B=2 * EYE, head=FIRST[HEAD])


def test_as_scatter_and_gather_calls_it():
    aggregator = FedRotAggregator(lam=1.0)
    send(aggregator, GLOBAL)
    for params, steps in ((FIRST, 3), (SECOND, 1)):
        assert aggregator.accept(FLModelUtils.to_shareable(client(params, steps)), FLContext())
    result = FLModelUtils.from_shareable(aggregator.aggregate(FLContext()))
    check(result.params, A=2.5 * EYE, B=2.5 * EYE, head=HEAD_MEAN)


def test_options_survive_the_job_configuration(tmp_path):
    import json

    from nvflare.app_common.workflows.fedavg import FedAvg
    from nvflare.job_config.api import FedJob

    options = {"lam": 0.7, "align": "alternate", "proper": False, "nonfinite": "drop"}
    job = FedJob("job")
    job.set_app_packages(["fedrot"])
    job.to_server(FedAvg(aggregator=FedRotAggregator(**options)))
    job.export_job(str(tmp_path))
    config = json.loads((tmp_path / "job/app_server/config/config_fed_server.json").read_text())
    assert config["workflows"][0]["args"]["aggregator"] == {
        "path": "fedrot.nvflare.FedRotAggregator",
        "args": options,
    }
