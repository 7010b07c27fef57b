"""A whole Flower deployment on this machine: a SuperLink, SuperNodes, and the app run on them.

    python run.py
    python run.py --nodes 3 -c 'method="fedavg" regauge=true'

Everything listens on 127.0.0.1 at free ports, keeps its files in a temporary folder, asks nothing
of the internet, and is gone when this ends, however it ends.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

APP = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
SWITCHES = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # else apps get a torch of their own
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=2, help="SuperNodes, and parts of the data")
    parser.add_argument("--output", type=Path, default=Path("runs/flower"), help="the adapter")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for everything")
    parser.add_argument("-c", "--run-config", default="", help="as of `flwr run`: 'rounds=2'")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # through every `finally`
    out, before = options.output.absolute(), time.time()
    config = f'clients={options.nodes} out="{out}" {options.run_config}'
    with deployment(options.nodes) as env:
        try:
            subprocess.run(
                [BIN / "flwr", "run", APP, "--stream", "-c", config],
                env=env,
                timeout=options.timeout,
                check=True,
            )
        except subprocess.TimeoutExpired:
            print(f"not done after {options.timeout:g} s", file=sys.stderr)
            return 1
    written = out / "adapter_model.safetensors"
    if not written.is_file() or written.stat().st_mtime < before:
        print("the run failed: no adapter was written", file=sys.stderr)
        return 1
    print(f"The global adapter is in {out}")
    return 0


@contextmanager
def deployment(nodes: int) -> Iterator[dict[str, str]]:
    """SuperLink and SuperNodes; the environment in which `flwr` finds them."""
    link, *runtimes = free_ports(nodes + 1)
    with tempfile.TemporaryDirectory(prefix="fedrot-flower-") as home:
        env = {**os.environ, **SWITCHES, "FLWR_HOME": home}
        env["PATH"] = os.pathsep.join([str(BIN), env.get("PATH", "")])
        Path(home, "config.toml").write_text(
            '[superlink]\ndefault = "here"\n\n[superlink.here]\n'
            f'address = "127.0.0.1:{link}"\ninsecure = true\n'
        )
        started: list[subprocess.Popen[bytes]] = []

        def start(name: str, *arguments: str) -> None:
            command = [BIN / name, "--insecure", "--host", "127.0.0.1", *arguments]
            started.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))

        with Path(home, "log.txt").open("wb") as log:
            try:
                start("flower-superlink", "--port", str(link))
                wait_for(link, started[0], Path(home, "log.txt"))
                for index, port in enumerate(runtimes):
                    node = ["--node-config", f"partition-id={index}", "--port", str(port)]
                    start("flower-supernode", "--superlink", f"127.0.0.1:{link}", *node)
                yield env
            finally:
                for process in reversed(started):
                    stop(process)
                kill_left_over(home)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"the SuperLink did not start:\n{log.read_text()}")


def stop(process: subprocess.Popen[bytes], seconds: float = 10) -> None:
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def kill_left_over(home: str, seconds: float = 10) -> None:
    """Flower's processes start others, in sessions of their own, that end a little later."""
    deadline = time.monotonic() + seconds
    while (pids := running(home)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def running(home: str) -> list[int]:
    """The processes that belong to this deployment (on Linux), by their environment."""
    found, mark = [], f"FLWR_HOME={home}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid()]


if __name__ == "__main__":
    sys.exit(main())
