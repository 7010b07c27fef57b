"""Running a program that a model wrote: in a process of its own, for a limited time.

It is stopped when the time is up, sees an empty environment and an empty folder that is removed
afterwards, and gets little memory. It is not a sandbox: the program has the user's rights.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

MEMORY = 4 << 30  # bytes
# The limit is set in the new process, where there is one to set.
LIMITED = f"""
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
    del resource
except (ImportError, ValueError, OSError):
    pass
"""


def passes(program: str, timeout: float) -> bool:
    """Whether a Python program ends by itself within ``timeout`` seconds and without an error."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.py"
        file.write_text(program, encoding="utf-8", errors="replace")
        run = f"{LIMITED}\nimport runpy\nrunpy.run_path({str(file)!r}, run_name='__main__')"
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", run],
            cwd=folder,
            env={},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(timeout) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process with everything that it started, which has its session."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
