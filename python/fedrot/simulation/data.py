"""What a run makes of its task's data: a validation part, and the examples of every client."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedrot.config import Config
from fedrot.simulation.attacks import poisoned
from fedrot.simulation.seeding import generator
from fedrot.tasks import TaskData
from fedrot.tasks.partition import hold_out, split, split_test


def divide(data: TaskData, config: Config) -> tuple[TaskData, list[Tensor], list[Tensor]]:
    """The data to train and test on; per client its rows of ``train``, and with
    ``clients.local_test`` those of ``test``, both ``(n,)`` integers.

    Raises:
        FedrotError: data and options do not go together, as more clients than examples.
    """
    if config.validation:
        data = _with_validation(data, config)
    examples = split(data, config.clients, config.seed)
    local_tests = split_test(data, examples) if config.clients.local_test else []
    return *poisoned(data, examples, config.clients), local_tests


def _with_validation(data: TaskData, config: Config) -> TaskData:
    """The same task with a part of its training examples in the place of the test part."""
    order = torch.randperm(len(data.labels), generator=generator(config.seed, "validation"))
    column = config.clients.by_column  # of whose values each keeps an example
    groups = [values for name, values in data.columns.items() if name == column]
    count = max(1, round(config.validation * len(order)))
    held, kept = hold_out(order, count, groups, f"validation={config.validation}")
    return replace(
        data,
        train={key: value[kept] for key, value in data.train.items()},
        test={key: value[held] for key, value in data.train.items()},
        labels=data.labels[kept],
        columns={name: values[kept] for name, values in data.columns.items()},
    )
