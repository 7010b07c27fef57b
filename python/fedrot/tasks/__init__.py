"""Tasks by name: data, model, loss and metric of a federation."""

from fedrot.tasks.base import Batch, Task, TaskData
from fedrot.tasks.digits import Digits

TASKS: dict[str, type[Task]] = {"digits": Digits}

__all__ = ["TASKS", "Batch", "Digits", "Task", "TaskData"]
