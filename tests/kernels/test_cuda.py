"""The CUDA kernels without a GPU: on an emulation of it (cuda_host), and what nvcc reports."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_host.build import COMPILER, CSRC, build
from gpu_checks import checks
from problems import planted

from fedrot_kernels.backends import cuda
from fedrot_kernels.backends.gpu import Layout

SCHEDULES = {"forward": 0, "reverse": 1, "random": 2}
NVCC = shutil.which("nvcc")
# Kinds of check that differ in the path which they take through the kernels.
CHECKS = dict(checks(full=False))

pytestmark = pytest.mark.usefixtures("one_thread")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


@pytest.fixture(scope="module")
def library(request):
    folder = request.config.cache.mkdir("cuda_host")
    return cuda.declare(ctypes.CDLL(str(build(Path(folder)))))


@pytest.fixture
def emulated(library, monkeypatch):
    """``emulated(schedule)``: from now on the backend runs on the CPU, in that order."""
    monkeypatch.setattr(cuda, "_library", lambda: library)

    def choose(schedule: str) -> None:
        library.cuda_host_schedule(SCHEDULES[schedule], 0)

    choose("forward")
    return choose


@needs_compiler
@pytest.mark.parametrize("name", CHECKS)
def test_checks_of_every_gpu_backend(name, emulated):
    """Each in one order of execution, in turns."""
    emulated(list(SCHEDULES)[list(CHECKS).index(name) % 3])
    CHECKS[name](cuda, "cpu")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("r", [4, 11, 16, 40])
def test_order_of_execution_changes_no_bit(r, dtype, emulated):
    """Several launches and units; every buffer is poisoned, counters and locks come back zero."""
    shapes = [(700, 300, r), (90, 1030, max(1, r - 3)), (17, 5, r)]
    inputs = planted(4, shapes, dtype, seed=r)
    weights = torch.tensor([1.0, 2.0, 0.5, 0.0])
    results = []
    for schedule in SCHEDULES:
        emulated(schedule)
        A = [torch.full_like(t, torch.nan) for t in inputs.ref_A]
        B = [torch.full_like(t, torch.nan) for t in inputs.ref_B]
        runner = cuda.Runner(tuple(inputs), weights, A, B, 0.4, "joint", True)
        layout, workspaces = runner._layout, runner._workspaces
        assert len(layout.launches) > 1
        for workspace in (layout.partials, layout.rotations, workspaces.memory):
            workspace.fill_(torch.nan)
        runner.run()
        assert not layout.counters.any() and not workspaces.taken.any()
        results.append([*A, *B, layout.rotations])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@needs_compiler
def test_fewer_workspaces_than_rotations(emulated, monkeypatch):
    """Who finds none free waits, whatever the order, and gets the same result."""
    monkeypatch.setattr(cuda._Workspaces, "most", 2)
    g = torch.Generator().manual_seed(0)
    M = torch.randn(23, 9, 9, generator=g)
    M[:, 3] = M[:, 4]  # deficient: none of them is done in registers
    results = []
    for schedule in SCHEDULES:
        emulated(schedule)
        results.append(cuda.polar(M, proper=True))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    eye = torch.eye(9).expand(23, 9, 9)
    torch.testing.assert_close(results[0] @ results[0].mT, eye, atol=1e-5, rtol=0)


def test_bad_input_is_named():
    A, B = torch.ones(2, 4), torch.ones(3, 2)
    with pytest.raises(ValueError, match="lora_A must hold clients x layers tensors"):
        cuda.align([], [], [], [])
    with pytest.raises(ValueError, match="lora_A must hold clients x layers tensors"):
        cuda.align([A] * 3, [B] * 3, [A] * 2, [B] * 2)


@needs_compiler
def test_errors_are_reported(emulated, library):
    layout = Layout(tuple(planted(1, [(3, 4, 2)])), None, 0.4, "joint")
    prepared = cuda._Prepared(layout, 0.4, True, weighted=False)
    # 2^40 units are more than a grid holds; nothing is launched.
    launch = (ctypes.c_int64 * 4)(0, 2**40, 0, 0)
    error = library.fedrot_cuda_run(
        ctypes.addressof(prepared._call), ctypes.addressof(launch), 1, None
    )
    assert error == b"more work in one launch than a grid can hold"


@needs_compiler
def test_structs_have_the_layout_of_call_h(tmp_path):
    fields = {"Call": cuda._Call, "Polar": cuda._Polar}
    checks = "\n".join(
        f'static_assert(offsetof({struct}, {name}) == {getattr(kind, name).offset}, "{name}");'
        f'static_assert(sizeof({struct}::{name}) == {getattr(kind, name).size}, "{name}");'
        for struct, kind in fields.items()
        for name, _ in kind._fields_
    )
    sizes = "\n".join(
        f"static_assert(sizeof({s}) == {ctypes.sizeof(k)});" for s, k in fields.items()
    )
    source = tmp_path / "layout.cpp"
    source.write_text(
        f'#include <cstddef>\n#include "{CSRC}/cuda/call.h"\nusing namespace fedrot::cuda;\n'
        f"using fedrot::cuda::Polar;\n{checks}\n{sizes}\n"
    )
    done = subprocess.run(
        [COMPILER, "-std=c++17", "-fsyntax-only", source], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@needs_compiler
def test_no_access_beyond_a_buffer(request):
    """In a process of its own, under AddressSanitizer: all memory is malloc's, tensors' too."""
    runtime = subprocess.run(
        [COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("no AddressSanitizer here")
    folder = request.config.cache.mkdir("cuda_host")
    # -O1: the accesses are the same, and compiling takes half of the time.
    asan = ("-O1", "-fsanitize=address", "-fno-omit-frame-pointer")
    library = build(Path(folder), *asan, some=True)
    script = (
        "import ctypes, sys\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "import torch\n"
        "from problems import planted\n"
        "from fedrot_kernels.backends import cuda\n"
        "library = cuda.declare(ctypes.CDLL(sys.argv[1]))\n"
        "cuda._library = lambda: library\n"
        "library.cuda_host_schedule(2, 0)\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    for r in (3, 8, 19, 34):\n"
        "        shapes = [(r + 5, 70, r), (260, r + 1, max(1, r - 1))]\n"
        "        inputs = planted(2, shapes, dtype, ranks=[r, max(1, r // 2)])\n"
        "        A, B = cuda.align_aggregate(*inputs)\n"
        "        assert all(bool(t.isfinite().all()) for t in [*A, *B])\n"
        "cuda.polar(torch.randn(9, 5, 7), proper=True)\n"
        "print('done')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(library), str(Path(__file__).parent)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "LD_PRELOAD": runtime,
            "ASAN_OPTIONS": "detect_leaks=0",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr[-4000:]


@needs_nvcc
@pytest.mark.parametrize("architecture", ["80", "90a", "100"])
def test_registers_and_spills(architecture, tmp_path):
    """From the compiler's report on the kernels of bfloat16 clients, which hold every path."""
    done = subprocess.run(
        [
            *(str(NVCC), "-std=c++17", "-O3", "-Xptxas=-v", "-cubin"),
            f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
            *(str(CSRC / "cuda" / "step_bf16.cu"), "-o", str(tmp_path / "step.cubin")),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    report = done.stderr
    spilled = {
        name: int(stores) + int(loads)
        for name, stores, loads in re.findall(
            r"for '?(\w+)'?\n\s+\d+ bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads",
            report,
        )
        + re.findall(
            r"Function properties for (\w+)\n\s+\d+ bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads",
            report,
        )
    }
    hot = [n for n in spilled if re.search(r"\d(covariance|covariance_mma|apply|apply_mma)I", n)]
    assert len(hot) >= 10, report
    assert {n: spilled[n] for n in hot if spilled[n]} == {}
    # What step itself and the rotations save around calls, once each.
    assert max(spilled.values()) <= 256, spilled
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert registers and max(registers) <= 168  # three blocks of 128 threads on a multiprocessor
