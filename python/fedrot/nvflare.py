"""NVFLARE's server side: an aggregator for its FedAvg and ScatterAndGather controllers.

    FedAvgRecipe(..., aggregator=FedRotAggregator(lam=0.4))

needs `pip install 'fedrot[nvflare]'`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedrot.adapters.layers import factor_keys
from fedrot.factors import Factors
from fedrot.methods import FedRot
from fedrot.methods.base import wide
from fedrot.streaming import StreamingAggregator

try:
    from nvflare.apis.fl_constant import FLMetaKey
    from nvflare.apis.fl_context import FLContext
    from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
    from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
    from nvflare.app_common.aggregators.weighted_aggregation_helper import (
        WeightedAggregationHelper,
        filter_aggregatable_metrics,
    )
    from nvflare.app_common.app_constant import AppConstants
    from nvflare.app_common.app_event_type import AppEventType
    from nvflare.app_common.utils.fl_model_utils import FLModelUtils
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("nvflare"):
        raise
    raise ImportError("fedrot.nvflare needs NVFLARE: pip install 'fedrot[nvflare]'") from None


class FedRotAggregator(ModelAggregator):
    """Rotates every client's LoRA factors toward those it started the round from, and averages.

    Everything that is no LoRA factor (a trained head, biases) is averaged plainly. A client counts
    by its ``FLMetaKey.NUM_STEPS_CURRENT_ROUND``, 1 where it gives none, as with NVFLARE's own
    aggregation. It is added when it arrives: memory does not grow with the number of clients.

    The reference is the model that NVFLARE sends out, seen in the event ``BEFORE_TRAIN_TASK``.
    Clients may return whole parameters or differences (``ParamsType.FULL``, ``DIFF``), torch
    tensors or NumPy arrays; the result is of the same type, in the dtypes of the global model.

    NVFLARE logs what :meth:`accept_model` raises and goes on without the client; so
    :meth:`aggregate_model` raises it again, which ends the job.

    Args:
        lam, align, proper: as in :class:`fedrot.methods.FedRot`, ``"alternate"`` included.
        nonfinite: a client with values that are not finite ends the job, ``"raise"``, or is left
            out of the round with a warning, ``"drop"``.

    Source: arXiv 2602.23638.
    """

    def __init__(
        self,
        lam: float = 0.4,
        align: str = "joint",
        proper: bool = True,
        nonfinite: str = "raise",
    ) -> None:
        super().__init__()
        self._method = FedRot.one_by_one(lam, align, proper)
        if nonfinite not in ("raise", "drop"):
            raise ValueError(f"nonfinite must be raise or drop, got {nonfinite!r}")
        # NVFLARE writes the job from the attributes that are called as the arguments.
        self.lam, self.align, self.proper, self.nonfinite = lam, align, proper, nonfinite
        self._lock = threading.Lock()
        self._sent = FLModel(params={})
        self._round: _Round | None = None
        self._failure: ValueError | TypeError | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        super().handle_event(event_type, fl_ctx)
        if event_type == AppEventType.BEFORE_TRAIN_TASK:
            sent = FLModelUtils.from_shareable(fl_ctx.get_prop(AppConstants.TRAIN_SHAREABLE))
            with self._lock:
                # Once for every client that fetches the task; all get what the first one got.
                if self._round is None or sent.current_round != self._sent.current_round:
                    # The controller may go on to change its dictionary, but not the tensors.
                    sent.params = dict(sent.params)
                    self._sent, self._round = sent, None

    def accept_model(self, model: FLModel) -> None:
        """Add one client.

        Raises:
            ValueError, TypeError: naming the client and the key, where it cannot be averaged.
        """
        with self._lock:
            try:
                self._accept(model)
            except (ValueError, TypeError) as error:
                self._failure = self._failure or error
                raise

    def aggregate_model(self) -> FLModel:
        """The average of the round's clients.

        Raises:
            ValueError, TypeError: a client could not be accepted, or there are none.
        """
        with self._lock:
            try:
                if self._failure is not None:
                    raise self._failure
                if self._round is None:
                    raise ValueError("there must be at least one client to average")
                return self._round.result()
            finally:
                self._reset()

    def reset_stats(self) -> None:
        with self._lock:
            self._reset()

    def _reset(self) -> None:
        self._round = self._failure = None

    def _accept(self, model: FLModel) -> None:
        if self._failure is not None:
            return  # the round is lost
        if not self._sent.params:
            raise ValueError(
                "no reference: no BEFORE_TRAIN_TASK event has reached the aggregator; give it to "
                "NVFLARE's FedAvg or ScatterAndGather as a component of the job"
            )
        name = repr((model.meta or {}).get("client_name", "unknown"))
        round = self._sent.current_round
        if None not in (round, model.current_round) and model.current_round != round:
            self.warning(f"client {name} is late: round {model.current_round}; it is left out")
            return
        if self._round is None:
            if round is None and self.align == "alternate":
                raise ValueError("align=alternate needs current_round in the global model")
            lam, align = self._method.schedule(round or 0)
            options = {"lam": lam, "align": align, "proper": self.proper}
            self._round = _Round(self._sent.params, model, {**options, "nonfinite": self.nonfinite})
            if left := self._round.left_out:
                self.warning(f"{len(left)} parameters stay with the server, as {left[0]!r}")
        if not self._round.accept(model, name):
            self.warning(f"client {name} has values that are not finite; it is left out")


class _Round:
    """The sums of one round.

    Args:
        sent: the global model that the clients started from.
        first: the first client; all others must return the same keys in the same way.
        options: of :class:`StreamingAggregator`.
    """

    def __init__(self, sent: Mapping[str, Any], first: FLModel, options: dict[str, Any]) -> None:
        self.params_type = first.params_type
        self._sent = sent
        self._keys = list(first.params)
        self._layers = _layers(sent)
        factors = {key for pair in self._layers.values() for key in pair}
        self._plain = [key for key in self._keys if key not in factors]
        self.left_out = sorted(sent.keys() - factors - first.params.keys())
        self._start = _as_factors({key: _tensor(sent[key], key) for key in factors}, self._layers)
        self._factors = StreamingAggregator(self._start, **options)
        self._drop = options["nonfinite"] == "drop"
        self._averages = WeightedAggregationHelper()
        self._metrics: WeightedAggregationHelper | None = WeightedAggregationHelper()

    def accept(self, model: FLModel, name: str) -> bool:
        """Whether the client counts; False where it has been dropped."""
        params, weight = self._params(model, name), _weight(model, name)
        for key in self._plain:
            if not bool(torch.isfinite(params[key]).all()):
                if self._drop:
                    return False
                raise ValueError(f"client {name}: {key!r} has values that are not finite")
        client = _as_factors(params, self._layers)
        if model.params_type == ParamsType.DIFF:
            client = Factors(_sum(self._start.A, client.A), _sum(self._start.B, client.B))
        if not self._factors.accept(client, weight, name=name):
            return False
        self._averages.add({key: _addend(params[key]) for key in self._plain}, weight, name, None)
        if model.metrics is None:
            self._metrics = None
        elif self._metrics is not None and weight > 0:
            self._metrics.add(filter_aggregatable_metrics(model.metrics), weight, name, None)
        return True

    def result(self) -> FLModel:
        factors = self._factors.finish()
        params = self._averages.get_result()
        for layer, (key_A, key_B) in self._layers.items():
            params[key_A], params[key_B] = factors.A[layer], factors.B[layer]
            if self.params_type == ParamsType.DIFF:
                params[key_A] = params[key_A] - self._start.A[layer]
                params[key_B] = params[key_B] - self._start.B[layer]
        return FLModel(
            params_type=self.params_type,
            params={key: _like(params[key], self._sent[key]) for key in self._keys},
            metrics=(self._metrics.get_result() or None) if self._metrics else None,
        )

    def _params(self, model: FLModel, name: str) -> dict[str, Tensor]:
        """The client's parameters as tensors, if it returns what the others do."""
        if model.params_type != self.params_type:
            raise ValueError(
                f"client {name} returns {model.params_type}, others {self.params_type}: "
                "all must return whole parameters, or all differences"
            )
        if unknown := sorted(model.params.keys() - self._sent.keys()):
            raise ValueError(f"client {name} returns {unknown[0]!r}; the global model has no such")
        wanted = {*self._keys, *(key for pair in self._layers.values() for key in pair)}
        if missing := sorted(wanted - model.params.keys()):
            raise ValueError(
                f"client {name} returns no {missing[0]!r} (of {len(missing)} that are missing); "
                "NVFLARE's client leaves out what is no torch tensor where the server expects NumPy"
            )
        if unknown := sorted(model.params.keys() - wanted):
            raise ValueError(f"client {name} returns {unknown[0]!r}, which others do not")
        params = {}
        for key, value in model.params.items():
            like = _tensor(self._sent[key], key)
            tensor = params[key] = _tensor(value, f"client {name}: {key}").to(like.device)
            if tensor.shape != like.shape:
                raise ValueError(
                    f"client {name}: {key!r} must be {tuple(like.shape)} as in the global model, "
                    f"got {tuple(tensor.shape)}"
                )
        return params


