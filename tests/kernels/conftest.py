from __future__ import annotations

import pytest

from fedrot_kernels import plan as plan_module


@pytest.fixture(params=["native", "through the operator"])
def planner(request, monkeypatch):
    if request.param != "native":
        monkeypatch.setattr(plan_module, "_planners", {})
