"""LoRA adapters on disk: read PEFT folders, merge them, write one. No base model is loaded.

`read_adapter` -> `gather` (checks, common scale) -> `merge` -> `write_adapter`; `measure` says how
far apart the adapters are.
"""

from fedrot.adapters.folder import Adapter, check_output, digests, read_adapter, write_adapter
from fedrot.adapters.measure import Misalignment, measure
from fedrot.adapters.merge import Merged, Uploads, gather, merge
from fedrot.adapters.weights import parse_weights

__all__ = [
    "Adapter",
    "Merged",
    "Misalignment",
    "Uploads",
    "check_output",
    "digests",
    "gather",
    "measure",
    "merge",
    "parse_weights",
    "read_adapter",
    "write_adapter",
]
