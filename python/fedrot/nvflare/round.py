"""The clients of one round: checked, and taken together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.aggregators.weighted_aggregation_helper import (
    WeightedAggregationHelper,
    filter_aggregatable_metrics,
)
from torch import Tensor

from fedrot.adapters.layers import factor_keys
from fedrot.factors import Factors, resized
from fedrot.methods import Method, Robust
from fedrot.methods.base import wide
from fedrot.streaming import StreamingAggregator, check_total


class Gathered:
    """All clients of a round for a method, by the calls of a ``StreamingAggregator``."""

    def __init__(self, reference: Factors, method: Method, round: int, drop: bool) -> None:
        self._reference, self._method, self._number, self._drop = reference, method, round, drop
        self._clients: list[tuple[str, Factors, float]] = []
        self._rest: list[Mapping[str, Tensor]] = []  # of the same clients

    def accept(self, client: Factors, weight: float, *, name: str) -> bool:
        for layer in client.A:
            for side, factors in (("A", client.A), ("B", client.B)):
                if not bool(torch.isfinite(factors[layer]).all()):
                    if self._drop:
                        return False
                    raise ValueError(
                        f"client {name}: lora_{side} of layer {layer} has values that are not "
                        "finite"
                    )
        self._clients.append((name, client, weight))
        return True

    def accept_rest(self, rest: Mapping[str, Tensor]) -> None:
        """What the client that was accepted last has beside its factors."""
        self._rest.append(rest)

    def finish(self) -> Factors:
        order, w = self._ordered()
        clients = [self._clients[i][1] for i in order]
        new = self._method.aggregate(clients, self._reference, w, round=self._number)
        return resized(new, {layer: len(A) for layer, A in self._reference.A.items()})

    def finish_rest(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The method's average of what is beside the factors; ``like``: what clients started
        from."""
        order, w = self._ordered()
        return self._method.average_rest([self._rest[i] for i in order], like, w)

    def _ordered(self) -> tuple[list[int], Tensor]:
        """The clients in the order of their names, which may be missing and so the same, and their
        weights."""
        order = sorted(range(len(self._clients)), key=lambda i: self._clients[i][0])
        weights = [self._clients[i][2] for i in order]
        check_total(len(order), math.fsum(weights))
        return order, torch.tensor(weights, dtype=torch.float64)


class Clipping(StreamingAggregator):
    """``Robust("clip")`` with a bound: the one method that needs no second client."""

    def __init__(self, reference: Factors, method: Robust, nonfinite: str) -> None:
        super().__init__(
            reference,
            lam=float(method.lam),
            align=method.align,
            proper=method.proper,
            nonfinite=nonfinite,
            bound=method.bound,
        )
        self._method = method

    def clipped(self, rest: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a client has beside its factors, of the names of ``like``, what it started from."""
        return self._method.average_rest([rest], like)


class Round:
    """The sums of one round.

    Args:
        sent: the global model that the clients started from, ``start`` its factors.
        first: the first client; all others must return the same keys in the same way.
        sums: takes the factors.
        drop: whether a client with values that are not finite is left out.
    """

    def __init__(
        self,
        sent: Mapping[str, Any],
        first: FLModel,
        start: Factors,
        sums: StreamingAggregator | Gathered,
        drop: bool,
    ) -> None:
        self.params_type = first.params_type
        self._sent = sent
        self._keys = list(first.params)
        self._layers = _layers(sent)
        factors = {key for pair in self._layers.values() for key in pair}
        self._plain = [key for key in self._keys if key not in factors]
        self.left_out = sorted(sent.keys() - factors - first.params.keys())
        self._start, self._factors, self._drop = start, sums, drop
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
        rest = {key: params[key] for key in self._plain}
        if isinstance(self._factors, Gathered):
            self._factors.accept_rest(rest)
            rest = {key: t for key, t in rest.items() if key not in self._beside}
        elif isinstance(self._factors, Clipping):
            rest |= self._factors.clipped(rest, self._beside)
        self._averages.add({key: _addend(t) for key, t in rest.items()}, weight, name, None)
        if model.metrics is None:
            self._metrics = None
        elif self._metrics is not None and weight > 0:
            self._metrics.add(filter_aggregatable_metrics(model.metrics), weight, name, None)
        return True

    def result(self) -> FLModel:
        factors = self._factors.finish()
        params = self._averages.get_result()
        if isinstance(self._factors, Gathered):
            params.update(self._factors.finish_rest(self._beside))
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

    @cached_property
    def _beside(self) -> dict[str, Tensor]:
        """What clients started from beside the factors and is of floating point, in the terms in
        which they return it."""
        sent = {key: _tensor(self._sent[key], key) for key in self._plain}
        like = {key: t for key, t in sent.items() if t.is_floating_point()}
        if self.params_type == ParamsType.DIFF:
            return {key: torch.zeros_like(t) for key, t in like.items()}
        return like

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


def factors_of(sent: Mapping[str, Any]) -> Factors:
    """The factors of the global model.

    Raises:
        ValueError, TypeError: it has none, or no pairs of them.
    """
    layers = _layers(sent)
    keys = [key for pair in layers.values() for key in pair]
    return _as_factors({key: _tensor(sent[key], key) for key in keys}, layers)


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
    average = average.to(like.device, like.dtype).view(like.shape)
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
