"""docs/scaling.md: the arithmetic by hand, the simulation in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import scaling, streaming
from benchmarks.scaling import ADAPTERS, Adapter, Load, machines, one_server, tree
from fedrot.bench.cases import LLAMA_8B_LINEAR, LLAMA_8B_QV, Case

pytestmark = pytest.mark.usefixtures("one_thread")

COSTS = {"accept": 3.0, "no alignment": 2.0, "merge": 10.0}


def test_elements_of_adapters():
    assert Adapter("Llama-3.2-1B", "q, v", 8).elements == 8 * 16 * (2 * 2048 + 512 + 2048) == 851968
    linear = 16 * 32 * (4 * 4096 + 2 * (1024 + 4096) + 3 * (14336 + 4096))
    assert Adapter("Llama-3-8B", "all linear", 16).elements == linear == 41943040
    for targets, shapes in (("q, v", LLAMA_8B_QV), ("all linear", LLAMA_8B_LINEAR)):
        case = Case("", 1, 16, shapes)
        assert Adapter("Llama-3-8B", targets, 16).elements == case.elements
    assert len(ADAPTERS) == len(set(ADAPTERS)) == 12


def test_one_server():
    adapter = Adapter("Llama-3.2-1B", "q, v", 8)
    load = one_server(adapter, 1000, COSTS)
    assert load.received == 1000 * 2 * 851968
    assert load.compute == pytest.approx(1000 * 851968 * 3e-9)
    assert load.memory == 22 * 851968
    assert load.network == pytest.approx(load.received / 1.25e9)
    aligned = one_server(adapter, 1000, COSTS, "no alignment")
    assert aligned.compute == pytest.approx(load.compute * 2 / 3)
    assert Load(2.5e9, 1.0, 0).seconds == 2.0 and Load(2.5e9, 3.0, 0).seconds == 3.0


def test_tree():
    """250 clients: leaves of 100, and 3 of them to the root."""
    adapter = Adapter("Llama-3.2-1B", "q, v", 8)
    leaf, root = tree(adapter, 250, COSTS)
    assert leaf == one_server(adapter, 100, COSTS)
    assert root.received == 3 * 8 * 851968
    assert root.compute == pytest.approx(3 * 851968 * 10e-9)
    assert tree(adapter, 7, COSTS) == [one_server(adapter, 7, COSTS)]
    assert [len(tree(adapter, n, COSTS)) for n in (100, 101, 10**4, 10**4 + 1, 10**6)] == [
        *(1, 2, 2, 3, 3)
    ]
    assert [machines(n) for n in (10, 250, 10**6)] == [1, 4, 10101]


def test_an_aggregator_holds_what_is_said():
    case = Case("small", 1, 4, ((24, 40),) * 3, torch.bfloat16)
    reference, _ = streaming.adapters(case, 1)
    aggregator = streaming.StreamingAggregator(reference)
    total = aggregator._total
    lists = (*aggregator._reference, *aggregator._aligned, total._mean, total._sum)
    held = sum(t.untyped_storage().nbytes() for tensors in lists for t in tensors)
    assert held == scaling.HELD * case.elements
    state = sum(t.nbytes for key, t in aggregator.state_dict().items() if key.startswith("mean"))
    assert state == scaling.STATE * case.elements


def test_units():
    assert [scaling.size(n) for n in (0, 7, 999, 1000, 13_600_000, 1.4e13, 2e16)] == [
        *("0.0 B", "7.0 B", "999 B", "1.0 kB", "14 MB", "14 TB", "20,000 TB")
    ]
    assert [scaling.duration(s) for s in (0.0021, 0.999, 1, 119, 120, 7199, 7200, 126000)] == [
        *("2.1 ms", "999 ms", "1.0 s", "119 s", "2.0 min", "120 min", "2.0 h", "35 h")
    ]


def test_the_page_shows_what_was_measured():
    """Printed by ``python -m benchmarks.scaling``, not typed."""
    results = json.loads(scaling.MEASURED.read_text(encoding="utf-8"))
    page = (Path(scaling.__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert scaling.adapters(results) in page
    assert scaling.rounds(results) in page


def test_the_simulation_in_small():
    """Memory and values; times are for the page."""
    case = Case("small", 1, 4, ((256, 512),) * 8, align="joint")  # 98 kB a client
    found = streaming.simulate(case, 1500, bins=15)
    rows = found["bins"]
    assert [row["clients"] for row in rows] == [100 * (i + 1) for i in range(15)]
    assert rows[-1]["resident"] - rows[2]["resident"] < 6  # 1200 clients kept: 118 MB
    assert found["error"] < 1e-6
    assert all(0 < row["q05"] <= row["median"] <= row["q95"] and row["fresh"] > 0 for row in rows)


def test_sums_in_small():
    rows = streaming.sums(3000)
    assert [row["clients"] for row in rows] == [100, 1000]
    assert all(row["blocks"] < 4e-7 and row["blocks"] < row["float32"] for row in rows)


def test_the_main_program(tmp_path, monkeypatch):
    small = Case("small", 1, 2, ((8, 8),) * 2, align="joint")
    monkeypatch.setattr(streaming, "SIMULATED", small)
    monkeypatch.setattr(streaming, "COSTS", (small, small.of(torch.bfloat16)))
    streaming.main(["--clients", "200", "--sums", "200", "-o", str(tmp_path)])
    result = json.loads((tmp_path / "streaming.json").read_text())
    assert [row["dtype"] for row in result["costs"]] == ["float32", "bfloat16"]
    assert all(ns > 0 for row in result["costs"] for ns in row["ns"].values())
    assert (tmp_path / "streaming.png").read_bytes().startswith(b"\x89PNG")
