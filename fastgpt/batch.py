"""The ragged batch a model computes: the tokens of several requests side by side."""

from dataclasses import dataclass

import torch

__all__ = ["Batch"]


@dataclass
class Batch:
    """Tokens of num_reqs requests, flat; prefill chunks and decodes mix freely.

    Owned by the engine's input buffers; a model reads it during one forward and keeps nothing.

    Attributes:
        token_ids: [num_tokens], int64.
        positions: [num_tokens], int64, position of each token in its request.
        slot_mapping: [num_tokens], int64, cache slot block_id * block_size + offset; -1 = no slot.
        block_tables: [num_reqs, max_blocks], int32, block ids in token order.
        cu_seqlens_q: [num_reqs + 1], int32, where each request's tokens start.
        seq_lens: [num_reqs], int32, tokens in the cache after this step; 0 = padding row.
        max_seqlen_q: most tokens of one request in this batch.
        max_seq_len: upper bound of seq_lens.
        logits_indices: [n], int64, the flat tokens whose logits are wanted.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    cu_seqlens_q: torch.Tensor
    seq_lens: torch.Tensor
    max_seqlen_q: int
    max_seq_len: int
    logits_indices: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens in the batch, padding included."""
        return self.token_ids.shape[0]

    @property
    def num_reqs(self) -> int:
        """Requests in the batch, padding rows included."""
        return self.seq_lens.shape[0]
