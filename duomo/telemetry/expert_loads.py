"""Owns how evenly the experts of each pool are used: its replicas' reported histograms, over a moving window. PURE but for its arrays.

Names of shapes: L layers, E experts. A pool's histogram is the sum of its replicas'.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

WINDOW_S: Final = 60.0
MARK_PERIOD_S: Final = 10.0  # totals are kept this far apart, so a window is up to this much longer

Counts = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PoolLoads:
    """One pool. total_LE: since its replicas' start; window_LE: of the last window_s seconds, from which all else comes.

    imbalance_L: the busiest expert's tokens over the mean (1 is even). active_L: experts with any token. top_L: the busiest one's number.
    entropy_L: nats; ln(experts) is even. All are 0 for a layer without tokens.
    """

    total_LE: Counts
    window_LE: Counts
    window_s: float
    imbalance_L: NDArray[np.float64]
    active_L: NDArray[np.int64]
    top_L: NDArray[np.int64]
    entropy_L: NDArray[np.float64]

    def as_json(self) -> dict[str, object]:
        """For /admin/experts: plain numbers, lists by layer."""
        return {
            "num_layers": self.total_LE.shape[0],
            "num_experts": self.total_LE.shape[1],
            "window_s": round(self.window_s, 3),
            "imbalance": [round(one, 4) for one in self.imbalance_L.tolist()],
            "active_experts": self.active_L.tolist(),
            "top_expert": self.top_L.tolist(),
            "entropy_nats": [round(one, 4) for one in self.entropy_L.tolist()],
            "window_tokens": self.window_LE.tolist(),
            "total_tokens": self.total_LE.tolist(),
        }


@dataclass(slots=True, kw_only=True, eq=False)
class _Replica:
    """latest: the last total and when it came. marks: earlier ones, the first of them where the window begins."""

    role: str
    latest: tuple[float, Counts]
    marks: deque[tuple[float, Counts]] = field(default_factory=deque)

    def observe(self, total_LE: Counts, now_s: float) -> None:
        if total_LE.shape != self.latest[1].shape or (total_LE < self.latest[1]).any():  # it has started anew
            self.marks.clear()
        self.latest = (now_s, total_LE)
        if not self.marks or now_s - self.marks[-1][0] >= MARK_PERIOD_S:
            self.marks.append(self.latest)
        while len(self.marks) > 1 and now_s - self.marks[1][0] >= WINDOW_S:
            self.marks.popleft()


class ExpertLoads:
    """All replicas' histograms, by replica id. Times are the gateway's monotonic clock's."""

    def __init__(self) -> None:
        self._replicas: dict[str, _Replica] = {}

    def observe(self, role: str, replica_id: str, total_LE: NDArray[np.integer], now_s: float) -> None:
        """A replica's total since its start."""
        total = np.asarray(total_LE, np.int64)
        replica = self._replicas.get(replica_id)
        if replica is None or replica.role != role:
            replica = self._replicas[replica_id] = _Replica(role=role, latest=(now_s, total))
        replica.observe(total, now_s)

    def forget(self, replica_id: str) -> None:
        self._replicas.pop(replica_id, None)

    def pools(self) -> Mapping[str, PoolLoads]:
        """By role, those that have reported."""
        roles = sorted({replica.role for replica in self._replicas.values()})
        return {role: _loads([replica for replica in self._replicas.values() if replica.role == role]) for role in roles}


def _loads(replicas: list[_Replica]) -> PoolLoads:
    shape = replicas[-1].latest[1].shape  # replicas of one gateway serve one model; whoever differs has just been replaced
    alike = [replica for replica in replicas if replica.latest[1].shape == shape]
    total_LE = np.sum([replica.latest[1] for replica in alike], axis=0)
    window_LE = total_LE - np.sum([replica.marks[0][1] for replica in alike], axis=0)
    tokens_L = window_LE.sum(axis=1)
    share_LE = window_LE / np.maximum(tokens_L, 1)[:, None]
    entropy_L = -(share_LE * np.log(np.where(share_LE > 0, share_LE, 1.0))).sum(axis=1)
    return PoolLoads(
        total_LE=total_LE,
        window_LE=window_LE,
        window_s=max(replica.latest[0] - replica.marks[0][0] for replica in alike),
        imbalance_L=share_LE.max(axis=1) * shape[1],
        active_L=(window_LE > 0).sum(axis=1),
        top_L=np.where(tokens_L > 0, window_LE.argmax(axis=1), 0),
        entropy_L=np.maximum(entropy_L, 0.0),  # not -0.0
    )
