"""Owns what `duomo bench gateway` concludes from a client's streams and a stub's records: what was added between them. Knows no process.

All moments are of one host's monotonic clock. What a stub notes as sent is noted just before its write, what a client notes as read just
after its read: the two processes' own waking is in the figures (the bare side says how much that is).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bench.serve.sse_load import SeenStream
from bench.serve.stub_ledger import StubRecord
from bench.serve.stub_story import StubStory

Floats = NDArray[np.float64]
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


class WrongBytes(ValueError):
    """A stream said something else than the stub: there is nothing to report."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of the gateway's processes while streams ran. num_tokens: that clients got within the window of window_s, cpu_s its CPU seconds."""

    window_s: float
    cpu_s: float
    num_tokens: int

    @property
    def tokens_per_cpu_s(self) -> float:
        return self.num_tokens / self.cpu_s if self.cpu_s else float("inf")


def check_streams(streams: Iterable[SeenStream], story: StubStory, num_prompt_tokens: int | None) -> None:
    """Raises WrongBytes where a stream's text or its counts are not the stub's. num_prompt_tokens: None where it counts none."""
    for stream in streams:
        expected = story.text(stream.seed, stream.num_completion_tokens)
        if stream.text != expected or not stream.num_completion_tokens:
            at = next((at for at, (one, other) in enumerate(zip(stream.text, expected, strict=False)) if one != other), len(expected))
            raise WrongBytes(f"seed {stream.seed}: from character {at} on {stream.text[at : at + 60]!r}, not {expected[at : at + 60]!r}")
        if num_prompt_tokens is not None and stream.num_prompt_tokens != num_prompt_tokens:
            raise WrongBytes(f"seed {stream.seed}: a prompt of {stream.num_prompt_tokens} tokens, not {num_prompt_tokens}")


def check_counts(streams: Iterable[SeenStream], records: Mapping[int, StubRecord]) -> None:
    """Raises WrongBytes where a stream has not one event for each token that the stub sent."""
    for stream in streams:
        sent = len(records[stream.seed].sent_s) if stream.seed in records else 0
        if not len(stream.times_s) == sent == stream.num_completion_tokens:
            told = f"{len(stream.times_s)} events and {stream.num_completion_tokens} tokens"
            raise WrongBytes(f"seed {stream.seed}: {told} of the {sent} that the stub sent")


def without_silent(
    streams: Iterable[SeenStream], records: Mapping[int, StubRecord], story: StubStory
) -> tuple[list[SeenStream], dict[int, StubRecord]]:
    """Both without the tokens and events that show no text: a peer may send more or fewer of these than came to it."""
    heard, shown = [], {}
    for stream in streams:
        pieces = story.pieces(stream.seed, stream.num_completion_tokens)
        told = [(text, time_s) for text, time_s in zip(stream.texts, stream.times_s, strict=True) if text]
        record = records[stream.seed]
        sent_s = [sent_s for piece, sent_s in zip(pieces, record.sent_s, strict=True) if piece]
        shown[stream.seed] = StubRecord(record.received_s, record.num_prompt_tokens, array("d", sent_s))
        times_s = array("d", [time_s for _, time_s in told])
        heard.append(replace(stream, texts=[text for text, _ in told], num_completion_tokens=len(sent_s), times_s=times_s))
    return heard, shown


def added_ttft_s(streams: Sequence[SeenStream], records: Mapping[int, StubRecord]) -> Floats:
    """[streams]: from the request's write to its first token's read, less what the stub took from reading it to writing that token."""
    taken = [stream.times_s[0] - stream.asked_s for stream in streams]
    of_stub = [records[stream.seed].sent_s[0] - records[stream.seed].received_s for stream in streams]
    return np.asarray(taken, np.float64) - np.asarray(of_stub, np.float64)


def delays_s(streams: Sequence[SeenStream], records: Mapping[int, StubRecord]) -> Floats:
    """[tokens]: from the stub's write of each token to the client's read of it."""
    return np.concatenate([np.asarray(stream.times_s) - np.asarray(records[stream.seed].sent_s) for stream in streams])


def added_gaps_s(streams: Sequence[SeenStream], records: Mapping[int, StubRecord]) -> Floats:
    """[gaps]: the client's time between two tokens of a stream less the stub's; negative where a late token is followed by one in time."""
    return np.concatenate([np.diff(stream.times_s) - np.diff(records[stream.seed].sent_s) for stream in streams])


def tokens_between(streams: Iterable[SeenStream], start_s: float, end_s: float) -> int:
    return sum(int(((times := np.asarray(stream.times_s)) >= start_s).sum() - (times >= end_s).sum()) for stream in streams)


def quantiles_ms(values_s: Floats) -> dict[str, float]:
    found = np.quantile(values_s, list(_QUANTILES.values())) * 1e3
    return dict(zip(_QUANTILES, (round(float(value), 4) for value in found), strict=True)) | {"max": round(float(values_s.max()) * 1e3, 4)}
