"""Tasks by name: data, model, loss and metric of a federation."""

from fedrot.tasks.base import Batch, Task, TaskData
from fedrot.tasks.digits import Digits
from fedrot.tasks.generation import CodeSearchNet, Gsm8k
from fedrot.tasks.glue import Mnli, Qnli, Qqp, Rte, Sst2
from fedrot.tasks.strings import Strings
from fedrot.tasks.text import Text

TASKS: dict[str, type[Task]] = {
    "digits": Digits,
    "strings": Strings,
    "sst2": Sst2,
    "qnli": Qnli,
    "qqp": Qqp,
    "rte": Rte,
    "mnli": Mnli,
    "gsm8k": Gsm8k,
    "codesearchnet": CodeSearchNet,
    "text": Text,
}

__all__ = ["TASKS", "Batch", "Digits", "Task", "TaskData"]
