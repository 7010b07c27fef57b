"""The pictures of a run."""

from __future__ import annotations

from typing import Any


def draw(result: dict[str, Any]) -> dict[str, bytes]:
    return {}
