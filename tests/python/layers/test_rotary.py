"""The rotary table against transformers' frequencies, for every scaling."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fastgpt.layers.rotary import RopeConfig, cos_sin_table

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **LLAMA3},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, **YARN},
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "attention_factor": 1.5, **YARN},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40, "mscale": 1.0,
         "mscale_all_dim": 0.7, **YARN},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "beta_fast": 4, "beta_slow": 2,
         "truncate": False, **YARN},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 0.5, **YARN},
    ],
)  # fmt: skip
@pytest.mark.parametrize("head_dim", [6, 64, 128])
def test_table_matches_transformers(rope: dict[str, object], head_dim: int) -> None:
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=600, rope_parameters=dict(rope))
    positions = torch.arange(600)
    cos, sin = LlamaRotaryEmbedding(config)(torch.empty(0), positions[None])
    half = head_dim // 2
    expected = torch.cat((cos[0, :, :half], sin[0, :, :half]), -1)
    table = cos_sin_table(RopeConfig.parse(config.to_dict(), head_dim), 600)
    # angles up to 600 carry a float32 rounding of 600 * 2^-24
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-4)
