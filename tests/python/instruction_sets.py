"""CPU kernels of one instruction set after another."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fastgpt import _C
from fastgpt.errors import InvalidArgument

BEST = _C.cpu_isa()


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Run CPU kernels of one set; a set this processor lacks is skipped, not replaced.

    "portable", "avx2", "avx512", or "avx512bf16": with dot products of bfloat16.
    """
    default = _C.use_bf16_dot()
    try:
        try:
            _C.set_cpu_isa(name.removesuffix("bf16"))
            _C.set_bf16_dot(name == "avx512bf16")
        except InvalidArgument as error:
            pytest.skip(str(error))
        yield
    finally:
        _C.set_cpu_isa(BEST)
        _C.set_bf16_dot(default)
