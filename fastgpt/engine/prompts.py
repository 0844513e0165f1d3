"""What a caller may give as a prompt, and its token ids."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastgpt.errors import RequestError
from fastgpt.tokenizer import Tokenizer

__all__ = ["Prompt", "as_prompts", "encode"]

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]


def as_prompts(prompts: Any) -> list[Prompt]:
    """Return a list of prompts for one prompt or several.

    Raises:
        RequestError: if it is neither.

    >>> as_prompts([1, 2]), as_prompts([[1], [2]])
    ([[1, 2]], [[1], [2]])
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Iterable):
        raise RequestError(f"prompts are of type {type(prompts).__name__}; expected a list of them")
    several: list[Any] = list(prompts)
    return [several] if several and isinstance(several[0], int | Mapping) else several


def encode(prompt: Prompt, tokenizer: Tokenizer | None, max_tokens: int | None = None) -> list[int]:
    """Return the token ids of a prompt, with exactly one BOS where the model uses one.

    Args:
        prompt: a text, token ids, or chat messages.
        tokenizer: None takes token ids alone.
        max_tokens: a text that surely has more is refused without the time to encode it.

    Raises:
        RequestError: if it is no prompt, if it is text and there is no tokenizer, if the chat
            template refuses it, or if it is too long.
    """
    if isinstance(prompt, bytes | Mapping) or not isinstance(prompt, Sequence):
        raise RequestError(
            f"a prompt is of type {type(prompt).__name__}; expected a text, a list of token ids, "
            "or a list of chat messages"
        )
    items: list[Any] = [] if isinstance(prompt, str) else list(prompt)
    if not isinstance(prompt, str) and all(type(item) is int for item in items):
        return items
    if not all(isinstance(item, Mapping) for item in items):
        kinds = sorted({type(item).__name__ for item in items})
        raise RequestError(
            f"a prompt is a list of {' and '.join(kinds)}; expected token ids (int) or chat "
            "messages (dict)"
        )
    if tokenizer is None:
        raise RequestError("the model file has no tokenizer; send token ids")
    if isinstance(prompt, str):
        return tokenizer.encode_prompt(prompt, max_tokens=max_tokens)
    return tokenizer.encode_chat(items, max_tokens=max_tokens)
