"""The sizes op tests run at: those of the models we serve, then 1, primes and ragged ones."""

import torch

FLOATS = [torch.float32, torch.float16, torch.bfloat16]

# Rows of a batch, including none.
ROWS = [0, 1, 2, 7, 33]

# Hidden sizes: tiny-r1, the 1.5B distill, and sizes no vector width divides.
HIDDEN = [1, 5, 17, 64, 256, 1536]

# (num_heads, num_kv_heads, head_dim_qk, head_dim_v): the compiled sizes, then generic ones.
HEADS = [
    (4, 4, 64, 64),
    (4, 2, 80, 80),
    (3, 1, 96, 96),
    (12, 2, 128, 128),
    (4, 4, 192, 128),
    (2, 1, 256, 256),
]
GENERIC_HEADS = [(5, 5, 7, 7), (6, 2, 24, 13), (2, 1, 72, 40)]

VOCABULARY = 151_936  # r1-qwen-1.5b
