"""Without NVFLARE."""

import importlib
import sys

import pytest


def test_missing_nvflare_is_one_line(monkeypatch):
    for name in [n for n in sys.modules if n == "fedrot.nvflare" or n.startswith("nvflare.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvflare", None)
    with pytest.raises(ImportError) as caught:
        importlib.import_module("fedrot.nvflare")
    assert str(caught.value) == "fedrot.nvflare needs NVFLARE: pip install 'fedrot[nvflare]'"
