"""`fastgpt doctor`: what this machine has, which kernels will run, and what is wrong."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
import typer

from fastgpt import _C
from fastgpt.errors import DeviceError, FastGPTError
from fastgpt.units import format_bytes

__all__ = ["Finding", "doctor", "examine", "main"]

MIN_DRIVER = 580  # the first that runs CUDA 13 programs
MIN_CAPABILITY = (7, 5)


@dataclass(frozen=True)
class Finding:
    """One line of the report; `problem` says what to do about it, or is empty."""

    name: str
    value: str
    problem: str = ""


def _versions() -> Iterator[Finding]:
    try:
        yield Finding("fastgpt", importlib.metadata.version("fastgpt-optimizer"))
    except importlib.metadata.PackageNotFoundError:
        yield Finding("fastgpt", "source tree, not installed")
    yield Finding("python", f"{platform.python_version()} ({sys.executable})")
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield Finding("torch", f"{torch.__version__} ({cuda})")
    library = Path(_C.__file__).resolve().parent
    size = sum(path.stat().st_size for path in library.glob("*.so"))
    architectures = _C.cuda_architectures()
    kernels = f"CUDA kernels for {architectures}" if architectures else "no CUDA kernels"
    yield Finding("library", f"{format_bytes(size)}, {kernels}")


def _cpu() -> Iterator[Finding]:
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    cores = len(os.sched_getaffinity(0))
    free, total = _C.device_memory(-1)
    yield Finding("cpu", f"{model}, {cores} cores usable")
    yield Finding("memory", f"{format_bytes(free)} free of {format_bytes(total)}")
    problem = ""
    try:
        import_module("fastgpt.ops")  # applies FASTGPT_NUM_THREADS and FASTGPT_CPU_ISA
    except (FastGPTError, ImportError, OSError) as error:
        problem = str(error)
    yield Finding("cpu kernels", f"{_C.cpu_isa()}, {_C.num_threads()} threads", problem)


def _kernels_for(capability: tuple[int, int]) -> tuple[str, str]:
    """Return which of the built kernels a device runs, and a problem if it runs none or PTX."""
    built = _C.cuda_architectures().split()
    name = f"{capability[0]}.{capability[1]}"
    machine_code = [arch for arch in built if not arch.endswith("+PTX")]
    if name in machine_code or f"{name}a" in machine_code:
        return f"machine code for {name}", ""
    # Machine code of one major version also runs on later minor ones.
    same_major = [a for a in machine_code if a.split(".")[0] == name.split(".")[0] and a <= name]
    if same_major and not same_major[-1].endswith("a"):
        return f"machine code for {same_major[-1]}", ""
    ptx = [a.removesuffix("+PTX") for a in built if a.endswith("+PTX")]
    if usable := [a for a in ptx if float(a) <= float(name)]:
        return (
            f"PTX of {usable[-1]}, compiled by the driver at start",
            f"no machine code for {name}; rebuild with TORCH_CUDA_ARCH_LIST={name} for speed",
        )
    return "none", f"no kernel fits {name}; rebuild with TORCH_CUDA_ARCH_LIST={name}"


def _gpus() -> Iterator[Finding]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:  # the library raises many types; all mean: no usable driver
        yield Finding("nvidia driver", f"not available ({error})")
        return
    driver = pynvml.nvmlSystemGetDriverVersion()
    old = int(driver.split(".")[0]) < MIN_DRIVER
    yield Finding(
        "nvidia driver",
        driver,
        f"driver {driver} is older than {MIN_DRIVER}; install {MIN_DRIVER} or newer" if old else "",
    )
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        problem = ""
        if capability < MIN_CAPABILITY:
            problem = f"compute capability {capability} is below {MIN_CAPABILITY}; not supported"
        yield Finding(
            f"gpu {index}",
            f"{pynvml.nvmlDeviceGetName(handle)}, compute capability "
            f"{capability[0]}.{capability[1]}, {format_bytes(memory.free)} free of "
            f"{format_bytes(memory.total)}",
            problem,
        )
        try:
            persistent = bool(pynvml.nvmlDeviceGetPersistenceMode(handle))
            yield Finding(
                f"gpu {index} persistence mode",
                "on" if persistent else "off",
                "" if persistent else "nvidia-smi -pm 1 saves about a second at each start",
            )
        except pynvml.NVMLError:
            yield Finding(f"gpu {index} persistence mode", "not readable here")
        if _C.cuda_architectures():
            kernels, problem = _kernels_for((capability[0], capability[1]))
            yield Finding(f"gpu {index} kernels", kernels, problem)
        else:
            yield Finding(
                f"gpu {index} kernels",
                "none",
                "this build has no CUDA kernels; rebuild with nvcc and FASTGPT_CUDA=1",
            )
    if not torch.cuda.is_available():
        yield Finding(
            "torch and the gpu",
            "torch sees no CUDA device",
            f"torch {torch.__version__} cannot use the GPU; pip install a CUDA build of torch",
        )
    elif _C.cuda_architectures():
        try:
            _C.device_memory(0)
        except DeviceError as error:
            yield Finding("cuda runtime", "fails", str(error))


def examine() -> list[Finding]:
    """Return every finding, in the order of the report."""
    return [*_versions(), *_cpu(), *_gpus()]


def doctor() -> None:
    """Print versions, devices and kernels; exit with 1 if something is wrong."""
    raise typer.Exit(main())


def main() -> int:
    """Print the report; return 1 if something is wrong, else 0."""
    findings = examine()
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.name:<{width}}  {finding.value}")
    problems = [finding for finding in findings if finding.problem]
    print()
    for finding in problems:
        print(f"problem: {finding.name}: {finding.problem}")
    if not problems:
        print("no problem found")
    return 1 if problems else 0
