"""Handwritten digits: a small ViT that knows 0-4 learns 5-9.

Real data (the UCI digits that scikit-learn bundles, 8 x 8 pixels), so it needs no download. The
ViT is pre-trained centrally on the digits 0-4 and kept in the cache folder; the federation
adapts it by LoRA to 5-9 under a new random head, shared by all clients and frozen.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedrot.errors import FedrotError
from fedrot.options import option
from fedrot.progress import Track, no_progress
from fedrot.tasks import base as shared
from fedrot.tasks.attention import short_attention
from fedrot.tasks.base import Batch, TaskData, query_and_value
from fedrot.tasks.cache import cached, facts, made_by, quiet

ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 8,
    "patch_size": [2, 4],
    "num_channels": 1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 5,
    "problem_type": "single_label_classification",
}
FORMAT = 2  # of the cache; a change of the code that makes the base model changes it


@dataclass(frozen=True)
class Digits:
    """Options of the task. ``pretrain_*``: central training on 0-4 (AdamW, one-cycle rate), by
    default with the run's seed, so that results over seeds are not those of one base model."""

    title: ClassVar[str] = "digits: a ViT pre-trained on 0-4 learns 5-9"
    preset: ClassVar[dict[str, Any]] = {}

    pretrain_steps: int = option(500, at_least=1)
    pretrain_batch: int = option(64, at_least=1)
    pretrain_lr: float = option(3e-3, above=0)
    pretrain_seed: int | None = option(None, at_least=0, below=2**32)
    test_fraction: float = option(0.2, above=0, below=1)

    def prepare(
        self, seed: int, track: Track = no_progress, clients_by: str | None = None
    ) -> TaskData:
        if self.pretrain_seed is None:
            return replace(self, pretrain_seed=seed).prepare(seed, track, clients_by)
        base = self._base(seed, track)
        train, test = _split(range(5, 10), self.test_fraction, seed)
        return TaskData(base, train, test, train["labels"], facts(base))

    def load_model(self, data: TaskData) -> nn.Module:
        return _load(data.base)

    def lora_targets(self, model: nn.Module) -> list[str]:
        return query_and_value(model)

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        return shared.evaluate(model, batch, size=1024)

    def _base(self, seed: int, track: Track) -> Path:
        """The cached folder with the pre-trained model under the random head of ``seed``."""
        pretrained = cached(
            "digits", {**self._key(), "part": "pretrained"}, lambda: self._pretrain(track)
        )

        def with_head() -> tuple[nn.Module, dict[str, Any]]:
            model = _load(pretrained)
            _new_head(model, seed)
            return model, facts(pretrained)

        return cached("digits", {**self._key(), "part": "base", "head_seed": seed}, with_head)

    def _key(self) -> dict[str, Any]:
        """What the pre-trained model depends on."""
        return {"format": FORMAT, "architecture": ARCHITECTURE, **made_by(), **asdict(self)}

    def _pretrain(self, track: Track) -> tuple[nn.Module, dict[str, Any]]:
        from transformers import ViTConfig, ViTForImageClassification

        assert self.pretrain_seed is not None  # prepare() has set it
        train, test = _split(range(5), self.test_fraction, self.pretrain_seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.pretrain_seed)
            model = ViTForImageClassification(
                ViTConfig(**{**ARCHITECTURE, "attn_implementation": short_attention()})
            )
            optimizer = torch.optim.AdamW(model.parameters(), lr=self.pretrain_lr)
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, self.pretrain_lr, total_steps=self.pretrain_steps
            )
            model.train()
            for _ in track(range(self.pretrain_steps), "pre-training (once a seed, cached)"):
                rows = torch.randint(len(train["labels"]), (self.pretrain_batch,))
                optimizer.zero_grad()
                model(**{key: value[rows] for key, value in train.items()}).loss.backward()
                optimizer.step()
                schedule.step()
        accuracy = self.evaluate(model.eval(), test)["accuracy"]
        return model, {"pretrained_accuracy": accuracy, "pretrained_on": "digits 0-4"}


def _load(folder: Path) -> nn.Module:
    from transformers import ViTForImageClassification

    with quiet():
        model = ViTForImageClassification.from_pretrained(
            folder, attn_implementation=short_attention()
        )
    return model.eval().requires_grad_(False)


def _split(digits: range, test_fraction: float, seed: int) -> tuple[Batch, Batch]:
    """Stratified train and test part of some digits, as arguments of the model."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    wanted = (data.target >= digits.start) & (data.target < digits.stop)
    images = torch.from_numpy(data.images[wanted]).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(data.target[wanted]).long() - digits.start
    try:
        train, test = train_test_split(
            torch.arange(len(labels)).numpy(),
            test_size=test_fraction,
            stratify=labels.numpy(),
            random_state=seed,
        )
    except ValueError as error:  # a part that cannot hold every digit
        raise FedrotError(f"task.test_fraction={test_fraction} does not do: {error}") from error
    rows: list[Tensor] = [torch.from_numpy(part) for part in (train, test)]
    first, second = ({"pixel_values": images[r], "labels": labels[r]} for r in rows)
    return first, second


def _new_head(model: nn.Module, seed: int) -> None:
    """A head for classes that the model has not seen, drawn as ``nn.Linear`` draws its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.classifier.reset_parameters()  # type: ignore[operator,union-attr]
