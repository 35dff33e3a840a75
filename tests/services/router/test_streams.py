"""Sinks: bytes when events happen, an error before the first of them raised, a client behind cut off."""

from __future__ import annotations

import asyncio

import pytest

from duomo.errors import EngineError, RequestCancelled
from services.router.answers import AnswerHead
from services.router.chat_answers import ChatShape
from services.router.generation import GenerationEnded, GenerationFailed, TextEmitted, Usage
from services.router.markup import OutputStyle
from services.router.streams import StreamSink, WholeSink
from tests.services.router.stub_system import loaded_text

HEAD = AnswerHead(answer_id="a", model="m", text=loaded_text(), shows_logprobs=False, shows_token_ids=False, includes_usage=True)


class Buffer:
    """A client's transport with so many bytes unsent. written: what was written to it, write by write."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.written: list[bytes] = []
        self.closing = False

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return self.num_bytes

    def abort(self) -> None:
        self.num_bytes = 0


def _sink(num_requests: int = 1, most: int = 10_000, transport: Buffer | None = None, behind: list | None = None) -> StreamSink:
    told = behind if behind is not None else []
    return StreamSink(
        num_requests,
        False,
        ChatShape(HEAD),
        max_behind_bytes=most,
        transport=transport,
        on_behind=lambda: told.append("behind"),
    )


def test_events_of_one_wake_up_go_in_one_piece_and_several_requests_end_together() -> None:
    async def scenario() -> None:
        sink = _sink(2)
        for choice in (0, 1):
            sink.deliver(TextEmitted(choice, "hi", (), None))
        await sink.first()
        piece = await sink.next()
        assert piece is not None and piece.count(b"data: ") == 4, "two openings and two tokens"
        sink.deliver(GenerationEnded(Usage(3, 1, 1)))
        waiting = asyncio.create_task(sink.next())
        await asyncio.sleep(0)
        assert not waiting.done()
        sink.deliver(GenerationEnded(Usage(4, 1, None)))
        last = await waiting
        assert last is not None and b'"total_tokens":9' in last and b'"cached_tokens":1' in last and last.endswith(b"data: [DONE]\n\n")
        assert await sink.next() is None

    asyncio.run(scenario())


def _of_chunks(written: list[bytes]) -> bytes:
    """The body that these chunks of a chunked transfer coding carry, one a write."""
    body = b""
    for write in written:
        size, _, rest = write.partition(b"\r\n")
        assert rest.endswith(b"\r\n") and len(rest) == int(size, 16) + 2
        body += rest[:-2]
    return body


def test_passing_through_writes_once_a_tick_and_wakes_nobody_before_the_end() -> None:
    async def scenario() -> None:
        transport = Buffer(0)
        sink, plain = _sink(2, transport=transport), _sink(2)
        texts = [TextEmitted(choice, f"{frame}", (), None) for frame in range(3) for choice in (0, 1)]
        for event in texts:
            plain.deliver(event)
        passing = asyncio.create_task(sink.pass_through())
        await asyncio.sleep(0)
        waiting = sink._waiter
        for frame in range(3):
            for event in texts[2 * frame : 2 * frame + 2]:
                sink.deliver(event)
            assert len(transport.written) == frame, "the tick's other tokens may still come"
            await asyncio.sleep(0)
        assert len(transport.written) == 3 and sink._waiter is waiting and not passing.done()
        assert sink.first_sent_s and sink.second_sent_s >= sink.first_sent_s
        for one in (sink, plain):
            one.deliver(GenerationEnded(Usage(3, 3, 1)))
            one.deliver(GenerationEnded(Usage(3, 3, 1)))
        last = await passing
        assert last is not None and len(transport.written) == 3, "the last bytes are the server's to write, with the body's end"
        assert _of_chunks(transport.written) + last == await plain.next()

    asyncio.run(scenario())


def test_passing_through_ends_without_a_write_where_the_client_is_gone_or_too_slow() -> None:
    async def scenario() -> None:
        for ending in ("closing", "left", "slow"):
            behind: list[str] = []
            transport = Buffer(0)
            sink = _sink(most=5000, transport=transport, behind=behind)
            passing = asyncio.create_task(sink.pass_through())
            await asyncio.sleep(0)
            transport.closing = ending == "closing"
            transport.num_bytes = 4999 if ending == "slow" else 0
            if ending == "left":
                sink.leave("gone")
            sink.deliver(TextEmitted(0, "hi", (), None))
            await asyncio.sleep(0)
            if ending == "closing":
                assert not passing.done(), "the server tells when it is gone"
                sink.leave("gone")
            assert await passing is None and transport.written == [] and behind == ["behind"] * (ending == "slow")

    asyncio.run(scenario())


def test_a_failure_while_passing_through_is_the_last_thing_said() -> None:
    async def scenario() -> None:
        transport = Buffer(0)
        sink = _sink(transport=transport)
        passing = asyncio.create_task(sink.pass_through())
        await asyncio.sleep(0)
        sink.deliver(TextEmitted(0, "hi", (), None))
        sink.deliver(GenerationFailed(EngineError("broken")))
        last = await passing
        await asyncio.sleep(0)
        assert last is not None and b'"hi"' in last and b'"code":"engine_failed"' in last and transport.written == []

    asyncio.run(scenario())


def test_a_token_of_which_nothing_goes_out_counts_as_sent() -> None:
    """Else the gap to the second token would be told as long as the markup is that holds its text back."""

    async def scenario() -> None:
        sink = StreamSink(1, False, ChatShape(HEAD, OutputStyle("hermes")), max_behind_bytes=10_000, transport=None, on_behind=lambda: None)
        sink.deliver(TextEmitted(0, "<tool", (), None))
        assert await sink.next() is not None
        sink.sent()
        assert sink.first_sent_s and not sink.second_sent_s
        sink.deliver(TextEmitted(0, "_call>", (), None))
        assert sink.second_sent_s >= sink.first_sent_s

    asyncio.run(scenario())


def test_a_failure_before_the_first_event_is_raised_and_after_it_is_an_event() -> None:
    async def scenario() -> None:
        early = _sink()
        early.deliver(GenerationFailed(EngineError("broken")))
        with pytest.raises(EngineError):
            await early.first()
        late = _sink()
        late.deliver(TextEmitted(0, "hi", (), None))
        late.deliver(GenerationFailed(EngineError("broken")))
        late.deliver(TextEmitted(0, "more", (), None))
        await late.first()
        piece = await late.next()
        assert piece is not None and b'"code":"engine_failed"' in piece and piece.endswith(b"[DONE]\n\n") and b"more" not in piece
        assert await late.next() is None
        whole = WholeSink(2, False)
        whole.deliver(GenerationFailed(EngineError("broken")))
        with pytest.raises(EngineError):
            await whole.gather(ChatShape(HEAD))

    asyncio.run(scenario())


def test_what_a_client_is_behind_counts_what_its_transport_holds() -> None:
    async def scenario() -> None:
        behind: list[str] = []
        transport = Buffer(0)
        sink = _sink(most=5000, transport=transport, behind=behind)
        sink.deliver(TextEmitted(0, "hi", (), None))
        assert behind == []
        transport.num_bytes = 4900
        sink.deliver(TextEmitted(0, "hi", (), None))
        assert behind == ["behind"]
        sink.deliver(TextEmitted(0, "hi", (), None))
        assert behind == ["behind"] and isinstance(sink.error, RequestCancelled) and await sink.next() is None

    asyncio.run(scenario())


def test_a_client_that_leaves_ends_the_waiting() -> None:
    async def scenario() -> None:
        sink = WholeSink(1, False)
        asyncio.get_running_loop().call_later(0.01, sink.leave, "gone")
        with pytest.raises(RequestCancelled):
            await sink.gather(ChatShape(HEAD))

    asyncio.run(scenario())
