"""OpenAI's requests: the bodies of /v1/chat/completions and /v1/completions, checked field by field. Knows no tokenizer and no HTTP.

Every refusal is a RequestError naming the field. Unknown fields are refused by name; fields that change nothing in the answer (`user`,
`metadata` ...) are ignored; fields that this server does not do pass only with the value that means "off".
Beyond OpenAI, as in vLLM: top_k, min_p, repetition_penalty, ignore_eos, min_tokens, stop_token_ids, return_token_ids.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Final, cast

import msgspec

from duomo.config import GatewaySection
from duomo.errors import RequestError
from duomo.wire.messages import Sampling
from services.router.fields import Fields, kind_of, wrong_type

_MASK_64: Final = (1 << 64) - 1
_MAX_TOKENS_BOUND: Final = 1 << 31
_ROLES: Final = ("system", "developer", "user", "assistant", "tool")
_IGNORED: Final = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
_CHAT_ONLY_OFF: Final[dict[str, tuple[object, ...]]] = {
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
_COMPLETION_ONLY_OFF: Final[dict[str, tuple[object, ...]]] = {"logit_bias": ({},), "suffix": ("",), "echo": (False,)}
_MESSAGE_OFF: Final[dict[str, tuple[object, ...]]] = {
    "tool_calls": ([],),
    "function_call": (),
    "tool_call_id": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
}


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation, content flattened to text."""

    role: str
    content: str
    name: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """How the answer is to be shaped."""

    stream: bool
    include_usage: bool
    num_choices: int
    return_token_ids: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonFields:
    """What both endpoints share. max_tokens is None where the request names none; sampling.max_tokens is set after tokenising."""

    sampling: Sampling
    max_tokens: int | None
    max_tokens_field: str
    stop: tuple[str, ...]
    answer: AnswerOptions


@dataclass(frozen=True, slots=True)
class ChatRequest:
    messages: tuple[ChatMessage, ...]
    common: CommonFields


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """prompts: texts or token ids, at least one."""

    prompts: tuple[str | tuple[int, ...], ...]
    common: CommonFields


