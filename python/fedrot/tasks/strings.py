"""Strings of digits: a small Llama that follows instructions learns new names for them.

The data are made here, so the task needs no download. A prompt names an order and an arithmetic,
then gives four digits: `mirror plus3 2 0 7 1 =` is answered by `4 0 3 5` and the end of text. The
Llama is pre-trained centrally on every pair of order and arithmetic and kept in the cache folder.
The federation teaches it other names of the arithmetics, which it has met with random meanings:
names, with nothing to be known about them. Clients differ in which of the names they use.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedrot.options import option
from fedrot.progress import Track, no_progress
from fedrot.tasks import base as shared
from fedrot.tasks.attention import short_attention
from fedrot.tasks.base import IGNORE, Batch, TaskData
from fedrot.tasks.cache import cached, facts, made_by, quiet

DIGITS = 4  # in a string
# Which digit comes where, and the digit a x + b modulo 10 that is written for x.
ORDERS = {"copy": (0, 1, 2, 3), "left": (1, 2, 3, 0), "right": (3, 0, 1, 2), "mirror": (3, 2, 1, 0)}
ARITHMETIC = {"same": (1, 0), "plus1": (1, 1), "plus3": (1, 3), "minus3": (1, 7), "nines": (9, 9)}
NEW_NAMES = ("ba", "de", "gi", "ko", "lu")
VOCABULARY = (*"0123456789", *ORDERS, *ARITHMETIC, *NEW_NAMES, "=", "</s>")
TOKEN = {word: index for index, word in enumerate(VOCABULARY)}
PROMPT = 3 + DIGITS  # tokens

ARCHITECTURE: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": TOKEN["</s>"],
    "pad_token_id": TOKEN["</s>"],
    "tie_word_embeddings": False,
}
FORMAT = 2  # of the cache; a change of the code that makes the base model changes it
UNKNOWN = 0.15  # of the pre-training prompts have a new name, of random meaning
ALL_LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@dataclass(frozen=True)
class Strings:
    """Options of the task. ``pretrain_*``: central training on the known names (AdamW, one-cycle
    rate), by default with the run's seed, so that results over seeds are not those of one base
    model. ``accuracy`` is exact match of the whole answer by greedy generation."""

    title: ClassVar[str] = "strings: a Llama that follows instructions learns new names for them"
    preset: ClassVar[dict[str, Any]] = {"local": {"lr": 0.1}}

    train_examples: int = option(3000, at_least=1, below=100_000)
    test_examples: int = option(500, at_least=1, below=10_000)
    pretrain_steps: int = option(1000, at_least=1)
    pretrain_batch: int = option(64, at_least=1)
    pretrain_lr: float = option(3e-3, above=0)
    pretrain_seed: int | None = option(None, at_least=0, below=2**32)

    def prepare(
        self, seed: int, track: Track = no_progress, clients_by: str | None = None
    ) -> TaskData:
        if self.pretrain_seed is None:
            return replace(self, pretrain_seed=seed).prepare(seed, track, clients_by)
        base = cached("strings", self._key(), lambda: self._pretrain(track))
        draw = torch.Generator().manual_seed(seed)
        # The test part has other strings than the training part.
        every = torch.randperm(10**DIGITS, generator=draw)
        cut = len(every) // 5
        test, _, _ = _examples(every[:cut], self.test_examples, NEW_NAMES, draw)
        train, names, orders = _examples(every[cut:], self.train_examples, NEW_NAMES, draw)
        columns = {"name": names, "order": orders}
        return TaskData(base, train, test, names, facts(base), columns)

    def load_model(self, data: TaskData) -> nn.Module:
        from transformers import LlamaForCausalLM

        with quiet():
            model = LlamaForCausalLM.from_pretrained(
                data.base, attn_implementation=short_attention()
            )
        return model.eval().requires_grad_(False)

    def lora_targets(self, model: nn.Module) -> list[str]:
        return ALL_LINEAR

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        return shared.evaluate(model, batch, size=1024)

    def _key(self) -> dict[str, Any]:
        """What the pre-trained model depends on."""
        options = {name: v for name, v in asdict(self).items() if name.startswith("pretrain_")}
        words = {"orders": ORDERS, "arithmetic": ARITHMETIC, "vocabulary": VOCABULARY}
        about = {"format": FORMAT, "part": "pretrained", "architecture": ARCHITECTURE}
        return {**about, **words, **made_by(), **options}

    def _pretrain(self, track: Track) -> tuple[nn.Module, dict[str, Any]]:
        from transformers import LlamaConfig, LlamaForCausalLM

        assert self.pretrain_seed is not None  # prepare() has set it
        draw = torch.Generator().manual_seed(self.pretrain_seed)
        every, known = torch.arange(10**DIGITS), tuple(ARITHMETIC)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.pretrain_seed)
            model = LlamaForCausalLM(
                LlamaConfig(**{**ARCHITECTURE, "attn_implementation": short_attention()})
            )
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.pretrain_lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.pretrain_lr, total_steps=self.pretrain_steps
        )
        model.train()
        for _ in track(range(self.pretrain_steps), "pre-training (once a seed, cached)"):
            batch, _, _ = _examples(every, self.pretrain_batch, known, draw)
            unknown = torch.rand(self.pretrain_batch, generator=draw) < UNKNOWN
            some = torch.randint(len(NEW_NAMES), (self.pretrain_batch,), generator=draw)
            batch["input_ids"][unknown, 1] = some[unknown] + TOKEN[NEW_NAMES[0]]
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
            schedule.step()
        test, _, _ = _examples(every, 1000, known, draw)
        accuracy = self.evaluate(model.eval(), test)["accuracy"]
        return model, {"pretrained_accuracy": accuracy, "pretrained_on": "the known names"}


def _examples(
    strings: Tensor, count: int, names: tuple[str, ...], draw: torch.Generator
) -> tuple[Batch, Tensor, Tensor]:
    """``count`` examples with some of the ``strings`` (numbers), and which arithmetic (by its place
    in ``names``) and which order each has. A new name means the arithmetic in the same place."""

    def pick(choices: int) -> Tensor:
        return torch.randint(choices, (count,), generator=draw)

    number, order, name = strings[pick(len(strings))], pick(len(ORDERS)), pick(len(names))
    digits = torch.stack([number // 10**place % 10 for place in range(DIGITS)], dim=1)
    where = torch.tensor(list(ORDERS.values()))[order]
    factor, offset = torch.tensor(list(ARITHMETIC.values()))[name].unsqueeze(2).unbind(1)
    answer = (digits.gather(1, where) * factor + offset) % 10
    ids = torch.cat(
        [
            (order + TOKEN["copy"]).unsqueeze(1),
            (name + TOKEN[names[0]]).unsqueeze(1),
            digits,
            torch.full((count, 1), TOKEN["="]),
            answer,
            torch.full((count, 1), TOKEN["</s>"]),
        ],
        dim=1,
    )
    labels = ids.clone()
    labels[:, :PROMPT] = IGNORE
    return {"input_ids": ids, "labels": labels}, name, order
