"""FedRot-LoRA in Flower (flwr 1.41 and newer): docs/flower.md.

``FedRot`` aligns the replies before another strategy aggregates them, ``FedRotAvg`` aligns and
averages at once, ``FedLoRA`` takes methods that look at all clients together, ``fedrot_mod`` aligns
on the client before the upload.
"""

try:
    import flwr.app  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"fedrot.flower needs Flower, and Python 3.11: pip install 'fedrot[flower]' ({error})"
    ) from None

from fedrot.flower.at_once import FedLoRA
from fedrot.flower.mod import FedRotMod, fedrot_mod
from fedrot.flower.strategy import FedRot, FedRotAvg

__all__ = ["FedLoRA", "FedRot", "FedRotAvg", "FedRotMod", "fedrot_mod"]
