"""A checkpoint as an nn.Module: whole sequences in, logits out, no cache to manage."""

import os

import torch
from torch import Tensor, nn

from fastgpt.batch import Batch
from fastgpt.checkpoint import Checkpoint, Container, open_checkpoint, write_container
from fastgpt.errors import CheckpointError, ConfigError, InvalidArgument
from fastgpt.models import registry
from fastgpt.models.model import Model
from fastgpt.models.placement import resolve_device, resolve_dtype

__all__ = ["CausalLM", "load"]

BLOCK_SIZE = 32


class CausalLM(nn.Module):
    """A language model of a known family over whole sequences.

    It wraps a `Model` and gives it a cache that lives for one call. Its weights are in the layout
    of the backend's kernels, so they are not parameters of the module; `checkpoint` has them in
    canonical form.
    """

    def __init__(self, model: Model, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.model = model
        self.checkpoint = checkpoint

    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> Tensor:
        """Return next-token logits, [batch, length, vocab], float32, of input_ids [batch, length].

        Raises:
            InvalidArgument: if the shape or dtype is wrong or the length is over the limit.
        """
        if input_ids.dim() != 2 or input_ids.dtype != torch.int64 or input_ids.numel() == 0:
            raise InvalidArgument(
                f"input_ids is {input_ids.dtype} of shape {tuple(input_ids.shape)}; expected "
                "int64 [batch, length], not empty"
            )
        low, high = torch.aminmax(input_ids)
        if int(low) < 0 or int(high) >= self.model.vocab_size:
            raise InvalidArgument(
                f"input_ids holds {int(low)} .. {int(high)}; the model knows ids 0 .. "
                f"{self.model.vocab_size - 1}"
            )
        num_reqs, length = input_ids.shape
        device = self.model.device
        blocks_each = -(-length // BLOCK_SIZE)
        tables = torch.arange(num_reqs * blocks_each, dtype=torch.int32, device=device)
        positions = torch.arange(length, device=device).repeat(num_reqs)
        firsts = torch.arange(num_reqs, device=device) * blocks_each * BLOCK_SIZE
        batch = Batch(
            token_ids=input_ids.flatten().to(device),
            positions=positions,
            slot_mapping=firsts.repeat_interleave(length) + positions,
            block_tables=tables.view(num_reqs, blocks_each),
            cu_seqlens_q=torch.arange(num_reqs + 1, dtype=torch.int32, device=device) * length,
            seq_lens=torch.full((num_reqs,), length, dtype=torch.int32, device=device),
            max_seqlen_q=length,
            max_seq_len=length,
            logits_indices=torch.arange(num_reqs * length, device=device),
        )
        cache = self.model.new_kv_cache(num_reqs * blocks_each, BLOCK_SIZE, self.model.dtype)
        logits = self.model.logits(self.model.forward(batch, cache))
        return logits.view(num_reqs, length, -1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the quantized model to one file that `load` and the server read.

        Raises:
            ConfigError: if the model came from an unquantized checkpoint.
        """
        source = self.checkpoint
        if not isinstance(source, Container):
            raise ConfigError(
                f"{source.path} is not quantized; use Quantizer(...).convert().save(path)"
            )
        write_container(path, ((n, source.read(n)) for n in source.names()), source.metadata)


def load(
    source: str | os.PathLike[str] | Checkpoint,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
) -> CausalLM:
    """Return the model of a Hugging Face directory, a FastGPT or a GGUF file, ready to call.

    Args:
        source: a path, or a checkpoint opened before.
        device: "auto" (the first GPU, else the CPU), "cpu", "cuda" or "cuda:N".
        dtype: of activations, "auto", "float32", "bfloat16" or "float16".

    Raises:
        CheckpointError: if the checkpoint is damaged or of an unknown architecture.
        ConfigError, DeviceError: if device or dtype do not exist.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    if checkpoint.config is None:
        raise CheckpointError(
            f"{checkpoint.path} holds a module of a class that FastGPT does not know; give that "
            "module: fastgpt.load(path, into=module)"
        )
    where = resolve_device(device)
    kind = registry.family(checkpoint.config)
    model = kind.build(
        kind.parse_config(checkpoint.config),
        checkpoint.read,
        where,
        resolve_dtype(dtype, where, checkpoint.config, checkpoint.fp16_overflows),
        lambda shape, dtype, name: torch.empty(shape, dtype=dtype, device=where),
    )
    return CausalLM(model, checkpoint)
