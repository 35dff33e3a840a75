"""PURE: in the OpenAPI document, the fields that all generating bodies share, and what several of them hold. Knows no endpoint.

What common_fields.py, structured.py and tools.py read; tests/services/router/test_openapi_bodies.py compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from services.router.openapi_words import (
    Schema,
    anything,
    array,
    boolean,
    either,
    free,
    integer,
    nothing,
    number,
    off,
    ref,
    taken,
    text,
    words,
)

_MOST: Final = 1 << 31
_LOWER_FIRST: Final = "A lower number goes first."


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the served model and the configuration bound. model_name: the one that bodies name."""

    model_name: str
    vocab_size: int
    max_choices: int
    max_logprobs: int
    max_stop_strings: int

    @property
    def model(self) -> Schema:
        return words(self.model_name, about="The served model.")

    @property
    def token_id(self) -> Schema:
        return integer(0, self.vocab_size - 1)


def tokens(about: str, least: int = 1) -> Schema:
    """A length that a body asks for."""
    return integer(least, _MOST, about)


def sampling(limits: Limits) -> dict[str, Schema]:
    """Of every generating endpoint."""
    return {
        "stream": boolean("Server-sent events in place of one object."),
        "stream_options": taken({}, _stream_options(), "Needs `stream`."),
        "temperature": number(0, 2, "0 is greedy; 1 where none is named."),
        "top_p": number(0, 1, low_is_open=True),
        "top_k": integer(-1, _MOST, "0 and -1: all tokens."),
        "min_p": number(0, 1),
        "seed": integer(-(1 << 63), (1 << 64) - 1),
        "presence_penalty": number(-2, 2),
        "frequency_penalty": number(-2, 2),
        "repetition_penalty": number(0, 2, low_is_open=True),
        "min_tokens": integer(0, _MOST),
        "ignore_eos": boolean(),
        "stop_token_ids": array(limits.token_id),
        "priority": integer(-100, 100, _LOWER_FIRST),
        "cache_salt": text("Only requests with the same one share what prompts leave in prefix caches.", maxLength=256),
        "skip_special_tokens": off(True),
        "spaces_between_special_tokens": off(True),
        "include_stop_str_in_output": off(False),
        "allowed_token_ids": off(),
        "bad_words": off([]),
        "truncate_prompt_tokens": off(),
        "use_beam_search": off(False),
        "prompt_cache_key": text("Requests with the same one go to the same replicas where nothing speaks against it.", maxLength=256),
    }


def _stream_options() -> dict[str, Schema]:
    return {
        "include_usage": boolean("The usage in a chunk of its own, at the end."),
        "continuous_usage_stats": boolean("With `include_usage`: the usage so far in each chunk."),
        "include_obfuscation": anything("Ignored."),
    }


def stop(limits: Limits) -> Schema:
    strings = array(text(minLength=1), at_most=limits.max_stop_strings)
    return either(text(minLength=1), strings, about="Where the answer ends; not shown.")


def prompt_logprobs(limits: Limits) -> Schema:
    """Of chat completions and completions."""
    about = "So many of the likeliest beside each prompt token's own log-probability; 0 alone with `stream`, which shows none."
    return integer(0, limits.max_logprobs, about)


def choices(limits: Limits) -> dict[str, Schema]:
    """Of chat completions and completions: several choices, structured output, biases."""
    return {
        "n": integer(1, limits.max_choices),
        "return_token_ids": boolean("Each choice with its `token_ids`."),
        "logit_bias": {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": number(-100, 100),
            "maxProperties": 1024,
            "description": "Added to the logits of these token ids.",
        },
        "response_format": either(
            taken({"type": words("text", "json_object")}, {"json_schema": free("Without meaning for this type.")}),
            taken({"type": words("json_schema"), "json_schema": ref("NamedSchema")}, {}),
        ),
        "structured_outputs": taken({}, _ways("") | {"json_object": boolean()}, "At most one of them."),
        **_ways("guided_"),
    }


def _ways(prefix: str) -> dict[str, Schema]:
    """vLLM's ways to say what the answer must be."""
    return {
        prefix + "json": either(free(), text(), about="JSON of this schema, which may be written as a string."),
        prefix + "regex": text("A whole match, in the syntax of Rust's `regex`.", minLength=1),
        prefix + "choice": array(text(minLength=1), 1, about="One of these strings."),
        prefix + "grammar": text("A sentence of this grammar, in Lark's form or GBNF.", minLength=1),
    }


def named_schema() -> Schema:
    """response_format's; each is kept strictly, whatever `strict` says."""
    return taken({"schema": free("JSON Schema.")}, {name: anything("Ignored.") for name in ("name", "description", "strict")})


def ignored(*more: str) -> dict[str, Schema]:
    names = ("user", "service_tier", "safety_identifier", "prompt_cache_retention", *more)
    return {name: anything("Ignored.") for name in names}


def parameters() -> Schema:
    """A function's JSON schema."""
    return {"type": "object", "properties": {"type": {"const": "object"}}, "additionalProperties": True, "description": "JSON Schema."}


def function(schema_field: str) -> dict[str, Schema]:
    """What describes a function beside its name."""
    return {
        "description": text(),
        schema_field: parameters(),
        "strict": boolean("Changes nothing: a call that must be made is always held."),
    }


def function_name() -> Schema:
    return text(pattern="^[A-Za-z0-9_-]{1,128}$")


def template() -> dict[str, Schema]:
    return {"chat_template_kwargs": free("Further names for the chat template, as `enable_thinking`.")}


def null_only() -> Schema:
    return nothing("Not of this role.")
