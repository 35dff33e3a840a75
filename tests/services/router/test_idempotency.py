"""Requests with an Idempotency-Key: run once, answered again byte for byte, refused while they run, free again where nothing was kept."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import redis

from duomo.errors import CapacityError, EngineError, RequestError
from duomo.wire.messages import Cancel, StartPrefill
from services.router.idempotency import asked_key, says_the_same_again
from services.router.service import serve_gateway
from services.router.store import ANSWERS, AnswerStore, ClaimName
from tests.ports import free_port
from tests.services.router.stub_replicas import Script
from tests.services.router.stub_system import PATIENCE_S, StubSystem, expire, stub_system

CHAT: Any = {"model": "tiny-moe", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 24}
BODIES: dict[str, Any] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "tiny-moe", "prompt": "hi", "max_tokens": 24},
    "/v1/responses": {"model": "tiny-moe", "input": "hi", "max_output_tokens": 24, "store": False},
    "/v1/messages": CHAT,
}
KEY = {"idempotency-key": "8e03978e-40d5-43dd-bc93-6894a57f9324"}


async def _ask(system: StubSystem, path: str = "/v1/chat/completions", headers: Any = KEY, **fields: object) -> httpx.Response:
    return await system.client.post(path, json=BODIES[path] | fields, headers=headers)


def _held() -> Script:
    """The first leg stops until the test lets it go on."""
    return Script(decode_faults=deque([("hold", 3)]))


def _num_run(system: StubSystem) -> int:
    return sum(len(replica.of_type(StartPrefill)) for replica in system.pools.of_role("prefill"))


def _events(system: StubSystem) -> dict[str, int]:
    """How often each event was counted."""
    families = system.gateway.metrics.idempotency.collect()
    return {sample.labels["event"]: int(sample.value) for family in families for sample in family.samples if sample.name.endswith("_total")}


def _redis(system: StubSystem) -> Any:
    return redis.Redis.from_url(system.redis.url)


async def _freed(system: StubSystem) -> None:
    """Every claim of the gateway was given back, in Redis too."""
    await system.until(lambda: not [key for key in _redis(system).scan_iter() if key.startswith(ANSWERS.encode())])


@pytest.mark.parametrize("key", ["a", "8e03978e-40d5-43dd-bc93-6894a57f9324", '"quoted as the draft has it"', "k" * 255])
def test_a_key_is_any_printable_text(key: str) -> None:
    assert asked_key([f" {key} "]) == key and asked_key([]) is None


@pytest.mark.parametrize("values", [[""], ["  "], ["k" * 256], ["naïve"], ["a\tb"], ["a", "a"]])
def test_what_is_no_key_is_refused_by_name(values: list[str]) -> None:
    with pytest.raises(RequestError, match="'Idempotency-Key'") as refused:
        asked_key(values)
    assert (refused.value.status, refused.value.param) == (400, "Idempotency-Key")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", list(BODIES))
def test_a_repeat_gets_the_same_bytes_and_nothing_runs_again(tmp_path: Path, path: str, stream: bool) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            first = await _ask(system, path, stream=stream)
            assert first.status_code == 200 and "idempotent-replayed" not in first.headers
            again = await _ask(system, path, stream=stream)
            assert again.content == first.content and len(first.content) > 100
            assert again.status_code == 200 and again.headers["idempotent-replayed"] == "true"
            for name in ("content-type", "x-request-id", "request-id", "cache-control"):
                assert again.headers.get(name) == first.headers.get(name), name
            assert _num_run(system) == 1
            plain = await _ask(system, path, headers={}, stream=stream)
            assert plain.status_code == 200 and plain.headers["x-request-id"] != first.headers["x-request-id"]
            assert _num_run(system) == 2
            assert _events(system) == {"claimed": 1, "kept": 1, "replayed": 1, "evicted": 0}

    asyncio.run(scenario())


def test_a_repeat_while_the_first_runs_is_refused_and_the_openai_client_comes_back_for_the_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, _held()) as system:
            client = openai.AsyncOpenAI(base_url=f"{system.base_url}/v1", api_key="none", max_retries=5)
            ask = client.chat.completions.with_raw_response.create
            first = asyncio.create_task(ask(**CHAT, extra_headers=KEY))
            await system.until(lambda: system.gateway.num_live_requests == 1)
            with pytest.raises(openai.ConflictError) as early:
                await client.with_options(max_retries=0).chat.completions.create(**CHAT, extra_headers=KEY)
            refused = early.value.response
            error = refused.json()["error"]
            assert (refused.status_code, error["code"], error["param"]) == (409, "idempotency_key_in_use", "Idempotency-Key")
            assert refused.headers["retry-after"] == "1" and "x-should-retry" not in refused.headers
            repeating = asyncio.create_task(ask(**CHAT, extra_headers=KEY))
            await system.until(lambda: _events(system)["in_progress"] >= 2)
            system.pools.go_on.set()
            again = await repeating
            assert again.headers["idempotent-replayed"] == "true" and again.content == (await first).content
            assert _num_run(system) == 1
            await client.close()

    asyncio.run(scenario())


def test_a_key_belongs_to_one_body_one_endpoint_and_one_client(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, _held()) as system:
            first = asyncio.create_task(_ask(system))
            await system.until(lambda: system.gateway.num_live_requests == 1)
            for _ in range(2):  # while it runs, and once it has ended
                other = await _ask(system, max_tokens=23)
                error = other.json()["error"]
                assert (other.status_code, error["code"], error["param"]) == (422, "idempotency_key_reused", "Idempotency-Key")
                assert "retry-after" not in other.headers
                system.pools.go_on.set()
                assert (await first).status_code == 200
            assert (await _ask(system, "/v1/messages", max_tokens=23)).status_code == 200
            assert (await _ask(system, headers=KEY | {"authorization": "Bearer sk-2"}, max_tokens=22)).status_code == 200
            assert (await _ask(system, headers=KEY | {"x-api-key": "sk-2"}, max_tokens=22)).headers["idempotent-replayed"] == "true"
            assert _num_run(system) == 3

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_gives_its_key_back(tmp_path: Path, stream: bool) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(decode_faults=deque([("hold", 3)]))) as system:
            leaving = asyncio.create_task(_ask(system, stream=stream))
            await system.until(lambda: bool(system.pools.of_role("decode")[0].num_running))
            leaving.cancel()
            await system.until(lambda: bool(system.pools.of_role("decode")[0].of_type(Cancel)))
            await _freed(system)
            again = await _ask(system, stream=stream)
            assert again.status_code == 200 and "idempotent-replayed" not in again.headers
            assert _events(system) == {"claimed": 2, "freed": 1, "kept": 1, "evicted": 0}

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_failure_that_a_retry_may_mend_is_not_kept(tmp_path: Path, stream: bool) -> None:
    async def scenario() -> None:
        script = Script(prefill_faults=deque(["fail"]))
        async with stub_system(tmp_path, script, overrides={"gateway": {"max_prefill_retries": 0}}) as system:
            failed = await _ask(system, stream=stream)
            assert failed.status_code == 503 and failed.headers["retry-after"] == "1"
            await _freed(system)
            assert (await _ask(system, stream=stream)).status_code == 200

    asyncio.run(scenario())


def test_neither_is_a_deadline_nor_a_refusal_before_anything_ran(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(prefill_faults=deque(["hold"]))) as system:
            late = asyncio.create_task(_ask(system, headers=KEY | {"x-request-timeout": "200"}))
            await expire(system, 1)
            assert (await late).status_code == 408
            await _freed(system)
            assert (await _ask(system, max_tokens=-1)).status_code == 400
            assert (await _ask(system)).status_code == 200 and _num_run(system) == 2

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_failure_for_good_is_the_answer(tmp_path: Path, stream: bool) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(prefill_faults=deque(["fail_for_good"]))) as system:
            failed, again = await _ask(system, stream=stream), await _ask(system, stream=stream)
            assert failed.status_code == again.status_code == 500 and failed.content == again.content
            assert failed.headers["x-should-retry"] == again.headers["x-should-retry"] == "false"
            assert again.headers["idempotent-replayed"] == "true" and _num_run(system) == 1

    asyncio.run(scenario())


def test_a_stream_that_failed_for_good_in_the_middle_is_replayed_with_its_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(decode_faults=deque([("fail_for_good", 3)]))) as system:
            failed, again = await _ask(system, stream=True), await _ask(system, stream=True)
            assert b"engine_failed" in failed.content and failed.content == again.content and _num_run(system) == 1

    asyncio.run(scenario())


def test_an_answer_that_is_too_large_is_given_and_not_kept(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, overrides={"gateway": {"idempotency_answer_bytes": 1024}}) as system:
            first = await _ask(system, stream=True, max_tokens=1500)
            assert first.content.endswith(b"data: [DONE]\n\n") and len(first.content) > 100_000
            await _freed(system)
            assert "idempotent-replayed" not in (await _ask(system, stream=True, max_tokens=1500)).headers
            assert _num_run(system) == 2 and _events(system)["too_large"] == 2

    asyncio.run(scenario())


def test_a_long_stream_is_replayed_piece_by_piece(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            first, again = await _ask(system, stream=True, max_tokens=1500), await _ask(system, stream=True, max_tokens=1500)
            assert len(first.content) > 3 * 64 * 1024 and again.content == first.content and _num_run(system) == 1

    asyncio.run(scenario())


def test_a_client_that_does_not_read_its_replay_is_cut_off_at_its_deadline(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            first = await _ask(system, stream=True, max_tokens=1500)
            body = json.dumps(CHAT | {"stream": True, "max_tokens": 1500}, separators=(",", ":"), ensure_ascii=False).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\nx-request-timeout: 2\r\n"
            with socket.socket() as lazy:
                lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                lazy.connect(("127.0.0.1", system.gateway.config.gateway.port))
                lazy.sendall(f"{head}idempotency-key: {KEY['idempotency-key']}\r\n\r\n".encode() + body)
                await system.until(lambda: bool(_replays()))
                await asyncio.wait(_replays())
                lazy.settimeout(PATIENCE_S)
                told = await asyncio.to_thread(_all_of, lazy)
            assert b"idempotent-replayed: true" in told and len(told) < len(first.content) and not told.endswith(b"0\r\n\r\n")
            assert _num_run(system) == 1

    asyncio.run(scenario())


def _replays() -> list[asyncio.Task[None]]:
    """The server's tasks that answer: there is one for each request that is."""
    return [task for task in asyncio.all_tasks() if getattr(task.get_coro(), "__qualname__", "") == "RequestResponseCycle.run_asgi"]


