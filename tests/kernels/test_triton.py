"""Triton's kernels without a GPU: their values in the interpreter, and that they compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import planted
from triton_checks import CHECKS

triton = pytest.importorskip("triton", minversion="3.5")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    """What went wrong with each check, or ``None``."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "triton_checks.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", CHECKS)
def test_values_in_the_interpreter(interpreted, name):
    assert interpreted[name] is None, interpreted[name]


def test_forced_for_cpu_tensors():
    """FEDROT_BACKEND=triton in the interpreter: the operators and Plan run Triton's kernels."""
    script = (
        "import torch\n"
        "from problems import planted\n"
        "from triton_checks import patch_once_a_launch\n"
        "from fedrot_kernels import Plan, backends\n"
        "from fedrot_kernels.backends import reference, triton\n"
        "assert backends.chosen['cpu'] == 'triton'\n"
        "patch_once_a_launch()\n"
        "inputs = planted(2, [(9, 7, 2)])\n"
        "plan = Plan(*inputs)\n"
        "assert isinstance(plan._runner, triton.Runner)\n"
        "plan()\n"
        "A, B = torch.ops.fedrot.align_aggregate(*inputs)\n"
        "assert torch.equal(plan.A[0], A[0]) and torch.equal(plan.B[0], B[0])\n"
        "expected, _ = reference.align_aggregate(*inputs)\n"
        "torch.testing.assert_close(A[0], expected[0], atol=1e-5, rtol=0)\n"
        "inputs, called = planted(2, [(9, 700, 2)]), []\n"
        "kept, triton._gram = triton._gram, lambda *a, **o: called.append(1) or kept(*a, **o)\n"
        "torch.ops.fedrot.gram(*inputs)\n"
        "assert called == [1, 1]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TRITON_INTERPRET": "1", "FEDROT_BACKEND": "triton"}
        | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


