"""The REST edge over a real uvicorn: answers of both endpoints, cancellation; refusals stand in test_refusals.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path

import numpy as np
import pytest
import uvloop

from duomo.wire.messages import Cancel, StartDecode, StartPrefill
from tests.services.router.stub_replicas import MODEL, Script
from tests.services.router.stub_system import StubSystem, loaded_text, stub_system

CHAT = {"model": "tiny-moe", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "tiny-moe", "prompt": "hi"}


def events_of(body: str) -> list[dict]:
    """The chunks of a stream, which must end with [DONE]."""
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_the_pools_desired_size_is_shown(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, num_decodes=2) as system:
            await system.until(lambda: all(link.report is not None for link in system.gateway.pools.links.values()))
            report = (await system.client.get("/admin/pools")).json()
            assert report["desired_replicas"] == {"prefill": 1, "decode": 1}
            told = {(one["role"], one["num_prefixes"], *one["report"]["prefix_digests"]) for one in report["replicas"]}
            assert told == {("prefill", 2), ("decode", 0)}, "their number alone"
            page = (await system.client.get("/metrics")).text
            assert 'duomo_desired_replicas{pool="prefill"} 1.0' in page and 'duomo_desired_replicas{pool="decode"} 1.0' in page

    asyncio.run(scenario())


def test_experts_are_shown_by_pool_layer_and_expert(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, num_prefills=2) as system:
            await system.until(lambda: set(system.gateway.metrics.experts.pools()) == {"prefill", "decode"})
            await system.until(lambda: all(link.report is not None for link in system.gateway.pools.links.values()))
            for replica in system.pools.of_role("prefill"):
                replica.expert_tokens_LE += np.array([[3, 1, 0, 0], [1, 1, 1, 1]])
            await system.until(lambda: system.gateway.metrics.experts.pools()["prefill"].window_LE.sum() == 2 * 8)
            shown = (await system.client.get("/admin/experts")).json()["pools"]
            assert shown["prefill"]["window_tokens"] == [[6, 2, 0, 0], [2, 2, 2, 2]] == shown["prefill"]["total_tokens"]
            assert shown["prefill"]["imbalance"] == [3.0, 1.0] and shown["prefill"]["active_experts"] == [2, 4]
            assert shown["decode"]["active_experts"] == [0, 0]
            page = (await system.client.get("/metrics")).text
            assert 'duomo_expert_load_imbalance{layer="0",pool="prefill"} 3.0' in page
            reports = [replica["report"] for replica in (await system.client.get("/admin/pools")).json()["replicas"]]
            assert [report["experts"] for report in reports] == [None] * 3, "those have a page of their own"

    asyncio.run(scenario())


def test_unknown_paths_and_methods_have_openais_body(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("GET", "/v1/models/other", 404)):
                answer = await system.client.request(method, path)
                assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}

    asyncio.run(scenario())


def test_chat_whole_and_streamed_say_the_same(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(cached_tokens=3)) as system:
            asked = CHAT | {"max_tokens": 33, "temperature": 0, "user": "me", "metadata": {"a": "b"}}
            whole = (await system.client.post("/v1/chat/completions", json=asked)).json()
            choice = whole["choices"][0]
            assert choice["message"] == {"role": "assistant", "content": system.story.text(0, 33), "refusal": None}
            assert (whole["object"], choice["finish_reason"]) == ("chat.completion", "length")
            assert whole["usage"]["completion_tokens"] == 33 and whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
            asked |= {"stream": True, "stream_options": {"include_usage": True}}
            streamed = await system.client.post("/v1/chat/completions", json=asked)
            assert streamed.headers["content-type"].startswith("text/event-stream")
            events = events_of(streamed.text)
            assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            deltas = [event["choices"][0] for event in events[1:-1]]
            assert len(deltas) == 33, "one event a token"
            assert "".join(delta["delta"].get("content", "") for delta in deltas) == system.story.text(0, 33)
            assert [delta["finish_reason"] for delta in deltas] == [None] * 32 + ["length"]
            assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
            assert {event["object"] for event in events} == {"chat.completion.chunk"} and len({event["id"] for event in events}) == 1

    asyncio.run(scenario())


def test_completion_takes_texts_and_ids_and_several_of_them(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            for prompt, num_prompts in (("a b", 1), ([5, 6, 7], 1), (["a", "b", "c"], 3), ([[5], [6, 7]], 2)):
                asked = TEXT | {"prompt": prompt, "max_tokens": 5, "n": 2}
                whole = (await system.client.post("/v1/completions", json=asked)).json()
                assert [choice["index"] for choice in whole["choices"]] == list(range(2 * num_prompts))
                assert [choice["text"] for choice in whole["choices"]] == [system.story.text(idx % 2, 5) for idx in range(2 * num_prompts)]
                assert whole["usage"]["completion_tokens"] == 10 * num_prompts
                streamed = await system.client.post("/v1/completions", json=asked | {"stream": True})
                texts = [""] * (2 * num_prompts)
                for event in events_of(streamed.text):
                    texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
                assert texts == [choice["text"] for choice in whole["choices"]]
            starts = system.pools.of_role("prefill")[0].of_type(StartPrefill)
            assert starts[2].prompt_ids == (5, 6, 7) and starts[2].choices == (0, 1), "n choices share one prefill"
            default = (await system.client.post("/v1/completions", json=TEXT)).json()
            assert default["usage"]["completion_tokens"] == 16

    asyncio.run(scenario())


def test_sampling_travels_to_both_legs(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            asked = {
                "temperature": 0.5,
                "top_k": 9,
                "top_p": 0.9,
                "min_p": 0.1,
                "seed": -1,
                "presence_penalty": 1,
                "frequency_penalty": 0.5,
            }
            more = {"repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [7], "max_completion_tokens": 4}
            answer = await system.client.post("/v1/chat/completions", json=CHAT | asked | more)
            assert answer.status_code == 200
            prefill = system.pools.of_role("prefill")[0].of_type(StartPrefill)[0]
            decode = system.pools.of_role("decode")[0].of_type(StartDecode)[0]
            assert prefill.sampling == decode.sampling and prefill.prompt_ids == decode.prompt_ids
            sampling = prefill.sampling
            assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 9, 0.9, 0.1)
            assert (sampling.seed, sampling.max_tokens, sampling.min_tokens) == ((1 << 64) - 1, 4, 2)
            assert (sampling.repetition_penalty, sampling.stop_token_ids, sampling.ignore_eos) == (1.1, (7,), True)
            await system.client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 1})
            await system.client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 1})
            seeds = {start.sampling.seed for start in system.pools.of_role("prefill")[0].of_type(StartPrefill)}
            assert len(seeds) == 3, "who names no seed gets a random one"

    asyncio.run(scenario())


def test_logprobs_and_token_ids_in_both_styles(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            asked = CHAT | {"max_tokens": 3, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}
            choice = (await system.client.post("/v1/chat/completions", json=asked)).json()["choices"][0]
            content = choice["logprobs"]["content"]
            assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
            assert [len(entry["top_logprobs"]) for entry in content] == [2, 2, 2] and content[0]["logprob"] == -0.5
            assert bytes(content[0]["bytes"]).decode() == content[0]["token"]
            assert choice["token_ids"] == [system.story.token(0, idx) for idx in range(3)]
            text = (await system.client.post("/v1/completions", json=TEXT | {"max_tokens": 3, "logprobs": 1})).json()["choices"][0]
            assert text["logprobs"]["text_offset"] == [0, 4, 9] and len(text["logprobs"]["top_logprobs"]) == 3

    asyncio.run(scenario())


def test_stop_strings_end_a_choice_across_tokens_and_cancel_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(step_s=0.001)) as system:
            asked = CHAT | {"max_tokens": 400, "stop": ["re was a", "zzz"]}
            whole = (await system.client.post("/v1/chat/completions", json=asked)).json()["choices"][0]
            assert (whole["message"]["content"], whole["finish_reason"]) == ("Once upon a time the", "stop")
            streamed = await system.client.post("/v1/chat/completions", json=asked | {"stream": True})
            shown = "".join(event["choices"][0]["delta"].get("content", "") for event in events_of(streamed.text))
            assert shown == "Once upon a time the"
            decode = system.pools.of_role("decode")[0]
            await system.until(lambda: len(decode.of_type(Cancel)) == 2 and decode.num_running == 0)
            two = (await system.client.post("/v1/chat/completions", json=asked | {"n": 2, "max_tokens": 30})).json()["choices"]
            assert [choice["finish_reason"] for choice in two] == ["stop", "length"]
            await system.until(lambda: len(decode.of_type(Cancel)) == 3)
            assert decode.of_type(Cancel)[-1].choice == 0, "only the stopped choice is cancelled"
            later = asked | {"stop": ["upon"], "min_tokens": 3, "max_tokens": 20}
            kept = (await system.client.post("/v1/chat/completions", json=later)).json()["choices"][0]
            assert kept["message"]["content"] == system.story.text(0, 20), "no stop before min_tokens"

    asyncio.run(scenario())


def test_an_echoed_prompt_stands_before_every_choice(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            ids = list(loaded_text().encode("once more", add_special_tokens=False))
            asked = {"model": "tiny-moe", "prompt": "tell me ", "echo": True, "max_tokens": 5, "n": 2}
            told = [system.story.text(choice, 5) for choice in range(2)]
            whole = (await system.client.post("/v1/completions", json=asked)).json()
            assert [choice["text"] for choice in whole["choices"]] == ["tell me " + text for text in told]
            by_ids = (await system.client.post("/v1/completions", json=asked | {"prompt": [ids, ids], "n": 1})).json()
            assert [choice["text"] for choice in by_ids["choices"]] == ["once more" + told[0]] * 2
            events = events_of((await system.client.post("/v1/completions", json=asked | {"stream": True})).text)
            texts = ["", ""]
            for event in events:
                texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
            assert texts == ["tell me " + text for text in told]

    asyncio.run(scenario())


def test_the_best_of_several_choices_are_shown_best_first(tmp_path: Path) -> None:
    async def scenario() -> None:
        script = Script(choice_logprobs=(-2.0, -0.25, -3.0, -0.5))
        async with stub_system(tmp_path, script) as system:
            asked = {"model": "tiny-moe", "prompt": ["a", "b"], "best_of": 4, "n": 2, "max_tokens": 6}
            answer = (await system.client.post("/v1/completions", json=asked)).json()
            best = [system.story.text(1, 6), system.story.text(3, 6)]
            assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == list(enumerate(best * 2))
            assert all(choice["logprobs"] is None for choice in answer["choices"]), "asked for to rank, not to show"
            assert answer["usage"]["completion_tokens"] == 2 * 4 * 6, "what was generated is counted"
            shown = (await system.client.post("/v1/completions", json=asked | {"logprobs": 1, "n": 1})).json()
            assert [choice["logprobs"]["token_logprobs"] for choice in shown["choices"]] == [[-0.25] * 6] * 2
            same = (await system.client.post("/v1/completions", json=asked | {"n": 4})).json()
            assert [choice["text"] for choice in same["choices"]] == [system.story.text(choice, 6) for choice in range(4)] * 2

    asyncio.run(scenario())


def test_eos_ends_with_stop_and_is_not_shown(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(eos_at=4)) as system:
            answer = (await system.client.post("/v1/chat/completions", json=CHAT)).json()
            assert answer["choices"][0]["message"]["content"] == system.story.text(0, 4)
            assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] == 5

    asyncio.run(scenario())


async def _read_some(system: StubSystem, num_chunks: int) -> None:
    async with system.client.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True, "max_tokens": 2000}) as answer:
        assert answer.status_code == 200
        async for _ in answer.aiter_lines():
            num_chunks -= 1
            if num_chunks <= 0:
                return


LOOPS = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])


@LOOPS
def test_a_client_that_leaves_cancels_both_legs(tmp_path: Path, run: Callable[[Coroutine[None, None, None]], None]) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(step_s=0.002, prefill_finishes=False)) as system:
            await _read_some(system, 5)
            decode, prefill = system.pools.of_role("decode")[0], system.pools.of_role("prefill")[0]
            await system.until(lambda: bool(decode.of_type(Cancel)) and bool(prefill.of_type(Cancel)))
            await system.until(lambda: decode.used_blocks == 0)
            whole = asyncio.create_task(system.client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 2000}))
            await system.until(lambda: decode.num_running == 1)
            whole.cancel()
            await system.until(lambda: len(decode.of_type(Cancel)) == 2 and len(prefill.of_type(Cancel)) == 2)
            await system.until(lambda: decode.used_blocks == 0 and system.gateway.num_live_legs == 0)

    run(scenario())


@LOOPS
def test_a_client_that_reads_too_slowly_is_cut_off(tmp_path: Path, run: Callable[[Coroutine[None, None, None]], None]) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, overrides={"gateway": {"slow_client_bytes": 20_000}}) as system:
            port = system.gateway.config.gateway.port
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            body = json.dumps(CHAT | {"stream": True, "max_tokens": 1500, "n": 16}).encode()
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            decode = system.pools.of_role("decode")[0]
            await system.until(lambda: bool(decode.of_type(Cancel)))
            await system.until(lambda: decode.used_blocks == 0)
            rendered = system.gateway.metrics.render().decode()
            assert "duomo_slow_clients_total 1.0" in rendered
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                while True:
                    if not await reader.read(65536):
                        raise ConnectionResetError
            writer.close()

    run(scenario())


def test_health_models_metrics_and_pools(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            get = system.client.get
            assert (await get("/health/live")).status_code == (await get("/health/ready")).status_code == 200
            model = (await get("/v1/models")).json()["data"][0]
            assert (model["id"], model["context_length"], model["vocab_size"], model["num_experts"]) == (MODEL.name, 2048, 8192, 16)
            assert (model["total_parameters"], model["active_parameters"]) == (16291072, 6853888)
            await system.client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 4})
            metrics = (await get("/metrics")).text
            assert 'duomo_requests_total{code="",outcome="ok"} 1.0' in metrics
            assert 'gen_ai_server_time_to_first_token_seconds_count{gen_ai_request_model="tiny-moe"} 1.0' in metrics
            report = (await get("/admin/pools")).json()
            assert {replica["role"] for replica in report["replicas"]} == {"prefill", "decode"}
            assert report["gateway"]["num_live_requests"] == 0 and report["replicas"][0]["report"]["num_blocks"] == 4096

    asyncio.run(scenario())


def test_without_a_pool_ready_says_why_and_requests_get_503(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, num_decodes=0) as system:
            await system.until(lambda: bool(system.gateway.pools.prefills()) and system.gateway.pools.prefills()[0].is_usable)
            ready = await system.client.get("/health/ready")
            assert ready.status_code == 503 and "decode" in ready.json()["error"]["message"] and "prefill" not in ready.text
            refused = await system.client.post("/v1/chat/completions", json=CHAT)
            assert refused.status_code == 503 and refused.headers["retry-after"] == "3"
            assert refused.json()["error"]["code"] == "no_decode_replica"
            assert (await system.client.get("/health/live")).status_code == 200

    asyncio.run(scenario())
