"""Federated LoRA with rotational alignment (FedRot-LoRA, arXiv 2602.23638)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedrot.adapters import aggregate

__version__ = "0.1.0"

__all__ = ["__version__", "aggregate"]


def __getattr__(name: str) -> Any:
    # Imported when first asked for: torch and peft take seconds.
    if name == "aggregate":
        from fedrot.adapters import aggregate

        return aggregate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
