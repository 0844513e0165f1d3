"""FastGPT: fast and trustworthy serving of DeepSeek-R1-family models.

Public names are imported when they are first used, so `import fastgpt` is instant and the command
line starts without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt import ops
    from fastgpt.engine import Engine
    from fastgpt.memory import GPTMemoryPool
    from fastgpt.quant import Quantizer, load
    from fastgpt.request import SamplingParams

__all__ = ["Engine", "GPTMemoryPool", "Quantizer", "SamplingParams", "load", "ops"]

_HOMES = {
    "Engine": "fastgpt.engine",
    "GPTMemoryPool": "fastgpt.memory",
    "Quantizer": "fastgpt.quant",
    "SamplingParams": "fastgpt.request",
    "load": "fastgpt.quant",
    "ops": "fastgpt.ops",
}


def __getattr__(name: str) -> Any:
    if name == "_C":
        return _native()
    if name not in _HOMES:
        raise AttributeError(f"module 'fastgpt' has no attribute {name!r}")
    home = import_module(_HOMES[name])
    value = home if name == "ops" else getattr(home, name)
    globals()[name] = value
    return value


def _native() -> Any:
    """Return the class module; every import of it passes here first."""
    try:
        return import_module("fastgpt._C")
    except ModuleNotFoundError as error:
        if error.name != "fastgpt._C":
            raise
        raise ImportError(
            "fastgpt._C is not built; run `pip install .` or "
            "`python setup.py build_ext --inplace` in the source tree"
        ) from None


def __dir__() -> list[str]:
    return sorted(__all__)
