"""Adapters: read PEFT folders and models, merge them, write one. No base model is loaded.

`aggregate` is all of it. Its steps: `read_adapter` or `read` -> `gather` (checks, common scale) ->
`merge` -> `Merged`, which can be saved or added to a model; `measure` says how far apart the
adapters are, `measure_spectrum` of what rank their average is. `kinds` has the adapters other than
LoRA.
"""

from fedrot.adapters.adapter import Adapter
from fedrot.adapters.folder import check_output, read_adapter, write_adapter
from fedrot.adapters.measure import Misalignment, measure
from fedrot.adapters.merge import Merged, aggregate, merge
from fedrot.adapters.sources import check_distinct, read
from fedrot.adapters.spectrum import ENERGY, Spectrum, measure_spectrum
from fedrot.adapters.uploads import Uploads, gather
from fedrot.adapters.weights import parse_weights

__all__ = [
    "ENERGY",
    "Adapter",
    "Merged",
    "Misalignment",
    "Spectrum",
    "Uploads",
    "aggregate",
    "check_distinct",
    "check_output",
    "gather",
    "measure",
    "measure_spectrum",
    "merge",
    "parse_weights",
    "read",
    "read_adapter",
    "write_adapter",
]
