"""Grouped-query attention over the paged cache (Llama, Qwen2, Qwen3)."""

from torch import Tensor

from fastgpt import ops
from fastgpt.batch import Batch
from fastgpt.layers.kv_cache import LayerKV
from fastgpt.layers.linear import Projection
from fastgpt.layers.norm import RmsNorm

__all__ = ["GqaAttention", "Workspace"]


class Workspace:
    """Scratch of the attention kernels, shared by all layers of a model; None = one split."""

    __slots__ = ("tensor",)

    def __init__(self) -> None:
        self.tensor: Tensor | None = None


class GqaAttention:
    """Queries, keys and values from one projection, rotary, cache write, attention, output.

    qkv: [hidden] -> num_heads * head_dim | num_kv_heads * head_dim | num_kv_heads * head_dim.
    q_norm, k_norm: per-head normalization before rotary (Qwen3), or None.
    cos_sin: the rotary table, [max_position, head_dim], float32.
    """

    def __init__(
        self,
        *,
        qkv: Projection,
        output: Projection,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        cos_sin: Tensor,
        q_norm: RmsNorm | None,
        k_norm: RmsNorm | None,
        workspace: Workspace,
    ) -> None:
        self.qkv = qkv
        self.output = output
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.cos_sin = cos_sin
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.workspace = workspace
        self.scale = head_dim**-0.5

    def __call__(self, x: Tensor, batch: Batch, kv: LayerKV) -> Tensor:
        """Return the attention branch of x, [num_tokens, hidden]; writes new keys and values.

        kv: this layer's slots of the cache.
        """
        heads, kv_heads = self.num_heads, self.num_kv_heads
        packed = self.qkv(x).view(-1, heads + 2 * kv_heads, self.head_dim)
        q, k, v = packed.split_with_sizes((heads, kv_heads, kv_heads), 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        ops.rotary_write_kv(
            batch.positions, self.cos_sin, q, k, v, batch.slot_mapping, kv.rows, kv_scale=kv.scale
        )
        out = ops.attention(
            q,
            kv.rows,
            batch.block_tables,
            batch.cu_seqlens_q,
            batch.seq_lens,
            self.scale,
            batch.max_seqlen_q,
            batch.max_seq_len,
            workspace=self.workspace.tensor,
            kv_scale=kv.scale,
        )
        return self.output(out.view(-1, heads * self.head_dim))
