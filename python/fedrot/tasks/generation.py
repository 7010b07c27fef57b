"""GSM8K and CodeSearchNet on Llama-3-8B, in the settings of FedRot-LoRA (arXiv 2602.23638)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from fedrot.hub import SOURCES, data_folder, model_folder
from fedrot.options import option
from fedrot.progress import Track, no_progress
from fedrot.tasks import base as shared
from fedrot.tasks.base import Batch, TaskData
from fedrot.tasks.encode import generate, prompts_of, tokenizer_of
from fedrot.tasks.execute import passes
from fedrot.tasks.files import Columns, column, read_part
from fedrot.tasks.text import TextTask, assemble, generate_examples

HUMANEVAL = "openai/openai_humaneval"
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")
# Where a completion of a function ends: the next statement at the left margin.
END_OF_FUNCTION = re.compile(r"\n(?=[^\s])")
LLAMA_PRESET: dict[str, Any] = {
    "rounds": 100,
    "clients": {"count": 6},
    "lora": {"r": 8, "alpha": 16, "dropout": 0.05},
    "local": {"optimizer": "sgd", "lr": 0.005, "steps": 30, "batch_size": 1},
}


def with_clients(**options: Any) -> dict[str, Any]:
    return {**LLAMA_PRESET, "clients": {**LLAMA_PRESET["clients"], **options}}


@dataclass(frozen=True)
class Gsm8k(TextTask):
    """Grade-school mathematics. ``accuracy``: the last number of what the model writes, up to
    ``max_new_tokens``, is that of the reference."""

    title: ClassVar[str] = "gsm8k: grade-school mathematics"
    preset: ClassVar[dict[str, Any]] = with_clients(partition="iid")

    model: str = option(SOURCES["gsm8k"].model)
    data: str = option(SOURCES["gsm8k"].data)
    max_length: int = option(650, at_least=8)
    max_new_tokens: int = option(256, at_least=1)
    dtype: str = option("bfloat16", choices=("float32", "bfloat16", "float16"))
    eval_batch: int = option(16, at_least=1)

    def prepare(
        self, seed: int, track: Track = no_progress, clients_by: str | None = None
    ) -> TaskData:
        base = model_folder(self.model)
        folder = data_folder(self.data, files=SOURCES["gsm8k"].files)
        folder = folder / "main" if (folder / "main").is_dir() else folder
        parts = {name: read_part(folder, name) for name in ("train", "test")}
        encoded = [
            generate_examples(
                base,
                [f"Question: {text}\nAnswer:" for text in column(columns, ["question"], name)],
                [f" {text}" for text in column(columns, ["answer"], name)],
                self.max_length,
            )
            for name, columns in parts.items()
        ]
        return assemble(self, base, encoded, parts["train"], seed)

    @property
    def written_tokens(self) -> int:
        return self.max_new_tokens

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        loss = shared.evaluate(model, batch, self.eval_batch)["loss"]
        tokenizer = tokenizer_of(_folder(model))
        written = generate(
            model, tokenizer, prompts_of(batch), self.max_new_tokens, self.eval_batch
        )
        answers = [labels[labels != shared.IGNORE].tolist() for labels in batch["labels"]]
        wanted = tokenizer.batch_decode(answers, skip_special_tokens=True)
        hits = [
            (number := final_number(text)) is not None and number == final_number(answer)
            for text, answer in zip(written, wanted, strict=True)
        ]
        return {"accuracy": sum(hits) / len(hits), "loss": loss}


def final_number(text: str) -> float | None:
    """The number after ``####``, GSM8K's mark, else the last one there is."""
    before, mark, after = text.partition("####")
    found = NUMBER.findall(after)[:1] if mark else []
    found = found or NUMBER.findall(before)[-1:]
    return float(found[0].replace(",", "").rstrip(".")) if found else None


