"""Reading large files through memory maps that let go of what was read."""

import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

from fastgpt.errors import CheckpointError

__all__ = ["MAP_BYTES", "MappedFile"]

MAP_BYTES = 1 << 30


class MappedFile:
    """A file of known size whose bytes are read as views of a private mapping.

    Mappings are copy-on-write: the file is never changed. A mapping serves MAP_BYTES of reads, then
    a new one takes over, and a mapping is closed when no tensor from it lives; so reading a file of
    any size tensor by tensor keeps little of it resident.
    """

    def __init__(self, path: Path, file_bytes: int) -> None:
        self.path = path
        self.file_bytes = file_bytes
        self._map: mmap.mmap | None = None
        self._served_bytes = 0

    @property
    def is_mapped(self) -> bool:
        """True while this object holds a mapping."""
        return self._map is not None

    def read(self, start: int, end: int) -> Tensor:
        """Return bytes start .. end, end > start, as uint8; writing to it changes memory only.

        Raises:
            CheckpointError: if the file became shorter or cannot be mapped.
        """
        mapped = self._map  # another thread may unmap meanwhile
        if mapped is None or self._served_bytes > MAP_BYTES:
            mapped = self._map = self._open()
            self._served_bytes = 0
        self._served_bytes += end - start
        return torch.frombuffer(mapped, dtype=torch.uint8, count=end - start, offset=start)

    def unmap(self) -> None:
        """Let go of the mapping; tensors read before keep it, the next `read` maps again."""
        self._map = None

    def _open(self) -> mmap.mmap:
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != self.file_bytes:
                    raise CheckpointError(
                        f"{self.path} changed from {self.file_bytes} to {size} bytes after it was "
                        "opened"
                    )
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be mapped: {error.strerror or error}"
            ) from None
