"""One hash of all weights of a checkpoint, each hashed in the background when it is first read."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from fastgpt.checkpoint.base import Checkpoint
from fastgpt.checkpoint.container import part_sha256
from fastgpt.errors import CheckpointError
from fastgpt.scheme import QuantizedTensor

__all__ = ["DigestingCheckpoint", "checkpoint_sha256"]

Stored = torch.Tensor | QuantizedTensor

_MAX_THREADS = 8
_MAX_WAITING = 32  # weights whose pages may be needed at once


class DigestingCheckpoint(Checkpoint):
    """A checkpoint that hashes every weight when it is read for the first time.

    Args:
        checkpoint: what is read; its weights must not change while this object lives.
        expected: name -> digest of weights that were read by a run before.
    """

    def __init__(self, checkpoint: Checkpoint, expected: Mapping[str, str] | None = None) -> None:
        self.path = checkpoint.path
        self.config = checkpoint.config
        self.tokenizer_json = checkpoint.tokenizer_json
        self.tokenizer_config = checkpoint.tokenizer_config
        self.chat_template = checkpoint.chat_template
        self.generation_config = checkpoint.generation_config
        self._inner = checkpoint
        self._expected = dict(expected or {})
        self._threads = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1))
        self._digests: dict[str, Future[str]] = {}
        self._waiting: deque[Future[str]] = deque()

    def names(self) -> list[str]:
        """Return the canonical weight names, sorted."""
        return self._inner.names()

    def __contains__(self, name: object) -> bool:
        """Tell whether a weight of that canonical name is present."""
        return name in self._inner

    def read(self, name: str) -> Stored:
        """Return one weight; its hash is on its way."""
        stored = self._inner.read(name)
        if name not in self._digests:
            self._digests[name] = self._threads.submit(_describe, name, stored)
            self._waiting.append(self._digests[name])
            while len(self._waiting) > _MAX_WAITING:
                self._waiting.popleft().result()
        return stored

    def start(self, names: Iterable[str]) -> None:
        """Hash weights that come late now, in the background: the last would be waited for."""
        for name in names:
            self.read(name)

    def digests(self, names: Iterable[str]) -> dict[str, str]:
        """Return the digests of weights, reading those that were not read.

        Raises:
            CheckpointError: one is not what a run before this one read.
        """
        out = {}
        for name in names:
            if name not in self._digests:
                self.read(name)
            out[name] = self._digests[name].result()
            if self._expected.get(name, out[name]) != out[name]:
                raise CheckpointError(
                    f"{self.path} has changed: {name!r} is not what the unfinished run read; "
                    "start again without resuming"
                )
        return out

    def sha256(self) -> str:
        """Return one hash of all weights: of each one's name, type, shape and bytes, by name."""
        whole = hashlib.sha256()
        for digest in self.digests(self.names()).values():
            whole.update(digest.encode())
        return whole.hexdigest()


def checkpoint_sha256(checkpoint: Checkpoint) -> str:
    """Return one hash of all weights of a checkpoint; see `DigestingCheckpoint.sha256`."""
    return DigestingCheckpoint(checkpoint).sha256()


def _describe(name: str, stored: Stored) -> str:
    """Return a line for every part of a weight: name, suffix, type, shape and SHA-256."""
    parts = stored.parts if isinstance(stored, QuantizedTensor) else {"": stored}
    lines = []
    for suffix, part in sorted(parts.items()):
        digest = part_sha256(part.detach().cpu().contiguous())
        lines.append(f"{name}|{suffix}|{part.dtype}|{list(part.shape)}|{digest}\n")
    return "".join(lines)
