"""The decoder-only model every family builds: attention and feed-forward between norms."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.batch import Batch
from fastgpt.config import check_kv_cache_dtype
from fastgpt.errors import InvalidArgument
from fastgpt.layers.attention import Workspace
from fastgpt.layers.kv_cache import LayerKV
from fastgpt.layers.linear import Projection
from fastgpt.layers.norm import RmsNorm
from fastgpt.layers.weights import Allocate
from fastgpt.models.spec import ModelConfig
from fastgpt.ops import scratch

__all__ = ["Block", "KVLayout", "Layer", "Model"]


@dataclass(frozen=True)
class KVLayout:
    """Shape of the paged cache of one model.

    Of floats, a block is [num_layers, 2, block_size, num_kv_heads, head_dim], of a latent cache
    [num_layers, block_size, head_dim]. Of codes (cache_dtype fp8 or int8) it is bytes, and a layer
    of a block of n tokens holds:

        keys and values   float32 scale [2, num_kv_heads, n] | codes [2, n, num_kv_heads, head_dim]
        latent            float32 scale [n, ceil(latent / 128)] | 16-bit rope [n, rope_dim]
                          | codes [n, latent]

    Attributes:
        kind: "gqa" (keys and values per head) or "mla" (one latent row for all heads).
        num_layers: layers that cache.
        num_kv_heads: key-value heads; 1 for mla.
        head_dim: width of one row: head size, or kv_lora_rank + rope size for mla.
        rope_dim: the last columns of an mla row, which stay 16-bit beside codes; 0 for gqa.
        cache_dtype: auto (the model's dtype), fp8 or int8.
    """

    kind: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    rope_dim: int = 0
    cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        check_kv_cache_dtype("kv_cache_dtype", self.cache_dtype)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one layer of codes, scales included; a multiple of 4.

        >>> KVLayout("gqa", 2, 4, 64, cache_dtype="fp8").token_bytes
        544
        >>> KVLayout("mla", 2, 1, 576, rope_dim=64, cache_dtype="int8").token_bytes
        656
        """
        if self.kind == "mla":
            num_bytes = 4 * self._latent_groups + 2 * self.rope_dim + self._latent
        else:
            num_bytes = 2 * self.num_kv_heads * (4 + self.head_dim)
        return -(-num_bytes // 4) * 4

    @property
    def _latent(self) -> int:
        return self.head_dim - self.rope_dim

    @property
    def _latent_groups(self) -> int:
        return -(-self._latent // 128)

    def storage_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the cache's tensor for a model of `dtype`: bytes for codes."""
        return dtype if self.cache_dtype == "auto" else torch.uint8

    def block_shape(self, block_size: int) -> tuple[int, ...]:
        """Return the shape of one block of block_size tokens, all layers.

        >>> KVLayout("gqa", 2, 4, 64).block_shape(32)
        (2, 2, 32, 4, 64)
        >>> KVLayout("gqa", 2, 4, 64, cache_dtype="fp8").block_shape(32)
        (2, 32, 544)
        """
        if self.cache_dtype != "auto":
            return (self.num_layers, block_size, self.token_bytes)
        if self.kind == "mla":
            return (self.num_layers, block_size, self.head_dim)
        return (self.num_layers, 2, block_size, self.num_kv_heads, self.head_dim)

    def split(self, kv_cache: Tensor, dtype: torch.dtype) -> list[LayerKV]:
        """Return the views of every layer.

        Args:
            kv_cache: [num_blocks, *block_shape(block_size)] of storage_dtype(dtype).
            dtype: the model's.
        """
        if self.cache_dtype == "auto":
            return [LayerKV(rows) for rows in kv_cache.unbind(1)]
        block_size = kv_cache.shape[2]
        code = torch.uint8 if self.cache_dtype == "fp8" else torch.int8
        layers = kv_cache.flatten(2)  # [num_blocks, num_layers, bytes]
        if self.kind != "mla":
            heads, scale_bytes = self.num_kv_heads, 8 * self.num_kv_heads * block_size
            code_bytes = 2 * heads * block_size * self.head_dim
            scale = layers.narrow(2, 0, scale_bytes).view(torch.float32)
            codes = layers.narrow(2, scale_bytes, code_bytes).view(code)
            return list(
                map(
                    LayerKV,
                    codes.unflatten(2, (2, block_size, heads, self.head_dim)).unbind(1),
                    scale.unflatten(2, (2, heads, block_size)).unbind(1),
                )
            )
        scale_bytes = 4 * self._latent_groups * block_size
        pe_bytes = 2 * self.rope_dim * block_size
        pe_dtype = dtype if dtype.itemsize == 2 else torch.bfloat16
        scale = layers.narrow(2, 0, scale_bytes).view(torch.float32)
        pe = layers.narrow(2, scale_bytes, pe_bytes).view(pe_dtype)
        codes = layers.narrow(2, scale_bytes + pe_bytes, self._latent * block_size).view(code)
        return list(
            map(
                LayerKV,
                codes.unflatten(2, (block_size, self._latent)).unbind(1),
                scale.unflatten(2, (block_size, self._latent_groups)).unbind(1),
                pe.unflatten(2, (block_size, self.rope_dim)).unbind(1),
            )
        )


@dataclass(slots=True)
class Layer:
    """One decoder layer without the norm before its attention; see `Block` for the fields."""

    attention: Callable[[Tensor, Batch, LayerKV], Tensor]
    post_norm: RmsNorm
    feed_forward: Callable[[Tensor], Tensor]


@dataclass(slots=True)
class Block:
    """One decoder layer.

    attention: (x, batch, this layer's slots) -> branch. feed_forward: x -> branch.
    post_norm stands before the feed-forward, next_norm before the next block's attention (after
    the last block it is the model's final norm).
    """

    attention: Callable[[Tensor, Batch, LayerKV], Tensor]
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

    def use_kv_cache_dtype(self, cache_dtype: str) -> None:
        """Change what caches hold from now on: auto (the model's dtype), fp8 or int8.

        Raises:
            ConfigError: for another word.
        """
        self.kv_layout = replace(self.kv_layout, cache_dtype=cache_dtype)

    def new_kv_cache(self, num_blocks: int, block_size: int, dtype: torch.dtype) -> Tensor:
        """Return a zeroed cache of its own memory, for use outside an engine.

        dtype: of the rows, where they are not codes.
        """
        shape = (num_blocks, *self.kv_layout.block_shape(block_size))
        dtype = self.kv_layout.storage_dtype(dtype)
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def forward(self, batch: Batch, kv_cache: Tensor) -> Tensor:
        """Return the normalized last hidden states, [num_tokens, hidden]; fills the cache.

        kv_cache: [num_blocks, *kv_layout.block_shape(block_size)] of kv_layout.storage_dtype.
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
        for block, kv in zip(self.blocks, self.kv_layout.split(kv_cache, self.dtype), strict=True):
            scratch.next_layer()
            x = block.post_norm.add(block.attention(x, batch, kv), residual)
            x = block.next_norm.add(block.feed_forward(x), residual)
        scratch.next_layer(last=True)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Return next-token logits of rows of `forward`, [n, hidden] -> [n, vocab], float32."""
        shape = (hidden.shape[0], self.config.vocab_size)
        out = scratch.empty(shape, torch.float32, self.device)
        return self.head(hidden, out=out)
