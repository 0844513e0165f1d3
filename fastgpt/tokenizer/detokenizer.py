"""From token ids to text as they arrive, never splitting a UTF-8 character."""

import codecs
from collections.abc import Callable

__all__ = ["ByteDetokenizer", "StopChecker", "WindowDetokenizer", "byte_level_alphabet"]

# A character has at most four bytes, so a window that still ends in U+FFFD after this many more
# tokens holds bytes that are no UTF-8 at all.
_MAX_HELD_TOKENS = 8


def byte_level_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level BPE vocabulary stands for.

    Source: GPT-2's bytes_to_unicode: printable Latin-1 characters mean themselves, the other
    bytes are U+0100, U+0101, ... in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet


class ByteDetokenizer:
    """Exact detokenizer of byte-level vocabularies: ids to bytes to UTF-8. One per stream.

    Args:
        token_bytes: returns the bytes of an id; b"" for an id without text.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the whole characters that this token completes."""
        return self._decoder.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        """Return U+FFFD for an incomplete character at the end, else nothing."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class WindowDetokenizer:
    """Detokenizer for any vocabulary: decodes a short window twice and returns the difference.

    Args:
        decode: turns ids into text, special tokens left out.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # a few emitted ids (for the context), then the held ones
        self._num_emitted = 0

    def push(self, token_id: int) -> str:
        """Return the whole characters that this token completes."""
        self._ids.append(token_id)
        old, new = self._decode(self._ids[: self._num_emitted]), self._decode(self._ids)
        held = len(self._ids) - self._num_emitted
        if len(new) <= len(old) or (new.endswith("�") and held < _MAX_HELD_TOKENS):
            return ""
        self._ids = self._ids[self._num_emitted :]
        self._num_emitted = len(self._ids)
        return new[len(old) :]

    def flush(self) -> str:
        """Return what was held back."""
        old, new = self._decode(self._ids[: self._num_emitted]), self._decode(self._ids)
        self._ids, self._num_emitted = [], 0
        return new[len(old) :]


class StopChecker:
    """Cuts a stream of text before the first stop string. One per stream.

    Text that may be the beginning of a stop string is held back until it is decided.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Return the text that is surely before any stop string; sets `stopped` at one."""
        if not self._stop or self.stopped:
            return "" if self.stopped else text
        text = self._held + text
        ends = [index for index in map(text.find, self._stop) if index >= 0]
        if ends:
            self.stopped = True
            self._held = ""
            return text[: min(ends)]
        held = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Return the text held back: it was no stop string."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest proper prefix of stop that ends the text."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
