"""One layer's part of the paged KV cache, as the attention ops take it."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["LayerKV"]


@dataclass(frozen=True, slots=True)
class LayerKV:
    """Views of one layer's slots in every block; the engine owns the memory.

    Attributes:
        rows: [num_blocks, 2, block_size, num_kv_heads, head_dim], or of a latent cache
            [num_blocks, block_size, kv_lora_rank + rope_dim]. A float dtype, or codes: uint8 (fp8
            e4m3) or int8, of a latent cache its kv_lora_rank columns alone.
        scale: of codes, float32: [num_blocks, 2, num_kv_heads, block_size], of a latent cache
            [num_blocks, block_size, ceil(kv_lora_rank / 128)]; else None.
        pe: rotary columns beside latent codes, [num_blocks, block_size, rope_dim]; else None.
    """

    rows: Tensor
    scale: Tensor | None = None
    pe: Tensor | None = None
