"""Owns `duomo scale`: asks a running system for other replica counts and waits for them. Knows neither Ray nor Serve."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from duomo.engine.card_shares import POOLS
from duomo.errors import ConfigError
from services.admin import SOCKET_NAME, AdminCommand, Replicas, ask, default_run_dir

POLL_S = 0.3


def scale_pools(wanted: dict[str, int | None], port: int, run_dir: Path | None, wait_s: float) -> int:
    """Raises ConfigError when no system answers or it refuses, naming what it had taken by then; 1 when not settled after wait_s.

    A pool that shrinks is asked first: its cards are the other's.
    """
    path = (run_dir or default_run_dir(port)) / SOCKET_NAME
    asked = {pool: count for pool, count in wanted.items() if count is not None}
    for pool, count in asked.items():
        if not 1 <= count <= 256:
            raise ConfigError(f"--{pool} must be from 1 to 256, not {count}")
    replicas = ask(path, AdminCommand(command="status"))
    taken: list[str] = []
    for pool in sorted((pool for pool in POOLS if pool in asked), key=lambda pool: asked[pool] - num_staying(replicas, pool)):
        try:
            ask(path, AdminCommand(command="scale", pool=pool, replicas=asked[pool]))
        except ConfigError as error:
            if not taken:
                raise
            raise ConfigError(f"{error.detail}; {' and '.join(taken)} was taken and holds") from error
        taken.append(f"--{pool} {asked[pool]}")
    end_s = time.monotonic() + wait_s
    replicas = ask(path, AdminCommand(command="status"))
    while not is_settled(replicas, asked) and time.monotonic() < end_s:
        time.sleep(POLL_S)
        replicas = ask(path, AdminCommand(command="status"))
    for pool, states in sorted(replicas.items()):
        print(f"{pool:<10} {', '.join(f'{count} {state}' for state, count in sorted(states.items()))}")
    if is_settled(replicas, asked):
        return 0
    print(f"duomo: the pools have not settled after {wait_s:.0f} s", file=sys.stderr)
    return 1


def num_staying(replicas: Replicas, pool: str) -> int:
    """Replicas of a pool that run, or will."""
    return sum(count for state, count in replicas.get(pool, {}).items() if state != "STOPPING")


def is_settled(replicas: Replicas, asked: dict[str, int]) -> bool:
    """Whether each asked pool has exactly that many running replicas and none that starts or drains."""
    return all({state: n for state, n in replicas.get(pool, {}).items() if n} == {"RUNNING": count} for pool, count in asked.items())
