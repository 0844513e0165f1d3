"""The server's settings: one YAML file, flags over it, every key known and every value checked."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastgpt.errors import ConfigError
from fastgpt.units import parse_duration_ms, resolve_bytes

__all__ = [
    "KV_CACHE_DTYPES",
    "HardwareConfig",
    "OptimizationConfig",
    "ServerConfig",
    "ServiceConfig",
    "check_int",
    "check_kv_cache_dtype",
]

KV_CACHE_DTYPES = ("auto", "fp8", "int8")

# Words of other servers and of the article's text, and our name for them.
_ALIASES = {
    "max_batch": "service.batch_size",
    "max_batch_size": "service.batch_size",
    "max_model_len": "service.max_length",
    "swap-to-cpu": "hardware.swap_to_cpu",
    "device": "the flag --device",
    "model": "the flag --model",
    "log_level": "the flag --log-level",
    "tokenizer": "the flag --tokenizer",
}


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """What clients see.

    Attributes:
        host, port: where the HTTP server listens.
        batch_size: most sequences decoded together.
        max_length: most tokens of one request, prompt and generated.
        min_batch: while the device is busy, waiting requests are admitted when this many wait ...
        batch_timeout_s: ... or the oldest has waited this long (key batch_timeout). An idle
            device admits at once.
        num_workers: threads that render and tokenize prompts.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    batch_size: int = 32
    max_length: int = 2048
    min_batch: int = 1
    batch_timeout_s: float = field(default=0.1, metadata={"key": "batch_timeout"})
    num_workers: int = 4

    def __post_init__(self) -> None:
        if not self.host:
            raise ConfigError("service.host is empty; use 127.0.0.1, or 0.0.0.0 for every address")
        check_int("service.port", self.port, 0, 65535)
        check_int("service.batch_size", self.batch_size, 1, 1024)
        check_int("service.max_length", self.max_length, 2, 2**20)
        check_int("service.min_batch", self.min_batch, 1, self.batch_size, "batch_size")
        check_int("service.num_workers", self.num_workers, 1, 256)


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """What the engine may use.

    Attributes:
        gpu_id: index of the GPU; ignored on the CPU.
        memory_pool_size: cap of the memory pool: a size (24GB = 24e9 bytes, 24GiB), a share of
            the free memory (0.9), or the free memory but some (-2GiB).
        swap_to_cpu: weights that memory_pool_size has no room for wait in host memory and are
            copied to the device in every step.
    """

    gpu_id: int = 0
    memory_pool_size: str = "0.9"
    swap_to_cpu: bool = False

    def __post_init__(self) -> None:
        check_int("hardware.gpu_id", self.gpu_id, 0, 1023)


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """How the engine runs.

    Attributes:
        async_pipeline: HTTP and text work overlap the computation in a process of their own; the
            synchronous loop is not available yet: only true.
        precision: mixed = every weight in the format of the file: only this.
        warmup_iterations: empty inferences of each batch size before the server is ready.
        kv_cache_dtype: what keys and values are kept in: auto = the dtype of the activations; fp8
            (e4m3) and int8 take about half of 16-bit memory, a scale per token and head.
    """

    async_pipeline: bool = True
    precision: str = "mixed"
    warmup_iterations: int = 5
    kv_cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        _only_today("optimization.async_pipeline", self.async_pipeline, True)
        _only_today("optimization.precision", self.precision, "mixed")
        check_int("optimization.warmup_iterations", self.warmup_iterations, 0, 1000)
        check_kv_cache_dtype("optimization.kv_cache_dtype", self.kv_cache_dtype)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """All settings of the server; see the README for the YAML form."""

    service: ServiceConfig = field(default_factory=ServiceConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)

    @classmethod
    def from_yaml(
        cls, path: str | Path | None, overrides: Mapping[str, Any] | None = None
    ) -> "ServerConfig":
        """Read a YAML file (None: all defaults) and apply overrides.

        Args:
            path: the file.
            overrides: values by dotted key (`service.port`) that win over the file; None values
                are skipped.

        Raises:
            ConfigError: if the file is missing or not YAML, or a key or value is wrong; the
                message names the key and suggests the nearest one.
        """
        tree: dict[str, dict[str, Any]] = {}
        if path is not None:
            tree = _read_yaml(Path(path))
        for key, value in (overrides or {}).items():
            if value is not None:
                section, _, name = key.partition(".")
                content = tree.get(section)
                if isinstance(content, dict) or content is None:
                    tree[section] = {**(content or {}), name: value}
        return cls.from_mapping(tree)

    @classmethod
    def from_mapping(cls, tree: Mapping[str, Any]) -> "ServerConfig":
        """Build the settings from nested mappings, as YAML yields them."""
        sections: dict[str, Any] = {}
        for section, content in tree.items():
            if section not in _SECTIONS:
                raise ConfigError(f"unknown key {section!r}{_suggest(str(section))}")
            if content is None:
                continue
            if not isinstance(content, Mapping):
                raise ConfigError(f"{section} is {content!r}; expected keys and values below it")
            sections[section] = _build_section(section, content)
        return cls(**sections)


