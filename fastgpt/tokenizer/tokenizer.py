"""The tokenizer of a checkpoint: plain text stays plain, exactly one BOS, UTF-8 kept whole."""

import json
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from fastgpt.errors import CheckpointError, RequestError
from fastgpt.tokenizer.chat_template import ChatTemplate
from fastgpt.tokenizer.detokenizer import (
    ByteDetokenizer,
    WindowDetokenizer,
    byte_level_alphabet,
)

__all__ = ["Detokenizer", "Tokenizer", "TokenizerFiles"]

THINK_START, THINK_END = "<think>", "</think>"

# Added tokens that steer a model are written like this even where a checkpoint forgets to flag
# them special (R1 does: <think>, <｜User｜>).
_CONTROL_TOKEN = re.compile(r"[<\[].+[>\]]")

# Unicode noncharacters: never text. One that the messages lack marks what must stay plain.
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class Detokenizer(Protocol):
    """Turns one stream of ids into whole characters."""

    def push(self, token_id: int) -> str:
        """Return the whole characters that this token completes."""

    def flush(self) -> str:
        """Return what was held back, at the end of the stream."""


class CheckpointTexts(Protocol):
    """The texts a checkpoint carries (`fastgpt.checkpoint.Checkpoint` has them)."""

    @property
    def tokenizer_json(self) -> str | None: ...
    @property
    def tokenizer_config(self) -> dict[str, Any]: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def generation_config(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class TokenizerFiles:
    """The texts that make a tokenizer, as a checkpoint stores them."""

    tokenizer_json: str
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    generation_config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_directory(cls, path: str | Path) -> "TokenizerFiles":
        """Read tokenizer.json and its companions from a directory (or the file itself).

        Raises:
            CheckpointError: if there is no tokenizer.json or a file is not valid JSON.
        """
        path = Path(path)
        folder = path.parent if path.is_file() else path
        file = path if path.is_file() else path / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{path} has no tokenizer.json; pass its directory")

        def read_json(name: str) -> dict[str, Any]:
            companion = folder / name
            if not companion.is_file():
                return {}
            try:
                content = json.loads(companion.read_text("utf-8"))
            except ValueError as error:
                raise CheckpointError(f"{companion} is not valid JSON: {error}") from error
            if not isinstance(content, dict):
                raise CheckpointError(f"{companion} is not a JSON object")
            return content

        template = folder / "chat_template.jinja"
        return cls(
            tokenizer_json=file.read_text("utf-8"),
            tokenizer_config=read_json("tokenizer_config.json"),
            chat_template=template.read_text("utf-8") if template.is_file() else None,
            generation_config=read_json("generation_config.json"),
        )

    @classmethod
    def from_checkpoint(cls, checkpoint: CheckpointTexts) -> "TokenizerFiles | None":
        """Return the checkpoint's texts, or None when it carries no tokenizer."""
        if checkpoint.tokenizer_json is None:
            return None
        return cls(
            tokenizer_json=checkpoint.tokenizer_json,
            tokenizer_config=dict(checkpoint.tokenizer_config or {}),
            chat_template=checkpoint.chat_template,
            generation_config=dict(checkpoint.generation_config or {}),
        )


class Tokenizer:
    """A checkpoint's tokenizer and chat template. Any thread may call it.

    Attributes:
        bos_id: the id that begins a prompt, or None when the model uses none.
        eos_ids: every id that ends a text.
        think_start_id, think_end_id: ids of <think> and </think>, or None.
        chat_template: the template, or None.
        generation_config: the checkpoint's sampling defaults.

    Raises:
        CheckpointError: if a text is damaged.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self.files = files
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(files.tokenizer_json)
            self._spec: dict[str, Any] = json.loads(files.tokenizer_json)
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"tokenizer.json is damaged: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._spec.get("added_tokens") or []
        self._control = {
            token["content"]: int(token["id"])
            for token in added
            if token.get("special") or _CONTROL_TOKEN.fullmatch(token["content"])
        }
        self._control_pattern = _alternatives(self._control)
        self._plain: tokenizers.Tokenizer | None = None
        self._plain_lock = threading.Lock()

        self.generation_config = files.generation_config
        self.think_start_id = self._tokenizer.token_to_id(THINK_START)
        self.think_end_id = self._tokenizer.token_to_id(THINK_END)
        self._skipped = {int(token["id"]) for token in added if token.get("special")} - {
            self.think_start_id,
            self.think_end_id,
        }
        self._alphabet = byte_level_alphabet()
        decoder = self._spec.get("decoder") or {}
        self._is_byte_level = decoder.get("type") == "ByteLevel"
        self._token_bytes: dict[int, bytes] = {}
        self._most_bytes = _most_bytes_of_a_token(self._spec) if self._is_byte_level else None

        names = {
            name: text
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
            if (text := self._named_token(name)) is not None
        }
        template = _default_template(files)
        self.chat_template = None if template is None else ChatTemplate(template, names)
        self.eos_ids = self._find_eos_ids(names.get("eos_token"))
        self.bos_id = self._find_bos_id(names.get("bos_token"))

    @classmethod
    def from_checkpoint(cls, source: CheckpointTexts | str | Path) -> "Tokenizer":
        """Return the tokenizer of a checkpoint, or of a directory with a tokenizer.json.

        Raises:
            CheckpointError: if there is none, or it is damaged.
        """
        if isinstance(source, str | Path):
            return cls(TokenizerFiles.from_directory(source))
        files = TokenizerFiles.from_checkpoint(source)
        if files is None:
            raise CheckpointError(
                "the checkpoint carries no tokenizer; pass --tokenizer DIR with a tokenizer.json"
            )
        return cls(files)

    @property
    def vocab_size(self) -> int:
        """Ids known to the tokenizer, added ones included."""
        return int(self._tokenizer.get_vocab_size())

    def encode(
        self, text: str, *, add_special: bool = False, allow_special: bool = False
    ) -> list[int]:
        """Return the ids of a text.

        Args:
            text: any text.
            add_special: begin with the BOS, if the model uses one.
            allow_special: parse the text of special tokens (<｜User｜>) as those tokens; otherwise
                it is plain text.

        Raises:
            RequestError: if the text is not valid Unicode (a lone surrogate).
        """
        tokenizer = self._tokenizer
        if not allow_special and self._control_pattern.search(text):
            tokenizer = self._plain_tokenizer()
        ids = _encode(tokenizer, text)
        return self._with_one_bos(ids) if add_special else ids

    def encode_prompt(self, text: str, *, max_tokens: int | None = None) -> list[int]:
        """Return the ids of a whole prompt: special tokens are parsed, exactly one BOS.

        Args:
            text: the prompt.
            max_tokens: a text that surely has more is refused without the time to encode it; one
                that is encoded may have more.

        Raises:
            RequestError: if the text is not valid Unicode, or too long for max_tokens.
        """
        self._refuse_long(text, max_tokens)
        return self.encode(text, add_special=True, allow_special=True)

    def encode_chat(
        self, messages: Sequence[dict[str, Any]], *, max_tokens: int | None = None
    ) -> list[int]:
        """Render the messages and return the prompt's ids, with exactly one BOS.

        The text of special tokens inside a message stays plain text; only the template writes
        special tokens (an earlier answer may hold <think>, which templates look for).

        Args:
            messages: role and content (text) of each message.
            max_tokens: see encode_prompt.

        Raises:
            RequestError: if there is no chat template, it refuses the messages, or the prompt is
                too long for max_tokens.
        """
        if self.chat_template is None:
            raise RequestError("this model has no chat template; use /v1/completions")
        mark, marked = self._mark_control_texts(messages)
        text = self.chat_template.render(marked)
        self._refuse_long(text if mark is None else text.replace(mark, ""), max_tokens)
        if mark is None or mark not in text:
            ids = _encode(self._tokenizer, text)
        else:
            ids = self._encode_marked(text, mark)
        return self._with_one_bos(ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of the ids, special tokens left out (<think> and </think> stay)."""
        if self._is_byte_level:
            return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def detokenizer(self) -> Detokenizer:
        """Return a detokenizer for one stream."""
        if self._is_byte_level:
            return ByteDetokenizer(self.token_bytes)
        return WindowDetokenizer(self.decode)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one id of a byte-level vocabulary; b"" for special or unknown ids."""
        known = self._token_bytes.get(token_id)
        if known is not None:
            return known
        token = None if token_id in self._skipped else self._tokenizer.id_to_token(token_id)
        if token is None:
            result = b""
        elif all(char in self._alphabet for char in token):
            result = bytes(self._alphabet[char] for char in token)
        else:
            result = token.encode("utf-8")
        self._token_bytes[token_id] = result
        return result

    def _refuse_long(self, text: str, max_tokens: int | None) -> None:
        """Raise RequestError if the text has more tokens however it is encoded."""
        if max_tokens is None or self._most_bytes is None:
            return
        # Of four bytes a character at most: a look at its bytes is for long texts.
        if len(text) * 4 <= max_tokens * self._most_bytes:
            return
        least = len(text.encode("utf-8", "replace")) // self._most_bytes
        if least > max_tokens:
            raise RequestError(
                f"the prompt has {len(text)} characters, at least {least} tokens; at most "
                f"{max_tokens} tokens fit; shorten it"
            )

    def _plain_tokenizer(self) -> tokenizers.Tokenizer:
        """Return a twin that never sees control tokens in a text."""
        with self._plain_lock:
            if self._plain is None:
                spec = dict(self._spec)
                spec["added_tokens"] = [
                    {**token, "special": token["content"] in self._control}
                    for token in spec.get("added_tokens") or []
                ]
                plain = tokenizers.Tokenizer.from_str(json.dumps(spec))
                plain.no_truncation()
                plain.no_padding()
                plain.encode_special_tokens = True
                self._plain = plain
            return self._plain

    def _mark_control_texts(
        self, messages: Sequence[dict[str, Any]]
    ) -> tuple[str | None, list[dict[str, Any]]]:
        """Put a mark into every control-token text of the messages: rendering keeps it apart.

        Returns the mark, or None when no message has such a text.
        """
        joined = "".join(v for m in messages for v in m.values() if isinstance(v, str))
        if not self._control_pattern.search(joined):
            return None, list(messages)
        mark = next((mark for mark in _MARKS if mark not in joined), None)
        if mark is None:
            raise RequestError("the messages hold too many Unicode noncharacters")

        def mark_text(message: dict[str, Any], text: str) -> str:
            def insert(match: re.Match[str]) -> str:
                found = match.group()
                if message.get("role") == "assistant" and found in (THINK_START, THINK_END):
                    return found
                return found[0] + mark + found[1:]

            return self._control_pattern.sub(insert, text)

        return mark, [
            {k: mark_text(m, v) if isinstance(v, str) else v for k, v in m.items()}
            for m in messages
        ]

    def _encode_marked(self, text: str, mark: str) -> list[int]:
        """Encode a rendered prompt: unmarked control tokens become ids, all else is plain text."""
        ids: list[int] = []
        plain = self._plain_tokenizer()
        end = 0
        for match in self._control_pattern.finditer(text):
            ids += _encode(plain, text[end : match.start()].replace(mark, ""))
            ids.append(self._control[match.group()])
            end = match.end()
        return ids + _encode(plain, text[end:].replace(mark, ""))

    def _with_one_bos(self, ids: list[int]) -> list[int]:
        if self.bos_id is None:
            return ids
        begin = 0
        while begin < len(ids) and ids[begin] == self.bos_id:
            begin += 1
        return [self.bos_id, *ids[begin:]]

    def _named_token(self, name: str) -> str | None:
        value = self.files.tokenizer_config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) else None

    def _find_eos_ids(self, eos_token: str | None) -> frozenset[int]:
        listed = self.generation_config.get("eos_token_id")
        ids = set(listed if isinstance(listed, list) else [] if listed is None else [listed])
        if eos_token is not None and (eos := self._tokenizer.token_to_id(eos_token)) is not None:
            ids.add(eos)
        return frozenset(int(token_id) for token_id in ids)

    def _find_bos_id(self, bos_token: str | None) -> int | None:
        """A model uses a BOS if its tokenizer adds one or its chat template begins with it."""
        if bos_token is None:
            return None
        bos_id: int | None = self._tokenizer.token_to_id(bos_token)
        if bos_id is None:
            return None
        if self.files.tokenizer_config.get("add_bos_token"):
            return bos_id
        if self._tokenizer.encode("", add_special_tokens=True).ids[:1] == [bos_id]:
            return bos_id
        source = "" if self.chat_template is None else self.chat_template.source
        return bos_id if "bos_token" in source or bos_token in source else None


def _most_bytes_of_a_token(spec: dict[str, Any]) -> int | None:
    """Return how many bytes of a text one token of a byte-level vocabulary can stand for.

    None: no limit is known: a token takes the white space around it with it, or a byte has none.
    """
    added = spec.get("added_tokens") or []
    if any(token.get("lstrip") or token.get("rstrip") for token in added):
        return None
    vocabulary = (spec.get("model") or {}).get("vocab")
    if not isinstance(vocabulary, dict) or not byte_level_alphabet().keys() <= vocabulary.keys():
        return None
    lengths = [len(token) for token in vocabulary]  # one character a byte
    lengths += [len(token["content"].encode("utf-8")) for token in added]
    # Composing characters (NFC) shortens a text to a third at most.
    return max(lengths) * (4 if spec.get("normalizer") else 1)


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    except (UnicodeEncodeError, TypeError) as error:
        raise RequestError("the text is not valid Unicode: it holds a lone surrogate") from error


def _alternatives(texts: dict[str, int]) -> re.Pattern[str]:
    if not texts:
        return re.compile(r"(?!)")
    return re.compile("|".join(re.escape(t) for t in sorted(texts, key=len, reverse=True)))


def _default_template(files: TokenizerFiles) -> str | None:
    template = files.chat_template
    if template is None:
        template = files.tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None
