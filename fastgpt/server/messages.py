"""What the HTTP process and the engine process say to each other, and how it is framed.

A frame is its length (4 bytes, little endian) and a msgpack message. Decoding builds only the
types below; nothing is ever unpickled.
"""

import struct
from typing import Any

import msgspec

from fastgpt.request import FinishReason, SamplingParams, Timings
from fastgpt.tokenizer import TokenizerFiles

__all__ = [
    "Abort",
    "Configure",
    "EngineInfo",
    "Failed",
    "Figures",
    "FrameReader",
    "FromEngine",
    "Output",
    "Outputs",
    "Ready",
    "Submit",
    "ToEngine",
    "encode_frame",
]

_LENGTH = struct.Struct("<I")
_MAX_FRAME_BYTES = 256 << 20


class Configure(msgspec.Struct, tag=True, kw_only=True, frozen=True):
    """First message to the engine: what to load and how to run it."""

    model: str
    tokenizer: str | None
    device: str
    gpu_id: int
    dtype: str
    memory_pool_size: str
    swap_to_cpu: bool
    max_batch: int
    max_length: int
    min_batch: int
    batch_timeout_s: float
    warmup_iterations: int
    kv_cache_dtype: str
    log_level: str


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Start a request."""

    request_id: str
    token_ids: list[int]
    params: SamplingParams


class Abort(msgspec.Struct, tag=True, frozen=True):
    """End a request; its client went away or its text is complete."""

    request_id: str


class EngineInfo(msgspec.Struct, kw_only=True, frozen=True):
    """What the engine serves and with what."""

    name: str
    architecture: str
    device: str
    dtype: str
    kernels: str
    num_threads: int
    vocab_size: int
    max_length: int
    max_batch: int
    block_size: int
    num_blocks: int
    kv_cache_dtype: str
    load_s: float
    warm_up_s: float

    @property
    def num_cache_tokens(self) -> int:
        """Tokens the KV cache holds."""
        return self.num_blocks * self.block_size

    @property
    def stored_cache_dtype(self) -> str:
        """What keys and values are kept in: fp8, int8, or the dtype of the activations."""
        return self.dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype


class Ready(msgspec.Struct, tag=True, kw_only=True, frozen=True):
    """The engine takes requests from now on."""

    info: EngineInfo
    tokenizer: TokenizerFiles | None
    generation_config: dict[str, Any]
    eos_ids: list[int]


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The engine cannot start or cannot go on; its process ends after this."""

    message: str


class Output(msgspec.Struct, frozen=True):
    """New tokens of one request; `error` says why a request was refused."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    timings: Timings | None = None
    error: str | None = None


class Outputs(msgspec.Struct, tag=True, frozen=True):
    """What one step produced, and the load after it."""

    outputs: list[Output]
    num_running: int
    num_waiting: int
    num_free_blocks: int


class Figures(msgspec.Struct, tag=True, kw_only=True, frozen=True):
    """The engine's counters, sent about twice a second and when it falls idle."""

    num_preemptions: int
    num_steps: int
    busy_s: float
    clock_s: float
    memory_fragmentation: float
    pool: dict[str, Any]


ToEngine = Configure | Submit | Abort
FromEngine = Ready | Failed | Outputs | Figures

_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: ToEngine | FromEngine) -> bytes:
    """Return the bytes of one frame."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into messages of one union type.

    Args:
        kind: ToEngine or FromEngine.
    """

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """Return the messages that this data completes.

        Raises:
            msgspec.ValidationError: if a message is none of the expected types.
            ValueError: if a frame is longer than 256 MiB.
        """
        self._buffer += data
        messages = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > _MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length} bytes; at most {_MAX_FRAME_BYTES}")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            messages.append(self._decoder.decode(memoryview(self._buffer)[_LENGTH.size : end]))
            del self._buffer[:end]
        return messages