_SECTIONS: dict[str, type] = {
    "service": ServiceConfig,
    "hardware": HardwareConfig,
    "optimization": OptimizationConfig,
}


def _keys(section: str) -> dict[str, dataclasses.Field[Any]]:
    return {f.metadata.get("key", f.name): f for f in dataclasses.fields(_SECTIONS[section])}


def _suggest(key: str, section: str | None = None) -> str:
    """Return `; did you mean …` for an unknown key, or the list of keys."""
    if key in _ALIASES:
        return f"; it is called {_ALIASES[key]}"
    known = {name: f"{home}.{name}" for home in _SECTIONS for name in _keys(home)}
    if key in known:
        return f"; it belongs to {known[key]}"
    candidates = [*_keys(section)] if section else [*_SECTIONS, *known]
    nearest = difflib.get_close_matches(key, candidates, n=1, cutoff=0.5)
    if not nearest and section:
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if nearest:
        return f"; did you mean {known.get(nearest[0], nearest[0])!r}?"
    return f"; known keys: {', '.join(_keys(section) if section else _SECTIONS)}"


def _build_section(section: str, content: Mapping[str, Any]) -> Any:
    keys = _keys(section)
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in keys:
            raise ConfigError(f"unknown key {section}.{key}{_suggest(str(key), section)}")
        name = f"{section}.{key}"
        spec = keys[key]
        if key == "memory_pool_size":
            values[spec.name] = _parsed_size(name, value)
        elif key == "batch_timeout":
            values[spec.name] = _parsed_duration_s(name, value)
        elif isinstance(spec.default, bool):
            values[spec.name] = _typed(name, value, bool, "true or false")
        elif isinstance(spec.default, int):
            values[spec.name] = value  # checked with its bounds
        else:
            values[spec.name] = _typed(name, value, str, "a text")
    return _SECTIONS[section](**values)


def _parsed_size(name: str, value: Any) -> str:
    """Return the size's text after checking that it can be read."""
    try:
        if resolve_bytes(value, 1 << 50) < 1 << 20:
            raise ConfigError(f"size is {value!r}, less than 1MiB; did you mean {value}GB?")
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    return str(value)


def _parsed_duration_s(name: str, value: Any) -> float:
    try:
        return parse_duration_ms(str(value)) / 1e3
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _typed(name: str, value: Any, kind: type, expected: str) -> Any:
    if not isinstance(value, kind):
        raise ConfigError(f"{name} is {value!r}; expected {expected}")
    return value


def check_int(name: str, value: Any, low: int, high: int, high_name: str = "") -> None:
    """Raise ConfigError unless value is an integer from low to high (called high_name)."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; expected an integer")
    if not low <= value <= high:
        raise ConfigError(
            f"{name} is {value}; expected {low} to {high}{f' ({high_name})' if high_name else ''}"
        )


def check_kv_cache_dtype(name: str, value: str) -> None:
    """Raise ConfigError, naming the setting, if the word is none of KV_CACHE_DTYPES."""
    if value not in KV_CACHE_DTYPES:
        raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(KV_CACHE_DTYPES)}")


def _only_today(name: str, value: Any, today: Any) -> None:
    if value != today:
        shown = str(value).lower() if isinstance(value, bool) else repr(value)
        allowed = str(today).lower() if isinstance(today, bool) else repr(today)
        raise ConfigError(f"{name} is {shown}, not available in this version; use {allowed}")


def _read_yaml(path: Path) -> dict[str, dict[str, Any]]:
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text") from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}; expected keys and values")
    return {str(k): dict(v) if isinstance(v, Mapping) else v for k, v in tree.items()}
