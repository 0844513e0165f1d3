"""Loading the op library, and the one place where native failures become Python errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch

from fastgpt import _C, env
from fastgpt.errors import DeviceError, FastGPTError, InvalidArgument, OutOfMemory

P = ParamSpec("P")
R = TypeVar("R")

_LIBRARY = Path(__file__).resolve().parents[1] / "_ops.so"
_ERRORS: dict[str, type[FastGPTError]] = {
    "InvalidArgument": InvalidArgument,
    "OutOfMemory": OutOfMemory,
    "DeviceError": DeviceError,
}


def load_library() -> None:
    """Load the ops into torch.ops.fastgpt.

    Raises:
        ImportError: if the library was not built or does not fit the installed torch.
    """
    if not _LIBRARY.exists():
        raise ImportError(
            f"{_LIBRARY.name} is not built; run `pip install .` or "
            "`python setup.py build_ext --inplace` in the source tree"
        )
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 11):
        raise ImportError(f"torch {torch.__version__} is too old; pip install 'torch>=2.11'")
    torch.ops.load_library(str(_LIBRARY))
    _C.set_num_threads(env.num_threads())
    if isa := env.cpu_isa():
        _C.set_cpu_isa(isa)


def translate(error: RuntimeError) -> NoReturn:
    """Raise the FastGPT error that the native message names, else the error itself."""
    message = str(error)
    if message.startswith("fastgpt."):
        name, _, text = message.removeprefix("fastgpt.").partition(": ")
        raise _ERRORS[name](text) from None
    raise error


def call(op: Callable[..., Any], *args: Any) -> None:
    """Run a native op with its failures translated."""
    try:
        op(*args)
    except RuntimeError as error:
        translate(error)


def assume_constant_result(function: Callable[P, R]) -> Callable[P, R]:
    """Let torch.compile call a function while it traces and take the result as a constant.

    It is torch.compiler.assume_constant_result, which imports the whole compiler to set this mark:
    2 to 4 s of every program's start. The compile tests of tests/python/ops would see another mark.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


load_library()
