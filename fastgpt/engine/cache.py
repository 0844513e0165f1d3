"""How many KV blocks the memory budget leaves."""

from fastgpt.engine.block_manager import num_blocks_for
from fastgpt.errors import OutOfMemory

__all__ = ["plan_num_blocks"]


def plan_num_blocks(
    *, left_bytes: int, block_bytes: int, max_batch: int, max_length: int, block_size: int
) -> int:
    """Return the number of KV blocks: as many as fit, at most max_batch * max_length tokens.

    Raises:
        OutOfMemory: if not even one request of max_length tokens fits.

    >>> plan_num_blocks(
    ...     left_bytes=10_000, block_bytes=100, max_batch=2, max_length=40, block_size=8
    ... )
    10
    """
    one_request = num_blocks_for(max_length, block_size)
    num_blocks = min(left_bytes // block_bytes, max_batch * one_request)
    if num_blocks < one_request:
        raise OutOfMemory(
            f"the KV cache of one request of {max_length} tokens takes "
            f"{one_request * block_bytes / 1e6:.1f}MB and {max(left_bytes, 0) / 1e6:.1f}MB are "
            "left; raise memory_pool_size or lower max_length"
        )
    return num_blocks
