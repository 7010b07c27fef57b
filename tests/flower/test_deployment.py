"""A real deployment of examples/flower on loopback: what a newcomer starts, and that it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from fedrot.adapters import read_adapter
from fedrot.adapters.layers import factor_keys

pytestmark = pytest.mark.integration

RUN = Path(__file__).resolve().parents[2] / "examples" / "flower" / "run.py"
LIMIT = 900  # processes that import torch each: seven minutes on two cores that ten jobs shared


@pytest.fixture
def started(tmp_path):
    """Start `run.py`; in the end nothing of it may be left, neither process nor folder."""
    env = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    processes = []

    def start(config: str) -> subprocess.Popen[str]:
        command = [sys.executable, RUN, "--output", tmp_path / "adapter", "--timeout", LIMIT - 60]
        process = subprocess.Popen(
            [*map(str, command), "-c", config],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
        return process

    try:
        yield start
        assert left_over(tmp_path) == []
        assert list(tmp_path.glob("fedrot-flower-*")) == []
    finally:
        for process in processes:
            process.kill()
        for pid in left_over(tmp_path):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def left_over(folder: Path) -> list[int]:
    """The processes whose FLWR_HOME lies in a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"FLWR_HOME={folder}/".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def test_two_rounds_of_two_supernodes(started, tmp_path):
    output, _ = started("rounds=2").communicate(timeout=LIMIT)
    assert "Received 2 results and 0 failures" in output
    accuracies = re.findall(r"MetricRecord: {'accuracy': ([0-9.]+)", output)
    assert len(accuracies) == 2, output
    assert float(accuracies[-1]) > 0.6
    assert "The global adapter is in" in output
    adapter = read_adapter(tmp_path / "adapter")
    assert len(factor_keys(adapter.tensors)) == 4


def test_a_run_that_fails(started, tmp_path):
    process = started('method="none"')
    output, _ = process.communicate(timeout=LIMIT)
    assert "method must be fedrot, fused, mod or fedavg, got 'none'" in output
    assert "the run failed: no adapter was written" in output
    assert process.returncode == 1
    assert not (tmp_path / "adapter").exists()


def test_terminated_in_the_middle(started, tmp_path):
    process = started("rounds=100")
    until = time.monotonic() + LIMIT
    for line in process.stdout:
        if "[ROUND 1/100]" in line:
            break
        assert time.monotonic() < until
    assert len(left_over(tmp_path)) >= 4  # SuperLink, two SuperNodes, flwr run
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode != 0
