"""Two clients whose average is known by hand, and how NVFLARE hands them to `FedRotAggregator`."""

from __future__ import annotations

import torch
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from torch import Tensor

from fedrot.nvflare import FedRotAggregator

A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
HEAD = "base_model.model.classifier.weight"
EYE, QUARTER = torch.eye(2), torch.tensor([[0.0, -1.0], [1.0, 0.0]])
GLOBAL = {A: EYE, B: EYE, HEAD: torch.zeros(2)}
# Client 1 has doubled both factors, client 2 has made them four times as large in a basis that is
# turned by 90 degrees. With steps 3 and 1, aligned: (3 * 2 EYE + 4 EYE) / 4 = 2.5 EYE.
FIRST = {A: 2 * EYE, B: 2 * EYE, HEAD: torch.tensor([1.0, -1.0])}
SECOND = {A: 4 * QUARTER.T, B: 4 * QUARTER, HEAD: torch.tensor([3.0, 1.0])}
PLAIN_A, PLAIN_B = 1.5 * EYE + QUARTER.T, 1.5 * EYE + QUARTER
HEAD_MEAN = torch.tensor([1.5, -0.5])


def send(aggregator: FedRotAggregator, params: dict, round: int | None = 0) -> None:
    """What FedAvg does before the first client gets its task."""
    context = FLContext()
    shareable = FLModelUtils.to_shareable(FLModel(params=params, current_round=round))
    context.set_prop(AppConstants.TRAIN_SHAREABLE, shareable, private=True, sticky=False)
    aggregator.handle_event(AppEventType.BEFORE_TRAIN_TASK, context)


def client(params: dict, steps: object = 1, name: str = "site-1", **more) -> FLModel:
    meta = {"client_name": name}
    if steps is not None:
        meta[FLMetaKey.NUM_STEPS_CURRENT_ROUND] = steps
    return FLModel(params=params, meta=meta, **more)


def averaged(aggregator: FedRotAggregator, *clients: FLModel) -> FLModel:
    for each in clients:
        aggregator.accept_model(each)
    return aggregator.aggregate_model()


def of_two(aggregator: FedRotAggregator, sent: dict = GLOBAL, round: int | None = 0) -> dict:
    send(aggregator, sent, round)
    two = client(FIRST, 3), client(SECOND, 1, "site-2")
    return averaged(aggregator, *two).params


def check(params: dict, **wanted: Tensor) -> None:
    for name, value in wanted.items():
        key = {"A": A, "B": B, "head": HEAD}[name]
        torch.testing.assert_close(params[key], value, rtol=0, atol=1e-6)
