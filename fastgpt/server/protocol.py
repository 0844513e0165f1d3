"""OpenAI's request bodies: what we take, what we refuse by name, and the errors in their form."""

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from fastgpt.request import MAX_TOKEN_ID, SamplingParams

__all__ = [
    "ApiError",
    "ChatRequest",
    "CompletionRequest",
    "describe_validation_errors",
    "error_body",
]

# Fields of OpenAI's API that do nothing here yet, and the values that ask for nothing.
_NOTHING: tuple[Any, ...] = (None, False, [], {})
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": _NOTHING,
    "best_of": (*_NOTHING, 1),
    "echo": _NOTHING,
    "function_call": (*_NOTHING, "none"),
    "functions": _NOTHING,
    "logit_bias": _NOTHING,
    "logprobs": _NOTHING,
    "metadata": _NOTHING,
    "modalities": (*_NOTHING, ["text"]),
    "n": (None, 1),
    "parallel_tool_calls": (*_NOTHING, True),
    "prediction": _NOTHING,
    "prompt_cache_key": (None,),
    "reasoning_effort": (None,),
    "response_format": (*_NOTHING, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": _NOTHING,
    "suffix": (None, ""),
    "tool_choice": (*_NOTHING, "none", "auto"),
    "tools": _NOTHING,
    "top_logprobs": (*_NOTHING, 0),
    "verbosity": (None,),
    "web_search_options": (None,),
}


class ApiError(Exception):
    """An error that becomes an HTTP response in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(message, kind=kind, param=param, code=code)


def error_body(
    message: str,
    *,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
) -> dict[str, Any]:
    """Return OpenAI's error object. What is not Unicode in a client's words is escaped."""
    message = _escape_surrogates(message)
    param = None if param is None else _escape_surrogates(param)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _escape_surrogates(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


Stop = (
    Annotated[str, Field(min_length=1)]
    | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)]
)
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class _GenerationRequest(BaseModel):
    """The fields that both endpoints share."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_unsupported_fields(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        body = dict(body)
        for name in [name for name in body if name in _UNSUPPORTED]:
            value = body.pop(name)
            if not any(type(value) is type(ok) and value == ok for ok in _UNSUPPORTED[name]):
                raise ApiError(
                    400, f"{name} is not supported yet; leave it out", param=name,
                    code="unsupported_parameter",
                )  # fmt: skip
        for name in body:
            if name not in cls.model_fields:
                nearest = difflib.get_close_matches(str(name), cls.model_fields, n=1)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
                raise ApiError(
                    400, f"unknown field {name!r}{hint}", param=str(name), code="unknown_parameter"
                )
        return body

    @model_validator(mode="after")
    def _check_stream_options(self) -> "_GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400, "stream_options is only allowed with stream: true", param="stream_options"
            )
        return self

    def sampling(self) -> SamplingParams:
        """Return the sampling parameters."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=0 if self.top_k == -1 else self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=self.seed,
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
        )


class TextPart(BaseModel):
    """A piece of a message's content; only text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One chat message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)] | None = None
    name: str | None = None
    # What an answer of ours carries, so that a client may send it back as it came. Reasoning of
    # earlier turns is not part of a prompt (R1's own template drops it).
    reasoning_content: str | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _check_content(self) -> "Message":
        # An answer of ours without text has content null when it comes back.
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError(
                "missing", "a {role} message has no content; send a text", {"role": self.role}
            )
        return self

    def for_template(self) -> dict[str, Any]:
        """Return what chat templates expect."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": content or ""}
        if self.name is not None:
            message["name"] = self.name
        return message


class ChatRequest(_GenerationRequest):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None

    def sampling(self) -> SamplingParams:
        """Return the sampling parameters; max_completion_tokens is the newer name of max_tokens."""
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ApiError(
                400, "max_tokens and max_completion_tokens mean the same; send one of them",
                param="max_tokens",
            )  # fmt: skip
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return super().sampling()


class CompletionRequest(_GenerationRequest):
    """Body of /v1/completions; prompt is one text or the token ids of one."""

    prompt: str | Annotated[list[int], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _refuse_several_prompts(cls, body: Any) -> Any:
        prompt = body.get("prompt") if isinstance(body, dict) else None
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            raise ApiError(
                400, f"prompt is a list of {len(prompt)} prompts; send one a request",
                param="prompt",
            )  # fmt: skip
        return body


def describe_validation_errors(errors: list[dict[str, Any]]) -> tuple[str, str | None]:
    """Return one line and the field for the most telling of pydantic's errors.

    >>> describe_validation_errors([{"loc": ("body", "top_p"), "msg": "Input should be less than \
or equal to 1", "input": 3, "type": "x"}])
    ('top_p: Input should be less than or equal to 1, not 3', 'top_p')
    """
    error = errors[0]
    if error.get("type") == "json_invalid":
        detail = error.get("ctx", {}).get("error", "")
        position = error["loc"][-1]
        return f"the body is not valid JSON: {detail} at character {position}", None
    # A union has an error of each of its types: the telling one is of the type that was meant.
    field = _field(error)
    of_field = [e for e in errors if f"{_field(e)}.".startswith(f"{field}.")]
    meant = [e for e in of_field if _field(e) != field or e.get("type") not in _OTHER_TYPE]
    message = str(error["msg"])
    if meant:
        error, message = meant[0], str(meant[0]["msg"])
    elif len(of_field) > 1:
        message = " or ".join([message, *(_TYPE_NAMES[e["type"]] for e in of_field[1:])])
    field = _field(error)
    if not field and error.get("type") == "missing":
        return "the body is empty; send a JSON object", None
    shown = f"{field}: {message}" if field else f"the body: {message}"
    # pydantic names some values itself.
    if error.get("type") not in ("missing", "too_long", "too_short") and "input" in error:
        value = repr(error["input"])
        shown += f", not {value if len(value) <= 60 else value[:57] + '...'}"
    return shown, field or None


# Types of the errors of a union's members that the value is none of.
_TYPE_NAMES = {"list_type": "a valid list", "string_type": "a valid string"}
_OTHER_TYPE = frozenset(_TYPE_NAMES)


def _field(error: dict[str, Any]) -> str:
    """Return the dotted name of an error's field, without the names of a union's types."""
    parts = [str(part) for part in error.get("loc", ()) if part != "body"]
    return ".".join(p for p in parts if "[" not in p and "-" not in p and p != "str")
