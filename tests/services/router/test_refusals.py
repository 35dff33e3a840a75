"""Every refusal of a bad request, over a real uvicorn: a 4xx with OpenAI's body that names the field, and nothing reserved."""

from __future__ import annotations

import asyncio
from pathlib import Path

from duomo.wire.messages import StartPrefill
from tests.services.router.stub_system import stub_system

CHAT = {"model": "tiny-moe", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "tiny-moe", "prompt": "hi"}


def as_format(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


BAD_REQUESTS: list[tuple[str, dict, int, str]] = [
    ("chat", CHAT | {"messages": []}, 400, "messages"),
    ("chat", {"model": "tiny-moe"}, 400, "messages"),
    ("chat", CHAT | {"messages": "hi"}, 400, "messages"),
    ("chat", CHAT | {"messages": ["hi"]}, 400, "messages[0]"),
    ("chat", CHAT | {"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    ("chat", CHAT | {"messages": [{"content": "hi"}]}, 400, "messages[0].role"),
    ("chat", CHAT | {"messages": [{"role": "wizard", "content": "hi"}]}, 400, "messages[0].role"),
    ("chat", CHAT | {"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content"),
    (
        "chat",
        CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
        400,
        "messages[0].content[0]",
    ),
    ("chat", CHAT | {"messages": [{"role": "user", "content": "hi", "mood": 1}]}, 400, "messages[0].mood"),
    ("chat", CHAT | {"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "messages"),
    ("chat", CHAT | {"messages": [{"role": "user", "content": "x" * 700_000}]}, 400, "messages"),
    ("chat", CHAT | {"model": "gpt-9"}, 404, "model"),
    ("chat", {"messages": CHAT["messages"]}, 400, "model"),
    ("chat", CHAT | {"model": 7}, 400, "model"),
    ("chat", CHAT | {"max_tokens": -1}, 400, "max_tokens"),
    ("chat", CHAT | {"max_tokens": 0}, 400, "max_tokens"),
    ("chat", CHAT | {"max_tokens": True}, 400, "max_tokens"),
    ("chat", CHAT | {"max_tokens": 1.5}, 400, "max_tokens"),
    ("chat", CHAT | {"max_tokens": "9"}, 400, "max_tokens"),
    ("chat", CHAT | {"max_tokens": 2048}, 400, "max_tokens"),
    ("chat", CHAT | {"max_completion_tokens": 4000}, 400, "max_completion_tokens"),
    ("chat", CHAT | {"max_tokens": 3, "max_completion_tokens": 4}, 400, "max_tokens"),
    ("chat", CHAT | {"n": 129}, 400, "n"),
    ("chat", CHAT | {"n": 0}, 400, "n"),
    ("chat", CHAT | {"temperature": 2.1}, 400, "temperature"),
    ("chat", CHAT | {"temperature": -0.1}, 400, "temperature"),
    ("chat", CHAT | {"temperature": True}, 400, "temperature"),
    ("chat", CHAT | {"top_p": 0}, 400, "top_p"),
    ("chat", CHAT | {"top_p": 1.1}, 400, "top_p"),
    ("chat", CHAT | {"top_k": -2}, 400, "top_k"),
    ("chat", CHAT | {"min_p": 2}, 400, "min_p"),
    ("chat", CHAT | {"presence_penalty": 3}, 400, "presence_penalty"),
    ("chat", CHAT | {"frequency_penalty": -3}, 400, "frequency_penalty"),
    ("chat", CHAT | {"repetition_penalty": 0}, 400, "repetition_penalty"),
    ("chat", CHAT | {"seed": 1 << 70}, 400, "seed"),
    ("chat", CHAT | {"stop": [""]}, 400, "stop"),
    ("chat", CHAT | {"stop": 5}, 400, "stop"),
    ("chat", CHAT | {"stop": ["a"] * 17}, 400, "stop"),
    ("chat", CHAT | {"stream": "yes"}, 400, "stream"),
    ("chat", CHAT | {"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ("chat", CHAT | {"stream": True, "stream_options": {"wrong": 1}}, 400, "stream_options.wrong"),
    ("chat", CHAT | {"top_logprobs": 2}, 400, "top_logprobs"),
    ("chat", CHAT | {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ("chat", CHAT | {"logprobs": 3}, 400, "logprobs"),
    ("chat", CHAT | {"tools": [{"type": "function"}]}, 400, "tools[0].function"),
    ("chat", CHAT | {"response_format": "json_object"}, 400, "response_format"),
    ("chat", CHAT | {"response_format": {}}, 400, "response_format.type"),
    ("chat", CHAT | {"response_format": {"type": "xml"}}, 400, "response_format.type"),
    ("chat", CHAT | {"response_format": {"type": "json_object", "mood": 1}}, 400, "response_format.mood"),
    ("chat", CHAT | {"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema"),
    ("chat", CHAT | {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, 400, "response_format.json_schema.schema"),
    ("chat", CHAT | {"response_format": as_format({"type": "colour"})}, 400, "response_format.json_schema.schema"),
    ("chat", CHAT | {"response_format": as_format({"type": "object", "not": {}})}, 400, "response_format.json_schema.schema"),
    ("chat", CHAT | {"response_format": as_format({"type": "object"}), "guided_regex": "a"}, 400, "guided_regex"),
    ("chat", CHAT | {"guided_json": "{"}, 400, "guided_json"),
    ("chat", CHAT | {"guided_json": [1]}, 400, "guided_json"),
    ("chat", CHAT | {"guided_regex": "(a"}, 400, "guided_regex"),
    ("chat", CHAT | {"guided_regex": ""}, 400, "guided_regex"),
    ("chat", CHAT | {"guided_choice": []}, 400, "guided_choice"),
    ("chat", CHAT | {"guided_choice": ["a", 1]}, 400, "guided_choice[1]"),
    ("chat", CHAT | {"guided_choice": ["a", ""]}, 400, "guided_choice[1]"),
    ("text", TEXT | {"guided_grammar": "start: missing"}, 400, "guided_grammar"),
    ("text", TEXT | {"guided_whitespace_pattern": " "}, 400, "guided_whitespace_pattern"),
    ("text", TEXT | {"structured_outputs": {"regex": "(a"}}, 400, "structured_outputs.regex"),
    ("text", TEXT | {"structured_outputs": {"structural_tag": "x"}}, 400, "structured_outputs.structural_tag"),
    ("text", TEXT | {"structured_outputs": {"regex": "a", "choice": ["a"]}}, 400, "structured_outputs.choice"),
    ("chat", CHAT | {"logit_bias": {"8192": 3}}, 400, "logit_bias"),
    ("chat", CHAT | {"logit_bias": {"-1": 3}}, 400, "logit_bias"),
    ("chat", CHAT | {"logit_bias": {"cat": 3}}, 400, "logit_bias"),
    ("chat", CHAT | {"logit_bias": {"5": 101}}, 400, "logit_bias"),
    ("text", TEXT | {"logit_bias": {"5": "3"}}, 400, "logit_bias.5"),
    ("text", TEXT | {"logit_bias": [5]}, 400, "logit_bias"),
    ("text", TEXT | {"logit_bias": {str(token_id): 1 for token_id in range(1025)}}, 400, "logit_bias"),
    ("chat", CHAT | {"min_tokens": 9, "max_tokens": 8}, 400, "min_tokens"),
    ("chat", CHAT | {"stop_token_ids": [8192]}, 400, "stop_token_ids"),
    ("chat", CHAT | {"stop_token_ids": [True]}, 400, "stop_token_ids[0]"),
    ("chat", CHAT | {"ignore_eos": 1}, 400, "ignore_eos"),
    ("chat", CHAT | {"frobnicate": 1}, 400, "frobnicate"),
    ("text", {"model": "tiny-moe"}, 400, "prompt"),
    ("text", TEXT | {"prompt": ""}, 400, "prompt"),
    ("text", TEXT | {"prompt": []}, 400, "prompt"),
    ("text", TEXT | {"prompt": {"a": 1}}, 400, "prompt"),
    ("text", TEXT | {"prompt": [1, "a"]}, 400, "prompt[1]"),
    ("text", TEXT | {"prompt": [1, 8192]}, 400, "prompt"),
    ("text", TEXT | {"prompt": [-1]}, 400, "prompt"),
    ("text", TEXT | {"prompt": ["a", 1]}, 400, "prompt[1]"),
    ("text", TEXT | {"prompt": [[1], []]}, 400, "prompt"),
    ("text", TEXT | {"prompt": [1.5]}, 400, "prompt[0]"),
    ("text", TEXT | {"prompt": [5] * 2048}, 400, "prompt"),
    ("text", TEXT | {"prompt": ["a"] * 65, "n": 2}, 400, "prompt"),
    ("text", TEXT | {"echo": 1}, 400, "echo"),
    ("text", TEXT | {"prompt_logprobs": -1}, 400, "prompt_logprobs"),
    ("chat", CHAT | {"prompt_logprobs": 1, "stream": True}, 400, "prompt_logprobs"),
    ("text", TEXT | {"suffix": "x"}, 400, "suffix"),
    ("text", TEXT | {"best_of": 3, "stream": True}, 400, "best_of"),
    ("text", TEXT | {"best_of": 1, "n": 2}, 400, "best_of"),
    ("text", TEXT | {"best_of": 65, "prompt": ["a", "b"]}, 400, "prompt"),
    ("text", TEXT | {"priority": 101}, 400, "priority"),
    ("/tokenize", {}, 400, "prompt"),
    ("/tokenize", {"prompt": 3}, 400, "prompt"),
    ("/tokenize", {"prompt": "x", "add_special_tokens": 1}, 400, "add_special_tokens"),
    ("/tokenize", {"messages": []}, 400, "messages"),
    ("/tokenize", {"prompt": "x", "max_tokens": 3}, 400, "max_tokens"),
    ("/tokenize", {"model": "gpt-9", "prompt": "x"}, 404, "model"),
    ("/detokenize", {}, 400, "tokens"),
    ("/detokenize", {"tokens": "x"}, 400, "tokens"),
    ("/detokenize", {"tokens": [1, 8192]}, 400, "tokens"),
    ("/detokenize", {"tokens": [1], "skip": True}, 400, "skip"),
    ("text", TEXT | {"logprobs": True}, 400, "logprobs"),
    ("text", TEXT | {"logprobs": 21}, 400, "logprobs"),
]


def test_limits_below_the_models_own_are_kept_and_named(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, overrides={"gateway": {"max_prompt_tokens": 40, "max_completion_tokens": 9}}) as system:
            for body, param, said in (
                (TEXT | {"prompt": [5] * 41}, "prompt", "at most 40"),
                (TEXT | {"prompt": "word " * 300_000}, "prompt", "at most 40"),
                (TEXT | {"max_tokens": 10}, "max_tokens", "at most 9"),
            ):
                answer = await system.client.post("/v1/completions", json=body)
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, param) and said in answer.text
            chat = await system.client.post("/v1/chat/completions", json=CHAT | {"max_completion_tokens": 2000})
            assert (chat.status_code, chat.json()["error"]["param"]) == (400, "max_completion_tokens")
            assert not system.pools.of_role("prefill")[0].of_type(StartPrefill)
            for body in (TEXT | {"prompt": [5] * 40}, TEXT | {"max_tokens": 9}):
                fine = (await system.client.post("/v1/completions", json=body)).json()
                assert fine["usage"]["completion_tokens"] == 9, "the default is within the limit too"

    asyncio.run(scenario())


def test_every_bad_input_is_refused_by_a_4xx_that_names_the_field(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            for endpoint, body, status, param in BAD_REQUESTS:
                path = {"chat": "/v1/chat/completions", "text": "/v1/completions"}.get(endpoint, endpoint)
                answer = await system.client.post(path, json=body)
                error = answer.json()["error"]
                assert (answer.status_code, error["param"]) == (status, param), (param, answer.text)
                assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
                assert param in error["message"] or status == 404, answer.text
            assert not system.pools.of_role("prefill")[0].of_type(StartPrefill), "a refusal reserves nothing"
            long = await system.client.post("/v1/completions", json=TEXT | {"prompt": "a b c " * 2000})
            assert "2048" in long.json()["error"]["message"], "an over-long prompt is told the limit"

    asyncio.run(scenario())
