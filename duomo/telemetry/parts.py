"""Parts that add up: where the time to the first token and the gap to the second one went. PURE; knows no clock and no span.

Each part comes from the timestamps of the process that did the work (docs/metrics.md names them); a crossing of the wire is half the
round trip that heartbeats measured; what is left is `unaccounted`, and is shown, never spread over the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from duomo.wire.values import Timings

UNACCOUNTED_FLOOR_S: Final = 0.001
UNACCOUNTED_SHARE: Final = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayTimes:
    """The gateway's own monotonic timestamps of one choice of one request.

    received_s: the request was read. tokenized_s: prompt ids exist. routed_s: StartPrefill was posted (of the attempt that answered).
    first_read_s, second_read_s: the frame with token 0, token 1 was read off its socket. first_emitted_s, second_emitted_s: that
    token's event was handed to the client's socket.
    """

    received_s: float
    tokenized_s: float
    routed_s: float
    first_read_s: float
    first_emitted_s: float
    second_read_s: float = 0.0
    second_emitted_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Rtts:
    """Round trips in seconds, as the gateway's heartbeats measured them: to P, to D."""

    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """A total and its named parts, in order, in seconds; they sum to the total together with unaccounted_s."""

    total_s: float
    parts_s: tuple[tuple[str, float], ...]

    @property
    def unaccounted_s(self) -> float:
        return self.total_s - sum(part_s for _, part_s in self.parts_s)

    @property
    def adds_up(self) -> bool:
        """Whether what is unaccounted, either way, is under the larger of 1 ms and 2% of the total (design 6, asked for at p99)."""
        return abs(self.unaccounted_s) <= max(UNACCOUNTED_FLOOR_S, UNACCOUNTED_SHARE * self.total_s)

    def with_unaccounted(self) -> dict[str, float]:
        """Every part by name, `unaccounted` last."""
        return dict(self.parts_s) | {"unaccounted": self.unaccounted_s}


def ttft_parts(times: GatewayTimes, prefill: Timings, rtts: Rtts) -> Parts:
    """Time to the first token, edge to edge at the gateway: request read to first event handed to the client's socket.

    The wire is crossed twice (StartPrefill, TokensEmitted). Retried attempts lie in gateway.route.
    """
    return Parts(
        total_s=times.first_emitted_s - times.received_s,
        parts_s=(
            ("gateway.tokenize", times.tokenized_s - times.received_s),
            ("gateway.route", times.routed_s - times.tokenized_s),
            ("wire", rtts.prefill_s),
            ("prefill.queue", prefill.queue_s),
            ("prefill.compute", prefill.compute_s + prefill.sample_s),
            ("prefill.emit", prefill.total_s - prefill.queue_s - prefill.compute_s - prefill.sample_s),
            ("gateway.emit", times.first_emitted_s - times.first_read_s),
        ),
    )


def second_token_parts(times: GatewayTimes, decode: Timings, rtts: Rtts) -> Parts:
    """The gap between the first and the second token, edge to edge at the gateway.

    P writes token 0 and PrefillDone together, so the wire's part is PrefillDone's crossing (P to D) and token 1's (D to gateway), less the
    crossing of token 0 (P to gateway), which the gap does not contain. gateway.emit is what emitting token 1 took longer than token 0.
    """
    first_emit_s = times.first_emitted_s - times.first_read_s
    return Parts(
        total_s=times.second_emitted_s - times.first_emitted_s,
        parts_s=(
            ("kv.handoff", decode.handoff_exposed_s),
            ("decode.admit", decode.admit_s),
            ("decode.first_step", decode.first_step_s),
            ("wire", (decode.peer_rtt_s + rtts.decode_s - rtts.prefill_s) / 2),
            ("gateway.emit", times.second_emitted_s - times.second_read_s - first_emit_s),
        ),
    )
