"""Models of public shapes with random weights: speed does not depend on what the weights say."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.checkpoint import Checkpoint
from fastgpt.models import registry
from fastgpt.models.spec import ParamSpec
from fastgpt.scheme import Format, QuantizedTensor

__all__ = ["POLICIES", "SHAPES", "RandomCheckpoint", "write_checkpoint"]


def _qwen2(
    hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int
) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _llama3(hidden: int, ffn: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        **_qwen2(hidden, ffn, layers, heads, 8, 128256),
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    }


_NUM_WRITERS = 6  # of shards; each holds one on the device

# config.json fields of the published checkpoints.
SHAPES: dict[str, dict[str, Any]] = {
    "r1-llama-8b": _llama3(4096, 14336, 32, 32),
    "r1-llama-70b": _llama3(8192, 28672, 80, 64),
    "r1-qwen-1.5b": _qwen2(1536, 8960, 28, 12, 2, 151936),
    "r1-qwen-7b": _qwen2(3584, 18944, 28, 28, 4, 152064),
    "r1-qwen-14b": _qwen2(5120, 13824, 48, 40, 8, 152064),
    "r1-qwen-32b": _qwen2(5120, 27648, 64, 40, 8, 152064),
}

# role -> format. The embedding is read one row a token, so its format does not matter for speed.
POLICIES: dict[str, dict[str, str]] = {
    "bf16": {},
    # The four tiers one by one, then together.
    "fp8 attention": {"attention_weights": "fp8"},
    "int4 residual branch": {"residual_connections": "int4"},
    "binary norms": {"norm_params": "binary"},
    "fp16 input and output": {"io_layers": "fp16"},
    "four-tier": {
        "attention_weights": "fp8",
        "residual_connections": "int4",
        "norm_params": "binary",
        "io_layers": "fp16",
    },
    "all-int4": {
        "attention_weights": "int4",
        "residual_connections": "int4",
        "norm_params": "binary",
        "io_layers": "int4",
    },
}


def _format_of(spec: ParamSpec, policy: dict[str, str]) -> Format:
    """Return the format of one parameter; embeddings stay fp16 where the head is quantized."""
    name = policy.get(spec.role, "bf16")
    if spec.role == "io_layers" and "embed" in spec.name and name not in {"fp16", "bf16"}:
        name = "fp16"
    return Format.parse(name)


class RandomCheckpoint(Checkpoint):
    """A checkpoint of random weights in a policy's formats.

    Values come from one buffer of 32 MiB of random bits, so that a 7B model takes seconds to make
    and still streams from memory.

    Args:
        config: fields of config.json.
        policy: role -> format name; roles that are missing are bf16.
        seed: of the random bits.
    """

    def __init__(self, config: dict[str, Any], policy: dict[str, str], seed: int = 0) -> None:
        family = registry.family(config)
        self.path = Path(f"random-{config['model_type']}")
        self.config = config
        self.tokenizer_config = {}
        self.generation_config = {}
        self._policy = policy
        self._specs = {s.name: s for s in family.roles(family.parse_config(config))}
        generator = torch.Generator().manual_seed(seed)
        self._values: dict[tuple[torch.dtype, int, int], Tensor] = {}
        self._noise = torch.randint(0, 256, (32 << 20,), dtype=torch.uint8, generator=generator)

    def names(self) -> list[str]:
        return sorted(self._specs)

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    @property
    def decode_bytes(self) -> int:
        """Bytes of weights that decoding one token reads: all but the embedding table."""
        return sum(
            _format_of(spec, self._policy).nbytes(tuple(spec.shape))
            for spec in self._specs.values()
            if "embed_tokens" not in spec.name
        )

    @property
    def stored_bytes(self) -> int:
        """Bytes of all weights as they are stored."""
        return sum(
            _format_of(spec, self._policy).nbytes(tuple(spec.shape))
            for spec in self._specs.values()
        )

    def read(self, name: str) -> Tensor | QuantizedTensor:
        spec = self._specs[name]
        format = _format_of(spec, self._policy)
        parts: dict[str, Tensor] = {}
        for suffix, (dtype, shape) in format.parts(tuple(spec.shape)).items():
            count = torch.Size(shape).numel()
            if suffix == "packed":
                codes = self._random_bytes(count)
                if format.name == "fp8":  # codes 0x7F and 0xFF are NaN
                    codes = codes.bitwise_and_(0xBF)
                parts[suffix] = codes.view(shape)
            elif suffix in {"scale", "offset"}:
                parts[suffix] = torch.full(shape, 1.0 / 256, dtype=dtype)
            else:  # a plain tensor: gains near 1, weights small
                parts[suffix] = self._random_values(dtype, shape)
        if format.is_plain:
            return parts[""]
        return QuantizedTensor(format, tuple(spec.shape), parts)

    def _random_values(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        key = dtype, shape[-1], len(shape)
        if key not in self._values:  # once: arithmetic on every value takes longer than copies
            values = self._noise.to(torch.float32).div_(255.0).sub_(0.5)
            values.mul_(2.0 * shape[-1] ** -0.5).add_(1.0 if len(shape) == 1 else 0.0)
            self._values[key] = values.to(dtype)
        out = torch.empty(shape, dtype=dtype)
        for part in out.view(-1).split(self._noise.numel()):
            part.copy_(self._values[key][: part.numel()])
        return out

    def _random_bytes(self, count: int) -> Tensor:
        return self._noise.repeat(-(-count // self._noise.numel()))[:count].clone()


def write_checkpoint(folder: Path, config: dict[str, Any], device: torch.device) -> int:
    """Write a Hugging Face directory of random bf16 weights, a shard per layer; return its bytes.

    Weights are Gaussian with a standard deviation of cols^-0.5, gains are near 1. Values are drawn
    on `device`, and taken from there and written by a few threads, a shard each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    family = registry.family(config)
    shards: dict[str, dict[str, ParamSpec]] = {}
    for spec in family.roles(family.parse_config(config)):
        parts = spec.name.split(".")
        place = parts[2] if parts[1] == "layers" else "io"
        shards.setdefault(f"model-{place}.safetensors", {})[spec.name] = spec
    generator = torch.Generator(device).manual_seed(0)
    weight_map, num_bytes = {}, 0
    with ThreadPoolExecutor(_NUM_WRITERS) as threads:
        writing = []
        for shard, specs in shards.items():
            entries, at = {}, 0
            for name, spec in specs.items():
                size = 2 * torch.Size(spec.shape).numel()
                entries[name] = {
                    "dtype": "BF16",
                    "shape": list(spec.shape),
                    "data_offsets": [at, at + size],
                }
                at += size
                weight_map[name] = shard
            head = json.dumps(entries).encode()
            head = head.ljust(-(-len(head) // 64) * 64 - 8 + 64)
            values = []
            for spec in specs.values():
                drawn = torch.randn(
                    spec.shape, dtype=torch.bfloat16, device=device, generator=generator
                )
                scale = 0.05 if len(spec.shape) == 1 else spec.shape[-1] ** -0.5
                values.append(drawn.mul_(scale).add_(1.0 if len(spec.shape) == 1 else 0.0))
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # another thread's stream does not wait
            writing.append(threads.submit(_write_shard, folder / shard, head, values))
            if len(writing) > _NUM_WRITERS:
                writing.pop(0).result()
            num_bytes += at
        for future in writing:
            future.result()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return num_bytes


def _write_shard(path: Path, head: bytes, values: list[Tensor]) -> None:
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        while values:
            file.write(values.pop(0).cpu().view(-1).view(torch.uint8).numpy().data)
