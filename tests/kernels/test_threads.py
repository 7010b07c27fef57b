"""The thread pool by itself: compiles and runs ``test_threads.cpp``."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
POOL = HERE.parents[1] / "csrc" / "cpu" / "threads.cpp"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("sanitizer", [None, "thread"])
def test_pool(tmp_path, sanitizer):
    program = tmp_path / "pool"
    options = ["-O1", "-g", "-std=c++17", "-pthread"]
    options += [f"-fsanitize={sanitizer}"] if sanitizer else []
    built = subprocess.run(
        [COMPILER, *options, HERE / "test_threads.cpp", POOL, "-o", program],
        capture_output=True,
        text=True,
    )
    if sanitizer and built.returncode:
        pytest.skip(f"no {sanitizer} sanitizer here")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