class RequestParser:
    """Turns bodies into requests for one served model; limits come from the configuration."""

    def __init__(self, section: GatewaySection, model_name: str, vocab_size: int) -> None:
        self._section = section
        self._model_name = model_name
        self._vocab_size = vocab_size

    def chat(self, body: bytes) -> ChatRequest:
        fields = Fields(_json_object(body))
        self._check_model(fields)
        messages = _messages(fields.array("messages"))
        fields.refuse_unless(_CHAT_ONLY_OFF)
        has_logprobs = fields.boolean("logprobs")
        top = fields.integer("top_logprobs", low=0, high=self._section.max_logprobs)
        if top is not None and not has_logprobs:
            raise RequestError("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
        common = self._common(fields, (top or 0) if has_logprobs else None)
        return ChatRequest(messages, common)

    def completion(self, body: bytes) -> CompletionRequest:
        fields = Fields(_json_object(body))
        self._check_model(fields)
        prompts = self._prompts(fields.take("prompt"))
        fields.refuse_unless(_COMPLETION_ONLY_OFF)
        logprobs = fields.integer("logprobs", low=0, high=self._section.max_logprobs)
        best_of = fields.integer("best_of", low=1, high=self._section.max_choices)
        common = self._common(fields, logprobs)
        if best_of is not None and best_of != common.answer.num_choices:
            raise RequestError("'best_of' is only supported equal to 'n'.", param="best_of", code="unsupported_parameter")
        if len(prompts) * common.answer.num_choices > self._section.max_choices:
            raise RequestError(
                f"'prompt' holds {len(prompts)} prompts of {common.answer.num_choices} choices each; at most "
                f"{self._section.max_choices} choices fit one request.",
                param="prompt",
            )
        return CompletionRequest(prompts, common)

    def _check_model(self, fields: Fields) -> None:
        name = fields.string("model")
        if name is None:
            raise RequestError("You must provide a 'model'.", param="model", code="missing_required_parameter")
        if name != self._model_name:
            raise RequestError(
                f"The model '{name}' does not exist; this server has '{self._model_name}'.",
                param="model",
                status=404,
                code="model_not_found",
            )

    def _common(self, fields: Fields, logprobs: int | None) -> CommonFields:
        max_tokens, max_tokens_field = _max_tokens(fields)
        num_choices = fields.integer("n", low=1, high=self._section.max_choices)
        stream = fields.boolean("stream")
        include_usage = _stream_options(fields, stream)
        stop = self._stop(fields)
        sampling = self._sampling(fields, logprobs)
        return_token_ids = fields.boolean("return_token_ids")
        fields.ignore(*_IGNORED)
        fields.finish()
        answer = AnswerOptions(stream=stream, include_usage=include_usage, num_choices=num_choices or 1, return_token_ids=return_token_ids)
        return CommonFields(sampling=sampling, max_tokens=max_tokens, max_tokens_field=max_tokens_field, stop=stop, answer=answer)

    def _sampling(self, fields: Fields, logprobs: int | None) -> Sampling:
        seed = fields.integer("seed", low=-(1 << 63), high=_MASK_64)
        top_k = fields.integer("top_k", low=-1, high=_MAX_TOKENS_BOUND)
        return Sampling(
            max_tokens=1,
            temperature=_or(fields.number("temperature", low=0.0, high=2.0), 1.0),
            top_k=max(top_k or 0, 0),
            top_p=_or(fields.number("top_p", low=0.0, high=1.0, low_is_open=True), 1.0),
            min_p=_or(fields.number("min_p", low=0.0, high=1.0), 0.0),
            seed=secrets.randbits(64) if seed is None else seed & _MASK_64,
            presence_penalty=_or(fields.number("presence_penalty", low=-2.0, high=2.0), 0.0),
            frequency_penalty=_or(fields.number("frequency_penalty", low=-2.0, high=2.0), 0.0),
            repetition_penalty=_or(fields.number("repetition_penalty", low=0.0, high=2.0, low_is_open=True), 1.0),
            min_tokens=fields.integer("min_tokens", low=0, high=_MAX_TOKENS_BOUND) or 0,
            ignore_eos=fields.boolean("ignore_eos"),
            stop_token_ids=self._token_ids("stop_token_ids", fields.array("stop_token_ids") or []),
            logprobs=logprobs,
        )

    def _stop(self, fields: Fields) -> tuple[str, ...]:
        value = fields.take("stop")
        if value is None:
            return ()
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list):
            raise wrong_type("stop", "a string or an array of strings", value)
        if len(value) > self._section.max_stop_strings:
            raise RequestError(f"'stop' holds {len(value)} strings, the limit is {self._section.max_stop_strings}.", param="stop")
        for idx, item in enumerate(value):
            if not isinstance(item, str):
                raise wrong_type(f"stop[{idx}]", "a string", item)
            if not item:
                raise RequestError(f"'stop[{idx}]' must not be empty.", param="stop")
        return tuple(value)

    def _token_ids(self, name: str, values: list[object]) -> tuple[int, ...]:
        if set(map(type, values)) <= {int}:  # all at once: a long prompt, looked at one by one, would hold every other stream up
            token_ids = cast(tuple[int, ...], tuple(values))
            if 0 <= min(token_ids, default=0) and max(token_ids, default=0) < self._vocab_size:
                return token_ids
        for idx, value in enumerate(values):
            if type(value) is not int:
                raise wrong_type(f"{name}[{idx}]", "a token id (an integer)", value)
            if not 0 <= value < self._vocab_size:
                raise RequestError(f"'{name}[{idx}]' is {value}, token ids go from 0 to {self._vocab_size - 1}.", param=name)
        raise AssertionError("one of them is wrong")

    def _prompts(self, value: object) -> tuple[str | tuple[int, ...], ...]:
        if value is None:
            raise RequestError("You must provide a 'prompt'.", param="prompt", code="missing_required_parameter")
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, list):
            raise wrong_type("prompt", "a string, an array of strings, of token ids, or of arrays of token ids", value)
        if not value:
            raise RequestError("'prompt' must not be empty.", param="prompt")
        if type(value[0]) is int:
            return (self._token_ids("prompt", value),)
        return tuple(self._prompt_item(idx, item, type(value[0])) for idx, item in enumerate(value))

    def _prompt_item(self, idx: int, item: object, kind: type) -> str | tuple[int, ...]:
        name = f"prompt[{idx}]"
        if kind is str and isinstance(item, str):
            return item
        if kind is list and isinstance(item, list):
            if not item:
                raise RequestError(f"'{name}' must not be empty.", param="prompt")
            return self._token_ids(name, item)
        wanted = "a string like the first" if kind is str else "an array of token ids"
        raise wrong_type(name, wanted, item)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _json_object(body: bytes) -> dict[str, object]:
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"The body is not valid UTF-8 (byte {error.start}).", param="body", code="invalid_utf8") from error
    try:
        value: object = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"The body is not valid JSON: {error}.", param="body", code="invalid_json") from error
    if not isinstance(value, dict):
        raise RequestError(f"The body must be a JSON object, got {kind_of(value)}.", param="body", code="invalid_type")
    return value


