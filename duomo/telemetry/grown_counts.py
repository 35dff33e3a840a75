"""By how much counters grew since they were last told, over starts and broken sockets. Owns what was last told; knows no metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

# Replicas that are gone may be back by the same start (a socket broke), within seconds. Those that restarted have new ids and never are.
KEPT_GONE: Final = 64


class GrownCounts:
    """The last counts of every replica that reports, and of the KEPT_GONE that were forgotten last."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[str, dict[str, int]]] = {}  # by replica id: the start that it is of, and what it told
        self._gone: dict[str, None] = {}  # in the order of their going

    def __len__(self) -> int:
        return len(self._last)

    def grown(self, replica_id: str, boot_id: str, counts: Mapping[str, int]) -> dict[str, int]:
        """The growth of each count since this start last told it: all of it the first time. Never negative."""
        self._gone.pop(replica_id, None)
        last_boot_id, before = self._last.get(replica_id, ("", {}))
        if last_boot_id != boot_id:
            before = {}
        self._last[replica_id] = (boot_id, dict(counts))
        return {name: max(count - before.get(name, 0), 0) for name, count in counts.items()}

    def forget(self, replica_id: str) -> None:
        """The replica is gone. What it told last stays for a while: it may be back."""
        if replica_id not in self._last:
            return
        self._gone.pop(replica_id, None)
        self._gone[replica_id] = None
        while len(self._gone) > KEPT_GONE:
            oldest = next(iter(self._gone))
            del self._gone[oldest], self._last[oldest]
