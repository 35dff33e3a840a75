"""UCX's tables of writes are read as UCX prints them, also where two threads print at once; nothing else is taken for one."""

from __future__ import annotations

import pytest

from services.kv_transfer import ucx_routes
from services.kv_transfer.ucx_routes import Route, is_met, is_of_table, refusal, routes_in


def printed(owner: str, operation: str, *rows: str, thread: int = 0) -> list[str]:
    """A table as libucp of UCX 1.23 prints it (UCX_PROTO_INFO=y)."""
    width = max(map(len, (owner, operation, *rows)))
    rule = f"+{'-' * (width + 2)}+"
    shown = [rule, f"| {owner:<{width}} |", f"| {operation:<{width}} |", rule, f"| {'Range | Description | Config':<{width}} |", rule]
    shown += [*(f"| {row:<{width}} |" for row in rows), rule]
    return [f"[1795365033.017268] [vm:27930:{thread}]   {line}" for line in shown]


def of_peer(routes: list[Route], agent: str, kinds: tuple[str, str] = ("host", "host"), num_before: int = 0) -> tuple[str, ...]:
    return ucx_routes.of_peer(routes, agent, kinds=kinds, num_before=num_before)


HOST = "remote memory write by ucp_put* from host memory to host"
CMA = printed("kv-p intra-node cfg#1", HOST, "0..inf | zero-copy | cma/memory")


def test_a_table_of_ucx_is_read() -> None:
    (route,) = routes_in(CMA)
    assert (route.agent, route.locality, route.config, route.lanes, route.text()) == (
        "kv-p",
        "intra-node",
        1,
        ("cma/memory",),
        "cma/memory",
    )
    assert of_peer([route], "kv-p") == ("cma/memory",)


@pytest.mark.parametrize(
    ("row", "lanes"),
    [
        ("0..inf | zero-copy | tcp/lo", ("tcp/lo",)),
        ("2K..inf | zero-copy | rc_mlx5/mlx5_0:1/path0", ("rc_mlx5/mlx5_0:1",)),
        ("2049..inf | zero-copy | rc_mlx5/mlx5_0:1 50% on path0 and 50% on path1", ("rc_mlx5/mlx5_0:1",)),
        ("2K..inf | zero-copy | 50% on rc_mlx5/mlx5_0:1/path0 and 50% on rc_mlx5/mlx5_3:1/path0", ("rc_mlx5/mlx5_0:1", "rc_mlx5/mlx5_3:1")),
        ("0..inf | zero-copy | tcp/br-9f.100", ("tcp/br-9f.100",)),
    ],
)
def test_devices_and_lanes(row: str, lanes: tuple[str, ...]) -> None:
    assert routes_in(printed("p inter-node cfg#2", HOST, "0..2K | short | tcp/lo", row))[0].lanes == lanes


def test_what_large_messages_take_is_the_last_row() -> None:
    rows = ("0..8184 | short | posix/memory", "8185..inf | zero-copy | cma/memory")
    assert routes_in(printed("p intra-node cfg#1", HOST, *rows))[0].lanes == ("cma/memory",)


def test_tables_of_two_threads_do_not_mix() -> None:
    tcp = printed("kv-d inter-node cfg#2", HOST, "0..inf | zero-copy | tcp/lo", thread=1)
    mixed = [line for pair in zip(CMA, tcp, strict=True) for line in pair]
    assert {(route.agent, route.lanes) for route in routes_in(mixed)} == {("kv-p", ("cma/memory",)), ("kv-d", ("tcp/lo",))}


def test_an_agent_s_connection_to_itself_says_nothing_of_its_peers() -> None:
    routes = routes_in([*CMA, *printed("kv-p self cfg#0", HOST, "0..inf | zero-copy | self/memory")])
    assert len(routes) == 2 and of_peer(routes, "kv-p") == ("cma/memory",)
    assert of_peer(routes, "kv-d") == () and of_peer(routes, "kv-p", ("cuda", "cuda")) == ()


