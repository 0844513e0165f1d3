"""What a run has done so far, so that a run that was killed goes on where it stopped.

Beside the output `m.pt` stand, until it is complete, `.m.pt.partial` (the bytes) and
`.m.pt.journal` (text, appended to, every line with its own checksum): the key, the calibration
tokens, the plan, then one line for every block whose bytes are on the disk. A line that was cut,
and what follows it, does not count. Everything else that quantizing a block depends on is computed
again from the blocks before it, so the finished file is the same byte for byte.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from fastgpt.checkpoint.base import Checkpoint
from fastgpt.checkpoint.writer import WrittenBlock
from fastgpt.errors import ConfigError

__all__ = ["Journal", "JournalBlock", "source_names_sha256"]


class JournalBlock(msgspec.Struct, frozen=True):
    """One block of the output.

    Attributes:
        written: what is on the disk.
        report: tensor name -> its entry in the report.
        source: tensor name -> digest of the weight that was read.
    """

    written: WrittenBlock
    report: dict[str, dict[str, Any]]
    source: dict[str, str]


class Journal:
    """The journal of one output; one process at a time holds it.

    Args:
        output: the file that will be made.
        key: what decides the result, name -> value.
        resume: go on where a run of the same key stopped; else what it left is deleted.

    Attributes:
        body: where the bytes go.
        tokens: calibration and evaluation tokens, None until they are known.
        plan: of the present attempt, None until it is known.
        blocks: of the present attempt.

    Raises:
        ConfigError: resuming with another key; the message names what differs. Or another process
            is writing this output.
        OSError: the file system refused.
    """

    def __init__(self, output: Path, key: Mapping[str, Any], *, resume: bool) -> None:
        self.output = output
        self.body = output.with_name(f".{output.name}.partial")
        self.path = output.with_name(f".{output.name}.journal")
        self.tokens: tuple[list[list[int]], list[list[int]]] | None = None
        self.plan: dict[str, Any] | None = None
        self.blocks: list[JournalBlock] = []
        wanted = json.loads(json.dumps(dict(key)))  # as it will be read back
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(
                f"another process is quantizing into {output}; wait for it, or choose another file"
            ) from None
        try:
            valid_bytes = self._read(wanted) if resume else 0
        except BaseException:
            self._file.close()
            raise
        os.ftruncate(self._file.fileno(), valid_bytes)
        if not valid_bytes:
            self._append("key", wanted)
        if self.blocks and not self.body.is_file():  # renamed or deleted: its blocks are made again
            assert self.plan is not None
            self.set_plan(self.plan)

    @staticmethod
    def exists(output: Path) -> bool:
        """Tell whether an unfinished run left its journal."""
        return output.with_name(f".{output.name}.journal").is_file()

    def set_tokens(self, calibration: list[list[int]], evaluation: list[list[int]]) -> None:
        """Keep the tokens: generating them again takes long."""
        self.tokens = calibration, evaluation
        self._append("tokens", self.tokens)

    def set_plan(self, plan: dict[str, Any]) -> None:
        """Start an attempt: blocks of another plan do not count any more."""
        self.plan = plan
        self.blocks = []
        self._append("plan", plan)

    def add_block(self, block: JournalBlock) -> None:
        """Keep a block whose bytes are on the disk."""
        self.blocks.append(block)
        self._append("block", msgspec.to_builtins(block))

    def close(self, *, keep: bool) -> None:
        """Let go of the journal; without `keep` it is deleted."""
        if not keep:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def _append(self, kind: str, value: Any) -> None:
        text = json.dumps([kind, value], separators=(",", ":")).encode()
        self._file.write(xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, key: dict[str, Any]) -> int:
        """Take over what the file holds; return how many of its bytes count."""
        self._file.seek(0)
        valid_bytes = 0
        for line in self._file:
            digest, _, text = line.rstrip(b"\n").partition(b" ")
            if not line.endswith(b"\n") or xxhash.xxh3_64_hexdigest(text).encode() != digest:
                break
            kind, value = json.loads(text)
            if kind == "key":
                _compare(self.output, value, key)
            elif kind == "tokens":
                self.tokens = value[0], value[1]
            elif kind == "plan":
                self.plan, self.blocks = value, []
            else:
                self.blocks.append(msgspec.convert(value, JournalBlock))
            valid_bytes += len(line)
        return valid_bytes


def source_names_sha256(checkpoint: Checkpoint) -> str:
    """Return a hash of the names of all weights and of the configuration; no weight is read."""
    known = {"config": checkpoint.config, "names": checkpoint.names()}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _compare(output: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ConfigError if a run before was another one, naming what differs."""
    differing = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    if not differing:
        return
    lines = [f"{k} was {_short(before.get(k))}, is {_short(now.get(k))}" for k in differing]
    raise ConfigError(
        f"the unfinished {output} was made from something else: {'; '.join(lines)}. Give what was "
        "given then, or start again without resuming"
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
