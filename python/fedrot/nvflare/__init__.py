"""NVFLARE's server side: aggregators for its FedAvg and ScatterAndGather controllers.

    FedAvgRecipe(..., aggregator=FedRotAggregator(lam=0.4))

needs `pip install 'fedrot[nvflare]'`.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from typing import Any

from fedrot.factors import Factors
from fedrot.methods import METHODS, FedRot, Method, Robust
from fedrot.options import build, pick
from fedrot.streaming import StreamingAggregator

try:
    from nvflare.apis.fl_context import FLContext
    from nvflare.app_common.abstract.fl_model import FLModel
    from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
    from nvflare.app_common.app_constant import AppConstants
    from nvflare.app_common.app_event_type import AppEventType
    from nvflare.app_common.utils.fl_model_utils import FLModelUtils

    from fedrot.nvflare.round import Clipping, Gathered, Round, factors_of
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("nvflare"):
        raise
    raise ImportError("fedrot.nvflare needs NVFLARE: pip install 'fedrot[nvflare]'") from None

# The classes stay in this file: a job's configuration names them as fedrot.nvflare.NAME.


class _Aggregator(ModelAggregator):
    """What the aggregators have in common.

    Everything that is no LoRA factor (a trained head, biases) is averaged plainly, but under robust
    rules. A client counts by its ``FLMetaKey.NUM_STEPS_CURRENT_ROUND``, 1 where it gives none, as
    with NVFLARE's own aggregation.

    The reference is the model that NVFLARE sends out, seen in the event ``BEFORE_TRAIN_TASK``.
    Clients may return whole parameters or differences (``ParamsType.FULL``, ``DIFF``), torch
    tensors or NumPy arrays; the result is of the same type, in the dtypes of the global model.

    NVFLARE logs what :meth:`accept_model` raises and goes on without the client; so
    :meth:`aggregate_model` raises it again, which ends the job.
    """

    def __init__(self, method: Method, nonfinite: str) -> None:
        super().__init__()
        if nonfinite not in ("raise", "drop"):
            raise ValueError(f"nonfinite must be raise or drop, got {nonfinite!r}")
        self._method = method
        # NVFLARE writes the job from the attributes that are called as the arguments.
        self.nonfinite = nonfinite
        self._lock = threading.Lock()
        self._sent = FLModel(params={})
        self._round: Round | None = None
        self._failure: ValueError | TypeError | None = None

    @abstractmethod
    def _sums(self, reference: Factors, round: int) -> StreamingAggregator | Gathered:
        """What takes the factors of a round, from 0."""

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
            if round is None and getattr(self._method, "align", None) == "alternate":
                raise ValueError("align=alternate needs current_round in the global model")
            start = factors_of(self._sent.params)
            sums = self._sums(start, round or 0)
            self._round = Round(self._sent.params, model, start, sums, self.nonfinite == "drop")
            if left := self._round.left_out:
                self.warning(f"{len(left)} parameters stay with the server, as {left[0]!r}")
        if not self._round.accept(model, name):
            self.warning(f"client {name} has values that are not finite; it is left out")


class FedRotAggregator(_Aggregator):
    """Rotates every client's LoRA factors toward those it started the round from, and averages.

    A client is added when it arrives: memory does not grow with the number of clients. All else,
    weights, types and errors: docs/nvflare.md.

    Args:
        lam, align, proper: as in :class:`fedrot.methods.FedRot`, ``"alternate"`` included.
        nonfinite: a client with values that are not finite ends the job, ``"raise"``, or is left
            out of the round with a warning, ``"drop"``.

    Raises:
        ValueError: an option is out of its range, or looks at all clients at once.

    Source: arXiv 2602.23638.
    """

    _method: FedRot

    def __init__(
        self,
        lam: float = 0.4,
        align: str = "joint",
        proper: bool = True,
        nonfinite: str = "raise",
    ) -> None:
        super().__init__(FedRot.one_by_one(lam, align, proper), nonfinite)
        self.lam, self.align, self.proper = lam, align, proper

    def _sums(self, reference: Factors, round: int) -> StreamingAggregator:
        lam, align = self._method.schedule(round)
        return StreamingAggregator(
            reference, lam=float(lam), align=align, proper=self.proper, nonfinite=self.nonfinite
        )


class FedLoRAAggregator(_Aggregator):
    """Aggregates LoRA factors by a method that looks at all clients of a round at once::

        FedLoRAAggregator("robust", {"rule": "krum", "attackers": 2})
        FedLoRAAggregator("flexlora", {"energy": 0.99})

    They are held until the round is over, and taken in the order of their names: the same clients
    give the same bits. Only ``robust`` with ``rule="clip"`` and a ``bound`` needs none of them
    longer than it takes to add it. Where a method chooses a smaller rank, the last rows of ``A``
    and columns of ``B`` are zero. All else, weights, types and errors: docs/nvflare.md.

    Args:
        method, options: as ``method.name`` and ``method.*`` of ``fedrot train``.
        nonfinite: as of :class:`FedRotAggregator`.

    Raises:
        ValueError: the method is unknown, an option is unknown or out of its range, or the new
            global adapter is not all that clients need: FFA-LoRA, RoLoRA, FedSA-LoRA, FedEx-LoRA,
            FLoRA, ``fedrot`` with ``lag=2``.
    """

    def __init__(
        self, method: str, options: dict[str, Any] | None = None, nonfinite: str = "raise"
    ) -> None:
        built = build(pick(METHODS, method, "method"), options or {}, "options.")
        built.check_stateless()
        super().__init__(built, nonfinite)
        self.method, self.options = method, options or {}

    def _sums(self, reference: Factors, round: int) -> StreamingAggregator | Gathered:
        method = self._method
        if isinstance(method, Robust) and method.rule == "clip" and method.bound:
            return Clipping(reference, method, self.nonfinite)
        return Gathered(reference, method, round, self.nonfinite == "drop")
