"""`prompt_logprobs`, and `echo` with `logprobs`, through the gateway with stub replicas: answers, refusals, retries, long prompts."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from pathlib import Path
from typing import Any

import openai
import pytest

from duomo.config_gateway import GatewaySection
from duomo.errors import RequestError
from duomo.wire.messages import SINCE, StartDecode, StartPrefill
from services.router.common_fields import CommonReader
from services.router.openai import RequestParser
from services.router.scored_prompt import FEW_ENTRIES
from tests.services.router.stub_replicas import Script
from tests.services.router.stub_scores import likeliest, own_logprob, rank
from tests.services.router.stub_system import StubSystem, loaded_text, stub_system

PARSER = RequestParser(GatewaySection(), CommonReader(GatewaySection(), "tiny-moe", 8192))
CHAT = {"model": "tiny-moe", "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 4}
TEXT = {"model": "tiny-moe", "prompt": "Once upon a time", "max_tokens": 4}
IDS = list(loaded_text().encode(str(TEXT["prompt"]), add_special_tokens=True))


def name(token_id: int) -> str:
    return loaded_text().token_bytes(token_id).decode("utf-8", "replace")


def listed(ids: list[int], num_top: int) -> list[dict[str, Any] | None]:
    """What the stub's numbers are in vLLM's form."""
    found: list[dict[str, Any] | None] = [None]
    for position, token_id in enumerate(ids[1:], 1):
        shown = {token_id: (own_logprob(position), rank(position))}
        shown |= {other: (value, place) for place, (other, value) in enumerate(likeliest(position, token_id, num_top), 1)}
        found.append({str(each): {"logprob": value, "rank": place, "decoded_token": name(each)} for each, (value, place) in shown.items()})
    return found


def starts(system: StubSystem) -> list[StartPrefill]:
    return [one for replica in system.pools.of_role("prefill") for one in replica.of_type(StartPrefill)]


def test_a_chat_shows_it_on_top_and_completions_in_every_choice(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            plain = (await system.client.post("/v1/chat/completions", json=CHAT)).json()
            assert "prompt_logprobs" not in plain and starts(system)[0].sampling.prompt_logprobs is None
            chat = (await system.client.post("/v1/chat/completions", json=CHAT | {"prompt_logprobs": 3, "n": 2})).json()
            assert chat["prompt_logprobs"] == listed(list(starts(system)[1].prompt_ids), 3)
            assert [choice["message"] for choice in chat["choices"]][0] == plain["choices"][0]["message"]
            (decode,) = system.pools.of_role("decode")
            assert [one.sampling.prompt_logprobs for one in decode.of_type(StartDecode)] == [None, 3], "both sides are told"
            text = (await system.client.post("/v1/completions", json=TEXT | {"prompt_logprobs": 0, "n": 2})).json()
            assert [choice["prompt_logprobs"] for choice in text["choices"]] == [listed(IDS, 0)] * 2
            two = (await system.client.post("/v1/completions", json=TEXT | {"prompt": [IDS, IDS[:1]], "prompt_logprobs": 1})).json()
            assert [choice["prompt_logprobs"] for choice in two["choices"]] == [listed(IDS, 1), [None]]
            assert all(choice["logprobs"] is None for choice in two["choices"])

    asyncio.run(scenario())


def echoed(choice: dict[str, Any]) -> None:
    """The lists of an echoed choice are those of the stub's prompt, then its answer's, and offsets are places in the text."""
    lists, num = choice["logprobs"], len(IDS)
    assert lists["tokens"][:num] == [name(each) for each in IDS] and len(lists["tokens"]) == num + 4
    assert lists["token_logprobs"] == [None, *(own_logprob(at) for at in range(1, num)), *[-0.5] * 4]
    assert lists["top_logprobs"][0] is None and None not in lists["top_logprobs"][1:]
    for position in range(1, num):
        wanted = {name(IDS[position]): own_logprob(position)}
        wanted |= {name(other): value for other, value in likeliest(position, IDS[position], 2)}
        assert lists["top_logprobs"][position] == wanted
    places = lists["text_offset"][: num + 1]
    assert [choice["text"][lo:hi] for lo, hi in zip(places, places[1:], strict=False)] == lists["tokens"][:num]


def test_echo_with_logprobs_has_the_prompts_whole_and_streamed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            asked = TEXT | {"echo": True, "logprobs": 2, "n": 2}
            whole = (await system.client.post("/v1/completions", json=asked)).json()
            for choice in whole["choices"]:
                assert "prompt_logprobs" not in choice
                echoed(choice)
            async with openai.AsyncOpenAI(base_url=system.base_url + "/v1", api_key="none", max_retries=0) as client:
                streamed: dict[int, dict[str, Any]] = {}
                async for chunk in await client.completions.create(**asked, stream=True):  # type: ignore[call-overload]  # a dict's values have no types
                    for part in chunk.choices:
                        lists: dict[str, list[Any]] = {field: [] for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
                        choice = streamed.setdefault(part.index, {"text": "", "logprobs": lists})
                        choice["text"] += part.text
                        for field, values in choice["logprobs"].items():
                            values += getattr(part.logprobs, field)
            assert [streamed[index] for index in range(2)] == [
                {"text": choice["text"], "logprobs": choice["logprobs"]} for choice in whole["choices"]
            ]
            best = asked | {"n": 1, "best_of": 3, "prompt_logprobs": 1}
            (shown,) = (await system.client.post("/v1/completions", json=best)).json()["choices"]
            assert shown["prompt_logprobs"] == listed(IDS, 1) and starts(system)[-1].sampling.prompt_logprobs == 2
            echoed(shown)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"prompt_logprobs": -1}, "'prompt_logprobs' must be between 0 and 20, got -1."),
        ({"prompt_logprobs": 21}, "'prompt_logprobs' must be between 0 and 20, got 21."),
        ({"prompt_logprobs": True}, "'prompt_logprobs' must be an integer, got a boolean."),
        ({"prompt_logprobs": "1"}, "'prompt_logprobs' must be an integer, got a string."),
        ({"prompt_logprobs": 1.0}, "'prompt_logprobs' must be an integer, got a number."),
        ({"prompt_logprobs": 1, "stream": True}, "'prompt_logprobs' above 0 cannot be streamed: leave out 'stream'."),
    ],
)
def test_what_cannot_be_shown_is_refused_by_its_name(body: dict[str, Any], told: str) -> None:
    for parse, rest in ((PARSER.chat, CHAT), (PARSER.completion, TEXT)):
        with pytest.raises(RequestError) as refusal:
            parse(json.dumps(rest | body).encode())
        assert (refusal.value.param, refusal.value.detail, refusal.value.status) == ("prompt_logprobs", told, 400)


def test_nothing_and_null_ask_for_nothing_and_a_stream_may_name_none_of_them() -> None:
    for parse, rest in ((PARSER.chat, CHAT), (PARSER.completion, TEXT)):
        for body in ({}, {"prompt_logprobs": None}, {"prompt_logprobs": 0, "stream": True}):
            assert parse(json.dumps(rest | body).encode()).common.sampling.prompt_logprobs is None
    lower = RequestParser(GatewaySection(max_logprobs=3), CommonReader(GatewaySection(max_logprobs=3), "tiny-moe", 8192))
    assert lower.chat(json.dumps(CHAT | {"prompt_logprobs": 3}).encode()).common.sampling.prompt_logprobs == 3
    with pytest.raises(RequestError, match="between 0 and 3"):
        lower.chat(json.dumps(CHAT | {"prompt_logprobs": 4}).encode())


def test_an_answer_that_no_memory_holds_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    """Every choice of a completion repeats its prompt's; a chat shows them once."""

    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            prompt = [10 + at % 500 for at in range(1900)]
            asked = {"model": "tiny-moe", "prompt": prompt, "max_tokens": 1, "n": 128}
            for field, body in (("prompt_logprobs", {}), ("logprobs", {"echo": True}), ("logprobs", {"echo": True, "max_tokens": 0})):
                answer = await system.client.post("/v1/completions", json=asked | body | {field: 20})
                told = answer.json()["error"]
                assert (answer.status_code, told["param"]) == (400, field) and "at most 4194304" in told["message"]
            assert not starts(system)
            shown = await system.client.post("/v1/completions", json=asked | {"prompt_logprobs": 0, "n": 2})
            assert shown.status_code == 200

    asyncio.run(scenario())


