"""What the readers of other toolkits' directories share: stored tensors, checked settings, weights.

A reader looks at names, types and shapes alone and returns a `ForeignWeight` for every weight it
recognizes; bytes are touched when one is decoded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from fastgpt.checkpoint.safetensors import TensorEntry
from fastgpt.errors import CheckpointError, UnsupportedFormat
from fastgpt.logging import get_logger
from fastgpt.scheme import Format, QuantizedTensor, suggest
from fastgpt.units import format_bytes

__all__ = [
    "FLOATS",
    "ForeignWeight",
    "Imported",
    "Settings",
    "StoredTensors",
    "by_module",
    "compile_pattern",
    "log_imports",
    "summarize",
]

_logger = get_logger(__name__)

FLOATS = (torch.float16, torch.bfloat16, torch.float32)  # of scales

T = TypeVar("T")


@dataclass(frozen=True)
class ForeignWeight:
    """One weight in another toolkit's form.

    Attributes:
        kind: toolkit and form, such as "GPTQ int4 g128".
        parts: suffix -> stored name of the tensors it is made of.
        decode: tensors by suffix -> the weight.
        becomes: what `decode` returns: a format that keeps the codes, or the type of a dequantized
            weight. Scales that float16 does not hold dequantize a weight that would be kept.
    """

    kind: str
    parts: dict[str, str]
    decode: Callable[[dict[str, Tensor]], Tensor | QuantizedTensor]
    becomes: Format | torch.dtype


@dataclass(frozen=True)
class Imported:
    """All weights of one foreign kind in a checkpoint.

    Attributes:
        kind: toolkit and form.
        becomes: format or type they are read as.
        is_kept: codes are taken over one by one, not dequantized.
        num_weights, num_bytes: how many, and their size in the file.
        first: name of one.
    """

    kind: str
    becomes: str
    is_kept: bool
    num_weights: int
    num_bytes: int
    first: str

    def __str__(self) -> str:
        """Return a phrase, such as "28 weights of GPTQ int4 g128, 1.2 GiB, kept as int4 g128"."""
        fate = "kept as" if self.is_kept else "dequantized to"
        return (
            f"{self.num_weights} weights of {self.kind}, {format_bytes(self.num_bytes)}, "
            f"{fate} {self.becomes}"
        )


class StoredTensors:
    """Names, types and shapes of a directory's tensors, and errors that name file and tensor."""

    def __init__(
        self, path: Path, entries: Mapping[str, TensorEntry], files: Mapping[str, str]
    ) -> None:
        self.path = path
        self.entries = entries
        self.files = files

    def fail(self, name: str, what: str) -> NoReturn:
        """Raise CheckpointError about one tensor."""
        raise CheckpointError(f"{self.path / self.files.get(name, '')}: {name!r} {what}") from None

    def require(
        self, name: str, needed_by: str, dtypes: Collection[torch.dtype], dim: int | None = 2
    ) -> TensorEntry:
        """Return a tensor's entry after checking that it is there, its type and its rank."""
        entry = self.entries.get(name)
        if entry is None:
            self.fail(needed_by, f"lacks its {name!r}; complete the download or quantize again")
        if entry.dtype not in dtypes or (dim is not None and len(entry.shape) != dim):
            wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            self.fail(
                name,
                f"is {str(entry.dtype).removeprefix('torch.')} of shape {entry.shape}; expected "
                f"{wanted}" + ("" if dim is None else f" of {dim} dimensions"),
            )
        return entry

    def check_shape(self, name: str, shape: tuple[int, ...], why: str) -> None:
        """Raise CheckpointError unless a tensor has this shape."""
        if self.entries[name].shape != shape:
            self.fail(
                name,
                f"has shape {self.entries[name].shape}; {why} needs {shape}: the quantization "
                "settings are not those of this file",
            )

    def nbytes(self, weight: ForeignWeight) -> int:
        """Return the stored bytes of a weight."""
        entries = (self.entries[name] for name in weight.parts.values())
        return sum(entry.end - entry.start for entry in entries)


