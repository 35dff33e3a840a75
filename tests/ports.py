"""Owns the choice of ports for servers that tests start. Knows no server."""

from __future__ import annotations

import itertools
import random
import socket
from collections.abc import Iterator
from pathlib import Path

FIRST = 20_000  # Ray's workers listen on 10002 to 19999
_GIVEN_BY_KERNEL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def _candidates() -> Iterator[int]:
    """Each port once, from a random place on, so that test processes beside each other seldom meet."""
    first_given, last_given = map(int, _GIVEN_BY_KERNEL.read_text().split())
    ports = [port for port in range(FIRST, 65_536) if not first_given <= port <= last_given]
    assert ports, f"the kernel gives away all ports from {FIRST} on ({_GIVEN_BY_KERNEL}): none is kept for servers"
    start = random.SystemRandom().randrange(len(ports))
    return itertools.cycle([*ports[start:], *ports[:start]])


_PORTS = _candidates()


def free_port() -> int:
    """A loopback port that nobody listens on, another one at each call.

    The kernel gives it to nobody who connects or asks for any port, so that it is free still when the server takes it, seconds later.
    """
    for port in _PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("cycle() ends never")
