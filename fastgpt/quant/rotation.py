"""The residual stream in another basis: a rotation folded into the weights, free at run time.

With an orthogonal Q every writer of the residual stream writes x Q instead of x, and every reader
undoes it. An RMS norm divides by a length, which Q does not change, but its gain lies between them:

    reader     W (gain * x) / |x|  =  (W diag(gain) Q) (Q' x) / |Q' x|
    writer     Q' W,  Q' bias
    embedding  rows times Q

So gains become ones, which a binary norm holds exactly, and channels that are large in every token
are spread over all. Source: QuaRot, arXiv:2404.00456; SpinQuant, arXiv:2405.16406 (R1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgpt.checkpoint.base import Checkpoint
from fastgpt.quant.family import dense_values
from fastgpt.quant.layerwise import layer_index
from fastgpt.quant.plan import MTP_ROLE, PlannedTensor
from fastgpt.quant.sensitivity import EMBEDDING
from fastgpt.quant.transforms import hadamard
from fastgpt.scheme import QuantizedTensor

__all__ = ["ResidualRotation", "RotatedCheckpoint", "why_not_rotated"]

_WRITERS = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias")
_MOST_ROWS = 64  # of one factor of the rotation
_SEED = 20250404


class ResidualRotation:
    """An orthogonal matrix [size, size]: signs, then a product of small factors.

    Hadamard matrices take the powers of two in `size` and a cosine transform what is odd, so every
    row mixes all columns. The signs keep the mean of the channels from becoming one of them.
    """

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(_SEED)
        self.signs = torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1
        self.factors: list[Tensor] = []
        power = size & -size
        odd = size // power
        while power > 1:
            rows = min(power, _MOST_ROWS)
            matrix = hadamard(rows)
            assert matrix is not None
            self.factors.append(matrix.sign().double() / rows**0.5)
            power //= rows
        if odd > 1:
            self.factors.append(_cosines(odd))

    def rows(self, x: Tensor) -> Tensor:
        """Return x Q, [..., size] float32 or float64."""
        shape = x.shape
        x = x * self.signs.to(x)
        x = x.reshape(-1, *(len(factor) for factor in self.factors))
        for axis, factor in enumerate(self.factors, 1):
            x = (x.movedim(axis, -1) @ factor.to(x)).movedim(-1, axis)
        turned: Tensor = x.reshape(shape)
        return turned

    def columns(self, x: Tensor) -> Tensor:
        """Return the transpose of Q times x, [size, cols]."""
        return self.rows(x.T).T.contiguous()


def _cosines(size: int) -> Tensor:
    """Return the orthogonal matrix of the discrete cosine transform of the second kind."""
    k = torch.arange(size, dtype=torch.float64)
    matrix: Tensor = torch.cos(math.pi / size * torch.outer(k, k + 0.5)) * (2 / size) ** 0.5
    matrix[0] /= 2**0.5
    return matrix


def why_not_rotated(checkpoint: Checkpoint, planned: Sequence[PlannedTensor]) -> str | None:
    """Return why a model's residual stream cannot be rotated, or None if it can."""
    if any(item.role == MTP_ROLE for item in planned):
        return "its multi-token prediction layers read the residual stream and are kept"
    if any(item.role == "norm_params" and not item.consumers for item in planned):
        return "the head is the embedding and cannot absorb the final norm's gain"
    return None


class RotatedCheckpoint(Checkpoint):
    """A model of the same function whose residual stream is rotated.

    Weights come in float32, as they are before they are rounded; those that are kept come in the
    type they have, protected ones (a router, a bias) in float32.

    Args:
        checkpoint: the source.
        planned: every tensor of the output; `why_not_rotated` gives no reason against it.
        device: where the products run; results are on the CPU.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        planned: Sequence[PlannedTensor],
        device: torch.device | None,
    ) -> None:
        self.path = checkpoint.path
        self.config = checkpoint.config
        self.tokenizer_json = checkpoint.tokenizer_json
        self.tokenizer_config = checkpoint.tokenizer_config
        self.chat_template = checkpoint.chat_template
        self.generation_config = checkpoint.generation_config
        self._inner = checkpoint
        self._device = device or torch.device("cpu")
        self._items = {item.name: item for item in planned}
        self._gains = {i.name for i in planned if i.role == "norm_params"}
        self._gain_of = {n: i.name for i in planned if i.name in self._gains for n in i.consumers}
        hidden = self._items[EMBEDDING].shape[1]
        self._rotation = ResidualRotation(hidden)

    def names(self) -> list[str]:
        """Return the canonical weight names, sorted."""
        return self._inner.names()

    def __contains__(self, name: object) -> bool:
        """Tell whether a weight of that canonical name is present."""
        return name in self._inner

    def nbytes(self, name: str) -> int:
        """Return the bytes of a weight in the source."""
        return self._inner.nbytes(name)

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """Return one weight of the rotated model."""
        stored = self._inner.read(name)
        is_writer = layer_index(name) is not None and name.endswith(_WRITERS)
        if not (is_writer or name in self._gains or name in self._gain_of or name == EMBEDDING):
            return stored
        value = dense_values(stored, name)
        if name in self._gains:
            return torch.ones_like(value)
        stored_dtype = value.dtype
        dtype = torch.promote_types(stored_dtype, torch.float32)
        value = value.to(self._device, dtype)
        if name in self._gain_of:
            gain_name = self._gain_of[name]
            gain = dense_values(self._inner.read(gain_name), gain_name)
            value = self._rotation.rows(value * gain.to(value))
        elif is_writer and value.ndim == 2:
            value = self._rotation.columns(value)
        else:
            value = self._rotation.rows(value)
        item = self._items[name]
        is_kept = item.format is None and item.role != "kept"
        return value.to("cpu", stored_dtype if is_kept else dtype)
