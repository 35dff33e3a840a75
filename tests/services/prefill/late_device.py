"""A device as prefill sees it, by gates that a test opens: pieces that end late, messages that it packs behind them. Judges nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from tests.services.prefill.prefill_rig import Rig, ids

PROMPT = ids(150)
NUM_GROUPS = 4

T = TypeVar("T")


@dataclass
class Late(Generic[T]):
    """A device's work: over when somebody has waited for it."""

    result: T
    wait_for: Callable[[], None]

    def wait(self) -> T:
        self.wait_for()
        return self.result


@dataclass
class Behind:
    """A message that a device packs once a group is over and its gate is open, whatever the host does meanwhile."""

    after: Late[float]
    gate: threading.Event
    pack: Callable[[], object]

    def is_over(self) -> bool:
        return self.gate.is_set()

    def wait(self) -> float:
        self.after.wait()
        opened(self.gate)
        self.pack()
        return 0.0


def opened(gate: threading.Event) -> None:
    assert gate.wait(10), "nobody opened it"


def groups_landed(parts: Rig, request_id: str) -> set[int]:
    """Whole groups of an open handle that are with decode."""
    decode = parts.decode
    handle = next((handle for handle, name in decode.open.items() if name == request_id), None)
    if handle is None:
        return set()
    landed = set(decode.landed[handle])
    groups = {span.group for span in decode.spans[handle]}
    return {group for group in groups if all(span.message_idx in landed for span in decode.spans[handle] if span.group == group)}


def num_wanted(parts: Rig) -> int:
    return parts.service._book.waves.num_running
