"""The folder of one run, ``runs/<name>/``.

config.yaml             the resolved configuration
metrics.jsonl           a line a round
metrics.csv             the same, single numbers only
tensorboard/, wandb/    the same for those who asked for it (``--log``)
checkpoint.safetensors  while the run is unfinished
clients/client-00/ ...  PEFT adapters: the uploads (one-shot), or clients' own with personal parts
adapter/                the global adapter as PEFT folder
merged.safetensors      what was folded into the frozen weights (FedEx-LoRA, FLoRA): add it to them
*.png, report.html
summary.json            last: it marks the run as finished
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedrot.config import Config, without_idle
from fedrot.errors import FedrotError, Refused
from fedrot.files import is_left, left_behind, new_file, remove, write_json, write_text
from fedrot.options import Tree, build, first_difference, read_yaml

Row = dict[str, Any]

# What a run writes beside config.yaml, in the order in which a new run removes it.
OWN = (
    "summary.json",  # without it the run is unfinished
    "checkpoint.safetensors",  # before the metrics, without which it must not be continued
    "metrics.jsonl",
    "metrics.csv",
    "merged.safetensors",
    "report.html",
)
OWN_FOLDERS = ("adapter", "clients", "tensorboard", "wandb")


@dataclass(frozen=True)
class RunDir:
    """Names and small files of a run folder."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def merged(self) -> Path:
        return self.path / "merged.safetensors"

    def client(self, index: int) -> Path:
        return self.path / "clients" / f"client-{index:02d}"

    def clients(self) -> list[Path]:
        """In order: client-100 comes behind client-11."""
        folders = (self.path / "clients").glob("client-*")
        return sorted(folders, key=lambda folder: int(folder.name.partition("-")[2]))

    @property
    def started(self) -> bool:
        return (self.path / "config.yaml").is_file()

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").is_file()

    def summary(self) -> dict[str, Any]:
        return json.loads((self.path / "summary.json").read_text(encoding="utf-8"))

    def start(self, config: Tree) -> None:
        """A new run: what an earlier one wrote goes, and nothing else."""
        self.path.mkdir(parents=True, exist_ok=True)
        remove([self.path / name for name in (*OWN, *OWN_FOLDERS)])
        remove(self.path.glob("*.png"))
        write_text(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary and drop the checkpoint: nothing is left to continue."""
        write_json(self.path / "summary.json", summary)
        self.checkpoint.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove what processes that were killed had not finished writing."""
        remove(left_behind(self.path))

    def rows(self) -> list[Row]:
        file = self.path / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        return [json.loads(line) for line in lines]

    def write_rows(self, rows: list[Row]) -> None:
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        write_text(self.path / "metrics.jsonl", text)
        with new_file(self.path / "metrics.csv") as fresh, fresh.open("w", newline="") as file:
            numbers = [scalars(row) for row in rows]
            columns = dict.fromkeys(key for row in numbers for key in row)
            writer = csv.DictWriter(file, list(columns), lineterminator="\n")
            writer.writeheader()
            writer.writerows(numbers)


def scalars(row: Row) -> dict[str, int | float]:
    """The single numbers of a round, which every kind of log can hold."""
    return {key: value for key, value in row.items() if isinstance(value, int | float)}


def open_run(path: Path, config: Tree, *, resume: bool = False, force: bool = False) -> RunDir:
    """The folder of a new run, or of one to continue (``resume``) or to replace (``force``).

    Nothing is written: :meth:`RunDir.start` is for when the run can begin.

    Raises:
        FedrotError: the folder holds something else, a run that neither flag allows to touch, or
            a run to continue with another configuration (the first differing key is named).
    """
    run = RunDir(path)
    if path.exists() and not path.is_dir():
        raise FedrotError(f"{path} is not a folder")
    if not path.is_dir() or all(map(is_left, path.iterdir())) or (force and run.started):
        return run
    if not run.started:
        raise Refused(f"{path} is not empty and not a run", "choose another --name or --output")
    if resume:
        _same_config(path, config)
    elif run.finished:
        raise Refused(f"{path} holds a finished run", "--force replaces it")
    else:
        raise Refused(
            f"{path} holds an unfinished run", "--resume continues it, --force replaces it"
        )
    return run


def _same_config(path: Path, config: Tree) -> None:
    file = path / "config.yaml"
    try:
        given = read_yaml(file)
        if not given:
            raise FedrotError("it is empty")
        # Options newer than the run have their defaults.
        stored = build(Config, without_idle(given)).tree()
    except FedrotError as error:
        raise Refused(f"{file} is corrupt ({error})", "--force starts the run again") from error
    if difference := first_difference(stored, config):
        key, before, now = difference
        raise Refused(
            f"{path} was started with {key}={before}, now it is {now}",
            "give the same configuration to --resume, or --force to start again",
        )
