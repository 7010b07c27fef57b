"""A Grid whose nodes are functions in this process: no ports, no Ray."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # what a SuperLink tells

Arrays = Mapping[str, Any]


def record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({key: Array(np.asarray(value)) for key, value in arrays.items()})


def values(arrays: ArrayRecord) -> dict[str, np.ndarray]:
    return {key: array.numpy() for key, array in arrays.items()}


class InProcess(Grid):
    """Nodes by their numbers. Messages are copied, as on their way through a real grid."""

    def __init__(self, apps: Mapping[int, Callable[[Message, Context], Message]]) -> None:
        self.apps = apps
        self.contexts = {n: Context(1, n, {}, RecordDict(), {}) for n in apps}
        self.sent: list[Message] = []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        return [self._answer(copy.deepcopy(message)) for message in messages]

    def _answer(self, message: Message) -> Message:
        self.sent.append(copy.deepcopy(message))
        node = message.metadata.dst_node_id
        try:
            return self.apps[node](message, self.contexts[node])
        except Exception as error:  # as a SuperNode reports it
            return Message(Error(code=0, reason=str(error)), reply_to=message)

    def get_node_ids(self) -> list[int]:
        return list(self.apps)

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        raise NotImplementedError


def node(
    train: Callable[[dict[str, np.ndarray]], Arrays], examples: int = 1, mods: Any = ()
) -> ClientApp:
    """A client that makes its arrays of the global ones."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def _(message: Message, context: Context) -> Message:
        arrays = train(values(message.content["arrays"]))
        metrics = MetricRecord({"num-examples": examples, "loss": float(examples)})
        content = RecordDict({"arrays": record(arrays), "metrics": metrics})
        return Message(content, reply_to=message)

    @app.evaluate()
    def _(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": examples, "accuracy": 0.5})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def one_round(
    strategy: Any, grid: Grid, arrays: ArrayRecord, round: int = 1
) -> tuple[dict[str, np.ndarray] | None, Any]:
    """What `Strategy.start` does for training in one round."""
    messages = strategy.configure_train(round, arrays, ConfigRecord(), grid)
    new, metrics = strategy.aggregate_train(round, grid.send_and_receive(messages))
    return (None if new is None else values(new)), metrics
