"""Finds and loads the native modules."""

from __future__ import annotations

import importlib
from types import ModuleType


def load(name: str) -> ModuleType:
    """The native module ``fedrot_kernels.<name>``.

    Raises:
        ImportError: it is not there or does not load; the message says how to build it.
    """
    try:
        return importlib.import_module(f"fedrot_kernels.{name}")
    except ImportError as error:
        raise ImportError(
            f"the native module fedrot_kernels.{name} does not load ({error}); "
            "install the package with a C++17 compiler present: pip install ."
        ) from error
