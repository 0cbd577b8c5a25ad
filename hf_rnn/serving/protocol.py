"""OpenAI's requests and answers, as far as they are known here; the rest is refused by name."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator

from hf_rnn.generation.batching import GREEDY, Sampling
from hf_rnn.serving.choice import Token
from hf_rnn.serving.text import Texts

# Parameters that say nothing here, and those that say nothing with one of these values
_MEANINGLESS = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier"}
_NEUTRAL: dict[str, tuple] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}

# Validation ends with the first element of a list that is no good, and the first name that is not known: a complaint
# about each of a million would take gigabytes
T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]

Integer = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=2**30)]  # with a bound pydantic looks at it: half of a surrogate pair is no text
StopString = Annotated[str, Field(min_length=1, max_length=256)]
TokenLists = Annotated[Many[Many[Integer]], Field(max_length=4096)]
SessionName = Annotated[str, Field(min_length=1, max_length=200)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _with_one_unknown_name(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        unknown = (x for x in values.items() if x[0] not in cls.model_fields and not cls.says_nothing(*x))
        first = next(unknown, None)
        return {name: x for name, x in values.items() if name in cls.model_fields} | dict([first] if first else [])

    @classmethod
    def says_nothing(cls, name: str, value: Any) -> bool:
        """Of a parameter that is not known here, whether it is no matter."""
        return False


class StreamOptions(Body):
    include_usage: StrictBool = False


class GenerationBody(Body):
    """What completions and chat completions share.

    `top_k`, `min_p` and `session` are not OpenAI's: a client sends them as `extra_body`.
    """

    model: str
    max_tokens: Annotated[Integer, Field(ge=0)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[Integer, Field(ge=1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    n: Annotated[Integer, Field(ge=1)] | None = 1
    seed: Annotated[Integer, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[Many[StopString], Field(max_length=16)] | None = None
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    session: SessionName | None = None

    @classmethod
    def says_nothing(cls, name: str, value: Any) -> bool:
        return name in _MEANINGLESS or (name in _NEUTRAL and value in (None, *_NEUTRAL[name]))

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def sampling(self) -> Sampling:
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(True, temperature, self.top_k, self.top_p, self.min_p) if temperature > 0 else GREEDY


class CompletionBody(GenerationBody):
    prompt: Text | Annotated[Many[Text] | Many[Integer] | TokenLists, Field(min_length=1)]
    logprobs: Annotated[Integer, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    @property
    def asked_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Many[TextPart]
    name: None = None

    @property
    def plain(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class ChatBody(GenerationBody):
    messages: Annotated[Many[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[Integer, Field(ge=0)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=20)] | None = None

    @property
    def asked_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class SessionBody(Body):
    """A new session; `source`: where it goes on from."""

    name: SessionName
    source: SessionName | None = None


# Answers


class CompletionShape:
    """Of `/v1/completions`."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def first(self, index: int) -> list[dict]:
        return []

    def choice(self, index: int, text: str, logprobs: dict | None, finish: str | None, streamed: bool) -> dict:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def logprobs(self, tokens: list[Token], texts: Texts) -> dict:
        named = [_unique(texts, token.token) for token in tokens]
        return {
            "tokens": named,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [{_unique(texts, t): _finite(p) for t, p in token.top} for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


class ChatShape:
    """Of `/v1/chat/completions`."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self, index: int) -> list[dict]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def choice(self, index: int, text: str, logprobs: dict | None, finish: str | None, streamed: bool) -> dict:
        message = {"delta": {"content": text}} if streamed else {"message": _answer(text)}
        return {"index": index, **message, "logprobs": logprobs, "finish_reason": finish}

    def logprobs(self, tokens: list[Token], texts: Texts) -> dict:
        def entry(token: int, logprob: float) -> dict:
            text, own = texts.token(token)
            return {"token": text, "logprob": _finite(logprob), "bytes": own}

        content = [entry(t.token, t.logprob) | {"top_logprobs": [entry(*pair) for pair in t.top]} for t in tokens]
        return {"content": content, "refusal": None}


def _answer(text: str) -> dict:
    return {"role": "assistant", "content": text, "refusal": None}


def _unique(texts: Texts, token: int) -> str:
    """A token's text, or its bytes where they are no text, as OpenAI writes them."""
    text, own = texts.token(token)
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own) if "\ufffd" in text else text


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # as OpenAI's, JSON has no infinity


def usage(prompt: int, new: int, remembered: int) -> dict[str, Any]:
    """
    Args:
        prompt: tokens of prompts.
        new: tokens generated.
        remembered: of those of prompts, by the prompt cache.
    """
    counts = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    return {**counts, "prompt_tokens_details": {"cached_tokens": remembered}}


def event(data: Any) -> str:
    """Of a stream of server-sent events."""
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n"
