"""From a checked request to generation requests: renders, tokenises once, and fits prompt and completion into the model's context.

Of the pools it knows what one choice may take, where the client names no length. Refusals are RequestErrors naming the field and the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec

from duomo.config_gateway import GatewaySection
from duomo.errors import RequestError
from duomo.wire.values import Sampling
from services.router.chat_template import Rendered
from services.router.common_fields import CommonFields, constrained
from services.router.conversation import Conversation
from services.router.forced_calls import forced_calls
from services.router.generation import GenerationRequest
from services.router.markup import OutputStyle
from services.router.model_card import ModelCard
from services.router.openai import ChatRequest, CompletionRequest
from services.router.scored_prompt import ScoredPrompt
from services.router.text import ModelText

# OpenAI's default length of a text completion that names none.
_COMPLETION_DEFAULT_TOKENS = 16
# Log-probabilities of prompts in one answer, each of some 65 bytes: every choice repeats its prompt's, and that may be more than memory.
_MOST_SCORES = 1 << 22


@dataclass(frozen=True, slots=True)
class PreparedChat:
    """A chat's one generation request, how its output is to be read, and its fields: with what forces a call, where one must be made."""

    requests: list[GenerationRequest]
    style: OutputStyle
    common: CommonFields


class PromptMaker:
    """Owns nothing; the tokenizer is shared. `template` gives all fields of a request that do not depend on its prompt."""

    def __init__(self, section: GatewaySection, card: ModelCard, text: ModelText, pool_tokens: Callable[[], int | None]) -> None:
        """pool_tokens: of one choice, prompt and completion; None where it is not known."""
        self._section = section
        self._card = card
        self._text = text
        self._pool_tokens = pool_tokens

    async def chat(self, request: ChatRequest, template: GenerationRequest) -> PreparedChat:
        conversation, common = request.conversation, request.common
        rendered = self._render(conversation, request.prompt_field)
        forced = forced_calls(conversation.tool_use, rendered.style)
        style = rendered.style
        if forced is not None:
            common = constrained(common, forced)
        elif common.structure is not None:
            style = replace(style, reasoning="none")  # what the answer must be leaves no room for it
        ids = await self._encode(rendered.text, request.prompt_field, add_special_tokens=False)
        fitted = self._fit(ids, request.prompt_field, common, self._section.default_max_tokens, template)
        made = self._scored(fitted, common)
        _refuse_too_many([made], common)
        return PreparedChat([made], style, common)

    def _render(self, conversation: Conversation, field: str) -> Rendered:
        """A refusal that names `messages` names the field of the body that holds them."""
        try:
            return self._text.render(conversation)
        except RequestError as error:
            if error.param != "messages" or error.param == field:
                raise
            raise RequestError(error.detail, param=field, status=error.status, code=error.code) from error

    async def completion(self, request: CompletionRequest, template: GenerationRequest) -> list[GenerationRequest]:
        requests = []
        for number, prompt in enumerate(request.prompts):
            name = "prompt" if len(request.prompts) == 1 else f"prompt[{number}]"
            ids = await self._encode(prompt, name, add_special_tokens=True) if isinstance(prompt, str) else prompt
            made = self._fit(ids, name, request.common, _COMPLETION_DEFAULT_TOKENS, template)
            made = self._scored(made, request.common, self._echo(prompt) if request.has_echo else "")
            if number:
                made = replace(made, request_id=f"{made.request_id}.{number}", first_choice=number * made.num_choices)
            requests.append(made)
        _refuse_too_many(requests, request.common, request.num_shown)
        return requests

    def echoes(self, request: CompletionRequest) -> tuple[str, ...]:
        """What each prompt's choices begin with; nothing where the client asked for no echo."""
        if not request.has_echo:
            return ()
        return tuple(map(self._echo, request.prompts))

    def _echo(self, prompt: str | tuple[int, ...]) -> str:
        return prompt if isinstance(prompt, str) else self._text.decode(prompt)

    def _scored(self, made: GenerationRequest, common: CommonFields, echo: str = "") -> GenerationRequest:
        """With a place for the prompt's own log-probabilities, where they were asked for."""
        if common.prompt.num_top is None:
            return made
        return replace(made, scored=ScoredPrompt(made.prompt_ids, common.prompt, self._text, echo))

    async def _encode(self, text: str, name: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        fewest = self._text.fewest_tokens(text)
        if fewest >= self._card.context_tokens or fewest > (self._section.max_prompt_tokens or fewest):
            raise self._too_long(name, f"at least {fewest}")
        return await self._text.encode_aside(text, add_special_tokens=add_special_tokens)

    def _fit(
        self, ids: tuple[int, ...], name: str, common: CommonFields, default_tokens: int | None, template: GenerationRequest
    ) -> GenerationRequest:
        """default_tokens: where the request names no length; None: as many as there is room for."""
        if not ids:
            raise RequestError(f"'{name}' must hold at least one token.", param=name)
        room = self._card.context_tokens - len(ids)
        if room < 1 or len(ids) > (self._section.max_prompt_tokens or len(ids)):
            raise self._too_long(name, str(len(ids)))
        max_tokens = common.max_tokens
        longest = self._section.max_completion_tokens or room
        if max_tokens is not None and max_tokens > longest and longest < room:
            raise RequestError(
                f"'{common.max_tokens_field}' asks for {max_tokens} tokens, this server generates at most {longest}.",
                param=common.max_tokens_field,
                code="max_tokens_exceeded",
            )
        if max_tokens is not None and max_tokens > room:
            raise RequestError(
                f"This model's context holds at most {self._card.context_tokens} tokens; the prompt has {len(ids)} and "
                f"'{common.max_tokens_field}' asks for {max_tokens}, but only {room} are left.",
                param=common.max_tokens_field,
                code="context_length_exceeded",
            )
        length = max_tokens if max_tokens is not None else self._open_length(len(ids), min(default_tokens or room, room, longest))
        if common.sampling.min_tokens > length:
            raise RequestError(f"'min_tokens' is {common.sampling.min_tokens}, above the {length} tokens asked for.", param="min_tokens")
        if length == 0:  # greedy and unbound: the one token that prefill always gives is dropped
            sampling = Sampling(max_tokens=1, temperature=0.0, prompt_logprobs=common.sampling.prompt_logprobs)
        else:
            sampling = msgspec.structs.replace(common.sampling, max_tokens=length)
        return replace(template, prompt_ids=ids, sampling=sampling, priority=common.priority, is_prompt_only=length == 0)

    def _open_length(self, num_prompt: int, longest: int) -> int:
        """Of a completion that nobody named a length for: never one that the pools could not hold to its end, even when empty."""
        held = self._pool_tokens()
        return longest if held is None else max(min(longest, held - num_prompt), 1)

    def _too_long(self, name: str, num_tokens: str) -> RequestError:
        limit, own = self._card.context_tokens, self._section.max_prompt_tokens
        if own is not None and own < limit:
            detail = f"'{name}' has {num_tokens} tokens, but this server takes prompts of at most {own} tokens."
            return RequestError(detail, param=name, code="context_length_exceeded")
        return RequestError(
            f"'{name}' has {num_tokens} tokens, but this model's context holds at most {limit} tokens, prompt and completion together.",
            param=name,
            code="context_length_exceeded",
        )


def _refuse_too_many(requests: Sequence[GenerationRequest], common: CommonFields, num_shown: int = 1) -> None:
    """num_shown: how often the answer shows each prompt's."""
    num_scores = sum(made.scored.num_entries for made in requests if made.scored is not None) * num_shown
    if num_scores > _MOST_SCORES:
        raise RequestError(
            f"The answer would show {num_scores} log-probabilities of prompt tokens, at most {_MOST_SCORES} fit one: ask for fewer "
            "choices, prompts or likeliest tokens.",
            param="logprobs" if common.prompt.listed is None else "prompt_logprobs",
        )
