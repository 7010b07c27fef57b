"""Text on a transformers model: what hub tasks share, and `text`, a user's own files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedrot.errors import FedrotError, first_line
from fedrot.hub import data_folder, model_folder
from fedrot.options import option
from fedrot.progress import Track, no_progress
from fedrot.tasks import base as shared
from fedrot.tasks.base import Batch, TaskData, query_and_value
from fedrot.tasks.cache import quiet
from fedrot.tasks.encode import classification, codes, generation, prompts_of, tokenizer_of
from fedrot.tasks.files import Columns, column, joined, part_files, read_file
from fedrot.tasks.partition import hold_out

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TextTask:
    """Options of every text task.

    ``model``, ``data``: a folder, or a repository of the Hugging Face hub. ``max_train``,
    ``max_test``: that many examples, drawn by the run's seed. ``dtype``: of the frozen model.
    """

    preset: ClassVar[dict[str, Any]] = {}

    model: str = option("")
    data: str = option("")
    max_length: int = option(128, at_least=4)
    max_train: int | None = option(None, at_least=1)
    max_test: int | None = option(None, at_least=1)
    dtype: str = option("float32", choices=DTYPES)
    eval_batch: int = option(64, at_least=1)

    def load_model(self, data: TaskData) -> nn.Module:
        """As :func:`load_model`.

        Raises:
            FedrotError: the folder does not load, an example, or a prompt and what is written
                after it, has more tokens than it takes, or what it writes is not causal.
        """
        model = load_model(data, self.dtype)
        takes = f"which is what {data.base} takes (max_position_embeddings)"
        limit = position_limit(model)
        masks = [part["attention_mask"] for part in (data.train, data.test)]
        longest = max(int(mask.sum(1).max()) for mask in masks)
        if limit is not None and longest > limit:
            raise FedrotError(
                f"task.max_length={self.max_length}: must be at most {limit}, {takes}; an example "
                f"has {longest} tokens"
            )
        if data.classes:
            return model
        if limit is not None and (written := self.written_tokens):
            prompt = max(len(tokens) for tokens in prompts_of(data.test))
            if prompt + written > limit:
                raise FedrotError(
                    f"task.max_new_tokens={written}: the longest prompt has {prompt} tokens, with "
                    f"which that is more than {limit}, {takes}"
                )
        if not is_causal(model, data.train["input_ids"][0, :2]):
            raise FedrotError(
                f"task.model={self.model}: a token of {type(model).__name__} sees those after it, "
                "the answer among them; writing answers takes a causal model, as Llama or GPT-2"
            )
        return model

    @property
    def written_tokens(self) -> int:
        """How many tokens evaluation lets the model write after a prompt."""
        return 0

    def lora_targets(self, model: nn.Module) -> list[str]:
        return query_and_value(model)

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        return shared.evaluate(model, batch, self.eval_batch)


@dataclass(frozen=True)
class Examples:
    """Encoded examples: ``kept`` of the ``n`` rows of the file, in their order."""

    batch: Batch
    kept: Tensor
    left_out: int = 0

    def first(self, count: int | None, seed: int) -> Examples:
        """``count`` of them, drawn at random."""
        n = len(self.kept)
        if count is None or count >= n:
            return self
        chosen = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count]
        rows = chosen.sort().values
        batch = {key: value[rows] for key, value in self.batch.items()}
        return replace(self, batch=batch, kept=self.kept[rows])


def load_model(data: TaskData, dtype: str = "float32") -> nn.Module:
    """A classifier for ``data.classes`` classes, or a language model where these are 0."""
    import transformers

    kind = "AutoModelForSequenceClassification" if data.classes else "AutoModelForCausalLM"
    head = {"num_labels": data.classes, "ignore_mismatched_sizes": True} if data.classes else {}
    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    precision = "dtype" if release >= (4, 56) else "torch_dtype"
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(data.seed)  # of a head that the folder lacks
        try:
            model = getattr(transformers, kind).from_pretrained(
                data.base, **{precision: getattr(torch, dtype)}, **head
            )
        except (OSError, ValueError) as error:
            reason = first_line(error)
            raise FedrotError(f"{data.base} does not load as a model ({reason})") from error
    # Right after what is read, whatever the model was saved with.
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer_of(data.base).eos_token_id
    return model.eval().requires_grad_(False)


def position_limit(model: Any) -> int | None:
    """How many tokens a model with a table of positions takes; others, as Llama, know no end."""
    most = getattr(model.config, "max_position_embeddings", None)
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if (
            isinstance(module, nn.Embedding)
            and ("pos" in name or name == "wpe")  # the latter in GPT-2
            and most is not None
            and module.num_embeddings >= most
        ):
            # RoBERTa counts positions from the one after the padding's.
            return most if module.padding_idx is None else most - module.padding_idx - 1
    return None


@torch.no_grad()
def is_causal(model: Any, ids: Tensor) -> bool:
    """Whether the logits of all tokens ``(n,)`` but the last are the same with another last one."""
    other = ids.clone()
    other[-1] = (
        ids[0] if ids[-1] != ids[0] else (ids[-1] + 1) % model.get_input_embeddings().num_embeddings
    )
    one, another = model(input_ids=torch.stack([ids, other])).logits[:, :-1]
    return bool(torch.allclose(one, another, rtol=1e-3, atol=1e-3, equal_nan=True))


def classify_examples(
    base: Path, texts: Sequence[Sequence[Any]], labels: Tensor, longest: int
) -> Examples:
    """``texts``: one or two columns; ``labels`` ``(n,)`` from 0."""
    strings = [[str(value) for value in values] for values in texts]
    batch = classification(tokenizer_of(base), strings, longest)
    return Examples({**batch, "labels": labels}, torch.arange(len(labels)))


def generate_examples(
    base: Path, prompts: Sequence[str], answers: Sequence[str], longest: int
) -> Examples:
    batch, kept = generation(tokenizer_of(base), prompts, answers, longest)
    return Examples(batch, kept, len(prompts) - len(kept))


@dataclass(frozen=True)
class Text(TextTask):
    """A user's own examples and model.

    ``data``: a JSONL, CSV or Parquet file, or a folder with ``train`` and perhaps ``test`` files
    (see :func:`part_files`); ``test``: the file of the test part, else ``test_fraction`` of the
    examples.
    Classification where the file has the columns ``text`` and ``label``, generation where it has
    ``prompt`` and ``answer``; the options of these names give them other names. Every further
    column may be the ``clients.column`` of the partition.
    """

    title: ClassVar[str] = "text: own examples"

    test: str | None = option(None)
    test_fraction: float = option(0.2, above=0, below=1)
    kind: str = option("auto", choices=("auto", "classification", "generation"))
    text: str = option("text")
    label: str = option("label")
    prompt: str = option("prompt")
    answer: str = option("answer")

    def prepare(
        self, seed: int, track: Track = no_progress, clients_by: str | None = None
    ) -> TaskData:
        for key in ("model", "data"):
            if not getattr(self, key):
                raise FedrotError(f"task.{key} must be given: --task text task.{key}=PATH")
        kind, train, test = self._read(seed, clients_by)
        base = model_folder(self.model)
        if kind == "classification":
            return self._classification(base, train, test, seed)
        return self._generation(base, train, test, seed)

    def _read(self, seed: int, clients_by: str | None) -> tuple[str, Columns, Columns]:
        """Whether it is a classification or a generation, the training and the test part."""
        data = Path(self.data).expanduser()
        tests = [Path(self.test).expanduser()] if self.test else []
        if data.is_file():
            trains = [data]
        else:
            folder = data_folder(self.data)
            trains = part_files(folder, "train")
            tests = tests or part_files(folder, "test", needed=False)
        read = {file: read_file(file) for file in (*trains, *tests)}
        train = joined([read[file] for file in trains])
        kind = self._kind(train)
        # Whether what is needed may be blank: a CSV file is, where a label is missing.
        needed = {self.prompt: True, self.answer: True}
        if kind == "classification":
            needed = {self.text: True, self.label: False}
        for file, columns in read.items():
            for name, blank in needed.items():
                column(columns, [name], str(file), blank=blank)
        if tests:
            return kind, train, joined([read[file] for file in tests])
        n = len(next(iter(train.values())))
        cut = max(1, round(self.test_fraction * n))
        if cut >= n:
            raise FedrotError(
                f"task.test_fraction={self.test_fraction} of the {n} examples of {self.data} "
                "leaves none to train on"
            )
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        labels = [codes(train[self.label])[0]] if kind == "classification" else []
        # What cannot be a client's column is refused later, where clients are made.
        values = train.get(clients_by or "", [])
        clients = [codes(values)[0]] if values and _are_simple(values) else []
        option = f"task.test_fraction={self.test_fraction}"
        held, kept = (rows.tolist() for rows in hold_out(order, cut, [*labels, *clients], option))
        return (
            kind,
            {name: [values[i] for i in kept] for name, values in train.items()},
            {name: [values[i] for i in held] for name, values in train.items()},
        )

    def _kind(self, columns: Columns) -> str:
        if self.kind != "auto":
            return self.kind
        if self.text in columns and self.label in columns:
            return "classification"
        if self.prompt in columns and self.answer in columns:
            return "generation"
        raise FedrotError(
            f"task.data={self.data} must have the columns {self.text} and {self.label}, or "
            f"{self.prompt} and {self.answer}; it has {', '.join(columns) or 'none'}"
        )

    def _classification(self, base: Path, train: Columns, test: Columns, seed: int) -> TaskData:
        labels, names = codes(train[self.label])
        if len(names) < 2:
            raise FedrotError(
                f"every training example of task.data={self.data} has the {self.label} "
                f"{names[0]!r}: a classification needs two"
            )
        index = {name: i for i, name in enumerate(names)}
        wanted = test[self.label]
        if unknown := [value for value in wanted if value not in index]:
            raise FedrotError(
                f"the test part has the {self.label} {unknown[0]!r}, the training part not"
            )
        parts = [
            classify_examples(base, [columns[self.text]], targets, self.max_length)
            for columns, targets in (
                (train, labels),
                (test, torch.tensor([index[value] for value in wanted])),
            )
        ]
        return assemble(self, base, parts, train, seed, classes=len(names), facts={"labels": names})

    def _generation(self, base: Path, train: Columns, test: Columns, seed: int) -> TaskData:
        parts = [
            generate_examples(
                base,
                [str(value) for value in columns[self.prompt]],
                [str(value) for value in columns[self.answer]],
                self.max_length,
            )
            for columns in (train, test)
        ]
        return assemble(self, base, parts, train, seed)


def _are_simple(values: Sequence[Any]) -> bool:
    """Whether examples can be told apart by them."""
    return all(isinstance(value, str | int | bool | None) for value in values)


def assemble(
    task: TextTask,
    base: Path,
    parts: Sequence[Examples],
    columns: Columns,
    seed: int,
    *,
    classes: int = 0,
    split_by: str | None = None,
    facts: dict[str, Any] | None = None,
) -> TaskData:
    """The task's data from its encoded ``parts``, training and test.

    ``columns`` are those of the training file; short ones of them can be partitioned by. A
    classification is split by its labels, a generation by the column ``split_by`` or evenly.
    """
    train, test = parts
    known = dict(facts or {})
    if left_out := train.left_out + test.left_out:
        known["too_long"] = left_out
    train, test = train.first(task.max_train, seed), test.first(task.max_test, seed)
    rows = train.kept.tolist()
    groups = {}
    for name, values in columns.items():
        if _are_simple(of_rows := [values[i] for i in rows]):
            found, distinct = codes(of_rows)
            if len(distinct) < len(rows):
                groups[name] = found
    labels = train.batch["labels"]
    if not classes:
        labels = groups[split_by] if split_by in groups else torch.zeros(len(rows)).long()
    return TaskData(base, train.batch, test.batch, labels, known, groups, classes, seed)
