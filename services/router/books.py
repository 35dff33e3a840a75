"""PURE: what one gateway knows of one replica: its last report, what it has sent there itself, and which prompts are known there.

Knows no socket and no policy: it gives the policy its views. The report tells of everybody's load; to an older replica, whose report says
too little, the gateway's own share is all there is beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from duomo.wire.messages import WIRE_VERSION, ReplicaReport
from services.router.policy import DecodeView, PrefillView
from services.router.prefix_index import PrefixIndex
from services.router.sent_since import Sent, SentSince

# A prefill replica's queue is kept this many waves deep, the running one among them; what is beyond waits at the gateway, where it can
# still go to another replica, keeps its place in the order of arrival, and is refused where it has become too late.
WAVES_AHEAD: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class BookLimits:
    """What views need of the configuration. max_queued_tokens: how much of a queue a prefill replica is given."""

    wave_tokens: int
    max_queued_tokens: int
    watermark_blocks: int
    max_choices: int


class ReplicaBook:
    """The sums are this gateway's own share: queued_tokens and room_tokens of prompts without a first token, on prefill; reserved_blocks,
    unlanded_blocks (of prompts without a first token) and num_choices on decode. Whoever calls enter() calls left()."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.report: ReplicaReport | None = None
        self.received_s = 0.0
        self.prefixes = PrefixIndex(0)
        self.queued_tokens = 0
        self.room_tokens = 0
        self.reserved_blocks = 0
        self.unlanded_blocks = 0
        self.num_choices = 0
        self._since = SentSince()

    @property
    def is_empty(self) -> bool:
        """Whether nothing of this gateway is there."""
        return not any((self.queued_tokens, self.room_tokens, self.reserved_blocks, self.unlanded_blocks, self.num_choices))

    def reported(self, report: ReplicaReport, received_s: float) -> None:
        """received_s: on this gateway's clock."""
        if self.report is None:
            self.prefixes = PrefixIndex(report.num_blocks)
        self.report, self.received_s = report, received_s
        self.prefixes.told(report.prefix_digests)
        self._since.reported(received_s)

    def enter(self, sent: Sent) -> None:
        """A leg goes there."""
        self._since.add(sent)
        self.queued_tokens += sent.num_tokens
        self.room_tokens += sent.room_tokens
        self.reserved_blocks += sent.num_blocks
        self.unlanded_blocks += sent.num_blocks
        self.num_choices += sent.num_choices

    def answered(self, sent: Sent) -> None:
        """Prefill has given its first token: nothing waits there any more, and decode's blocks hold what they were promised for."""
        self.queued_tokens -= sent.num_tokens
        self.room_tokens -= sent.room_tokens
        self.unlanded_blocks -= sent.num_blocks
        if sent.num_tokens:
            self._since.take_out(sent)

    def left(self, sent: Sent) -> None:
        """The leg is over; answered() was called before."""
        self.reserved_blocks -= sent.num_blocks
        self.num_choices -= sent.num_choices
        if not sent.num_tokens:
            self._since.take_out(sent)

    def prefill_view(self, limits: BookLimits, now_s: float, *, is_open: bool, wire_version: int = WIRE_VERSION) -> PrefillView | None:
        """None before the first report. wire_version: what its connection speaks."""
        report, since = self.report, self._since
        if report is None:
            return None
        done_tokens = report.tokens_per_s * max(now_s - self.received_s, 0.0)  # by now, of what the report told of
        if report.num_work_tokens is None:
            queued = max(self.queued_tokens, report.num_queued_tokens)
        else:
            queued = round(max(report.num_work_tokens - done_tokens, 0.0)) + since.work_tokens
        waiting = round(max(report.num_queued_tokens - done_tokens, 0.0)) + since.num_tokens
        room = max(self.room_tokens, min(waiting, (report.num_queued + since.num_legs) * limits.wave_tokens))
        return PrefillView(
            key=self.key,
            queued_tokens=queued,
            room_tokens=room,
            num_blocks=report.num_blocks,
            block_tokens=report.block_tokens,
            wave_tokens=limits.wave_tokens,
            max_queued_tokens=limits.max_queued_tokens,
            is_open=is_open,
            prefixes=self.prefixes,
            tokens_per_s=report.tokens_per_s,
            wave_s=report.step_s,
            wire_version=wire_version,
        )

    def decode_view(self, limits: BookLimits, *, is_open: bool, wire_version: int = WIRE_VERSION) -> DecodeView | None:
        """None before the first report. wire_version: what its connection speaks."""
        report, since = self.report, self._since
        if report is None:
            return None
        available = report.num_free_blocks + report.num_cached_blocks
        if report.num_promised_blocks is None:
            free = min(report.num_blocks - self.reserved_blocks, available - self.unlanded_blocks)
            num_choices = max(self.num_choices, report.num_running)
        else:
            free = min(available - report.num_promised_blocks - since.num_blocks + since.freed_blocks, report.num_blocks)
            told = report.num_running + report.num_queued + since.num_choices - since.freed_choices
            num_choices = max(told, self.num_choices)
        return DecodeView(
            key=self.key,
            free_blocks=free,
            num_blocks=report.num_blocks,
            block_tokens=report.block_tokens,
            watermark_blocks=limits.watermark_blocks,
            num_choices=num_choices,
            max_choices=min(limits.max_choices, report.max_choices or limits.max_choices),
            is_open=is_open,
            prefixes=self.prefixes,
            step_s=report.step_s,
            wire_version=wire_version,
        )