def _all_of(connection: socket.socket) -> bytes:
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_without_redis_a_keyed_request_is_refused_and_others_go_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, _held()) as system:
            running = asyncio.create_task(_ask(system))
            await system.until(lambda: system.gateway.num_live_requests == 1)
            await asyncio.to_thread(system.redis.stop)
            system.pools.go_on.set()
            assert (await running).status_code == 200  # it had its claim; that its answer is not kept is not its client's fault
            refused = await _ask(system)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "idempotency_unavailable")
            assert refused.headers["retry-after"] == "1" and "Idempotency-Key" in refused.json()["error"]["message"]
            assert (await _ask(system, headers={})).status_code == 200
            assert _events(system)["not_kept"] == 1 and _events(system)["unavailable"] == 1

    asyncio.run(scenario())


def test_a_claim_whose_reply_was_lost_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            claim = AnswerStore.claim

            async def lost(store: AnswerStore, name: ClaimName) -> object:
                await claim(store, name)
                raise CapacityError("Redis does not answer", code="idempotency_unavailable", phase="gateway")

            monkeypatch.setattr(AnswerStore, "claim", lost)
            freed, free = [], AnswerStore.free

            async def noted(store: AnswerStore, name: ClaimName) -> None:
                await free(store, name)
                freed.append(name)

            monkeypatch.setattr(AnswerStore, "free", noted)
            assert (await _ask(system)).status_code == 503
            await system.until(lambda: len(freed) == 1)
            monkeypatch.undo()
            await _freed(system)
            assert (await _ask(system)).status_code == 200

    asyncio.run(scenario())


