"""Every error FastGPT raises on purpose: messages say what was wrong, the value and the fix."""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DeviceError",
    "FastGPTError",
    "InvalidArgument",
    "OutOfMemory",
    "RequestError",
    "UnsupportedFormat",
]


class FastGPTError(Exception):
    """Base of all errors raised by FastGPT."""


class InvalidArgument(FastGPTError, ValueError):
    """A caller passed a value that an operation does not accept."""


class ConfigError(FastGPTError, ValueError):
    """A configuration file, flag or environment variable is wrong."""


class CheckpointError(FastGPTError):
    """A model file or directory is missing, damaged or of an unknown architecture."""


class UnsupportedFormat(FastGPTError):
    """A quantization format is not known to this version or not available on this device."""


class OutOfMemory(FastGPTError, MemoryError):
    """A memory request does not fit in the budget or on the device; recoverable by freeing."""


class RequestError(FastGPTError, ValueError):
    """One generation request is invalid; other requests are unaffected."""


class DeviceError(FastGPTError, RuntimeError):
    """The device or its driver reported a failure; not recoverable in this process."""