POINTERS = {
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.float64: "*fp64",
    torch.float32: "*fp32",
}
# What every program of a target may take of shared memory.
TARGETS = {
    "sm_80": ("cuda", 80, 32, 99 * 1024),
    "sm_90": ("cuda", 90, 32, 99 * 1024),
    "sm_100": ("cuda", 100, 32, 99 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}


def compiled(kernel, target: str, arguments: dict[str, object]):
    """The kernel as a launch with these arguments would have it compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = dict(arguments)
    options = {name: arguments.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments.pop(parameter.name)
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i64" if abs(value) >= 1 << 31 else "i32"
    assert not arguments, "arguments that the kernel does not have"
    source = ASTSource(kernel, signature, constants, attributes)
    *gpu, shared = TARGETS[target]
    result = triton.compile(source, target=GPUTarget(*gpu), options=options)
    assert result.metadata.shared <= shared
    return result


@pytest.mark.parametrize(
    ("target", "client", "out", "r"),
    [
        *((target, torch.bfloat16, torch.bfloat16, 16) for target in TARGETS),
        ("sm_80", torch.float32, torch.float32, 4),
        ("sm_90", torch.float64, torch.float64, 3),
        ("sm_90", torch.bfloat16, torch.float32, 20),
        ("sm_90", torch.bfloat16, torch.float64, 4),
        ("sm_90", torch.float64, torch.float16, 16),
        ("gfx942", torch.float16, torch.float64, 8),
    ],
    ids=str,
)
def test_compiles(target, client, out, r, tmp_path, monkeypatch):
    """Every launch of a call, for GPUs that need not be there."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("nothing is compiled in the interpreter")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launched = launches(client, out, r, monkeypatch)
    assert len(launched) == 4
    for kernel, arguments in launched:
        code = compiled(kernel, target, arguments).asm
        if target == "gfx942":
            assert code["hsaco"]
        else:
            assert code["cubin"]
            assert "tf32" not in code["ptx"]
            if r % 8 == 0 and kernel is not launched[1][0]:
                assert "0x10" in code["ptx"] or "global.v4" in code["ptx"], "no wide loads"


def test_widened_factors_are_not_multiplied_as_tf32(tmp_path, monkeypatch):
    """A rank tile of 64 on sm_100, of which alone Triton does not keep "ieee" there."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("nothing is compiled in the interpreter")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, arguments = launches(torch.bfloat16, torch.float32, 40, monkeypatch)[0]
    assert kernel.__name__ == "covariance_kernel"
    assert "tf32" not in compiled(kernel, "sm_100", arguments).asm["ptx"]


@pytest.mark.parametrize(
    ("target", "client", "out", "r"),
    [
        ("sm_80", torch.float32, torch.float32, 4),
        ("sm_90", torch.bfloat16, torch.bfloat16, 16),
        ("sm_90", torch.float64, torch.float64, 3),
        ("sm_90", torch.bfloat16, torch.float64, 8),
        ("sm_90", torch.float64, torch.float16, 4),
        ("sm_100", torch.bfloat16, torch.float32, 20),
        ("sm_100", torch.float16, torch.float16, 16),
        ("gfx942", torch.bfloat16, torch.bfloat16, 16),
    ],
    ids=str,
)
def test_blocks_compile(target, client, out, r, tmp_path, monkeypatch):
    """``gram``, of one factor in parts and of the other in one, and ``combine``."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("nothing is compiled in the interpreter")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from fedrot_kernels.backends import triton as backend

    inputs = planted(2, [(64, 1536, r)], client)
    inputs.ref_A[:], inputs.ref_B[:] = (
        [t.to(out) for t in side] for side in (inputs.ref_A, inputs.ref_B)
    )
    launched = recorded(backend, monkeypatch, "gram_kernel", "gram_sum_kernel", "apply_kernel")
    dtype = backend.gram(*inputs)[0].dtype
    mix = torch.empty(1, 2, r, r, dtype=dtype)
    backend.combine(*inputs, mix, mix)
    names = [kernel.__name__ for kernel, _ in launched]
    assert names == ["gram_kernel", "gram_sum_kernel", "gram_kernel", "apply_kernel"]
    for kernel, arguments in launched:
        code = compiled(kernel, target, arguments).asm
        if target == "gfx942":
            assert code["hsaco"]
            continue
        assert code["cubin"]
        assert "tf32" not in code["ptx"]
        if kernel.__name__ == "gram_kernel":
            # 16-bit and float64 products in the matrix units, wide loads where rows allow them.
            in_units = client == out != torch.float32 or torch.float64 in (client, out)
            assert ("mma" in code["ptx"]) == in_units
            wide = "0x10" in code["ptx"] or "global.v4" in code["ptx"]
            assert r % 8 or client != out or wide


def launches(client, out, r: int, monkeypatch) -> list[tuple[object, dict[str, object]]]:
    """Those of ``align_aggregate``."""
    from fedrot_kernels.backends import triton as backend
    from fedrot_kernels.backends.gpu import Layout

    inputs = planted(2, [(64, 48, r)], client)
    inputs.ref_A[:], inputs.ref_B[:] = (
        [t.to(out) for t in side] for side in (inputs.ref_A, inputs.ref_B)
    )
    outputs = [torch.empty_like(inputs.ref_A[0])], [torch.empty_like(inputs.ref_B[0])]
    weights = torch.ones(2, dtype=torch.float64)
    layout = Layout(tuple(inputs), weights, 0.4, "joint", out=outputs)
    names = ("covariance_kernel", "rotation_kernel", "apply_kernel")
    launched = recorded(backend, monkeypatch, *names)
    backend.Launches(layout, 0.4, True, True, None)()
    return launched


def test_no_more_clients_than_a_grid_holds(monkeypatch):
    from fedrot_kernels.backends import triton as backend

    monkeypatch.setattr(backend, "_MOST_BLOCKS", 1)
    with pytest.raises(ValueError, match="fewer clients of rank 8 in a call than 2"):
        launches(torch.float32, torch.float32, 8, monkeypatch)


def recorded(backend, monkeypatch, *names: str) -> list[tuple[object, dict[str, object]]]:
    """From now on what these kernels would be launched with, instead of launches."""
    launched: list[tuple[object, dict[str, object]]] = []
    for name in names:
        kernel = getattr(backend, name)
        recorder = Recorder(lambda arguments, kernel=kernel: launched.append((kernel, arguments)))
        monkeypatch.setattr(backend, name, recorder)
    return launched


class Recorder:
    """Stands for a kernel: ``kernel[grid](**arguments)``."""

    def __init__(self, record) -> None:
        self._record = record

    def __getitem__(self, grid):
        return lambda **arguments: self._record(arguments)
