"""Owns what is known of the messages that a layer group was pushed in: their span of time, and what moved them how. Knows no leg."""

from __future__ import annotations

from dataclasses import dataclass, field

from duomo.telemetry.tracing import AttributeValue
from services.kv_transfer.push_job import PushResult
from services.kv_transfer.transport import WriteReport


@dataclass(slots=True, kw_only=True)
class GroupPush:
    """Messages that are pushed together: those of a computed group or, is_rewrite, one that D pulled. num_left: not yet done."""

    group: int
    num_left: int
    is_rewrite: bool = False
    started_s: float = float("inf")
    ended_s: float = 0.0
    num_messages: int = 0
    num_bytes: int = 0
    pack_s: float = 0.0
    write_s: float = 0.0
    reports: list[WriteReport] = field(default_factory=list)

    def add(self, result: PushResult) -> None:
        """One more of them is in D's memory."""
        self.num_left -= 1
        self.num_messages += 1
        self.num_bytes += result.num_bytes
        self.started_s, self.ended_s = min(self.started_s, result.started_s), max(self.ended_s, result.ended_s)
        self.pack_s += result.posted_s - result.started_s
        self.write_s += result.ended_s - result.posted_s
        if result.report is not None:
            self.reports.append(result.report)

    @property
    def bytes_per_s(self) -> float:
        """From the first message's packing to the last write's end; 0 where nothing was pushed."""
        took_s = self.ended_s - self.started_s
        return self.num_bytes / took_s if took_s > 0 else 0.0

    def attributes(self, transport_name: str) -> dict[str, AttributeValue]:
        """Of the span `kv.push`: docs/metrics.md. What the transport measured is missing where it measures nothing."""
        known: dict[str, AttributeValue] = {
            "duomo.group": self.group,
            "duomo.bytes": self.num_bytes,
            "duomo.messages": self.num_messages,
            "duomo.rewrite": self.is_rewrite,
            "duomo.way": transport_name,
            "duomo.bytes_per_s": self.bytes_per_s,
            "duomo.pack_s": self.pack_s,
            "duomo.write_s": self.write_s,
        }
        if self.reports:
            known |= {
                "duomo.transport.backends": sorted({report.backend for report in self.reports}),
                "duomo.transport.lanes": sorted({lane for report in self.reports for lane in report.lanes}),
                "duomo.transport.bytes": sum(report.num_bytes for report in self.reports),
                "duomo.transport.descriptors": sum(report.num_descriptors for report in self.reports),
                "duomo.transport.post_s": sum(report.post_s for report in self.reports),
                "duomo.transport.transfer_s": sum(report.transfer_s for report in self.reports),
            }
        return known
