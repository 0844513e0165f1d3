"""Which format each parameter gets: roles, ordered overrides, and names that stay in 16 bits."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastgpt.errors import ConfigError
from fastgpt.scheme import EIGHT_BIT, Format, suggest

__all__ = ["PRESETS", "QUANTIZED_ROLES", "Parameter", "Policy"]

QUANTIZED_ROLES = (
    "attention_weights",
    "residual_connections",
    "norm_params",
    "io_layers",
    "default",
)

PRESETS: dict[str, dict[str, Any]] = {
    # The four tiers of the article: fp8 attention, int4 residual branch, binary norms, fp16 IO.
    "four-tier": {
        "attention_weights": "fp8",
        "residual_connections": "int4",
        "norm_params": "binary",
        "io_layers": "fp16",
        "default": "fp16",
    },
    "fp8": {
        "attention_weights": "fp8",
        "residual_connections": "fp8",
        "io_layers": "fp16",
        "default": "fp8",
    },
    # fp8 weights and, where the device multiplies them faster, fp8 activations.
    "w8a8": {
        "attention_weights": "fp8",
        "residual_connections": "fp8",
        "io_layers": "fp16",
        "default": "fp8",
        "activations": "auto",
    },
    "int3": {
        "attention_weights": {"format": "int3", "symmetric": False},
        "residual_connections": {"format": "int3", "symmetric": False},
        "io_layers": "fp16",
        "default": {"format": "int3", "symmetric": False},
    },
    "int4": {
        "attention_weights": "int4",
        "residual_connections": "int4",
        "io_layers": "fp16",
        "default": "int4",
    },
}

_IMPLIED = {"io_layers": "fp16"}  # a configuration that does not name these roles means this
_KEYS = (*QUANTIZED_ROLES, "overrides", "sensitive", "activations")
_ACTIVATIONS = ("16bit", *EIGHT_BIT, "auto")
_FP16 = Format("fp16")


@dataclass(frozen=True, slots=True)
class Parameter:
    """What a policy needs to know of one parameter.

    Attributes:
        name: its full name.
        shape: of the unquantized tensor.
        role: one of QUANTIZED_ROLES, or "kept" for what is protected.
    """

    name: str
    shape: tuple[int, ...]
    role: str


@dataclass(frozen=True)
class Policy:
    """Roles -> formats, with exceptions by name.

    For each parameter, the first that applies: protected parameters are kept; names in `sensitive`
    stay fp16; the first matching override; the role's format; without one the parameter is kept.

    Attributes:
        roles: role -> format.
        overrides: (regular expression searched in the full name, format), first match wins.
        sensitive: dotted names, or parts of them: "lm_head", "layers.0", "layers.3.mlp.down_proj".
        required: roles that the user named; each must match a parameter.
        activations: of the formats that name none: "16bit"; "fp8" or "int8", for weights of that
            format; "auto", for weights of either where the device gains from it.
        gains: the formats for which the device does; see `on`.
    """

    roles: Mapping[str, Format]
    overrides: tuple[tuple[str, Format], ...] = ()
    sensitive: tuple[str, ...] = ()
    required: frozenset[str] = frozenset()
    activations: str = "16bit"
    gains: frozenset[str] = frozenset()

    @staticmethod
    def parse(
        config: Mapping[str, Any] | str | None = None, sensitive: Sequence[str] | str = ()
    ) -> Policy:
        """Return the policy a configuration describes.

        Args:
            config: role -> format, plus `overrides` (a mapping or a list of pairs, regular
                expression -> format), `sensitive` (names) and `activations`; or the name of a
                preset; None means "four-tier". Roles it does not name are kept as they are,
                io_layers becomes fp16.
            sensitive: more names that stay fp16.

        Raises:
            ConfigError: an unknown key or preset, a malformed value.
        """
        if config is None or isinstance(config, str):
            name = "four-tier" if config is None else config
            if name not in PRESETS:
                hint = suggest(name, PRESETS)
                raise ConfigError(
                    f"unknown policy {name!r}{hint}; presets: {', '.join(PRESETS)}; "
                    "or give a mapping from roles to formats"
                )
            preset = dict(PRESETS[name])
            activations = preset.pop("activations", "16bit")
            roles = {r: _parse_format(value, r, activations) for r, value in preset.items()}
            return Policy(roles, (), _names_of(sensitive, "sensitive"), activations=activations)
        if not isinstance(config, Mapping):
            raise ConfigError(f"config is {config!r}; expected a mapping from roles to formats")
        for key in config:
            if key not in _KEYS:
                hint = suggest(str(key), _KEYS)
                raise ConfigError(f"unknown key {key!r}{hint}; known: {', '.join(_KEYS)}")
        named = {role: config[role] for role in QUANTIZED_ROLES if role in config}
        activations = config.get("activations", "16bit")
        if activations not in _ACTIVATIONS:
            raise ConfigError(
                f"activations is {activations!r}{suggest(str(activations), _ACTIVATIONS)}; "
                f"expected one of {', '.join(_ACTIVATIONS)}"
            )
        roles = {r: _parse_format(v, r, activations) for r, v in {**_IMPLIED, **named}.items()}
        return Policy(
            roles=roles,
            overrides=_parse_overrides(config.get("overrides", ()), activations),
            sensitive=(
                *_names_of(config.get("sensitive", ()), "sensitive"),
                *_names_of(sensitive, "sensitive"),
            ),
            required=frozenset(named),
            activations=activations,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the configuration that `parse` turns back into this policy."""
        out: dict[str, Any] = {role: self._format_json(fmt) for role, fmt in self.roles.items()}
        if self.overrides:
            out["overrides"] = [[pattern, self._format_json(f)] for pattern, f in self.overrides]
        if self.sensitive:
            out["sensitive"] = list(self.sensitive)
        if self.activations != "16bit":
            out["activations"] = self.activations
        return out

    def _format_json(self, fmt: Format) -> dict[str, Any]:
        """Return a format's mapping; what the policy's activations would change is spelled out."""
        out = fmt.to_json()
        if fmt.name in EIGHT_BIT and self.activations != "16bit":
            out["activations"] = fmt.activations
        return out

    def on(self, gains: Collection[str]) -> Policy:
        """Return the same policy for a device, with every format's "auto" decided.

        gains: formats whose products with activations of that format the device makes faster.
        """
        known = replace(self, gains=frozenset(gains))
        return replace(
            known,
            roles={role: known._decided(fmt) for role, fmt in self.roles.items()},
            overrides=tuple((pattern, known._decided(fmt)) for pattern, fmt in self.overrides),
        )

    def with_activations(self, fmt: Format | None) -> Format | None:
        """Return a format that no rule names, as a budget chooses it, with its activations."""
        return fmt and self._decided(_with_activations(fmt, self.activations))

    def _decided(self, fmt: Format) -> Format:
        if fmt.activations != "auto":
            return fmt
        return replace(fmt, activations=fmt.name if fmt.name in self.gains else "16bit")

    def pins(self, name: str) -> bool:
        """Tell whether an override or a sensitive name, not a role, decides a parameter."""
        return any(f".{s.strip('.')}." in f".{name}." for s in self.sensitive) or any(
            re.search(pattern, name) for pattern, _ in self.overrides
        )

    def assign(self, parameters: Sequence[Parameter]) -> dict[str, Format | None]:
        """Return name -> format for every parameter; None keeps it as it is.

        Raises:
            ConfigError: a rule that matches nothing (or only protected parameters), or a format
                that cannot store a parameter it was given to.
        """
        patterns = [(re.compile(pattern), fmt) for pattern, fmt in self.overrides]
        sensitive = [f".{name.strip('.')}." for name in self.sensitive]
        hits: set[str] = set()  # rules that matched, protected parameters aside
        out: dict[str, Format | None] = {}
        for parameter in parameters:
            dotted = f".{parameter.name}."
            named = [s for s, part in zip(self.sensitive, sensitive, strict=True) if part in dotted]
            matching = [(p.pattern, fmt) for p, fmt in patterns if p.search(parameter.name)]
            if parameter.role == "kept":
                hits.update(named)
                out[parameter.name] = None
                continue
            hits.update((*named, *(pattern for pattern, _ in matching)))
            if named:
                out[parameter.name] = _FP16
            elif matching:
                out[parameter.name] = matching[0][1]
                _check_storable(parameter, matching[0][1], f"override {matching[0][0]!r}")
            else:
                hits.add(parameter.role)
                out[parameter.name] = self.roles.get(parameter.role)
                if (fmt := out[parameter.name]) is not None:
                    _check_storable(parameter, fmt, parameter.role)
        self._check_every_rule_matched(hits, parameters)
        return out

    def _check_every_rule_matched(self, hits: set[str], parameters: Sequence[Parameter]) -> None:
        for role in QUANTIZED_ROLES:
            if role in self.required and role not in hits:
                present = sorted({p.role for p in parameters} - {"kept"})
                why = (
                    "overrides and sensitive names cover all of it"
                    if role in present
                    else f"this model has {', '.join(present) or 'no parameters'}"
                )
                raise ConfigError(f"{role} takes no bytes: {why}; remove the key {role!r}")
        for pattern, _ in self.overrides:
            if pattern in hits:
                continue
            if any(re.search(pattern, p.name) for p in parameters):
                raise ConfigError(
                    f"override {pattern!r} matches only protected parameters (router, biases, "
                    "q/k norms), which are always kept"
                )
            hint = suggest(pattern.replace("\\", ""), (p.name for p in parameters))
            raise ConfigError(f"override {pattern!r} matches no parameter{hint}")
        for name in self.sensitive:
            if name not in hits:
                raise ConfigError(
                    f"sensitive name {name!r} matches no parameter"
                    f"{suggest(name, _dotted_parts(p.name for p in parameters))}"
                )