class Settings:
    """A mapping of a quantization configuration, read key by key; what is not read is refused.

    Args:
        values: the mapping.
        where: its place, for messages: "config.json: quantization_config".
    """

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise CheckpointError(f"{where} is {values!r}, not an object")
        self.values = values
        self.where = where
        self._known: set[str] = set()

    def get(self, key: str, kind: type[T], default: T) -> T:
        """Return a value of the type `kind`, or the default where it is absent or null."""
        self._known.add(key)
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            self.fail(f"has {key} {value!r}; expected {kind.__name__}")
        return value

    def one_of(self, key: str, choices: Sequence[T], default: T) -> T:
        """Return a value that must be one of the choices.

        Raises:
            UnsupportedFormat: if it is another.
        """
        self._known.add(key)
        value = self.values.get(key)
        value = default if value is None else value
        if value not in choices or type(value) is not type(choices[choices.index(value)]):
            self.unsupported(key, value, choices)
        return value

    def group_size(self, key: str, default: int | None) -> int | None:
        """Return how many columns share a scale; None, written as -1: all of a row."""
        value = self.get(key, int, default or -1)
        if value < 1 and value != -1:
            self.fail(f"has {key} {value}; expected -1 or 1 and more")
        return value if value > 0 else None

    def ignore(self, *keys: str) -> None:
        """Accept keys that do not change what the stored numbers mean."""
        self._known.update(keys)

    def refuse(self, key: str) -> None:
        """Raise UnsupportedFormat if a key is set to anything but null, false or empty."""
        self._known.add(key)
        if self.values.get(key):
            self.unsupported(key, self.values[key], ())

    def unsupported(self, key: str, value: Any, choices: Sequence[Any]) -> NoReturn:
        """Raise UnsupportedFormat for the value of a key."""
        known = f"; read are {', '.join(map(str, choices))}" if choices else ""
        raise UnsupportedFormat(
            f"{self.where} has {key} {value!r}, which this version does not read{known}"
        )

    def fail(self, what: str) -> NoReturn:
        """Raise CheckpointError about these settings."""
        raise CheckpointError(f"{self.where} {what}") from None

    def done(self) -> None:
        """Raise UnsupportedFormat if a key was neither read nor accepted."""
        for key in self.values:
            if key not in self._known:
                raise UnsupportedFormat(
                    f"{self.where} has the unknown key {key!r}{suggest(key, self._known)}; what "
                    "it means for the weights is not known, so the checkpoint is not read"
                )


def by_module(entries: Mapping[str, TensorEntry], suffixes: Collection[str]) -> dict[str, set[str]]:
    """Return module -> those of the suffixes that it has tensors of."""
    modules: dict[str, set[str]] = {}
    for name in entries:
        module, _, suffix = name.rpartition(".")
        if suffix in suffixes:
            modules.setdefault(module, set()).add(suffix)
    return modules


def compile_pattern(pattern: str, where: str) -> re.Pattern[str]:
    """Return a compiled regular expression of a configuration.

    Raises:
        CheckpointError: if it is not one.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise CheckpointError(f"{where} has the bad pattern {pattern!r}: {error}") from None


def log_imports(path: Path, imported: Sequence[Imported]) -> None:
    """Say in one line what becomes of another toolkit's weights."""
    if imported:
        _logger.info("%s holds %s", path, "; ".join(map(str, imported)))


def summarize(weights: Mapping[str, ForeignWeight], tensors: StoredTensors) -> list[Imported]:
    """Return the weights counted by kind and by what becomes of them."""
    groups: dict[tuple[str, str, bool], list[str]] = {}
    for name, weight in weights.items():
        is_kept = isinstance(weight.becomes, Format)
        becomes = str(weight.becomes).removeprefix("torch.")
        groups.setdefault((weight.kind, becomes, is_kept), []).append(name)
    return [
        Imported(kind, becomes, is_kept, len(names),
                 sum(tensors.nbytes(weights[name]) for name in names), min(names))
        for (kind, becomes, is_kept), names in sorted(groups.items())
    ]  # fmt: skip
