"""Shared by every test: GPU tests run where a GPU is."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords also hold the names of folders
            item.add_marker(skip)
