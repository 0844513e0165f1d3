"""Shared by every test: GPU tests run where a GPU is; a test says the same at every run."""

import pytest
import torch
from hypothesis import HealthCheck, settings

# No deadline: a busy machine is slow, not wrong. The same examples each time: a failure repeats.
settings.register_profile(
    "fastgpt", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fastgpt")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords also hold the names of folders
            item.add_marker(skip)
