"""Flower (the extra `flower`) needs Python 3.11; below it only its absence can be tested."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("flwr") else ["test_[!w]*.py"]
