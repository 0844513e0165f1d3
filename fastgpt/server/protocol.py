"""OpenAI's request bodies: what we take, what we refuse by name, and the errors in their form."""

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fastgpt.request import SamplingParams

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
    """Return OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


Stop = (
    Annotated[str, Field(min_length=1)]
    | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)]
)
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
    stop_token_ids: Annotated[list[int], Field(max_length=64)] | None = None
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
    content: str | list[TextPart] | None = None
    name: str | None = None
    # What an answer of ours carries, so that a client may send it back as it came. Reasoning of
    # earlier turns is not part of a prompt (R1's own template drops it).
    reasoning_content: str | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

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


def describe_validation_errors(errors: list[dict[str, Any]]) -> tuple[str, str | None]:
    """Return one line and the field for the first of pydantic's errors.

    >>> describe_validation_errors([{"loc": ("body", "top_p"), "msg": "Input should be less than \
or equal to 1", "input": 3, "type": "x"}])
    ('top_p: Input should be less than or equal to 1, not 3', 'top_p')
    """
    error = errors[0]
    loc = [str(part) for part in error.get("loc", ()) if part != "body"]
    if error.get("type") == "json_invalid":
        detail = error.get("ctx", {}).get("error", "")
        position = loc[0] if loc else "?"
        return f"the body is not valid JSON: {detail} at character {position}", None
    message = str(error["msg"])
    # Unions add the name of the tried type to the location; show the field alone.
    field = ".".join(part for part in loc if "[" not in part and "-" not in part) or None
    if error.get("type") in ("missing", "model_attributes_type") or "input" not in error:
        return f"{field}: {message}" if field else f"the body: {message}", field
    value = repr(error["input"])
    shown = value if len(value) <= 60 else value[:57] + "..."
    return f"{field or 'the body'}: {message}, not {shown}", field


def parse_error(error: ValidationError) -> ApiError:
    """Return the 400 for a body that does not validate."""
    message, field = describe_validation_errors([dict(e) for e in error.errors()])
    return ApiError(400, message, param=field)
