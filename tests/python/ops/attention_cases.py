"""Random ragged batches for the attention tests."""

from dataclasses import dataclass

import torch
from torch import Tensor

# (query rows, keys) of each request: prefill, a later chunk, decode, padding rows of both kinds.
MIXED = [(5, 5), (7, 40), (1, 33), (0, 0), (1, 1), (2, 0), (0, 9), (1, 130)]

# The same for prefill kernels: their tiles have 64 or 128 rows and keys, so lengths stand around
# those; then primes, a late chunk, more queries than one tile of a head, empty requests, a decode.
PREFILL = [
    (1, 1), (129, 129), (127, 640), (0, 0), (64, 191), (1, 257), (300, 300), (31, 31), (9, 521),
    (13, 0), (128, 128), (0, 70), (200, 1009),
]  # fmt: skip


@dataclass
class Case:
    """A random ragged batch over a cache with unused NaN-poisoned blocks and slots."""

    q: Tensor
    kv_cache: Tensor
    block_tables: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    scale: float
    max_seqlen_q: int
    max_seq_len: int

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float, int, int]:
        return (
            self.q, self.kv_cache, self.block_tables, self.cu_seqlens_q, self.seq_lens, self.scale,
            self.max_seqlen_q, self.max_seq_len,
        )  # fmt: skip


def make_case(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int, int, int],
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    block_size: int = 16,
    extra_blocks: int = 3,
    mla: bool = False,
    seed: int = 0,
) -> Case:
    """Build a batch; in MLA form the cache row is head_dim_qk wide and shared by all heads."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads, dim_qk, dim_v = heads
    counts = [-(-seq_len // block_size) for _, seq_len in lengths]
    num_blocks = sum(counts) + 2
    ids = torch.randperm(num_blocks, generator=generator).int()
    # Entries past a request's blocks are never read: they name blocks that do not exist.
    tables = torch.full((len(lengths), max(counts, default=0) + extra_blocks), 2**30).int()
    row = (block_size, dim_qk) if mla else (2, block_size, num_kv_heads, max(dim_qk, dim_v))
    layers = torch.full((num_blocks, 3, *row), float("nan"))  # blocks carry three layers
    used = 0
    for r, (_, seq_len) in enumerate(lengths):
        tables[r, : counts[r]] = ids[used : used + counts[r]]
        used += counts[r]
        for position in range(seq_len):
            block, offset = int(tables[r, position // block_size]), position % block_size
            if mla:
                layers[block, 1, offset] = torch.randn(dim_qk, generator=generator)
            else:
                values = torch.randn(2, *row[2:], generator=generator)
                values[0, :, dim_qk:] = float("nan")
                values[1, :, dim_v:] = float("nan")
                layers[block, 1, :, offset] = values
    starts = torch.tensor([0, *(q_len for q_len, _ in lengths)]).cumsum(0).int()
    q = torch.randn(int(starts[-1]), num_heads, dim_qk, generator=generator) * 2
    return Case(
        q.to(device, dtype),
        layers.to(device, cache_dtype or dtype)[:, 1],
        tables.to(device),
        starts.to(device),
        torch.tensor([seq_len for _, seq_len in lengths]).int().to(device),
        dim_qk**-0.5,
        max((q_len for q_len, _ in lengths), default=0),
        max((seq_len for _, seq_len in lengths), default=0),
    )
