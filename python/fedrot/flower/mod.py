"""A client mod that aligns the factors before they leave the client.

The server stays plain, and whatever has to come last (clipping, noise, the masks of SecAgg+) does.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MessageType
from flwr.clientapp.typing import ClientAppCallable

from fedrot import methods
from fedrot.flower.records import Reference, decode

# The modules of Flower's mods that change arrays, in the current and the legacy stack.
CLIPS_OR_MASKS = ("centraldp_mods", "localdp_mod", "secagg_mod", "secaggplus_mod")


class FedRotMod:
    """Rotates what a client trained toward the arrays it was sent (FedRot-LoRA, arXiv 2602.23638).

    Acts on ``train`` messages; arrays that are no LoRA factors pass. A client of smaller rank is
    padded to the global one. Mods run from the last to the first on a reply, so this one comes
    last in the list: ``[secaggplus_mod, fixedclipping_mod, fedrot_mod]``. ``fedrot_mod`` is the
    mod with these defaults.

    Args:
        lam: soft rotation in [0, 1].
        align: ``"joint"``, ``"A"``, ``"B"``, or the paper's ``"alternate"``: the first round
            unaligned, then A in even and B in odd rounds as Flower counts, from 1.
        proper: rotations only, no reflections.
        names: of the parameters, one for each array in their order; needed in the legacy stack
            (SecAgg+), which numbers arrays.

    Raises:
        ValueError: an option is out of its range.

    On a message: ValueError or TypeError where the arrays do not fit, or a mod that clips or masks
    comes behind this one in the list. Flower sends it to the server as the client's failure.
    """

    def __init__(
        self,
        *,
        lam: float = 0.4,
        align: str = "joint",
        proper: bool = True,
        names: Sequence[str] | None = None,
    ) -> None:
        self.method = methods.FedRot.one_by_one(lam, align, proper)
        self.names = None if names is None else tuple(names)

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if message.metadata.message_type.partition(".")[0] != MessageType.TRAIN:
            return call_next(message, context)
        _check_order(call_next)
        # Read first: the app may take the arrays out of the message.
        sent = [ArrayRecord(dict(record)) for record in message.content.array_records.values()]
        round = self._round(message)
        reply = call_next(message, context)
        if reply.has_error() or not reply.content.array_records:
            return reply
        if len(sent) != 1 or len(reply.content.array_records) != 1:
            raise ValueError(
                "fedrot_mod needs one ArrayRecord in the message and one in the reply, got "
                f"{len(sent)} and {len(reply.content.array_records)}"
            )
        ((key, record),) = reply.content.array_records.items()
        reference = Reference.of(sent[0], self.names)
        rotated = reference.rotate(self.method, decode(record), "the reply", round=round)
        reply.content[key] = ArrayRecord({**record, **rotated})
        return reply

    def _round(self, message: Message) -> int:
        """From 0; only ``alternate`` depends on it."""
        if self.method.align != "alternate":
            return 1
        for config in message.content.config_records.values():
            if isinstance(round := config.get("server-round"), int):
                return round - 1
        if message.metadata.group_id.isdecimal():  # the legacy stack
            return int(message.metadata.group_id) - 1
        raise ValueError("align='alternate' needs the round: config['server-round'] is missing")


fedrot_mod = FedRotMod()


def _check_order(call_next: ClientAppCallable) -> None:
    """Raise where a mod that clips or masks lies between this one and the app.

    Flower's ``ClientApp`` makes its chain of mods of closures, which is all there is to see.
    """
    link: Any = call_next
    while inspect.isfunction(link):
        cells = inspect.getclosurevars(link).nonlocals
        mod, link = cells.get("_mod"), cells.get("_ffn")
        if mod is None:
            return
        module = getattr(mod, "__module__", "")
        if module.startswith("flwr.") and module.rpartition(".")[2] in CLIPS_OR_MASKS:
            name = getattr(mod, "__name__", type(mod).__name__)
            raise ValueError(
                f"{name} comes after fedrot_mod in the list of mods, so it changes the arrays "
                f"before they are rotated; write [..., {name}, ..., fedrot_mod]"
            )
