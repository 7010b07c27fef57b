"""What a user sees who has not installed the extra."""

from __future__ import annotations

import subprocess
import sys


def test_one_line_names_the_extra():
    code = "import sys; sys.modules['flwr'] = None; import fedrot.flower"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fedrot.flower needs Flower")
    assert "pip install 'fedrot[flower]'" in last
    assert "During handling" not in done.stderr
