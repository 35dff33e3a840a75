"""The line of legs that wait for room: who is next, who is last, and what waits in all. Knows no pool: whoever has room asks for the head.

Legs that were running before (retries, resumes) go first. The others go by when they came, each level of priority counting as
PRIORITY_AGE_S of waiting: first come, first served within a level; and nobody is passed by a leg that came more than that long after it for
each level between them, so that no level starves. (It is the rule of prefill's queue, where the same requests wait on.)

As time passes all age alike, so that a leg's place never changes: a heap holds them. A step costs O(log n); those that gave up are dropped
when they would be next, or when they are most of what is kept.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

PRIORITY_AGE_S: Final = 2.0
_MIN_GONE: Final = 64

Rank = tuple[bool, float]


def rank(*, received_s: float, priority: int, was_running: bool) -> Rank:
    """The lower goes first. priority: higher goes first."""
    return (not was_running, received_s - PRIORITY_AGE_S * priority)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """What a leg that waits will take: prompt tokens to compute, decode's blocks and choices."""

    work_tokens: int
    num_blocks: int
    num_choices: int


class Waiter(Protocol):
    """What waits. owner: of one or more entries, which are forgotten together."""

    @property
    def owner(self) -> Hashable: ...
    @property
    def rank(self) -> Rank: ...
    @property
    def weight(self) -> Weight: ...


W = TypeVar("W", bound=Waiter)


class WaitingLine(Generic[W]):
    """work_tokens, num_blocks, num_choices: of all that wait."""

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, int, W]] = []
        self._waiting: dict[int, W] = {}  # by place in the order of joining
        self._places: dict[Hashable, set[int]] = {}
        self._num_joined = 0
        self._last_rank: Rank | None = None  # of all that joined since nobody waited
        self.work_tokens = 0
        self.num_blocks = 0
        self.num_choices = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[W]:
        """In order; the one step that is not cheap."""
        return (waiter for _, place, waiter in sorted(self._heap, key=lambda one: one[:2]) if place in self._waiting)

    def join(self, waiter: W) -> None:
        """At its place. The same leg may join again once it was taken out."""
        self._last_rank = waiter.rank if self._last_rank is None or not self._waiting else max(self._last_rank, waiter.rank)
        place = self._num_joined
        self._num_joined += 1
        self._waiting[place] = waiter
        self._places.setdefault(waiter.owner, set()).add(place)
        heapq.heappush(self._heap, (waiter.rank, place, waiter))
        self._weigh(waiter, 1)

    def head(self) -> W | None:
        """Who is next."""
        while self._heap and self._heap[0][1] not in self._waiting:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def pop_head(self) -> None:
        """The head has its pair."""
        waiter = self.head()
        assert waiter is not None
        self._drop(heapq.heappop(self._heap)[1], waiter)

    def ahead_of(self, own: Rank) -> Weight:
        """What those need in all who would be served before it. Looks at everybody where some are not."""
        if self._last_rank is None or own >= self._last_rank:
            return Weight(work_tokens=self.work_tokens, num_blocks=self.num_blocks, num_choices=self.num_choices)
        ahead = [waiter.weight for waiter in self._waiting.values() if waiter.rank <= own]
        return Weight(
            work_tokens=sum(weight.work_tokens for weight in ahead),
            num_blocks=sum(weight.num_blocks for weight in ahead),
            num_choices=sum(weight.num_choices for weight in ahead),
        )

    def last(self) -> W | None:
        """Who would be served last of all. Looks at everybody."""
        live = [one for one in self._heap if one[1] in self._waiting]
        return max(live, key=lambda one: one[:2])[2] if live else None

    def forget(self, owner: Hashable) -> list[W]:
        """None of its entries waits any more; those that did."""
        gone = []
        for place in list(self._places.get(owner, ())):
            gone.append(self._waiting[place])
            self._drop(place, self._waiting[place])
        if len(self._heap) > _MIN_GONE + 2 * len(self._waiting):
            self._heap = [one for one in self._heap if one[1] in self._waiting]
            heapq.heapify(self._heap)
        return gone

    def _drop(self, place: int, waiter: W) -> None:
        del self._waiting[place]
        places = self._places[waiter.owner]
        places.discard(place)
        if not places:
            del self._places[waiter.owner]
        self._weigh(waiter, -1)

    def _weigh(self, waiter: W, sign: int) -> None:
        weight = waiter.weight
        self.work_tokens += sign * weight.work_tokens
        self.num_blocks += sign * weight.num_blocks
        self.num_choices += sign * weight.num_choices
