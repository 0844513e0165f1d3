"""Fixtures shared by the Python tests: the devices an op runs on."""

from collections.abc import Iterator

import pytest
import torch

from fastgpt import _C


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each backend in turn; cuda only where tests marked gpu are selected."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(params=["portable", "avx2", "avx512"])
def cpu_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the CPU kernels in turn; skipped where the processor lacks it."""
    before = _C.cpu_isa()
    try:
        _C.set_cpu_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _C.set_cpu_isa(before)
