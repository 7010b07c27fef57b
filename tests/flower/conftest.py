"""Needs Flower (the extra `flower`), which needs Python 3.11."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr", reason="Flower is not there before Python 3.11")
