"""The decoder-only model every family builds: attention and feed-forward between norms."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.batch import Batch
from fastgpt.errors import InvalidArgument
from fastgpt.layers.attention import Workspace
from fastgpt.layers.linear import Projection
from fastgpt.layers.norm import RmsNorm
from fastgpt.layers.weights import Allocate
from fastgpt.models.spec import ModelConfig
from fastgpt.ops import scratch

__all__ = ["Block", "KVLayout", "Layer", "Model"]


@dataclass(frozen=True)
class KVLayout:
    """Shape of the paged cache of one model.

    Attributes:
        kind: "gqa" (keys and values per head) or "mla" (one latent row for all heads).
        num_layers: layers that cache.
        num_kv_heads: key-value heads; 1 for mla.
        head_dim: width of one row: head size, or kv_lora_rank + rope size for mla.
    """

    kind: str
    num_layers: int
    num_kv_heads: int
    head_dim: int

    def block_shape(self, block_size: int) -> tuple[int, ...]:
        """Return the shape of one block of block_size tokens, all layers.

        >>> KVLayout("gqa", 2, 4, 64).block_shape(32)
        (2, 2, 32, 4, 64)
        """
        if self.kind == "mla":
            return (self.num_layers, block_size, self.head_dim)
        return (self.num_layers, 2, block_size, self.num_kv_heads, self.head_dim)


@dataclass(slots=True)
class Layer:
    """One decoder layer without the norm before its attention; see `Block` for the fields."""

    attention: Callable[[Tensor, Batch, Tensor], Tensor]
    post_norm: RmsNorm
    feed_forward: Callable[[Tensor], Tensor]


@dataclass(slots=True)
class Block:
    """One decoder layer.

    attention: (x, batch, this layer's cache) -> branch. feed_forward: x -> branch.
    post_norm stands before the feed-forward, next_norm before the next block's attention (after
    the last block it is the model's final norm).
    """

    attention: Callable[[Tensor, Batch, Tensor], Tensor]
    post_norm: RmsNorm
    feed_forward: Callable[[Tensor], Tensor]
    next_norm: RmsNorm


class Model:
    """A decoder-only model over flat ragged batches and a paged cache.

    Owned by one engine thread. `forward` neither synchronizes nor depends on values in tensors, so
    it can be captured into a CUDA graph.
    """

    def __init__(
        self,
        *,
        config: ModelConfig,
        kv_layout: KVLayout,
        embedding: Tensor,
        first_norm: RmsNorm,
        blocks: Sequence[Block],
        head: Projection,
        num_heads: int,
        head_dim_v: int,
        workspace: Workspace,
        device: torch.device,
        dtype: torch.dtype,
        max_position: int,
        allocate: Allocate,
    ) -> None:
        self.config = config
        self.kv_layout = kv_layout
        self.embedding = embedding
        self.first_norm = first_norm
        self.blocks = list(blocks)
        self.head = head
        self.device = device
        self.dtype = dtype
        self.max_position = max_position
        self._num_heads = num_heads
        self._head_dim_v = head_dim_v
        self._workspace = workspace
        self._allocate = allocate

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding and columns of the logits."""
        return self.config.vocab_size

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.blocks)

    def reserve_workspace(self, max_tokens: int, max_seq_len: int) -> None:
        """Allocate the attention kernels' scratch for batches within these limits.

        Without it kernels do not split long sequences over the device.
        """
        num_bytes = ops.attention_workspace_bytes(
            max_tokens, self._num_heads, self._head_dim_v, max_seq_len, self.device
        )
        if num_bytes:
            self._workspace.tensor = self._allocate(
                (num_bytes,), torch.uint8, "attention.workspace"
            )

    def new_kv_cache(self, num_blocks: int, block_size: int, dtype: torch.dtype) -> Tensor:
        """Return a zeroed cache of its own memory, for use outside an engine."""
        shape = (num_blocks, *self.kv_layout.block_shape(block_size))
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def forward(self, batch: Batch, kv_cache: Tensor) -> Tensor:
        """Return the normalized last hidden states, [num_tokens, hidden]; fills the cache.

        kv_cache: [num_blocks, *kv_layout.block_shape(block_size)].
        """
        if batch.max_seq_len > self.max_position:
            raise InvalidArgument(
                f"max_seq_len is {batch.max_seq_len}, but the model was built for positions below "
                f"{self.max_position}"
            )
        shape = (batch.token_ids.shape[0], self.config.hidden_size)
        residual = scratch.empty(shape, self.dtype, self.device)
        ops.embedding(batch.token_ids, self.embedding, out=residual)
        x = self.first_norm(residual)
        for block, cache in zip(self.blocks, kv_cache.unbind(1), strict=True):
            scratch.next_layer()
            x = block.post_norm.add(block.attention(x, batch, cache), residual)
            x = block.next_norm.add(block.feed_forward(x), residual)
        scratch.next_layer(last=True)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Return next-token logits of rows of `forward`, [n, hidden] -> [n, vocab], float32."""
        shape = (hidden.shape[0], self.config.vocab_size)
        out = scratch.empty(shape, torch.float32, self.device)
        return self.head(hidden, out=out)