def test_a_chat_has_the_same_bound_and_shows_them_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            shown = await system.client.post("/v1/chat/completions", json=CHAT | {"prompt_logprobs": 1, "n": 4})
            num = 2 * len(shown.json()["prompt_logprobs"])
            monkeypatch.setattr("services.router.prompts._MOST_SCORES", num)
            assert (await system.client.post("/v1/chat/completions", json=CHAT | {"prompt_logprobs": 1, "n": 4})).status_code == 200
            answer = await system.client.post("/v1/chat/completions", json=CHAT | {"prompt_logprobs": 2})
            told = answer.json()["error"]
            assert (answer.status_code, told["param"]) == (400, "prompt_logprobs") and f"at most {num} fit one" in told["message"]
            both = TEXT | {"echo": True, "logprobs": 0, "prompt_logprobs": 0}
            monkeypatch.setattr("services.router.prompts._MOST_SCORES", 2 * len(IDS) - 1)
            assert (await system.client.post("/v1/completions", json=both)).status_code == 400, "both forms count"

    asyncio.run(scenario())


def test_the_other_endpoints_know_no_such_field(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            for path, body in (("/v1/responses", {"input": "hi"}), ("/v1/messages", {"messages": CHAT["messages"], "max_tokens": 4})):
                answer = await system.client.post(path, json={"model": "tiny-moe", "prompt_logprobs": 1} | body)
                assert answer.status_code == 400 and "prompt_logprobs" in answer.json()["error"]["message"]

    asyncio.run(scenario())


def test_what_was_told_is_not_asked_again(tmp_path: Path) -> None:
    """A retry asks again where something is missing; a retry and a resume behind the last of them ask no more."""

    async def scenario() -> None:
        script = Script(prefill_faults=deque(["fail"]))
        async with stub_system(tmp_path, script, num_prefills=2, num_decodes=2) as system:
            answer = await system.client.post("/v1/completions", json=TEXT | {"prompt_logprobs": 1})
            assert answer.json()["choices"][0]["prompt_logprobs"] == listed(IDS, 1)
            assert [one.sampling.prompt_logprobs for one in starts(system)] == [1, 1]
            script.fails_scored = 1
            script.decode_faults += [(None, 0), ("preempt", 2)]
            seen = {one.request_id for one in starts(system)}
            answer = await system.client.post("/v1/completions", json=TEXT | {"prompt_logprobs": 1, "max_tokens": 8})
            assert answer.json()["choices"][0]["prompt_logprobs"] == listed(IDS, 1)
            assert answer.json()["choices"][0]["text"] == system.story.text(0, 8)
            again = sorted((one for one in starts(system) if one.request_id not in seen), key=lambda one: one.attempt)
            assert [one.sampling.prompt_logprobs for one in again] == [1, None, None] and again[-1].emitted_ids

    asyncio.run(scenario())


@pytest.mark.parametrize(("num_frames", "code"), [(0, "scores_lost"), (1, "scores_lost")])
def test_a_first_token_before_all_of_them_is_a_fault_and_no_answer(tmp_path: Path, num_frames: int, code: str) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(score_frames=num_frames)) as system:
            body = TEXT | {"prompt": list(range(10, 110)), "prompt_logprobs": 1}
            answer = await system.client.post("/v1/completions", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, code)
            assert (await system.client.post("/v1/completions", json=TEXT)).status_code == 200

    asyncio.run(scenario())