def _parse_format(value: Any, where: str, activations: str) -> Format:
    """Return a format; one that does not name its activations takes the policy's."""
    fmt = Format.parse(value, where)
    named = isinstance(value, Format) or (isinstance(value, Mapping) and "activations" in value)
    return fmt if named else _with_activations(fmt, activations)


def _with_activations(fmt: Format, activations: str) -> Format:
    takes = fmt.name in EIGHT_BIT and activations in (fmt.name, "auto")
    return replace(fmt, activations=activations) if takes else fmt


def _check_storable(parameter: Parameter, fmt: Format, rule: str) -> None:
    try:
        fmt.parts(parameter.shape)
    except ConfigError as error:
        raise ConfigError(f"{rule} covers {parameter.name}: {error}") from None


def _parse_overrides(value: Any, activations: str) -> tuple[tuple[str, Format], ...]:
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, (list, tuple)):
        raise ConfigError(f"overrides is {value!r}; expected a mapping or a list of pairs")
    out = []
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise ConfigError(
                f"overrides holds {pair!r}; expected [regular expression, format] pairs"
            )
        pattern, fmt = pair
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"override {pattern!r} is no regular expression: {error}") from None
        out.append((pattern, _parse_format(fmt, f"override {pattern!r}", activations)))
    return tuple(out)


def _names_of(value: Any, key: str) -> tuple[str, ...]:
    if value == "auto":
        raise ConfigError(f'{key}="auto" is an argument of Quantizer, not part of a policy')
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) and n for n in names):
        raise ConfigError(f"{key} is {value!r}; expected a list of names")
    return tuple(names)


def _dotted_parts(names: Iterable[str]) -> set[str]:
    """Return every run of dotted segments of the names that could be given as `sensitive`."""
    parts: set[str] = set()
    for name in list(names)[:512]:  # enough to suggest from; R1 has 47,000 names
        segments = name.split(".")
        for start in range(len(segments)):
            parts.update(".".join(segments[start:end]) for end in range(start + 1, len(segments)))
            parts.add(".".join(segments[start:]))
    return parts
