"""GLUE on RoBERTa-large, in the settings of FedRot-LoRA (arXiv 2602.23638)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fedrot.hub import SOURCES, data_folder, model_folder
from fedrot.options import option
from fedrot.progress import Track, no_progress
from fedrot.tasks.base import TaskData
from fedrot.tasks.files import column, read_part
from fedrot.tasks.text import TextTask, assemble, classify_examples


@dataclass(frozen=True)
class Glue(TextTask):
    """Options of a GLUE task; the validation part is the test part, as GLUE hides its labels."""

    subset: ClassVar[str]
    texts: ClassVar[tuple[str, ...]]
    classes: ClassVar[int] = 2
    validation: ClassVar[str] = "validation"
    preset: ClassVar[dict[str, Any]] = {
        "rounds": 250,
        "clients": {"count": 10, "alpha": 0.5},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.05},
        "local": {"optimizer": "sgd", "lr": 0.02, "steps": 20, "batch_size": 128, "head": True},
    }

    model: str = option(SOURCES["sst2"].model)
    data: str = option(SOURCES["sst2"].data)

    def prepare(
        self, seed: int, track: Track = no_progress, clients_by: str | None = None
    ) -> TaskData:
        base = model_folder(self.model)
        folder = data_folder(self.data, files=SOURCES[self.subset].files)
        if (folder / self.subset).is_dir():
            folder = folder / self.subset
        files = [read_part(folder, part) for part in ("train", self.validation)]
        parts = []
        for columns in files:
            texts = [column(columns, [name], str(folder)) for name in self.texts]
            labels = torch.tensor(column(columns, ["label"], str(folder)), dtype=torch.long)
            parts.append(classify_examples(base, texts, labels, self.max_length))
        return assemble(self, base, parts, files[0], seed, classes=self.classes)


@dataclass(frozen=True)
class Sst2(Glue):
    title: ClassVar[str] = "sst2: sentiment of a film review's sentence"
    subset: ClassVar[str] = "sst2"
    texts: ClassVar[tuple[str, ...]] = ("sentence",)


@dataclass(frozen=True)
class Qnli(Glue):
    title: ClassVar[str] = "qnli: does the sentence answer the question"
    subset: ClassVar[str] = "qnli"
    texts: ClassVar[tuple[str, ...]] = ("question", "sentence")


@dataclass(frozen=True)
class Qqp(Glue):
    title: ClassVar[str] = "qqp: are two questions the same"
    subset: ClassVar[str] = "qqp"
    texts: ClassVar[tuple[str, ...]] = ("question1", "question2")


@dataclass(frozen=True)
class Rte(Glue):
    title: ClassVar[str] = "rte: does one sentence follow from the other"
    subset: ClassVar[str] = "rte"
    texts: ClassVar[tuple[str, ...]] = ("sentence1", "sentence2")


@dataclass(frozen=True)
class Mnli(Glue):
    title: ClassVar[str] = "mnli: entailment, neutral or contradiction (matched)"
    subset: ClassVar[str] = "mnli"
    texts: ClassVar[tuple[str, ...]] = ("premise", "hypothesis")
    classes: ClassVar[int] = 3
    validation: ClassVar[str] = "validation_matched"
