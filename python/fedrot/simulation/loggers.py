"""Where the metrics of a run go besides its folder's metrics.jsonl and metrics.csv.

A log is written anew from those metrics whenever a run starts or goes on, so an interruption leaves
neither gaps nor duplicates.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import yaml

from fedrot.errors import FedrotError
from fedrot.files import write_text
from fedrot.options import Tree, pick
from fedrot.simulation.run_dir import Row, RunDir, scalars


class Logger(ABC):
    """An open log of one run."""

    package: ClassVar[str]  # what has to be installed

    @abstractmethod
    def __init__(self, run: RunDir, config: Tree) -> None: ...

    @abstractmethod
    def log(self, row: Row) -> None:
        """Add one round. A round that the log already has is left as it is."""

    @abstractmethod
    def close(self, failed: bool) -> None: ...


class TensorBoard(Logger):
    """Event files in ``tensorboard/``: ``tensorboard --logdir runs``."""

    package = "tensorboard"

    def __init__(self, run: RunDir, config: Tree) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.path / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        self.writer = SummaryWriter(str(folder))
        text = yaml.safe_dump(config, sort_keys=False)
        self.writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()))

    def log(self, row: Row) -> None:
        for key, value in scalars(row).items():
            self.writer.add_scalar(key, value, row["round"])
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()


class WeightsAndBiases(Logger):
    """A run in ``wandb/``, offline unless ``WANDB_MODE`` says otherwise; ``wandb sync`` uploads it.

    Its id stays the same when the run is continued. Online, W&B has the rounds before that.
    """

    package = "wandb"

    def __init__(self, run: RunDir, config: Tree) -> None:
        import wandb

        folder = run.path / "wandb"
        for old in folder.glob("offline-run-*"):
            shutil.rmtree(old, ignore_errors=True)
        name = folder / "id.txt"
        if not name.is_file():
            folder.mkdir(exist_ok=True)
            write_text(name, secrets.token_hex(4))
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self.run: Any = wandb.init(
            dir=str(run.path),  # wandb 0.19 takes no Path
            id=name.read_text(encoding="utf-8"),
            resume="allow",
            name=run.path.as_posix(),
            project=os.environ.get("WANDB_PROJECT", "fedrot"),
            mode=mode,
            config=config,
            # Neither its banner nor a copy of ours: what the terminal shows is the command's.
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, row: Row) -> None:
        if row["round"] >= self.run.step:
            self.run.log(scalars(row), step=row["round"])

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def check(names: Sequence[str]) -> None:
    """Raise `FedrotError` where a logger is unknown or its package is not installed."""
    for name in names:
        spec = importlib.util.find_spec(pick(LOGGERS, name, "logger").package)
        # A folder of that name in the working directory is found too, as a package without origin.
        if spec is None or spec.origin is None:
            raise FedrotError(
                f"--log {name} needs a package that is not installed: pip install 'fedrot[{name}]'"
            )


@contextmanager
def opened(
    names: Sequence[str], run: RunDir, config: Tree, rows: Sequence[Row]
) -> Iterator[Callable[[Row], None]]:
    """A function that adds a round to every log; they start with ``rows``."""
    with ExitStack() as stack:
        loggers = [stack.enter_context(_opened(LOGGERS[n](run, config))) for n in names]

        def log(row: Row) -> None:
            for logger in loggers:
                logger.log(row)

        for row in rows:
            log(row)
        yield log


@contextmanager
def _opened(logger: Logger) -> Iterator[Logger]:
    try:
        yield logger
    except BaseException:
        logger.close(failed=True)
        raise
    logger.close(failed=False)
