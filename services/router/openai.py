"""OpenAI's requests: the bodies of /v1/chat/completions and /v1/completions, checked field by field. Knows no tokenizer and no HTTP.

Every refusal is a RequestError naming the field. Unknown fields are refused by name; fields that change nothing in the answer (`user`,
`metadata` ...) are ignored; fields that this server does not do pass only with the value that means "off".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import msgspec

from duomo.config_gateway import GatewaySection
from duomo.errors import RequestError
from services.router.chat_messages import read_messages
from services.router.common_fields import CommonFields, CommonNames, CommonReader, json_object
from services.router.conversation import Conversation
from services.router.fields import Fields, wrong_type
from services.router.scored_prompt import PromptForms
from services.router.tools import read_tool_use

_IGNORED: Final = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_retention")
_CHAT_NAMES: Final = CommonNames(lengths=("max_tokens", "max_completion_tokens"), ignored=_IGNORED, has_structure=True)
_COMPLETION_NAMES: Final = CommonNames(lengths=("max_tokens",), ignored=_IGNORED, has_structure=True, least_length=0)
_CHAT_ONLY_OFF: Final[dict[str, tuple[object, ...]]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "include_reasoning": (True,),
    "documents": ([],),
    "chat_template": (),
}
_COMPLETION_ONLY_OFF: Final[dict[str, tuple[object, ...]]] = {"suffix": ("",), "add_special_tokens": (True,)}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """prompt_field: which field of the body holds the conversation."""

    conversation: Conversation
    common: CommonFields
    prompt_field: str = "messages"


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """prompts: texts or token ids, at least one. Of the choices sampled for each (common.answer.num_choices) num_shown are shown."""

    prompts: tuple[str | tuple[int, ...], ...]
    common: CommonFields
    num_shown: int
    has_echo: bool


class RequestParser:
    """Turns bodies into requests for the reader's model; limits come from the configuration."""

    def __init__(self, section: GatewaySection, reader: CommonReader) -> None:
        self._section = section
        self._reader = reader

    def fields(self, body: bytes, *, needs_model: bool = True) -> Fields:
        """Of a body for this model."""
        fields = Fields(json_object(body))
        if needs_model or fields.has("model"):
            self._reader.check_model(fields)
        else:
            fields.take("model")  # null is as not given
        return fields

    def conversation(self, fields: Fields) -> Conversation:
        """The fields of a chat that are rendered."""
        messages = read_messages(fields.array("messages"))
        return Conversation(messages, read_tool_use(fields), fields.mapping("chat_template_kwargs") or {})

    def token_ids(self, name: str, values: list[object]) -> tuple[int, ...]:
        return self._reader.token_ids(name, values)

    def chat(self, body: bytes) -> ChatRequest:
        fields = self.fields(body)
        conversation = self.conversation(fields)
        fields.refuse_unless(_CHAT_ONLY_OFF)
        has_logprobs = fields.boolean("logprobs")
        top = fields.integer("top_logprobs", low=0, high=self._section.max_logprobs)
        if top is not None and not has_logprobs:
            raise RequestError("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
        prompt = PromptForms(listed=self._prompt_logprobs(fields))
        common = self._reader.read(fields, _CHAT_NAMES, (top or 0) if has_logprobs else None, prompt)
        return ChatRequest(conversation, common)

    def completion(self, body: bytes) -> CompletionRequest:
        fields = self.fields(body)
        prompts = self._prompts(fields.take("prompt"))
        fields.refuse_unless(_COMPLETION_ONLY_OFF)
        logprobs = fields.integer("logprobs", low=0, high=self._section.max_logprobs)
        best_of = fields.integer("best_of", low=1, high=self._section.max_choices)
        has_echo = fields.boolean("echo")
        prompt = PromptForms(listed=self._prompt_logprobs(fields), echoed=logprobs if has_echo else None)
        common = self._reader.read(fields, _COMPLETION_NAMES, logprobs, prompt)
        if common.max_tokens == 0 and not has_echo:
            raise RequestError(
                "'max_tokens' must be at least 1: 0 asks for the prompt alone, and needs 'echo' to be true.",
                param="max_tokens",
            )
        num_shown = common.answer.num_choices
        if best_of is not None:
            common = _best_of(common, best_of)
        if len(prompts) * common.answer.num_choices > self._section.max_choices:
            raise RequestError(
                f"'prompt' holds {len(prompts)} prompts of {common.answer.num_choices} choices each; at most "
                f"{self._section.max_choices} choices fit one request.",
                param="prompt",
            )
        return CompletionRequest(prompts, common, num_shown, has_echo)

    def _prompt_logprobs(self, fields: Fields) -> int | None:
        """Not vLLM's -1, which asks for the whole vocabulary at every token."""
        return fields.integer("prompt_logprobs", low=0, high=self._section.max_logprobs)

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
            return (self.token_ids("prompt", value),)
        return tuple(self._prompt_item(idx, item, type(value[0])) for idx, item in enumerate(value))

    def _prompt_item(self, idx: int, item: object, kind: type) -> str | tuple[int, ...]:
        name = f"prompt[{idx}]"
        if kind is str and isinstance(item, str):
            return item
        if kind is list and isinstance(item, list):
            if not item:
                raise RequestError(f"'{name}' must not be empty.", param="prompt")
            return self.token_ids(name, item)
        wanted = "a string like the first" if kind is str else "an array of token ids"
        raise wrong_type(name, wanted, item)


def _best_of(common: CommonFields, best_of: int) -> CommonFields:
    """So many choices are sampled, with the log-probabilities that rank them. Of prompts alone all are the same, and none is too many."""
    num_shown = common.answer.num_choices
    if best_of < num_shown:
        raise RequestError(f"'best_of' is {best_of}, but must be at least 'n', which is {num_shown}.", param="best_of")
    if best_of == num_shown or common.max_tokens == 0:
        return common
    if common.answer.stream:
        raise RequestError("'best_of' above 'n' cannot be streamed: the best are known at the end.", param="best_of")
    sampling = common.sampling
    ranked = sampling if sampling.logprobs is not None else msgspec.structs.replace(sampling, logprobs=0)
    return replace(common, sampling=ranked, answer=replace(common.answer, num_choices=best_of))