def test_memory_of_a_gpu_has_a_way_of_its_own() -> None:
    """UCX also prints how it would write from the host to the card: no message goes that way."""
    up = printed(
        "kv-p intra-node cfg#1",
        "remote memory write by ucp_put*(fast-completion) from host memory to cuda/dev[0]",
        "0..inf | copy-in | tcp/lo",
    )
    gpu = "remote memory write by ucp_put*(multi) from cuda/dev[0] memory to cuda/dev[1]"
    routes = routes_in([*printed("kv-p intra-node cfg#1", gpu, "0..inf | zero-copy | cuda_ipc/cuda"), *up, *CMA])
    assert of_peer(routes, "kv-p", ("cuda", "cuda")) == ("cuda_ipc/cuda",) and of_peer(routes, "kv-p") == ("cma/memory",)
    assert of_peer(routes, "kv-p", ("host", "cuda")) == ("tcp/lo",)


def test_a_peer_has_the_table_that_came_with_it_and_else_what_earlier_peers_have() -> None:
    routes = routes_in([*CMA, *printed("kv-p inter-node cfg#2", HOST, "0..inf | zero-copy | tcp/eth0")])
    assert of_peer(routes[:1], "kv-p", num_before=0) == ("cma/memory",)
    assert of_peer(routes[:1], "kv-p", num_before=1) == ("cma/memory",), "connected as the first one is"
    assert of_peer(routes, "kv-p", num_before=1) == ("tcp/eth0",)
    assert of_peer(routes, "kv-p", num_before=2) == ("cma/memory", "tcp/eth0"), "one of the two: nothing says which"


def test_long_names_are_cut_as_ucx_cuts_them() -> None:
    name = "kv-consumer-abcdefghijklmnopqrstuvwxyz0123456789"
    routes = routes_in(printed(f"{name[:31]} intra-node cfg#1", HOST, "0..inf | zero-copy | cma/memory"))
    assert of_peer(routes, name) == ("cma/memory",)


@pytest.mark.parametrize(
    "lines",
    [
        CMA[:-1],
        printed("kv-p intra-node cfg#1", "active message by ucp_am_send* from host memory", "0..inf | zero-copy | tcp/lo"),
        ["[1795365033.0] [vm:1:0]   ucp_ep.c:123  UCX  WARN a | message + of another kind"],
        ["+---+", "| no line of UCX |"],
    ],
    ids=["cut short", "another operation", "a warning", "no log line"],
)
def test_nothing_else_is_a_route(lines: list[str]) -> None:
    assert routes_in(lines) == []


def test_messages_are_told_from_tables() -> None:
    assert all(map(is_of_table, CMA))
    assert not is_of_table("[1795365033.0] [vm:1:0]   ucp_ep.c:123  UCX  ERROR connection reset by peer")


@pytest.mark.parametrize(
    ("required", "lanes", "met"),
    [
        ("cma", ("cma/memory",), True),
        ("rc", ("rc_mlx5/mlx5_0:1", "rc_verbs/mlx5_1:1"), True),
        ("rc", ("rc_mlx5/mlx5_0:1", "tcp/eth0"), False),
        ("cuda_ipc", ("cuda_copy/cuda",), False),
        ("tcp", (), False),
        ("c", ("cma/memory",), False),
    ],
)
def test_every_lane_has_to_be_what_is_required(required: str, lanes: tuple[str, ...], met: bool) -> None:
    assert is_met(required, lanes) is met


@pytest.mark.parametrize(
    ("required", "lanes", "is_one_process", "is_refused"),
    [
        ("", ("tcp/lo",), False, False),
        ("cma", ("cma/memory",), True, False),
        ("cma", ("tcp/lo",), True, True),
        ("cma", (), True, True),
        ("cuda_ipc", ("cuda_copy/cuda",), True, True),
        ("rc", ("cma/memory",), True, False),
        ("rc", ("cma/memory",), False, True),
        ("rc", ("tcp/eth0",), True, True),
        ("rc", (), False, True),
    ],
)
def test_what_is_refused(required: str, lanes: tuple[str, ...], is_one_process: bool, is_refused: bool) -> None:
    """Two agents of one process prove nothing about a network that is required, unless they are joined by one."""
    said = refusal(required, lanes, is_one_process=is_one_process)
    assert bool(said) is is_refused
    assert not said or (f"require_transport is {required}" in said and all(lane in said for lane in lanes))
