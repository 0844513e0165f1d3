"""Causal attention of ragged queries over the paged KV cache."""

import torch
from torch import Tensor

from fastgpt import _C
from fastgpt.ops._library import assume_constant_result, call
from fastgpt.ops.scratch import empty

__all__ = ["attention", "attention_workspace_bytes", "mla_attention"]

_ops = torch.ops.fastgpt


@assume_constant_result
def attention_workspace_bytes(
    num_tokens: int, num_heads: int, head_dim_v: int, max_seq_len: int, device: torch.device | str
) -> int:
    """Return the bytes of workspace that suffice for any batch within these limits.

    It lets long sequences be split over the device; 0 on the CPU, which needs none.

    Args:
        num_tokens: most rows of q.
        num_heads: heads of q.
        head_dim_v: head size of out, 512 for mla_attention.
        max_seq_len: longest sequence.
        device: where the op will run.
    """
    is_cuda = torch.device(device).type == "cuda"
    return int(
        _C.attention_workspace_bytes(num_tokens, num_heads, head_dim_v, max_seq_len, is_cuda)
    )


def _workspace(out: Tensor, max_seq_len: int) -> Tensor | None:
    num_tokens, num_heads, head_dim_v = out.shape
    if out.device.type != "cuda":
        return None
    num_bytes = attention_workspace_bytes(
        num_tokens, num_heads, head_dim_v, max_seq_len, out.device
    )
    return out.new_empty(num_bytes, dtype=torch.uint8)


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
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    kv_scale: Tensor | None = None,
) -> Tensor:
    """Return softmax(scale * q kᵀ) v for the queries of every request, prefill and decode mixed.

    Query t of request r stands at position seq_lens[r] - q_len[r] + t and sees every earlier
    position and its own. Keys and values are read from the cache alone, so write them first.

    Args:
        q: [num_tokens, num_heads, head_dim_qk]; float32, float16 or bfloat16, last dimension
            contiguous.
        kv_cache: one layer, [num_blocks, 2, block_size, num_kv_heads, width], width at least both
            head sizes, any float dtype, any strides but the last. Or codes, see write_kv: uint8
            for fp8, int8; they are read as code * scale and summed in float32.
        block_tables: [num_reqs, max_blocks], int32; entries past a request's blocks are not read.
        cu_seqlens_q: [num_reqs + 1], int32, where each request's rows of q start.
        seq_lens: [num_reqs], int32, keys of each request, the new tokens included. The rows of a
            request with 0 (padding) become zero. Rows past cu_seqlens_q[-1] are not touched.
        scale: multiplies the scores, usually head_dim_qk ** -0.5.
        max_seqlen_q: at least the most rows of one request.
        max_seq_len: at least the largest of seq_lens.
        head_dim_v: head size of an allocated out; None = head_dim_qk.
        out: where to write, [num_tokens, num_heads, head_dim_v], dtype of q; allocated if None.
        workspace: uint8, see attention_workspace_bytes; None with an allocated out: allocated,
            None with a given one: long sequences are not split.
        kv_scale: of codes, [num_blocks, 2, num_kv_heads, block_size], float32.

    Raises:
        InvalidArgument: if shapes, dtypes or strides do not fit; on the CPU also if a length or a
            block id does not.

    Source: PagedAttention, arXiv:2309.06180; FlashAttention-2, arXiv:2307.08691.
    """
    if out is None:
        width = q.shape[2] if head_dim_v is None else head_dim_v
        out = empty((q.shape[0], q.shape[1], width), q.dtype, q.device)
        workspace = _workspace(out, max_seq_len) if workspace is None else workspace
    call(
        _ops.attention.default,
        q, kv_cache, block_tables, cu_seqlens_q, seq_lens, scale, max_seqlen_q, max_seq_len,
        out, workspace, kv_scale,
    )  # fmt: skip
    return out


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
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    kv_scale: Tensor | None = None,
    pe_cache: Tensor | None = None,
) -> Tensor:
    """Return multi-head latent attention in absorbed form: all heads share one key row a token.

    The first head_dim_v columns of a key row are also its value.

    Args:
        q: [num_tokens, num_heads, 576]: latent 512, then rotary 64; float32, float16 or bfloat16.
        kv_cache: one layer, [num_blocks, block_size, 576], any float dtype. Or codes of the latent
            columns, [num_blocks, block_size, 512], see write_mla.
        block_tables, cu_seqlens_q, seq_lens, max_seqlen_q, max_seq_len: as in attention.
        scale: multiplies the scores, (192 ** -0.5 times the rope's correction for DeepSeek).
        head_dim_v: head size of an allocated out.
        out: where to write, [num_tokens, num_heads, 512], dtype of q; allocated if None.
        workspace: as in attention.
        kv_scale, pe_cache: of codes, as in write_mla.

    Raises:
        InvalidArgument: as attention; on CUDA also if the head sizes are not 576 and 512.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
    """
    if out is None:
        out = empty((q.shape[0], q.shape[1], head_dim_v), q.dtype, q.device)
        workspace = _workspace(out, max_seq_len) if workspace is None else workspace
    call(
        _ops.mla_attention.default,
        q, kv_cache, block_tables, cu_seqlens_q, seq_lens, scale, max_seqlen_q, max_seq_len,
        out, workspace, kv_scale, pe_cache,
    )  # fmt: skip
    return out


@torch.library.register_fake("fastgpt::attention")
def _(
    q: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    scale: float,
    max_seqlen_q: int,
    max_seq_len: int,
    out: Tensor,
    workspace: Tensor | None,
    kv_scale: Tensor | None = None,
) -> None:
    return None


@torch.library.register_fake("fastgpt::mla_attention")
def _(
    q: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    scale: float,
    max_seqlen_q: int,
    max_seq_len: int,
    out: Tensor,
    workspace: Tensor | None,
    kv_scale: Tensor | None = None,
    pe_cache: Tensor | None = None,
) -> None:
    return None
