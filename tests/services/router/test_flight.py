"""One request in flight: whatever order tokens come in, the client sees each once and in order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from duomo.errors import DuomoError, EngineError
from duomo.telemetry.tracing import Tracing
from duomo.wire.values import EmittedToken, Sampling
from services.router.flight import Choice, Flight
from services.router.generation import GenerationEnded, GenerationEvent, GenerationFailed, GenerationRequest, TextEmitted
from tests.services.router.stub_replicas import Story
from tests.services.router.stub_system import loaded_text


class Recorder:
    """A sink that keeps what it is given."""

    wants_pieces = True
    first_sent_s = second_sent_s = 0.0

    def __init__(self) -> None:
        self.events: list[GenerationEvent] = []

    def deliver(self, event: GenerationEvent) -> None:
        self.events.append(event)


def _flight(num_choices: int = 1, max_tokens: int = 8, stop: tuple[str, ...] = ()) -> tuple[Flight, Recorder, list[DuomoError | None]]:
    sink, endings = Recorder(), []
    request = GenerationRequest(
        request_id="r",
        prompt_ids=(1,),
        sampling=Sampling(max_tokens=max_tokens),
        num_choices=num_choices,
        stop=stop,
        received_s=0,
        deadline_s=9,
    )
    choices = tuple(Choice(number, loaded_text().detokenizer(), stop) for number in range(num_choices))
    span = Tracing(None).start_span("gateway.request")
    return Flight(request, sink, choices, span, lambda flight, error: endings.append(error)), sink, endings


def _token(story: Story, index: int, max_tokens: int, choice: int = 0, token_id: int | None = None) -> EmittedToken:
    finish = "length" if index == max_tokens - 1 else None
    known = story.token(choice, index) if token_id is None else token_id
    return EmittedToken(request_id="r", choice=choice, attempt=0, index=index, token_id=known, finish_reason=finish)


@settings(max_examples=200, deadline=None)
@given(num_choices=st.integers(1, 3), num_tokens=st.integers(1, 12), data=st.data())
def test_any_order_with_any_repeats_is_seen_once_and_in_order(num_choices: int, num_tokens: int, data: st.DataObject) -> None:
    story = Story(loaded_text())
    all_tokens = [_token(story, index, num_tokens, choice) for index in range(num_tokens) for choice in range(num_choices)]
    repeats = data.draw(st.lists(st.sampled_from(all_tokens), max_size=6))
    flight, sink, endings = _flight(num_choices, num_tokens)
    for token in data.draw(st.permutations(all_tokens + repeats)):
        flight.take(flight.choices[token.choice], token)
    for choice in range(num_choices):
        mine = [event for event in sink.events if isinstance(event, TextEmitted) and event.choice == choice]
        assert [event.pieces[0].token_id for event in mine] == [story.token(choice, index) for index in range(num_tokens)]
        assert "".join(event.text for event in mine) == story.text(choice, num_tokens)
        assert [event.finish_reason for event in mine] == [None] * (num_tokens - 1) + ["length"]
    assert isinstance(sink.events[-1], GenerationEnded) and endings == [None]
    assert sink.events[-1].usage.completion_tokens == num_choices * num_tokens


def test_a_contradiction_changes_nothing_and_is_told() -> None:
    story = Story(loaded_text())
    flight, sink, _ = _flight()
    (choice,) = flight.choices
    assert flight.take(choice, _token(story, 0, 8)) == "taken"
    assert flight.take(choice, _token(story, 0, 8)) == "repeated"
    assert flight.take(choice, _token(story, 0, 8, token_id=77)) == "contradicted"
    assert flight.take(choice, _token(story, 5, 8)) == "early"
    assert flight.take(choice, _token(story, 800, 8)) == "early" and list(choice.early) == [5], "beyond max_tokens nothing is kept"
    assert len(sink.events) == 1


def test_it_ends_once_and_late_tokens_are_dropped() -> None:
    story = Story(loaded_text())
    flight, sink, endings = _flight(stop=(" upon",))
    (choice,) = flight.choices
    flight.take(choice, _token(story, 0, 8))
    flight.take(choice, _token(story, 1, 8))
    assert choice.has_ended and choice.needs_cancel and flight.take(choice, _token(story, 2, 8)) == "late"
    flight.fail(EngineError("too late"))
    assert endings == [None] and isinstance(sink.events[-1], GenerationEnded)
    failed, sink, endings = _flight()
    failed.fail(EngineError("one"))
    failed.fail(EngineError("two"))
    assert len(endings) == 1 and [type(event) for event in sink.events] == [GenerationFailed]


def test_a_stop_token_is_counted_and_not_shown() -> None:
    flight, sink, _ = _flight()
    (choice,) = flight.choices
    ending = EmittedToken(request_id="r", choice=0, attempt=0, index=0, token_id=500, finish_reason="stop")
    flight.take(choice, ending)
    event = sink.events[0]
    assert isinstance(event, TextEmitted) and (event.text, event.finish_reason) == ("", "stop") and not choice.needs_cancel
    assert flight.num_completion_tokens() == 1
