"""Which KV-cache block belongs to which request."""

from fastgpt.errors import OutOfMemory
from fastgpt.request import Request

__all__ = ["BlockManager", "num_blocks_for"]


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Return how many blocks hold num_tokens.

    >>> num_blocks_for(33, block_size=32)
    2
    """
    return -(-num_tokens // block_size)


class BlockManager:
    """Owns the free ids of the cache's equal blocks and fills the requests' block tables.

    Freed blocks are used again first (their lines may still be in a cache). Only the engine's
    thread calls it.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that no request holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that requests hold."""
        return self.num_blocks - len(self._free)

    def missing(self, request: Request, num_tokens: int) -> int:
        """Return how many more blocks the request needs to hold num_tokens in all."""
        return max(0, num_blocks_for(num_tokens, self.block_size) - len(request.block_table))

    def grow(self, request: Request, num_tokens: int) -> None:
        """Append blocks to the request's table until it holds num_tokens in all.

        Raises:
            OutOfMemory: if too few blocks are free; the table is unchanged.
        """
        missing = self.missing(request, num_tokens)
        if missing > len(self._free):
            raise OutOfMemory(
                f"request {request.request_id} needs {missing} KV blocks, {len(self._free)} of "
                f"{self.num_blocks} are free"
            )
        for _ in range(missing):
            request.block_table.append(self._free.pop())

    def free(self, request: Request) -> None:
        """Take back all blocks of the request and empty its table."""
        self._free.extend(reversed(request.block_table))
        request.block_table.clear()

    def check_integrity(self, requests: list[Request]) -> None:
        """Raise AssertionError unless every block is free or in exactly one table of `requests`."""
        held = [block for request in requests for block in request.block_table]
        everything = sorted(held + self._free)
        assert everything == list(range(self.num_blocks)), (
            f"{len(held)} held and {len(self._free)} free blocks are not the {self.num_blocks} ids"
        )
