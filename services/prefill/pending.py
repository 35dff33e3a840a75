"""Owns what the step thread hands back of work that it has launched: its end, for another thread to wait for. Knows no device.

A thread that waited for a piece's end would launch the decode step behind it late, and the device would idle between the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """Launched work. wait() may be called from any thread, once; it raises what the work raised."""

    def wait(self) -> T_co: ...


@dataclass(frozen=True, slots=True)
class Over(Generic[T]):
    """Work that was over when it returned, as a CPU's is."""

    result: T

    def wait(self) -> T:
        return self.result
