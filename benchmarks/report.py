"""What every benchmark prints about where it ran."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastgpt import _C

__all__ = ["machine", "median", "print_machine", "streaming_read_gb_s"]

ROOT = Path(__file__).resolve().parents[1]


def median(values: list[float]) -> float:
    """Return the middle value."""
    return sorted(values)[len(values) // 2]


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def machine(device: str) -> dict[str, Any]:
    """Return what a reader needs to judge a figure: device, versions, commit, command."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "command": " ".join(sys.argv),
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = properties.name
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["cuda"] = torch.version.cuda
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line for line in lines if line.startswith("model name")), "cpu: unknown")
        facts["device"] = model.partition(":")[2].strip()
        facts["threads"] = _C.num_threads()
        facts["cores"] = len(os.sched_getaffinity(0))
    return facts


def print_machine(device: str) -> dict[str, Any]:
    """Print machine() in one line and return it."""
    facts = machine(device)
    print("  ".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    return facts


def streaming_read_gb_s(device: str, num_bytes: int | None = None) -> float:
    """Return how fast a sum reads memory, GB/s: the limit of everything bound by memory."""
    cuda = device.startswith("cuda")
    if num_bytes is None:
        num_bytes = (4 << 30) if cuda else (1 << 30)
    data = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    threads = torch.get_num_threads()
    torch.set_num_threads(_C.num_threads())
    try:
        times = []
        for _ in range(8):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            data.sum()
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return num_bytes / min(times) / 1e9
