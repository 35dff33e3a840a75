"""Decides what UCX's own tables say of the way that writes take: transport and device, such as cma/memory. PURE; knows no agent, no file.

UCX prints a table for each kind of operation of each kind of connection, when it first chooses (UCX_PROTO_INFO). Of a write:

    [1795365126.226177] [host:28019:0]   | kv-p intra-node cfg#1                                    |
    [1795365126.226177] [host:28019:0]   | remote memory write by ucp_put* from host memory to host |
    [1795365126.226177] [host:28019:0]   | Range  | Description |              Config               |
    [1795365126.226177] [host:28019:0]   | 0..inf | zero-copy   | cma/memory                        |

whose: the agent's name, cut to 31 letters, and where its peer is; "self" is the agent's connection to itself. The last row says what KV
takes: messages are large.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

MAX_NAME = 31
# Transports that end at the host.
LOCAL = frozenset({"cma", "xpmem", "knem", "posix", "sysv", "cuda_ipc", "cuda_copy", "gdr_copy", "self"})

Locality = Literal["self", "intra-node", "inter-node"]
_LOCALITIES: dict[str, Locality] = {"self": "self", "intra-node": "intra-node", "inter-node": "inter-node"}

_LINE = re.compile(r"^\[[\d.]+\] \[[^\]:]*:(\d+\s*:\d+)\]\s+(.*?)\s*$")
_OWNER = re.compile(r"^(?P<name>.+) (?P<locality>self|intra-node|inter-node) cfg#(?P<config>\d+)$")
_WRITE = re.compile(r"^remote memory write by ucp_put\*\S* from (?P<source>\S+)( memory)? to (?P<target>\S+)")
_LANE = re.compile(r"\b([a-z][a-z0-9_]*/[A-Za-z0-9_.-]+(?::\d+)?)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What writes of one kind of connection take. lanes: transport/device, such as ("rc_mlx5/mlx5_0:1", "rc_mlx5/mlx5_1:1")."""

    agent: str
    locality: Locality
    config: int
    source: str
    target: str
    lanes: tuple[str, ...]

    @property
    def kinds(self) -> tuple[str, str]:
        """Of the memory that is read and of that which is written: UCX says host, or cuda/GPU0, cuda/dev[0]."""
        return self.source.partition("/")[0], self.target.partition("/")[0]

    def text(self) -> str:
        return " + ".join(self.lanes)


def routes_in(lines: Iterable[str]) -> list[Route]:
    """Every table of a write that is whole, in order. Tables that threads print at once do not mix."""
    cells: dict[str, list[str]] = {}
    found: list[Route] = []
    for line in lines:
        matched = _LINE.match(line)
        if matched is None or not is_of_table(line):
            continue
        thread, text = matched.groups()
        if not text.startswith("+"):
            cells.setdefault(thread, []).append(text)
            continue
        # A rule. Under the owner and the operation, under the columns' names, and at the table's end, which says that it is whole.
        rows = cells.get(thread, [])
        if len(rows) > 3 or (rows and _OWNER.match(_cell(rows[0])) is None):
            found += _route(cells.pop(thread))
    return found


def is_of_table(line: str) -> bool:
    """Whether a line of UCX's log is part of such a table, and no message."""
    matched = _LINE.match(line)
    return matched is not None and matched.group(2)[:1] in ("|", "+") and matched.group(2)[-1:] == matched.group(2)[:1]


def of_peer(routes: Sequence[Route], agent: str, *, kinds: tuple[str, str], num_before: int) -> tuple[str, ...]:
    """The lanes by which `agent` writes to a peer, from memory of one kind to memory of the other (host, cuda); () where nothing says it.

    num_before: tables that were there before it connected. A table that came since is the peer's. None comes where an earlier peer is
    connected alike: then it is what that one has, and where earlier peers differ, all that they have.
    """
    ours = [
        (place, route)
        for place, route in enumerate(routes)
        if route.agent == agent[:MAX_NAME] and route.locality != "self" and route.kinds == kinds
    ]
    if ours and ours[-1][0] >= num_before:
        return ours[-1][1].lanes
    return tuple(dict.fromkeys(lane for _, route in ours for lane in route.lanes))


def is_met(required: str, lanes: Sequence[str]) -> bool:
    """Whether every lane is of the transport that is required: cma by cma/memory, rc by rc_mlx5/mlx5_0:1 and rc_verbs/mlx5_0:1."""
    transports = [_transport(lane) for lane in lanes]
    return bool(transports) and all(transport == required or transport.startswith(f"{required}_") for transport in transports)


def refusal(required: str, lanes: Sequence[str], *, is_one_process: bool) -> str:
    """Why writes that take these lanes are not what kv_transfer.require_transport asks for; "" where they are, or nothing is asked.

    is_one_process: writer and reader are two agents of it. UCX joins those by a transport of the host where it may, so they prove nothing
    about a network that is required.
    """
    is_local = bool(lanes) and all(_transport(lane) in LOCAL for lane in lanes)
    if not required or is_met(required, lanes) or (is_one_process and is_local and required not in LOCAL):
        return ""
    taken = (
        f"UCX writes by {' + '.join(lanes)}" if lanes else "nothing says what UCX writes by (UCX_LOG_FILE and UCX_PROTO_INFO must be unset)"
    )
    return f"kv_transfer.require_transport is {required}, but {taken}: see UCX_TLS and UCX_NET_DEVICES, and `duomo doctor`"


def _transport(lane: str) -> str:
    return lane.partition("/")[0]


def _cell(row: str) -> str:
    return row.strip("|").strip()


def _route(rows: Sequence[str]) -> list[Route]:
    """The table's route; none where it is of another operation, or nothing that we know."""
    if len(rows) < 4:
        return []
    owner, write = _OWNER.match(_cell(rows[0])), _WRITE.match(_cell(rows[1]))
    lanes = tuple(dict.fromkeys(_LANE.findall(rows[-1].rstrip("|").rpartition("|")[2])))
    if owner is None or write is None or not lanes:
        return []
    return [
        Route(
            agent=owner["name"],
            locality=_LOCALITIES[owner["locality"]],
            config=int(owner["config"]),
            source=write["source"],
            target=write["target"],
            lanes=lanes,
        )
    ]
