"""Causal attention over the paged KV cache in plain torch, one request at a time."""

import torch
from torch import Tensor


def attention(
    q: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    scale: float,
    max_seqlen_q: int,
    max_seq_len: int,
    *,
    head_dim_v: int | None = None,
    compute: torch.dtype = torch.float64,
) -> Tensor:
    head_dim_v = q.shape[2] if head_dim_v is None else head_dim_v
    return _attend(
        q,
        kv_cache[:, 0, ..., : q.shape[2]],
        kv_cache[:, 1, ..., :head_dim_v],
        block_tables,
        cu_seqlens_q,
        seq_lens,
        scale,
        compute,
    )


def mla_attention(
    q: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    scale: float,
    max_seqlen_q: int,
    max_seq_len: int,
    *,
    head_dim_v: int = 512,
    compute: torch.dtype = torch.float64,
) -> Tensor:
    keys = kv_cache.unsqueeze(2)
    return _attend(
        q, keys, keys[..., :head_dim_v], block_tables, cu_seqlens_q, seq_lens, scale, compute
    )


def _attend(
    q: Tensor,
    keys: Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim_qk]
    values: Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim_v]
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    scale: float,
    compute: torch.dtype,
) -> Tensor:
    block_size, num_kv_heads = keys.shape[1], keys.shape[2]
    group = q.shape[1] // num_kv_heads
    out = torch.zeros(q.shape[0], q.shape[1], values.shape[-1], dtype=q.dtype, device=q.device)
    starts = cu_seqlens_q.tolist()
    for r, seq_len in enumerate(seq_lens.tolist()):
        q_len = starts[r + 1] - starts[r]
        if seq_len == 0 or q_len == 0:
            continue
        blocks = block_tables[r, : -(-seq_len // block_size)].long()
        k = keys[blocks].flatten(0, 1)[:seq_len].to(compute).repeat_interleave(group, dim=1)
        v = values[blocks].flatten(0, 1)[:seq_len].to(compute).repeat_interleave(group, dim=1)
        rows = slice(starts[r], starts[r + 1])
        scores = torch.einsum("qhd,khd->hqk", q[rows].to(compute), k) * scale
        positions = torch.arange(seq_len, device=q.device)
        hidden = positions[None, :] > positions[seq_len - q_len :, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
    return out
