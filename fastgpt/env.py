"""Every environment variable FastGPT reads at run time, its meaning and its default.

Nothing else in the package reads `os.environ`; the README's table is checked against `VARIABLES`.
Build variables (FASTGPT_CUDA, MAX_JOBS, TORCH_CUDA_ARCH_LIST) belong to setup.py.
"""

import os
from dataclasses import dataclass

from fastgpt.errors import ConfigError

__all__ = ["VARIABLES", "Variable", "cpu_isa", "flag", "log_level", "num_threads", "text"]


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, the value used when unset, and what it does."""

    name: str
    default: str
    doc: str


VARIABLES: tuple[Variable, ...] = (
    Variable(
        "FASTGPT_LOG_LEVEL", "info", "Log level: debug, info, warning or error; --log-level wins."
    ),
    Variable(
        "FASTGPT_NUM_THREADS",
        "",
        "Threads of the CPU kernels; unset: the CPUs this process may use.",
    ),
    Variable(
        "FASTGPT_CPU_ISA",
        "",
        "CPU kernels: portable, avx2 or avx512; unset: the best this CPU has.",
    ),
    Variable("FASTGPT_FORCE_CPU", "0", "1: device `auto` means the CPU, whatever GPU is present."),
    Variable(
        "FASTGPT_SYNC", "0", "1: wait for the device in each step, so a failure shows where it is."
    ),
    Variable(
        "FASTGPT_CHECK_NUMERICS", "0", "1: stop with an error when a logit is NaN or infinite."
    ),
    Variable(
        "FASTGPT_DISABLE_CUDA_GRAPH",
        "0",
        "1: launch decode kernels one by one instead of by graph.",
    ),
    Variable(
        "FASTGPT_DISABLE_PDL",
        "0",
        "1: a kernel starts when the one before has ended, but for the second of one attention.",
    ),
)

_BY_NAME = {variable.name: variable for variable in VARIABLES}


def text(name: str) -> str:
    """Return the variable's value, or its default when unset or empty."""
    variable = _BY_NAME[name]
    return os.environ.get(name, "") or variable.default


def flag(name: str) -> bool:
    """Return whether the variable is 1 (or true, yes, on).

    Raises:
        ConfigError: if the value is none of 0, 1, false, true, no, yes, off, on.
    """
    value = text(name).lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("0", "false", "no", "off", ""):
        return False
    raise ConfigError(f"{name} is {value!r}; expected 0 or 1")


def log_level() -> str:
    """Return FASTGPT_LOG_LEVEL in lower case."""
    return text("FASTGPT_LOG_LEVEL").lower()


def num_threads() -> int:
    """Return FASTGPT_NUM_THREADS, or the number of CPUs this process may use.

    Raises:
        ConfigError: if the value is not a positive integer.
    """
    value = text("FASTGPT_NUM_THREADS")
    if not value:
        return len(os.sched_getaffinity(0))
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"FASTGPT_NUM_THREADS is {value!r}; expected a positive integer")
    return int(value)


def cpu_isa() -> str | None:
    """Return FASTGPT_CPU_ISA, or None when the best instruction set shall be used.

    Raises:
        ConfigError: if the value is not portable, avx2 or avx512.
    """
    value = text("FASTGPT_CPU_ISA").lower()
    if not value:
        return None
    if value not in ("portable", "avx2", "avx512"):
        raise ConfigError(f"FASTGPT_CPU_ISA is {value!r}; expected portable, avx2 or avx512")
    return value