def test_a_replica_that_is_too_old_is_never_asked(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            for link in system.gateway.pools.links.values():
                link.connection.version = SINCE["Sampling", "prompt_logprobs"] - 1
            for body in ({"prompt_logprobs": 0}, {"echo": True, "logprobs": 1, "stream": True}):
                answer = await system.client.post("/v1/completions", json=TEXT | body)
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "peer_too_old") and "retry-after" in answer.headers
            assert (await system.client.post("/v1/completions", json=TEXT)).status_code == 200 and len(starts(system)) == 1

    asyncio.run(scenario())


def test_a_long_prompt_is_written_aside_and_no_slow_client(tmp_path: Path) -> None:
    """More than is written at once and more than a client may be behind; another stream goes on meanwhile."""
    prompt = [10 + at % 500 for at in range(900)]
    assert len(prompt) * 21 > FEW_ENTRIES

    async def scenario() -> None:
        async with stub_system(tmp_path, overrides={"gateway": {"slow_client_bytes": 64 * 1024}}) as system:
            body = TEXT | {"prompt": prompt, "prompt_logprobs": 20}
            beside = asyncio.create_task(system.client.post("/v1/completions", json=TEXT))
            whole = await system.client.post("/v1/completions", json=body)
            assert whole.json()["choices"][0]["prompt_logprobs"] == listed(prompt, 20)
            assert (await beside).status_code == 200
            asked = TEXT | {"prompt": prompt, "echo": True, "logprobs": 20}
            expected = (await system.client.post("/v1/completions", json=asked)).json()["choices"][0]
            streamed = await system.client.post("/v1/completions", json=asked | {"stream": True})
            events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
            assert streamed.text.endswith("data: [DONE]\n\n") and len(events) == 5
            assert "".join(event["choices"][0]["text"] for event in events) == expected["text"]
            assert events[0]["choices"][0]["logprobs"]["token_logprobs"] == expected["logprobs"]["token_logprobs"][:900]

    asyncio.run(scenario())


def test_a_client_that_leaves_while_it_is_written_holds_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(prefill_s=0.05)) as system:
            body = TEXT | {"prompt": [10 + at % 500 for at in range(1500)], "prompt_logprobs": 20, "max_tokens": 50}
            for _ in range(4):
                call = asyncio.create_task(system.client.post("/v1/completions", json=body))
                await asyncio.sleep(0.08)
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)
            await system.until(lambda: not system.gateway.num_open_answers)
            system.check_nothing_is_held()

    asyncio.run(scenario())
