"""Checking a file against its own certificate: bytes by SHA-256, figures by measuring again."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from fastgpt.checkpoint import Container, open_checkpoint
from fastgpt.checkpoint.container import part_sha256
from fastgpt.errors import CheckpointError
from fastgpt.quant.calibration import tokens_sha256
from fastgpt.quant.digest import checkpoint_sha256
from fastgpt.quant.evaluate import Evaluation, stored_nll
from fastgpt.scheme import QuantizedTensor

__all__ = ["verify"]

# Of figures measured again: kernels of another device add up in another order.
_NLL_TOLERANCE = 0.005
_KL_TOLERANCE = 0.1


def verify(
    path: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    device: torch.device | None = None,
) -> Iterator[str]:
    """Yield a line for every claim of a file that was checked and holds.

    Args:
        path: a container.
        source: the model it was made from: its hash and all figures are then checked; without it
            the likelihood of the evaluation tokens is, which needs the file alone.
        device: where to run.

    Raises:
        CheckpointError: a claim does not hold, or the file makes none.
    """
    container = Container(path)
    hashed = 0
    for name, record in container.metadata.tensors.items():
        if record.sha256.keys() != record.parts.keys():
            raise CheckpointError(f"{path} states no SHA-256 of {name!r}; quantize it again")
        stored = container.read(name)
        parts = stored.parts if isinstance(stored, QuantizedTensor) else {"": stored}
        for suffix, expected in record.sha256.items():
            if part_sha256(parts[suffix]) != expected:
                raise CheckpointError(
                    f"{path} is not what it certifies: {name!r} {suffix or 'bytes'} has another "
                    "SHA-256"
                )
            hashed += 1
    yield f"{hashed} tensors have the SHA-256 that the file states"
    stated = container.metadata.certificate
    original = None if source is None else open_checkpoint(source)
    if original is not None:
        if checkpoint_sha256(original) != stated.get("source_sha256"):
            raise CheckpointError(f"{path} was not made from {source}: the weights differ")
        yield "the source has the SHA-256 that the file states"
    tokens = stated.get("evaluation_tokens")
    if not tokens:
        yield "the file states no figures of the model's answers"
        return
    if tokens_sha256(tokens) != stated.get("evaluation_sha256"):
        raise CheckpointError(f"{path} states another hash of its evaluation tokens")
    nll = stored_nll(container, tokens, device)
    _check_near(path, "negative log-likelihood", nll, stated["nll"], _NLL_TOLERANCE)
    yield f"negative log-likelihood {nll:.5f} a token, stated {stated['nll']:.5f}"
    if original is None:
        return
    measured = Evaluation(original, tokens, device)
    for _ in measured.watch((name, container.read(name)) for name in container.metadata.tensors):
        pass
    for key in ("kl_mean", "kl_p99"):
        _check_near(path, key, measured.figures[key], stated[key], _KL_TOLERANCE)
        yield f"{key} {measured.figures[key]:.4g}, stated {stated[key]:.4g}"


def _check_near(
    path: str | os.PathLike[str], what: str, found: float, stated: float, tolerance: float
) -> None:
    if not abs(found - stated) <= tolerance * abs(stated) + 1e-6:
        raise CheckpointError(f"{path} states a {what} of {stated:.6g}; measured {found:.6g}")
