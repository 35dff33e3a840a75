"""Owns `duomo admin`: an operator's word to a running gateway over its admin API. Knows nothing but that API."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from duomo.errors import ConfigError, PeerError

TIMEOUT_S = 60.0


def list_replicas(url: str, key: str) -> int:
    """A line for each replica: its pool, what it runs, and whether it drains. Raises ConfigError (--url) and PeerError (a refusal)."""
    report = _called(url, "GET", "/admin/pools", key)
    for one in sorted(report["replicas"], key=lambda one: (one["role"], one["replica_id"])):
        last = one["report"]
        if last is None:
            state = "has not reported"
        else:
            blocks = f"{last['num_free_blocks']} free and {last['num_cached_blocks']} cached of {last['num_blocks']} blocks"
            state = f"{last['num_running']} running, {last['num_queued']} queued, {blocks}{', drains' if last['is_draining'] else ''}"
        print(f"{one['role']:<8} {one['replica_id']:<24} {state}")
    return 0


def ask_of_replica(url: str, key: str, replica: str, verb: str) -> int:
    """verb: drain, undrain or flush. Raises as list_replicas."""
    print(json.dumps(_called(url, "POST", f"/admin/replicas/{urllib.parse.quote(replica, safe='')}/{verb}", key)))
    return 0


def ask_of_pool(url: str, key: str, pool: str, verb: str, body: dict[str, int] | None = None) -> int:
    """verb: flush, or scale with {"replicas": n}. 1 where a replica was not flushed. Raises as list_replicas."""
    done = _called(url, "POST", f"/admin/pools/{pool}/{verb}", key, body)
    print(json.dumps(done))
    return 1 if done.get("not_flushed") else 0


def _called(url: str, method: str, path: str, key: str, body: dict[str, int] | None = None) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url.rstrip("/") + path, data, headers, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=TIMEOUT_S) as response:
            answer: dict[str, Any] = json.loads(response.read())
            return answer
    except urllib.error.HTTPError as error:
        raise PeerError(_reason(error.read())) from error
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        raise ConfigError(f"--url {url}: no admin API answers there ({why}); `duomo serve --admin-port` opens one") from error


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:500]
