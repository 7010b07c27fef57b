"""Compiles csrc/cuda for the CPU emulation in this folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def build(folder: Path, *options: str, some: bool = False) -> Path:
    """The kernels as a shared library in ``folder``, compiled unless it is there already. ``some``:
    without those of float64 and float16 clients, half of the time.

    Raises:
        RuntimeError: the compiler refuses; the message has its output.
    """
    sources = [*sorted((CSRC / "cuda").glob("*.cu")), HERE / "emulator.cpp"]
    if some:
        sources = [s for s in sources if s.stem not in ("step_f64", "step_f16")]
        sources.append(HERE / "left_out.cpp")
    command = [str(COMPILER), "-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{HERE}", *options]
    digest = hashlib.sha256(" ".join([*command, str(some)]).encode())
    for file in sorted([*CSRC.rglob("*"), *HERE.glob("*")]):
        if file.suffix in (".cu", ".cuh", ".cpp", ".h"):
            digest.update(file.read_bytes())
    library = folder / f"cuda-host-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library

    def compile_one(source: Path) -> str:
        to = folder / f"{source.stem}-{os.getpid()}.o"
        _run([*command, "-x", "c++", "-c", str(source), "-o", str(to)])
        return str(to)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    unfinished = library.with_suffix(f".{os.getpid()}")
    _run([*command, "-shared", *objects, "-o", str(unfinished)])
    for file in objects:
        os.remove(file)
    unfinished.replace(library)
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
