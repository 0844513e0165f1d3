"""Multi-head latent attention in absorbed form, for prefill and decode alike.

A head's score is q_nope · (W_uk c) + q_pe · k_pe = (W_ukᵀ q_nope) · c + q_pe · k_pe, so the cache
holds one row c | k_pe per token for all heads, and W_uk, W_uv are applied to queries and outputs.
Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
"""

from torch import Tensor

from fastgpt import ops
from fastgpt.batch import Batch
from fastgpt.layers.attention import Workspace
from fastgpt.layers.kv_cache import LayerKV
from fastgpt.layers.linear import Projection
from fastgpt.layers.norm import RmsNorm
from fastgpt.ops import scratch

__all__ = ["MlaAttention"]


class MlaAttention:
    """Latent attention of DeepSeek-V2 and V3.

    down: [hidden] -> q_lora_rank | kv_lora_rank | rope_dim, or without query compression
        num_heads * (nope_dim + rope_dim) | kv_lora_rank | rope_dim.
    q_norm, q_up: normalization and expansion of the query latent; None without compression.
    kv_norm: normalization of the key-value latent.
    key_up: W_ukᵀ, [num_heads, kv_lora_rank, nope_dim]; value_up: W_uv, [num_heads, v_dim,
        kv_lora_rank].
    """

    def __init__(
        self,
        *,
        down: Projection,
        q_norm: RmsNorm | None,
        q_up: Projection | None,
        kv_norm: RmsNorm,
        key_up: Tensor | ops.ArrangedWeight,
        value_up: Tensor | ops.ArrangedWeight,
        output: Projection,
        num_heads: int,
        nope_dim: int,
        rope_dim: int,
        latent_dim: int,
        v_dim: int,
        scale: float,
        cos_sin: Tensor,
        interleaved: bool,
        workspace: Workspace,
    ) -> None:
        self.down = down
        self.q_norm = q_norm
        self.q_up = q_up
        self.kv_norm = kv_norm
        self.key_up = key_up
        self.value_up = value_up
        self.output = output
        self.num_heads = num_heads
        self.nope_dim = nope_dim
        self.rope_dim = rope_dim
        self.latent_dim = latent_dim
        self.out_width = num_heads * v_dim
        self.split = (
            down.out_features - self.latent_dim - rope_dim,
            self.latent_dim,
            rope_dim,
        )
        self.scale = scale
        self.cos_sin = cos_sin
        self.interleaved = interleaved
        self.workspace = workspace

    def __call__(self, x: Tensor, batch: Batch, kv: LayerKV) -> Tensor:
        """Return the attention branch of x, [num_tokens, hidden]; writes new latents.

        kv: this layer's slots of the cache.
        """
        num_tokens = x.shape[0]
        q, kv_latent, k_pe = self.down(x).split_with_sizes(self.split, 1)
        if self.q_norm is not None and self.q_up is not None:
            q = self.q_up(self.q_norm(q))
        q = q.view(num_tokens, self.num_heads, self.nope_dim + self.rope_dim)
        kv_latent = self.kv_norm(kv_latent)

        shape = (num_tokens, self.num_heads, self.latent_dim + self.rope_dim)
        absorbed = scratch.empty(shape, x.dtype, x.device)
        ops.batched_linear(
            q.narrow(2, 0, self.nope_dim), self.key_up, out=absorbed.narrow(2, 0, self.latent_dim)
        )
        q_pe = absorbed.narrow(2, self.latent_dim, self.rope_dim)
        q_pe.copy_(q.narrow(2, self.nope_dim, self.rope_dim))
        ops.rotary(
            batch.positions, self.cos_sin, q_pe, k_pe.unsqueeze(1), interleaved=self.interleaved
        )
        ops.write_mla(
            kv_latent, k_pe, batch.slot_mapping, kv.rows, kv_scale=kv.scale, pe_cache=kv.pe
        )
        shape = (num_tokens, self.num_heads, self.latent_dim)
        out_latent = scratch.empty(shape, x.dtype, x.device)
        ops.mla_attention(
            absorbed,
            kv.rows,
            batch.block_tables,
            batch.cu_seqlens_q,
            batch.seq_lens,
            self.scale,
            batch.max_seqlen_q,
            batch.max_seq_len,
            out=out_latent,
            workspace=self.workspace.tensor,
            kv_scale=kv.scale,
            pe_cache=kv.pe,
        )
        out = ops.batched_linear(out_latent, self.value_up)
        return self.output(out.view(num_tokens, self.out_width))