@pytest.mark.parametrize(("code", "is_kept"), [("bad_logits", False), ("internal", False), ("engine_failed", True)])
def test_a_fault_of_the_server_is_no_answer_for_good(code: str, is_kept: bool) -> None:
    assert says_the_same_again(EngineError("x", code=code, phase="decode.stream", retryable=False)) is is_kept


def test_a_request_longer_than_its_lease_keeps_its_key_also_where_redis_forgets(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, _held(), overrides={"redis": {"lease_s": 3.0}}) as system:
            first = asyncio.create_task(_ask(system))
            await system.until(lambda: system.gateway.num_live_requests == 1)
            client = _redis(system)
            (claim,) = [key for key in client.scan_iter() if key.startswith(ANSWERS.encode())]
            client.pexpire(claim, 2500)  # as after a part of the lease: only who renews makes it longer again
            await system.until(lambda: client.pttl(claim) > 2500)
            assert (await _ask(system)).status_code == 409
            client.flushall()
            await system.until(lambda: client.pttl(claim) > 0)
            assert (await _ask(system)).status_code == 409 and _num_run(system) == 1
            system.pools.go_on.set()
            body = (await first).content
            assert (await _ask(system)).content == body

    asyncio.run(scenario())


def test_nothing_stays_in_redis_for_ever_and_no_key_is_told_there(tmp_path: Path) -> None:
    async def scenario() -> None:
        overrides = {"redis": {"lease_s": 30.0}, "gateway": {"idempotency_ttl_s": 60.0}}
        async with stub_system(tmp_path, Script(prefill_faults=deque([None, "hold"])), overrides=overrides) as system:
            await _ask(system, headers=KEY | {"authorization": "Bearer sk-secret"})
            held = asyncio.create_task(_ask(system))
            await system.until(lambda: system.gateway.num_live_requests == 1)
            client = _redis(system)
            mine = [key for key in client.scan_iter() if b"idempotency" in key]
            assert len(mine) == 4 and all(0 < client.pttl(key) <= 60_000 for key in mine)
            told = b" ".join([*mine, *(client.dump(key) for key in mine)])
            assert b"sk-secret" not in told and KEY["idempotency-key"].encode() not in told
            held.cancel()
            await system.until(lambda: len([key for key in client.scan_iter() if b"idempotency" in key]) == 3)

    asyncio.run(scenario())