def _layers(sent: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The keys of both factors of every layer of the global model."""
    try:
        layers = factor_keys(sent)
    except ValueError as error:
        raise type(error)(f"the global model: {error}") from None
    if not layers:
        raise ValueError("the global model has no LoRA factors")
    return layers


def _tensor(value: Any, name: str) -> Tensor:
    """A tensor, a NumPy array, or NVFLARE's reference to a tensor on disk, as a tensor."""
    if hasattr(value, "materialize"):
        value = value.materialize()
    if isinstance(value, Tensor):
        tensor = value.detach()
    elif hasattr(value, "__array__"):
        tensor = torch.tensor(value)
    else:
        raise TypeError(f"{name} must be a torch tensor or a NumPy array, got {type(value)}")
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise TypeError(f"{name} has dtype {tensor.dtype}, which cannot be averaged")
    return tensor


def _like(average: Tensor, sent: Any) -> Any:
    """An average in the type and dtype of what was sent."""
    like = _tensor(sent, "the global model")
    if not like.is_floating_point():
        average = average.round()
    average = average.to(like.dtype).view(like.shape)
    return average if isinstance(sent, Tensor) else average.numpy()


def _as_factors(params: Mapping[str, Tensor], layers: Mapping[str, tuple[str, str]]) -> Factors:
    """The factors as matrices: a convolution's ``(r, in, kh, kw)`` is ``(r, in kh kw)``."""
    A = {layer: wide(params[key]).flatten(1) for layer, (key, _) in layers.items()}
    B = {layer: wide(params[key]).flatten(1) for layer, (_, key) in layers.items()}
    return Factors(A, B)


def _addend(tensor: Tensor) -> Tensor:
    return wide(tensor) if tensor.is_floating_point() else tensor.double()


def _sum(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: a[key] + b[key] for key in a}


def _weight(model: FLModel, name: str) -> float:
    value = (model.meta or {}).get(FLMetaKey.NUM_STEPS_CURRENT_ROUND, 1.0)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0.0 <= value < math.inf:
        key = str(FLMetaKey.NUM_STEPS_CURRENT_ROUND)
        raise ValueError(f"client {name}: {key} must be a number from 0 on, got {value!r}")
    return float(value)
