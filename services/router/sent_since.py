"""PURE: what a gateway sent to one replica, and what ended there, that the replica's last report cannot tell of yet. Knows no report.

A replica's load is what its report says, of all gateways' requests, and what was sent since; so several gateways agree on all but a tenth
of a second. What this gateway knows to be over is taken out at once: on a fast machine a request lives shorter than a report does.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

IN_FLIGHT_S: Final = 0.01  # sent less long before a report came: it may have crossed it


@dataclass(slots=True, eq=False, kw_only=True)
class Sent:
    """One leg's load on one replica. Of prefill: its prompt, what is left to compute of it, and what counts against the queue's room; of
    decode: blocks and choices. is_counted: no report tells of it yet."""

    at_s: float
    num_tokens: int = 0
    work_tokens: int = 0
    room_tokens: int = 0
    num_blocks: int = 0
    num_choices: int = 0
    is_counted: bool = True


class SentSince:
    """Of one replica. Sums of what was sent since the last report, and (freed) of what it told of and has ended since."""

    def __init__(self) -> None:
        self.num_legs = 0
        self.num_tokens = 0
        self.work_tokens = 0
        self.num_blocks = 0
        self.num_choices = 0
        self.freed_blocks = 0
        self.freed_choices = 0
        self._sent: deque[Sent] = deque()

    def add(self, sent: Sent) -> None:
        """In order of time."""
        self._sent.append(sent)
        self._count(sent, 1)

    def take_out(self, sent: Sent) -> None:
        """It is over there, or never came to be."""
        if sent.is_counted:
            self._count(sent, -1)
        else:
            self.freed_blocks += sent.num_blocks
            self.freed_choices += sent.num_choices

    def reported(self, received_s: float) -> None:
        """A report came: it tells of all that was there when it was made."""
        while self._sent and self._sent[0].at_s < received_s - IN_FLIGHT_S:
            sent = self._sent.popleft()
            if sent.is_counted:
                self._count(sent, -1)
        self.freed_blocks = self.freed_choices = 0

    def _count(self, sent: Sent, sign: int) -> None:
        sent.is_counted = sign > 0
        self.num_legs += sign
        self.num_tokens += sign * sent.num_tokens
        self.work_tokens += sign * sent.work_tokens
        self.num_blocks += sign * sent.num_blocks
        self.num_choices += sign * sent.num_choices
