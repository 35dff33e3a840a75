"""PURE: in the OpenAPI document, the bodies of chat completions and completions, and of /tokenize and /detokenize. Knows no answer.

What openai.py, chat_messages.py, tools.py and tokenizing.py read; tests/services/router/test_openapi_bodies.py compares the two.
"""

from __future__ import annotations

from services.router.openapi_fields import (
    Limits,
    choices,
    function,
    function_name,
    ignored,
    named_schema,
    null_only,
    prompt_logprobs,
    sampling,
    stop,
    template,
    tokens,
)
from services.router.openapi_words import Schema, anything, array, boolean, either, integer, nothing, off, ref, taken, text, words


def chat_schemas(limits: Limits) -> dict[str, Schema]:
    """Components by their names."""
    return {
        "ChatCompletionRequest": _chat(limits),
        "CompletionRequest": _completion(limits),
        "TokenizeRequest": _tokenize(limits),
        "DetokenizeRequest": taken({"tokens": array(limits.token_id)}, {"model": limits.model}),
        "ChatMessage": _message(),
        "TextPart": taken({"type": words("text", "input_text"), "text": text()}, {}),
        "AssistantToolCall": _tool_call(),
        "ChatTool": taken({"type": words("function"), "function": taken({"name": function_name()}, function("parameters"))}, {}),
        "ChatToolChoice": either(
            words("auto", "none", "required"),
            taken({"type": words("function"), "function": taken({"name": text()}, {})}, {}),
        ),
        "NamedSchema": named_schema(),
    }


def _conversation() -> dict[str, Schema]:
    """What is rendered beside the messages."""
    return {
        "tools": array(ref("ChatTool")),
        "tool_choice": ref("ChatToolChoice"),
        "parallel_tool_calls": boolean(),
        **template(),
    }


def _messages() -> Schema:
    return array(ref("ChatMessage"), 1)


def _chat(limits: Limits) -> Schema:
    unsupported = {name: off() for name in ("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options")}
    optional = {
        **_conversation(),
        "max_tokens": tokens("As max_completion_tokens."),
        "max_completion_tokens": tokens("The answer's length at most."),
        "stop": stop(limits),
        "logprobs": boolean(),
        "top_logprobs": integer(0, limits.max_logprobs, "Needs `logprobs`."),
        "prompt_logprobs": prompt_logprobs(limits),
        **sampling(limits),
        **choices(limits),
        **ignored("metadata", "store"),
        **unsupported,
        "functions": off([]),
        "function_call": off("none", "auto"),
        "modalities": off(["text"]),
        "add_generation_prompt": off(True),
        "continue_final_message": off(False),
        "add_special_tokens": off(False),
        "include_reasoning": off(True),
        "documents": off([]),
        "chat_template": off(),
    }
    return taken({"model": limits.model, "messages": _messages()}, optional)


def _completion(limits: Limits) -> Schema:
    ids = array(limits.token_id, 1)
    prompt = either(text(), array(text(), 1), ids, array(ids, 1), about="One prompt or several, as text or token ids.")
    optional = {
        "max_tokens": tokens("The length of each choice at most; 0, which needs `echo`, shows the prompt alone.", 0),
        "stop": stop(limits),
        "logprobs": integer(0, limits.max_logprobs, "With `echo` the prompt's own too."),
        "prompt_logprobs": prompt_logprobs(limits),
        "best_of": integer(1, limits.max_choices, "At least `n`; not streamed where it is above."),
        "echo": boolean("Each choice begins with its prompt."),
        **sampling(limits),
        **choices(limits),
        **ignored("metadata", "store"),
        "suffix": off(""),
        "add_special_tokens": off(True),
    }
    return taken({"model": limits.model, "prompt": prompt}, optional)


def _tokenize(limits: Limits) -> Schema:
    shown: dict[str, Schema] = {
        "model": limits.model,
        "add_special_tokens": boolean("True where none is given, but for messages, whose template writes them."),
        "return_token_strs": boolean(),
    }
    rendered = {**shown, "prompt": off(), **_conversation(), "add_generation_prompt": boolean("True where none is given.")}
    return either(taken({"prompt": text()}, shown), taken({"messages": _messages()}, rendered))


def _message() -> Schema:
    content = either(text(), array(ref("TextPart"), 1), about="Text, whole or in parts; images and audio are refused.")
    shared: dict[str, Schema] = {
        "name": text(),
        "function_call": off(),
        "refusal": off(),
        "audio": off(),
        "annotations": off([]),
    }
    no_reasoning = {"reasoning": null_only(), "reasoning_content": null_only()}
    told = {**shared, **no_reasoning, "tool_calls": array({}, at_most=0), "tool_call_id": null_only()}
    called = {**shared, **no_reasoning, "tool_calls": array({}, at_most=0)}
    own = {**shared, "reasoning": text(), "reasoning_content": text("As `reasoning`."), "tool_call_id": null_only()}
    calls = array(ref("AssistantToolCall"))
    return either(
        taken({"role": words("system", "developer", "user"), "content": content}, told),
        taken({"role": words("assistant"), "content": content}, {**own, "tool_calls": calls}),
        taken(
            {"role": words("assistant"), "tool_calls": array(ref("AssistantToolCall"), 1)},
            {**own, "content": content},
            "Calls without words.",
        ),
        taken({"role": words("assistant"), "content": nothing("As an answer has it that is all reasoning.")}, {**own, "tool_calls": calls}),
        *(
            taken({"role": words("assistant"), name: text()}, {**own, "content": content, "tool_calls": calls}, "Reasoning without words.")
            for name in ("reasoning", "reasoning_content")
        ),
        taken({"role": words("tool"), "content": content, "tool_call_id": text("Of the call that this answers.")}, called),
    )


def _tool_call() -> Schema:
    arguments = text("A JSON object.", contentMediaType="application/json")
    called = taken({"name": text()}, {"arguments": arguments})
    return taken({"function": called}, {"id": text(), "type": words("function"), "index": anything("Ignored.")})