@asynccontextmanager
async def _second_gateway(system: StubSystem) -> AsyncIterator[httpx.AsyncClient]:
    """Another gateway process' whole service, before the same pools and the same Redis."""
    config = system.gateway.config
    port = free_port()
    raw = config.model_dump() | {"gateway": config.gateway.model_dump() | {"port": port}, "redis": {"url": system.redis.url}}
    stop = asyncio.Event()
    running = asyncio.create_task(serve_gateway(type(config).model_validate(raw), "gateway-1", stop))
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
            await _ready(client)
            yield client
    finally:
        stop.set()
        await running


async def _ready(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get("/health/ready")).status_code == 200:
                    return
            await asyncio.sleep(0.02)


def test_two_gateways_on_one_redis_agree(tmp_path: Path) -> None:
    async def scenario() -> None:
        script = Script(decode_faults=deque([("hold", 3), ("hold", 3)]))
        async with stub_system(tmp_path, script) as system, _second_gateway(system) as other:
            path = "/v1/chat/completions"
            first = asyncio.create_task(_ask(system, stream=True))
            await system.until(lambda: system.gateway.num_live_requests == 1)
            body = CHAT | {"stream": True}
            assert (await other.post(path, json=body, headers=KEY)).status_code == 409
            assert (await other.post(path, json=CHAT, headers=KEY)).status_code == 422
            system.pools.go_on.set()
            told = (await first).content
            system.pools.go_on.clear()
            again = await other.post(path, json=body, headers=KEY)
            assert again.content == told and again.headers["idempotent-replayed"] == "true" and _num_run(system) == 1
            headers = {"idempotency-key": "x"}
            asked = [asyncio.create_task(one.post(path, json=CHAT, headers=headers)) for one in (other, system.client) for _ in range(8)]
            await system.until(lambda: sum(one.done() for one in asked) == 15)
            system.pools.go_on.set()
            statuses = [answer.status_code for answer in await asyncio.gather(*asked)]
            assert sorted(statuses) == [200] + [409] * 15 and _num_run(system) == 2

    asyncio.run(scenario())
