"""What the bodies of all generating endpoints share: model, sampling, lengths, stop, stream. Knows no endpoint's own fields.

Beyond OpenAI, as in vLLM: top_k, min_p, repetition_penalty, ignore_eos, min_tokens, stop_token_ids, return_token_ids, cache_salt,
structured_outputs, guided_* (structured.py).
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Final, cast

import msgspec

from duomo.config_gateway import GatewaySection
from duomo.errors import RequestError
from duomo.wire.values import Sampling
from services.router.fields import Fields, kind_of, wrong_type
from services.router.scored_prompt import NOT_SHOWN, PromptForms
from services.router.session import checked_session
from services.router.structured import Structure, read_logit_bias, read_structure

_MASK_64: Final = (1 << 64) - 1
_MAX_TOKENS_BOUND: Final = 1 << 31
_SALT_CHARS: Final = 256
# vLLM's, with the values that ask for what is done here anyway.
_OFF: Final[dict[str, tuple[object, ...]]] = {
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
_PRIORITY_BOUND: Final = 100  # each level is worth seconds of waiting (prefill's policy): a hundred are longer than a request lives


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """How the answer is to be shaped. counts_each: each chunk of a stream has the usage so far."""

    stream: bool
    include_usage: bool
    counts_each: bool
    num_choices: int
    return_token_ids: bool
    shows_logprobs: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonNames:
    """What an endpoint calls its length (the newest name last) and its stop strings, which fields it ignores, whether it has choices: `n`,
    and token ids shown of each.

    has_structure: whether it has structured output and logit_bias by OpenAI's and vLLM's names. least_length: 0 where a prompt alone may
    be asked for.
    """

    lengths: tuple[str, ...]
    ignored: tuple[str, ...]
    stop: str = "stop"
    has_choices: bool = True
    has_structure: bool = False
    least_length: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonFields:
    """What all endpoints share. max_tokens is None where the request names none; sampling.max_tokens is set after tokenising.

    priority: higher goes first (the field's own sign is the other one, as in vLLM). structure: sampling's constraint and the field
    that named it; check_structure() compiles it. prompt: what is shown of the prompt's own log-probabilities; sampling asks for it.
    cache_key: prompt_cache_key, cache_salt: the field of that name; "" for none.
    """

    sampling: Sampling
    max_tokens: int | None
    max_tokens_field: str
    stop: tuple[str, ...]
    answer: AnswerOptions
    priority: int = 0
    cache_key: str = ""
    cache_salt: str = ""
    structure: Structure | None = None
    prompt: PromptForms = NOT_SHOWN


def constrained(common: CommonFields, structure: Structure | None) -> CommonFields:
    """With what the answer must be, where anything says so."""
    if structure is None:
        return common
    return replace(common, structure=structure, sampling=msgspec.structs.replace(common.sampling, constraint=structure.constraint))


class CommonReader:
    """Reads them for one served model; limits come from the configuration."""

    def __init__(self, section: GatewaySection, model_name: str, vocab_size: int) -> None:
        self._section = section
        self._model_name = model_name
        self._vocab_size = vocab_size

    def check_model(self, fields: Fields) -> None:
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

    def read(self, fields: Fields, names: CommonNames, logprobs: int | None, prompt: PromptForms = NOT_SHOWN) -> CommonFields:
        """Takes what is common and refuses whatever is left then: an endpoint takes its own fields before."""
        max_tokens, max_tokens_field = _max_tokens(fields, names)
        num_choices = fields.integer("n", low=1, high=self._section.max_choices) if names.has_choices else None
        stream = fields.boolean("stream")
        include_usage, counts_each = _stream_options(fields, stream)
        stop = self._stop(fields, names.stop)
        prompt = _shown_prompt(prompt, stream)
        sampling = self._sampling(fields, logprobs, prompt)
        structure = read_structure(fields) if names.has_structure else None
        if names.has_structure:
            biases = read_logit_bias(fields, self._vocab_size)
            constraint = None if structure is None else structure.constraint
            sampling = msgspec.structs.replace(sampling, constraint=constraint, logit_bias=biases)
        return_token_ids = fields.boolean("return_token_ids") if names.has_choices else False
        priority = fields.integer("priority", low=-_PRIORITY_BOUND, high=_PRIORITY_BOUND) or 0
        cache_key = checked_session(fields.string("prompt_cache_key") or "", fields.name("prompt_cache_key"))
        own_salt = fields.string("cache_salt") or ""
        if len(own_salt) > _SALT_CHARS:
            raise RequestError(f"'cache_salt' has {len(own_salt)} characters, at most {_SALT_CHARS} are taken.", param="cache_salt")
        fields.refuse_unless(_OFF)
        fields.ignore(*names.ignored)
        fields.finish()
        return CommonFields(
            sampling=sampling,
            max_tokens=max_tokens,
            max_tokens_field=max_tokens_field,
            stop=stop,
            answer=AnswerOptions(
                stream=stream,
                include_usage=include_usage,
                counts_each=counts_each,
                num_choices=num_choices or 1,
                return_token_ids=return_token_ids,
                shows_logprobs=logprobs is not None,
            ),
            priority=-priority,
            cache_key=cache_key,
            cache_salt=own_salt,
            structure=structure,
            prompt=prompt,
        )

    def token_ids(self, name: str, values: list[object]) -> tuple[int, ...]:
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

    def _sampling(self, fields: Fields, logprobs: int | None, prompt: PromptForms) -> Sampling:
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
            stop_token_ids=self.token_ids("stop_token_ids", fields.array("stop_token_ids") or []),
            logprobs=logprobs,
            prompt_logprobs=prompt.num_top,
        )

    def _stop(self, fields: Fields, name: str) -> tuple[str, ...]:
        value = fields.take(name)
        if value is None:
            return ()
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list):
            raise wrong_type(name, "a string or an array of strings", value)
        if len(value) > self._section.max_stop_strings:
            raise RequestError(f"'{name}' holds {len(value)} strings, the limit is {self._section.max_stop_strings}.", param=name)
        for idx, item in enumerate(value):
            if not isinstance(item, str):
                raise wrong_type(f"{name}[{idx}]", "a string", item)
            if not item:
                raise RequestError(f"'{name}[{idx}]' must not be empty.", param=name)
        return tuple(value)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def json_object(body: bytes) -> dict[str, object]:
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


def _max_tokens(fields: Fields, names: CommonNames) -> tuple[int | None, str]:
    """The completion's length and which field named it, the first of them where none did."""
    read = ((fields.integer(name, low=names.least_length, high=_MAX_TOKENS_BOUND), name) for name in names.lengths)
    given = [(value, name) for value, name in read if value is not None]
    if len({value for value, _ in given}) > 1:
        raise RequestError(f"'{given[0][1]}' and '{given[1][1]}' contradict each other.", param=given[0][1])
    return given[-1] if given else (None, names.lengths[0])


def _shown_prompt(prompt: PromptForms, stream: bool) -> PromptForms:
    """As vLLM has it: a stream shows no `prompt_logprobs`, and only 0 of them may be asked of one."""
    if not stream or prompt.listed is None:
        return prompt
    if prompt.listed:
        raise RequestError(
            "'prompt_logprobs' above 0 cannot be streamed: leave out 'stream'.", param="prompt_logprobs", code="unsupported_parameter"
        )
    return replace(prompt, listed=None)


def _stream_options(fields: Fields, stream: bool) -> tuple[bool, bool]:
    """Whether a stream ends with its usage, and whether each chunk has it so far: as in vLLM, only where the end has it too."""
    raw = fields.mapping("stream_options")
    if raw is None:
        return False, False
    if not stream:
        raise RequestError("'stream_options' needs 'stream' to be true.", param="stream_options")
    options = Fields(raw, "stream_options.")
    include_usage = options.boolean("include_usage")
    counts_each = options.boolean("continuous_usage_stats")
    options.ignore("include_obfuscation")
    options.finish()
    return include_usage, include_usage and counts_each
