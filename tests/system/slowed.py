"""Owns the settings of the system in which tests hit moments of a request, and what mends it between them. Knows no moment."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tests.system.conftest import ReplicaSystem

# Four groups of a prompt, each in a message of its own, and long answers. A silence is longer than most stalls of a machine.
SLOWED: dict[str, object] = {
    "delays.prefill_group_s": 0.25,
    "delays.kv_handoff_s": 0.15,
    "delays.decode_step_s": 0.02,
    "wire.silence_timeout_s": 4.0,
}
END_S = 45.0


def shape(system: ReplicaSystem, num_prefill: int, num_decode: int) -> None:
    """A gateway and so many replicas that live, whatever a test has left: the dead and the stopped are started again, spare ones drain."""
    for name in sorted(system.killed & system.processes.keys()):
        system.kill(name)
        system.processes.pop(name).wait(END_S)
    if "router-0" not in system.processes:
        system.start("router", "router-0")
    _so_many(system, "prefill", num_prefill)
    _so_many(system, "decode", num_decode)
    system.wait_for_pools(num_prefill, num_decode)


def _so_many(system: ReplicaSystem, role: Literal["prefill", "decode"], wanted: int) -> None:
    names = sorted(name for name in system.processes if name.startswith(role))
    for spare in names[wanted:]:
        process = system.processes.pop(spare)
        process.send_signal(signal.SIGINT)
        assert process.wait(END_S) == 0, spare
    absent = [name for number in range(wanted) if (name := f"{role}-{number}") not in names]
    for name in absent[: max(wanted - len(names), 0)]:
        system.start(role, name)
