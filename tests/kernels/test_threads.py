"""The threads of the CPU kernels: PyTorch's, and without PyTorch those of ``test_threads.cpp``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
THREADS = HERE.parents[1] / "csrc" / "cpu" / "threads.cpp"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("sanitizer", [None, "thread"])
def test_without_pytorch(tmp_path, sanitizer):
    program = tmp_path / "threads"
    options = ["-O1", "-g", "-std=c++17", "-pthread", "-ldl"]
    options += [f"-fsanitize={sanitizer}"] if sanitizer else []
    built = subprocess.run(
        [COMPILER, *options, HERE / "test_threads.cpp", THREADS, "-o", program],
        capture_output=True,
        text=True,
    )
    if sanitizer and built.returncode:
        pytest.skip(f"no {sanitizer} sanitizer here")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import os, torch, fedrot_kernels\n" + script],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads by /proc")
@pytest.mark.parametrize("clients", [3, 300])  # worth two threads, and all
def test_threads_of_pytorch_do_the_work(clients):
    """Its threads still look for work after an operator: others would compete with them. And none
    is lost by a call that needs fewer."""
    counts = run(
        "torch.set_num_threads(4)\n"
        "torch.randn(1 << 22).sum()\n"
        "A, B = torch.randn(4, 1024), torch.randn(1024, 4)\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        f"torch.ops.fedrot.align_aggregate([A] * {clients}, [B] * {clients}, [A], [B])\n"
        "print(before, len(os.listdir('/proc/self/task')))\n"
    )
    before, after = map(int, counts.split())
    assert before >= 4 and after == before


@pytest.mark.parametrize("used_before", [True, False])
def test_after_fork(used_before):
    """A forked child has none of the parent's threads and must not wait for them."""
    run(
        "import sys\n"
        "torch.set_num_threads(2)\n"
        "torch.randn(1 << 22).sum()\n"
        "x = torch.randn(2000, 16, 16)\n"
        f"expected = torch.ops.fedrot.polar(x) if {used_before} else None\n"
        "if (child := os.fork()) == 0:\n"
        "    actual = torch.ops.fedrot.polar(x)\n"
        "    fine = expected is None or all(map(torch.equal, actual, expected))\n"
        "    os._exit(0 if fine else 3)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
