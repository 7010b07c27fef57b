"""Local training of all clients of a round in one pass of the model.

The clients share one frozen backbone and differ in their LoRA factors (and heads) alone. So these
are stacked, ``(N, r, k)`` and ``(N, d, r)``, and the model runs once over the clients' batches, one
behind the other: its frozen products see one large batch, and only the layers of
:mod:`~fedrot.simulation.grouped` tell the clients apart. The sum of the client losses gives each
client its own gradient, and an element-wise optimizer on the stacked tensors is N separate ones.
Activations of ``together * micro_batch`` examples are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import pad

from fedrot.config import Local
from fedrot.factors import Factors, rank_of
from fedrot.progress import Track, no_progress
from fedrot.simulation.grouped import GroupedLayers, grouped
from fedrot.simulation.memory import Memory
from fedrot.tasks import Batch
from fedrot.tasks.base import example_losses, example_terms, trim

Regularizer = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Sequence[int]], Tensor | None]
NO_EXAMPLE = -1  # in a batch that is not full


@dataclass(frozen=True)
class Trained:
    """What the clients come back with. ``losses``: each one's mean training loss ``(N,)``, not
    finite where it diverged."""

    factors: list[Factors]
    heads: list[dict[str, Tensor]]
    losses: Tensor


def draw_batches(examples: Tensor, local: Local, generator: torch.Generator) -> Tensor:
    """Which of its examples ``(n_i,)`` a client sees: ``(steps, batch_size)``.

    ``local.steps`` batches drawn with replacement; or, with ``local.epochs``, every example once
    an epoch in a new order, the last batch of an epoch filled up with ``NO_EXAMPLE``.
    """
    size = local.batch_size
    if local.epochs is None:
        return examples[torch.randint(len(examples), (local.steps, size), generator=generator)]
    epochs = []
    for _ in range(local.epochs):
        order = examples[torch.randperm(len(examples), generator=generator)]
        epochs.append(pad(order, (0, -len(order) % size), value=NO_EXAMPLE))
    return torch.cat(epochs).view(-1, size)


def train_clients(
    model: PeftModel,
    starts: Sequence[Factors],
    train: Batch,
    batches: Sequence[Tensor],
    local: Local,
    *,
    parts: str = "AB",
    heads: Sequence[dict[str, Tensor]] | None = None,
    memory: Memory | None = None,
    dropout: Sequence[torch.Generator] | None = None,
    regularizer: Regularizer | None = None,
    track: Track = no_progress,
) -> Trained:
    """Train every client from its own factors on its own batches, where the model is.

    Args:
        model: the shared model; its parameters are not changed.
        starts: ``N`` adapters; smaller ranks are zero-padded meanwhile, which is exact: rows of
            ``A`` and columns of ``B`` that are both zero get no gradient.
        train: all training examples, on the CPU.
        batches: per client ``(steps_i, batch_size)`` indices into ``train``.
        local: how to train; ``local.together`` clients go through the model at a time, with
            ``local.micro_batch`` examples of each.
        parts: which factors are trained, ``"AB"``, ``"A"`` or ``"B"``.
        heads: per client the parameters of linear layers of the base model, by name; trained too.
        memory: of ``model`` and ``train``.
        dropout: per client the generator of its masks, where the adapter has dropout; on the
            model's device.
        regularizer: what is added to the clients' losses, as ``Method.regularizer``.

    Returns:
        Factors and heads on the CPU.

    Raises:
        ValueError: the adapter has dropout, and ``dropout`` is missing.
    """
    together = local.together or len(starts)
    slices = [slice(i, i + together) for i in range(0, len(starts), together)]
    steps = sum(max(len(rows) for rows in batches[part]) for part in slices)
    clock = iter(track(range(steps), "local steps"))
    heads = heads or [{} for _ in starts]
    trainer = _Trainer(model, train, local, parts, memory or Memory({}), clock, regularizer)
    found = [
        trainer.run(starts[part], batches[part], heads[part], dropout[part] if dropout else None)
        for part in slices
    ]
    next(clock, None)  # to its end
    return Trained(
        [factors for part in found for factors in part.factors],
        [head for part in found for head in part.heads],
        torch.cat([part.losses for part in found]),
    )


@dataclass(frozen=True)
class _Trainer:
    """What all clients of a round share."""

    model: PeftModel
    train: Batch
    local: Local
    parts: str
    memory: Memory
    clock: Iterator[int]
    regularizer: Regularizer | None

    def run(
        self,
        starts: Sequence[Factors],
        batches: Sequence[Tensor],
        heads: Sequence[dict[str, Tensor]],
        dropout: Sequence[torch.Generator] | None,
    ) -> Trained:
        """Train some clients together."""
        longest = max(len(rows) for rows in batches)
        rows = torch.stack(
            [pad(b, (0, 0, 0, longest - len(b)), value=NO_EXAMPLE) for b in batches], dim=1
        )  # (steps, N, batch_size)
        full = bool((rows != NO_EXAMPLE).all())
        terms = example_terms(self.train["labels"])[rows.clamp(min=0)]
        counts = torch.where(rows != NO_EXAMPLE, terms, 0).sum(2).clamp(min=1)  # (steps, N)
        device = self.model.device
        lengths = torch.tensor([len(rows) for rows in batches], device=device)
        ranks = [rank_of(start) for start in starts]
        losses = torch.zeros(len(starts), dtype=torch.float64, device=device)
        with (
            grouped(self.model, starts, heads, dropout) as layers,
            self.memory.recalled(self.model),
        ):
            optimizer = _Optimizer(layers, self.local, self.parts)
            for step in range(longest):
                next(self.clock)
                loss = torch.zeros(len(starts), device=device)
                for piece in rows[step].split(self.local.micro_batch or rows.shape[2], dim=1):
                    part = self._losses(layers, piece, full) / counts[step].to(device)
                    optimizer.add(part)
                    loss += part.detach()
                if self.regularizer is not None:
                    more = self.regularizer(*layers.factors, ranks)
                    if more is not None:
                        optimizer.add(more, of_all=False)  # not of heads
                active = None if full else step < lengths
                optimizer.step(active)
                losses += loss if active is None else torch.where(active, loss, 0.0)
            ends = [layers.of(i, *own) for i, own in enumerate(zip(starts, heads, strict=True))]
        return Trained([f for f, _ in ends], [head for _, head in ends], (losses / lengths).cpu())

    def _losses(self, layers: GroupedLayers, rows: Tensor, full: bool) -> Tensor:
        """The summed loss of each client ``(N,)`` on its examples ``rows`` ``(N, b)``."""
        flat, device = rows.flatten().clamp(min=0), self.model.device
        batch = trim({key: value.index_select(0, flat) for key, value in self.train.items()})
        if "attention_mask" in batch:
            mask = batch["attention_mask"].view(*rows.shape, -1)
            layers.lengths[:] = mask.sum(2).amax(1).tolist()
        batch = {key: value.to(device) for key, value in batch.items()}
        self.memory.rows = flat.to(device)
        base = self.model.get_base_model()
        output = base(**{key: value for key, value in batch.items() if key != "labels"})
        sums = example_losses(output, batch)[0].view(rows.shape)
        return (
            sums.sum(1) if full else torch.where((rows != NO_EXAMPLE).to(device), sums, 0.0).sum(1)
        )


class _Optimizer:
    """Every client's own optimizer: losses are added up, then comes a step."""

    def __init__(self, layers: GroupedLayers, local: Local, parts: str) -> None:
        self.local = local
        groups = {part: layers.parameters(part) for part in (*parts, "head")}
        rates = {"A": local.lr, "B": local.lr * local.lr_ratio, "head": local.lr}
        self.trained = [p for group in groups.values() for p in group]
        for p in self.trained:
            p.requires_grad_()
        self.gradients: tuple[Tensor, ...] = ()
        self.starts = [p.detach().clone() for p in self.trained] if local.prox else []
        options = [{"params": group, "lr": rates[part]} for part, group in groups.items() if group]
        decay = local.weight_decay
        self.optimizer: torch.optim.Optimizer
        if local.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(
                options, momentum=local.momentum, weight_decay=decay, fused=True
            )
        else:
            kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[local.optimizer]
            self.optimizer = kind(options, weight_decay=decay, fused=True)

    def add(self, losses: Tensor, *, of_all: bool = True) -> None:
        """Part of each client's loss ``(N,)``; ``of_all``: it depends on all that is trained."""
        more = torch.autograd.grad(losses.sum(), self.trained, materialize_grads=not of_all)
        so_far = self.gradients
        self.gradients = tuple(map(torch.add, so_far, more)) if so_far else more

    def step(self, active: Tensor | None) -> None:
        """``active`` ``(N,)``: clients that have not taken all their steps yet; ``None`` is all."""
        gradients, self.gradients = self.gradients, ()
        if self.local.prox:
            gradients = tuple(
                g + self.local.prox * (p.detach() - start)
                for g, p, start in zip(gradients, self.trained, self.starts, strict=True)
            )
        if self.local.clip is not None:
            gradients = _clipped(gradients, self.local.clip)
        for p, g in zip(self.trained, gradients, strict=True):
            p.grad = g.contiguous()  # fused optimizers go by memory, not by strides
        if active is None:
            self.optimizer.step()
            return
        before = [p.detach().clone() for p in self.trained]
        self.optimizer.step()
        with torch.no_grad():
            for p, old in zip(self.trained, before, strict=True):
                p[~active] = old[~active]


def _clipped(gradients: Sequence[Tensor], largest: float) -> tuple[Tensor, ...]:
    """The gradient of each client with a norm of at most ``largest``."""
    norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
    scale = largest / norm.clamp(min=largest)
    return tuple(g * scale.view(-1, *(1,) * (g.dim() - 1)) for g in gradients)
