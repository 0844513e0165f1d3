"""The pool behind torch's own allocator: C functions by name, one pair for each slot."""

from pathlib import Path

import torch

from fastgpt import _C

__all__ = ["pluggable_allocator"]

# Functions that torch's caching allocator calls may be called until the process ends.
_ALLOCATORS: dict[int, torch.cuda.memory.CUDAPluggableAllocator] = {}


def pluggable_allocator(slot: int) -> torch.cuda.memory.CUDAPluggableAllocator:
    """Return torch's wrapper of our C functions of a slot."""
    if slot not in _ALLOCATORS:
        library = Path(_C.__file__).with_name("libfastgpt.so")
        _ALLOCATORS[slot] = torch.cuda.memory.CUDAPluggableAllocator(
            str(library), f"fastgpt_allocate_{slot}", f"fastgpt_free_{slot}"
        )
    return _ALLOCATORS[slot]
