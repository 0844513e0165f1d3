"""Rendering chat messages with the checkpoint's own template, in a sandbox."""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastgpt.errors import CheckpointError, RequestError

__all__ = ["ChatTemplate"]

# The rendered prompt may be this many times as long as its messages, plus a constant: a template
# that loops cannot fill the memory.
_MAX_GROWTH = 16
_MAX_EXTRA_CHARS = 1 << 16


def _raise_exception(message: str) -> NoReturn:
    raise RequestError(f"the chat template refused the messages: {message}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class ChatTemplate:
    """A compiled Jinja template, as `transformers` renders it. Any thread may call it.

    Args:
        source: the template's text.
        special_tokens: variables such as bos_token and eos_token.

    Raises:
        CheckpointError: if the template does not compile.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template does not compile: {error}") from error
        self.source = source
        self._special_tokens = special_tokens

    def render(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """Return the prompt's text.

        Raises:
            RequestError: if the template refuses the messages or fails on them.
        """
        limit = _MAX_EXTRA_CHARS + _MAX_GROWTH * sum(
            len(str(value)) for message in messages for value in message.values()
        )
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special_tokens,
            ):
                pieces.append(piece)
                length += len(piece)
                if length > limit:
                    raise RequestError(f"the chat template wrote more than {limit} characters")
        except jinja2.TemplateError as error:
            raise RequestError(f"the chat template failed: {error}") from error
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(f"the chat template failed on these messages: {error}") from error
        return "".join(pieces)
