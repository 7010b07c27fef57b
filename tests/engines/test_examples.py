"""The examples, run as their first lines say."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def accuracies(output):
    return [float(a) for a in re.findall(r"^round \d+: accuracy ([\d.]+)$", output, re.MULTILINE)]


def test_two_processes_train_what_one_does(monkeypatch, capsys, one_thread):
    script = EXAMPLES / "distributed" / "train.py"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", script, "--rounds", "3"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    together = accuracies(done.stdout)

    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "0")  # any that is free
    monkeypatch.setattr(sys, "argv", [str(script), "--rounds", "3"])
    runpy.run_path(str(script), run_name="__main__")
    alone = accuracies(capsys.readouterr().out)

    assert len(together) == len(alone) == 3
    assert all(abs(a - b) <= 0.02 for a, b in zip(together, alone, strict=True))
    assert together[2] > together[0] + 0.05
