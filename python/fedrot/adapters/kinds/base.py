"""What an adapter other than LoRA has to say: its tensors, its options, its invariance."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fedrot.adapters.config import Config, peft_default
from fedrot.adapters.layers import StateKeys, is_plain
from fedrot.errors import FedrotError
from fedrot.methods import FedIT, FedRot, Method

if TYPE_CHECKING:
    from fedrot.adapters.adapter import Adapter

Tensors = Mapping[str, Tensor]

# Fields of every configuration that do not change what the tensors mean. Which layers carry an
# adapter is compared through the keys of the state dict.
NEUTRAL = frozenset(
    {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
        *("revision", "inference_mode", "target_modules", "exclude_modules"),
        *("layers_to_transform", "layers_pattern", "modules_to_save"),
    }
)


class Kind(ABC):
    """A kind of adapter: its tensors are brought to the reference's coordinates, then averaged.

    Every field of PEFT's configuration is in ``NEUTRAL`` or ``neutral`` (no matter), in
    ``must_agree`` (with PEFT's default), or refused.
    """

    peft_type: ClassVar[str]
    title: ClassVar[str]  # how it is called in print
    keys: ClassVar[re.Pattern[str]]  # its own tensors
    shared: ClassVar[re.Pattern[str] | None] = None  # frozen tensors, the same for all
    neutral: ClassVar[frozenset[str]] = frozenset()
    must_agree: ClassVar[Mapping[str, Any]] = {}
    rotates: ClassVar[bool] = False  # has a rotation, which may be soft or fitted to one factor

    def check_config(self, config: Config, source: str) -> None:
        """Raise ``FedrotError`` for an option of which nobody knows what it does to the mean."""
        for field in sorted(config.keys() - NEUTRAL - self.neutral - self.must_agree.keys()):
            if config[field] and config[field] != peft_default(field, self.peft_type):
                raise FedrotError(
                    f"{source}: the configuration sets {field}={config[field]!r}, "
                    f"an option of {self.title} that this version of fedrot does not know"
                )

    def sort(self, tensors: Tensors, config: Config, source: str) -> StateKeys:
        """The keys to average, as ``StateKeys.plain``; ``shared`` ones are left out.

        Raises:
            FedrotError: a key is unknown, none is the kind's own, or a shape is wrong.
        """
        plain = []
        for key in sorted(tensors):
            if self.shared is not None and self.shared.fullmatch(key):
                continue
            if not self.keys.fullmatch(key) and not is_plain(key, tensors, config):
                raise FedrotError(f"{source}: unknown key {key!r} in a state dict of {self.title}")
            plain.append(key)
        if not any(self.keys.fullmatch(key) for key in plain):
            raise FedrotError(f"{source}: the state dict has no tensors of {self.title}")
        self.check_shapes(tensors, config, source)
        return StateKeys({}, {}, (), tuple(plain))

    def check_shapes(self, tensors: Tensors, config: Config, source: str) -> None:  # noqa: B027
        """Raise ``FedrotError`` where a tensor has not the shape that ``config`` promises."""

    def check_fit(self, adapter: Adapter, reference: Adapter) -> None:
        """Raise ``FedrotError`` where frozen tensors that all should share are not the same."""
        for key, theirs in reference.tensors.items():
            if self.shared is None or not self.shared.fullmatch(key):
                continue
            ours = adapter.tensors[key]
            # A copy in bf16 holds the same values, rounded.
            same = torch.equal(ours.to(theirs), theirs) or torch.equal(ours, theirs.to(ours))
            if not same:
                raise FedrotError(
                    f"{adapter.source}: {key!r} is frozen and has to be the same for all, but has "
                    f"other values than in the reference {reference.source}"
                )

    def check_rank(self, **options: object) -> None:
        """Raise ``FedrotError`` for an option that chooses a rank: ``rank``, ``energy``."""
        for option, value in options.items():
            if value is not None:
                raise FedrotError(
                    f"{option} must be left out for {self.title}, which has no LoRA factors, got "
                    f"{value}"
                )

    def check_method(self, method: Method) -> None:
        """Raise ``FedrotError`` for a method, or an option of it, that says nothing here."""
        if isinstance(method, FedIT):
            return
        if not isinstance(method, FedRot) or method.rotation != "procrustes":
            how = f", rotation {method.rotation}," if isinstance(method, FedRot) else ""
            raise FedrotError(
                f"method: {method.name}{how} takes LoRA factors; {self.title} adapters are merged "
                "by FedRot or FedIT (--rule mean, --rotation procrustes)"
            )
        if self.rotates:
            if isinstance(method.lam, str) or method.align not in ("joint", "A", "B"):
                raise FedrotError(
                    f"{self.title} takes a number for lam and joint, A or B for align: the "
                    "others minimise the error of products B A, got "
                    f"lam {method.lam}, align {method.align}"
                )
            return
        if method.lam not in (0, 1):
            raise FedrotError(
                f"lam must be 0 (plain average) or 1 (aligned) for {self.title}: it has no "
                f"rotation of which a part could be taken, got {method.lam}"
            )
        for option, value, default in (
            ("align", method.align, "joint"),
            ("proper", method.proper, True),
        ):
            if value != default:
                raise FedrotError(
                    f"{option} must be left alone for {self.title}, which has no factors to "
                    f"rotate, got {value!r}"
                )

    def scale(self, config: Config, reference: Config, key: str) -> float:
        """What a tensor is multiplied by, so that it means the same under the other config."""
        return 1.0

    @abstractmethod
    def align(
        self, tensors: Tensors, reference: Tensors, config: Config, method: FedRot
    ) -> tuple[Tensors, str]:
        """The adapter in the coordinates of the reference that are nearest.

        Args:
            tensors: the kind's own tensors of a client, scaled, float32 or float64.
            reference: the same of the reference; ``config`` is its configuration.
            method: with ``lam`` above 0.

        Returns:
            The tensors, and what has to be said of them ("" for nothing).
        """


class Plain(Kind):
    """A kind without an invariance: its tensors are averaged as they are."""

    def align(
        self, tensors: Tensors, reference: Tensors, config: Config, method: FedRot
    ) -> tuple[Tensors, str]:
        return tensors, ""