@dataclass(frozen=True)
class CodeSearchNet(TextTask):
    """Functions from their documentation, tested on HumanEval.

    ``execute``: the model's programs are run to see whether they pass HumanEval's tests
    (pass@1), each in a process of its own for up to ``timeout`` seconds. That is no sandbox: a
    program can do whatever the user can. Without it the test part is CodeSearchNet's own, and
    ``accuracy`` the exact match of the whole function, which is rare.
    """

    title: ClassVar[str] = "codesearchnet: functions from their documentation, then HumanEval"
    preset: ClassVar[dict[str, Any]] = with_clients(partition="column", column="language")

    model: str = option(SOURCES["codesearchnet"].model)
    data: str = option(SOURCES["codesearchnet"].data)
    humaneval: str = option(HUMANEVAL)
    execute: bool = option(False)
    timeout: float = option(10.0, above=0)
    max_length: int = option(650, at_least=8)
    max_new_tokens: int = option(384, at_least=1)
    max_train: int | None = option(60_000, at_least=1)
    max_test: int | None = option(500, at_least=1)
    dtype: str = option("bfloat16", choices=("float32", "bfloat16", "float16"))
    eval_batch: int = option(16, at_least=1)

    def prepare(
        self, seed: int, track: Track = no_progress, clients_by: str | None = None
    ) -> TaskData:
        base = model_folder(self.model)
        folder = data_folder(self.data)
        folder = folder / "all" if (folder / "all").is_dir() else folder
        columns = read_part(folder, "train")
        train = generate_examples(base, *described(columns), self.max_length)
        if not self.execute:
            own = described(read_part(folder, "test"))
            test, note = generate_examples(base, *own, self.max_length), "exact match"
        else:
            problems = _problems(_humaneval(self.humaneval))
            solved = problems["prompt"], problems["canonical_solution"]
            test, note = generate_examples(base, *solved, self.max_length), "HumanEval pass@1"
            test.batch["problem"] = test.kept
        facts = {"accuracy_is": note}
        return assemble(self, base, (train, test), columns, seed, split_by="language", facts=facts)

    @property
    def written_tokens(self) -> int:
        return self.max_new_tokens if self.execute else 0

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        known = {key: value for key, value in batch.items() if key != "problem"}
        scores = shared.evaluate(model, known, self.eval_batch)
        if "problem" not in batch:
            return scores
        tokenizer, problems = tokenizer_of(_folder(model)), _problems(_humaneval(self.humaneval))
        written = generate(
            model, tokenizer, prompts_of(batch), self.max_new_tokens, self.eval_batch
        )
        programs = [
            program({name: values[i] for name, values in problems.items()}, text)
            for i, text in zip(batch["problem"].tolist(), written, strict=True)
        ]
        hits = sum(passes(text, self.timeout) for text in programs)
        return {**scores, "accuracy": hits / len(programs)}


def described(columns: Columns) -> tuple[list[str], list[str]]:
    """Prompts and functions; the columns are named as on the hub or in the original files."""
    where = "CodeSearchNet"
    documentation = column(columns, ["func_documentation_string", "docstring"], where)
    code = column(columns, ["func_code_string", "code"], where)
    language = column(columns, ["language"], where)
    prompts = [
        f"A function in {kind} that does the following.\n{text}\n\n"
        for kind, text in zip(language, documentation, strict=True)
    ]
    return prompts, list(code)


def program(problem: dict[str, Any], completion: str) -> str:
    """What decides whether a completion solves a problem of HumanEval: it ends without error."""
    body = END_OF_FUNCTION.split(completion)[0]
    return f"{problem['prompt']}{body}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"


def _humaneval(name: str) -> Path:
    return data_folder(name, "task.humaneval")


@lru_cache(maxsize=1)
def _problems(folder: Path) -> Columns:
    columns = read_part(folder, "test")
    names: Sequence[str] = ("prompt", "canonical_solution", "test", "entry_point")
    return {name: column(columns, [name], "HumanEval") for name in names}


def _folder(model: Any) -> Path:
    """Where the base model came from; its tokenizer is there too."""
    return Path(model.config._name_or_path)
