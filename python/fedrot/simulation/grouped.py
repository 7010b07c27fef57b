"""The adapted layers of all clients of a round as one, inside the one shared model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import pad

from fedrot.factors import Factors
from fedrot.simulation.adapter import ADAPTER, parameter_names
from fedrot.tasks import Batch
from fedrot.tasks.base import trim

# Up to this many entries of a weight, one product with `W + scaling B A` of each client is faster
# than the frozen product and two thin ones beside it (docs/training.md).
MERGED = 128 * 64
EXAMPLES = 3  # in the pass that looks at inputs: no usual size of anything else


class GroupedLinear(nn.Module):
    """``N`` linear layers at once: input ``(N * b, ..., k)``, weight ``(N, d, k)``, bias
    ``(N, d)`` or ``None``; the first ``b`` rows go through the first layer, and so on."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.unsqueeze(1)
        return _grouped_product(x.to(self.weight.dtype), self.weight, bias)


class GroupedLora(nn.Module):
    """A frozen layer with ``N`` LoRA adapters: ``A`` ``(N, r, k)``, ``B`` ``(N, d, r)``, input
    ``(N * b, ..., k)`` as for :class:`GroupedLinear`. ``dropout``: the generators of the clients'
    masks, where the adapter has dropout, of which every pass takes ``(b, ..., k)`` numbers; of
    sequences no more than the client would see alone, ``lengths`` ``(N,)``, empty for as they are.
    """

    def __init__(
        self,
        adapted: Any,
        A: Tensor,
        B: Tensor,
        dropout: Sequence[torch.Generator] | None = None,
        lengths: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.base = adapted.get_base_layer()
        self.scaling: float = adapted.scaling[ADAPTER]
        self.A, self.B = (nn.Parameter(t, requires_grad=False) for t in (A, B))
        self.p = float(getattr(adapted.lora_dropout[ADAPTER], "p", 0.0))  # else an Identity
        self.generators, self.lengths = dropout or (), lengths
        if self.p and not dropout:
            raise ValueError(f"dropout must hold a generator a client: the adapter drops {self.p}")
        small = self.base.weight.numel() <= MERGED and self.base.weight.dtype == A.dtype
        self.merged = small and type(self.base) is nn.Linear and not self.p

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            weight = torch.baddbmm(self.base.weight, self.B, self.A, alpha=self.scaling)
            return _grouped_product(x, weight, self.base.bias)
        y = self.base(x)
        x = x.to(self.A.dtype)
        if self.p:
            x = x * self._mask(x)
        grouped = x.reshape(len(self.A), -1, x.shape[-1])
        update = (grouped @ self.A.mT) @ self.B.mT
        return torch.add(y, update.view(y.shape), alpha=self.scaling).to(y.dtype)

    def _mask(self, x: Tensor) -> Tensor:
        """0 or ``1 / (1 - p)``, ``(N * b, ..., k)``. A client's numbers do not depend on how far
        the others' sequences make it pad its own; nothing looks at what is padding."""
        shape, drawn = (len(x) // len(self.generators), *x.shape[1:]), []
        padded = bool(self.lengths) and x.dim() == 3 and x.shape[1] == max(self.lengths)
        for client, g in enumerate(self.generators):
            own = (shape[0], self.lengths[client], shape[2]) if padded else shape
            mask = torch.rand(own, generator=g, device=x.device)
            drawn.append(pad(mask, (0, 0, 0, shape[1] - own[1])) if padded else mask)
        return (torch.cat(drawn) >= self.p) / (1 - self.p)


def _grouped_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    grouped = x.reshape(len(weight), -1, x.shape[-1])
    y = grouped @ weight.mT if bias is None else torch.baddbmm(bias, grouped, weight.mT)
    return y.view(*x.shape[:-1], y.shape[-1])


@dataclass(frozen=True)
class GroupedLayers:
    """What tells the clients apart, by the layers' names in the base model. ``lengths``: of the
    next batch, for its dropout, how long each client's longest sequence is."""

    lora: dict[str, GroupedLora]
    heads: dict[str, GroupedLinear]
    lengths: list[int]

    def parameters(self, part: str) -> list[nn.Parameter]:
        """Those of ``"A"``, ``"B"`` or ``"head"``, stacked; none requires a gradient yet."""
        if part == "head":
            return [p for layer in self.heads.values() for p in layer.parameters()]
        return [layer.A if part == "A" else layer.B for layer in self.lora.values()]

    @property
    def factors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All clients' ``A`` ``(N, r, k)`` and ``B`` ``(N, d, r)`` by layer."""
        layers = self.lora.items()
        return {name: layer.A for name, layer in layers}, {name: layer.B for name, layer in layers}

    def of(
        self, client: int, start: Factors, head: dict[str, Tensor]
    ) -> tuple[Factors, dict[str, Tensor]]:
        """A client's factors, of the rank of its ``start``, and its head, on the CPU."""
        A, B = {}, {}
        for module, layer in self.lora.items():
            r = start.A[module].shape[0]
            A[module] = layer.A[client, :r].detach().cpu().contiguous()
            B[module] = layer.B[client, :, :r].detach().cpu().contiguous()
        own = {}
        for name in head:
            base, _, kind = name.rpartition(".")
            own[name] = getattr(self.heads[base], kind)[client].detach().cpu()
        return Factors(A, B), own


@contextmanager
def grouped(
    model: PeftModel,
    starts: Sequence[Factors],
    heads: Sequence[dict[str, Tensor]],
    dropout: Sequence[torch.Generator] | None = None,
) -> Iterator[GroupedLayers]:
    """The model with the clients' LoRA layers, and the linear layers of their heads, in it.

    ``dropout``: as for :class:`GroupedLora`.
    """
    base = model.get_base_model()
    lora, of_heads = {}, {}
    lengths: list[int] = []
    for module in parameter_names(model):
        r = max(f.A[module].shape[0] for f in starts)
        A = [pad(f.A[module], (0, 0, 0, r - f.A[module].shape[0])) for f in starts]
        B = [pad(f.B[module], (0, r - f.B[module].shape[1])) for f in starts]
        lora[module] = GroupedLora(
            base.get_submodule(module),
            torch.stack(A).to(model.device),
            torch.stack(B).to(model.device),
            dropout,
            lengths,
        )
    for name in heads[0]:
        linear, _, kind = name.rpartition(".")
        if kind == "weight":
            bias = f"{linear}.bias"
            stacked = {
                key: torch.stack([head[key] for head in heads]).to(model.device)
                for key in (name, bias)
                if key in heads[0]
            }
            of_heads[linear] = GroupedLinear(stacked[name], stacked.get(bias))
    layers: dict[str, nn.Module] = {**lora, **of_heads}
    plain = {name: base.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            _put(base, name, layer)
        yield GroupedLayers(lora, of_heads, lengths)
    finally:
        for name, own in plain.items():
            _put(base, name, own)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


@torch.no_grad()
def mixed_layer(model: PeftModel, train: Batch) -> str | None:
    """The first adapted layer whose input is not a row an example, ``(b, ..., k)``, as grouped
    layers take it to be; ``None`` where there is none. DeBERTa's query projection, for one, is also
    applied to embeddings of positions that all examples share."""
    batch = {key: value[:1].repeat_interleave(EXAMPLES, 0) for key, value in train.items()}
    batch = {key: value.to(model.device) for key, value in trim(batch).items() if key != "labels"}
    base, found = model.get_base_model(), []

    def watch(name: str) -> Any:
        return lambda module, args: found.append(name) if len(args[0]) != EXAMPLES else None

    hooks = [
        base.get_submodule(name).register_forward_pre_hook(watch(name))
        for name in parameter_names(model)
    ]
    try:
        base(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