def _max_tokens(fields: Fields) -> tuple[int | None, str]:
    """The completion's length and which field named it: `max_completion_tokens`, or the older `max_tokens`."""
    older = fields.integer("max_tokens", low=1, high=_MAX_TOKENS_BOUND)
    newer = fields.integer("max_completion_tokens", low=1, high=_MAX_TOKENS_BOUND)
    if older is not None and newer is not None and older != newer:
        raise RequestError("'max_tokens' and 'max_completion_tokens' contradict each other.", param="max_tokens")
    return (newer, "max_completion_tokens") if newer is not None else (older, "max_tokens")


def _stream_options(fields: Fields, stream: bool) -> bool:
    raw = fields.mapping("stream_options")
    if raw is None:
        return False
    if not stream:
        raise RequestError("'stream_options' needs 'stream' to be true.", param="stream_options")
    options = Fields(raw, "stream_options.")
    include_usage = options.boolean("include_usage")
    options.ignore("include_obfuscation")
    options.finish()
    return include_usage


def _messages(values: list[object] | None) -> tuple[ChatMessage, ...]:
    if values is None:
        raise RequestError("You must provide 'messages'.", param="messages", code="missing_required_parameter")
    if not values:
        raise RequestError("'messages' must hold at least one message.", param="messages")
    return tuple(_message(f"messages[{idx}]", value) for idx, value in enumerate(values))


def _message(name: str, value: object) -> ChatMessage:
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    fields = Fields(value, name + ".")
    role = fields.string("role")
    if role is None:
        raise RequestError(f"You must provide '{name}.role'.", param=f"{name}.role", code="missing_required_parameter")
    if role not in _ROLES:
        raise RequestError(f"'{name}.role' must be one of {', '.join(_ROLES)}.", param=f"{name}.role")
    content = _content(f"{name}.content", fields.take("content"))
    speaker = fields.string("name")
    fields.refuse_unless(_MESSAGE_OFF)
    fields.finish()
    return ChatMessage(role, content, speaker)


def _content(name: str, value: object) -> str:
    if value is None:
        raise RequestError(f"You must provide '{name}'.", param=name, code="missing_required_parameter")
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong_type(name, "a string or an array of content parts", value)
    if not value:
        raise RequestError(f"'{name}' must not be empty.", param=name)
    return "".join(_part(f"{name}[{idx}]", part) for idx, part in enumerate(value))


def _part(name: str, value: object) -> str:
    if not isinstance(value, dict):
        raise wrong_type(name, "an object", value)
    fields = Fields(value, name + ".")
    kind = fields.string("type")
    if kind is None:
        raise RequestError(f"You must provide '{name}.type'.", param=f"{name}.type", code="missing_required_parameter")
    if kind not in ("text", "input_text"):
        raise RequestError(f"'{name}' is of type '{kind}'; this model reads only text.", param=name, code="unsupported_content")
    text = fields.string("text")
    if text is None:
        raise RequestError(f"You must provide '{name}.text'.", param=f"{name}.text", code="missing_required_parameter")
    fields.finish()
    return text
