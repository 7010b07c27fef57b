"""What was measured on, and with which versions."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fedrot
from fedrot_kernels.backends import cpu

GIB = 2**30


def describe(device: str, threads: int) -> dict[str, Any]:
    """Processor, versions, commit and date, for the results file."""
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "fedrot": fedrot.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": cores(),
        "instruction_set": cpu.instruction_set,
        "device": device,
        "threads": threads,
        "last_level_cache": last_level_cache(),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def kind(machine: dict[str, Any]) -> str:
    """The name of the results file: one a kind of machine."""
    if machine["device"] == "cuda":
        return "cuda-" + "-".join(machine["gpu"].lower().split())
    arch = machine["system"].split()[-1]
    plain = re.sub(r"\(.*?\)|\b(processor|cpu)\b|@.*", " ", machine["cpu"].lower())
    model = "-".join(re.findall(r"[a-z0-9]+", plain))
    return f"cpu-{arch}-{model}-{machine['instruction_set']}-{machine['threads']}threads"


def cold_bytes(device: str) -> int:
    """Bytes of input that no cache holds: twice the last level, within 256 MiB, 2 GiB and an
    eighth of the memory."""
    memory = memory_bytes()
    cache = last_level_cache()
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        memory, cache = properties.total_memory, getattr(properties, "L2_cache_size", 64 * 2**20)
    return int(max(256 * 2**20, min(2 * cache, 2 * GIB, memory // 8)))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 8 * GIB


def last_level_cache() -> int:
    """Bytes; 32 MiB where the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes, default=32 * 2**20)


def cpu_model(info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, with its family and model where it has no number: virtual machines hide
    which of its kind a processor is."""
    try:
        first = info.read_text().partition("\n\n")[0].splitlines()
    except OSError:
        first = []
    found = {name.strip(): value.strip() for name, _, value in (s.partition(":") for s in first)}
    name = found.get("model name")
    if not name:
        return platform.processor() or platform.machine()
    if re.search(r"\d", name) or not {"cpu family", "model"} <= found.keys():
        return name
    return f"{name} family {found['cpu family']} model {found['model']}"


def commit() -> str | None:
    """The commit of the source tree that this package runs from, ``None`` outside of one."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # not some other project's tree
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=10", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
