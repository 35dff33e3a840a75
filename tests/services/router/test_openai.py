"""Requests field by field; every refusal over HTTP stands in test_refusals.py."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duomo.config_gateway import GatewaySection
from duomo.errors import RequestError
from services.router.common_fields import CommonReader
from services.router.conversation import ChatMessage
from services.router.openai import RequestParser

PARSER = RequestParser(GatewaySection(), CommonReader(GatewaySection(), "tiny-moe", 8192))
CHAT = {"model": "tiny-moe", "messages": [{"role": "user", "content": "hi"}]}


def _chat(**fields: object) -> bytes:
    return json.dumps(CHAT | fields).encode()


def test_defaults_are_openais() -> None:
    common = PARSER.chat(_chat()).common
    sampling = common.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (1.0, 1.0, 0, 0.0, 1.0)
    assert (common.max_tokens, common.stop, common.answer.num_choices, common.answer.stream, sampling.logprobs) == (
        None,
        (),
        1,
        False,
        None,
    )


def test_nulls_and_harmless_fields_pass() -> None:
    off = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {}, "parallel_tool_calls": True}
    nulls = dict.fromkeys(("max_tokens", "stop", "temperature", "seed", "n", "stream", "stream_options", "tools", "logprobs", "functions"))
    ignored = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    assert PARSER.chat(_chat(**(off | ignored))).conversation.messages == PARSER.chat(_chat(**nulls)).conversation.messages
    whole = {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None, "annotations": [], "audio": None}
    assert PARSER.chat(_chat(messages=[whole])).conversation.messages == (ChatMessage("assistant", "yes", None),)


def test_what_an_answer_without_text_looks_like_may_be_sent_back() -> None:
    for turn in ({"content": None, "reasoning_content": "why"}, {"reasoning": "why"}):
        (read,) = PARSER.chat(_chat(messages=[{"role": "assistant", **turn}])).conversation.messages
        assert read == ChatMessage("assistant", "", None, reasoning="why")
    (read,) = PARSER.chat(_chat(messages=[{"role": "assistant", "content": None, "tool_calls": []}])).conversation.messages
    assert read == ChatMessage("assistant", "", None)
    for forgotten in ({"role": "assistant"}, {"role": "user", "content": None}):
        with pytest.raises(RequestError, match=r"You must provide 'messages\[0\].content'"):
            PARSER.chat(_chat(messages=[forgotten]))


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert PARSER.chat(_chat(messages=[{"role": "user", "content": parts, "name": "Ann"}])).conversation.messages == (
        ChatMessage("user", "ab", "Ann"),
    )


def test_a_low_priority_number_goes_first_as_in_vllm() -> None:
    assert [PARSER.chat(_chat(priority=number)).common.priority for number in (-3, 0, 100)] == [3, 0, -100]
    with pytest.raises(RequestError, match="'priority' must be between -100 and 100"):
        PARSER.chat(_chat(priority=101))


def test_integers_are_numbers_and_minus_one_is_no_top_k() -> None:
    sampling = PARSER.chat(_chat(temperature=0, top_p=1, top_k=-1, seed=(1 << 64) - 1)).common.sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.0, 0, (1 << 64) - 1)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    "messages model max_tokens max_completion_tokens n stream stream_options stop temperature top_p top_k min_p seed logprobs top_logprobs "
    "presence_penalty frequency_penalty repetition_penalty ignore_eos min_tokens stop_token_ids tools logit_bias prompt best_of echo "
    "priority prompt_logprobs"
).split()


@given(field=st.sampled_from(FIELDS), value=json_values)
def test_any_value_of_any_field_is_taken_or_refused_by_its_name(field: str, value: object) -> None:
    for parse, body in ((PARSER.chat, CHAT), (PARSER.completion, {"model": "tiny-moe", "prompt": "hi"})):
        try:
            parse(json.dumps(body | {field: value}).encode())
        except RequestError as error:
            assert error.status in (400, 404) and error.param is not None
            assert error.param.startswith(field) or (field == "logprobs" and error.param == "top_logprobs") or field == "stream", error


@given(body=st.binary(max_size=60))
def test_any_bytes_are_refused_or_taken_and_never_crash(body: bytes) -> None:
    with pytest.raises(RequestError):
        PARSER.chat(body)
