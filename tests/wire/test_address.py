"""Addresses: what is one, and what happens where it cannot be had."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from duomo.errors import ConfigError
from duomo.wire.address import Address, bind, bound_address, parse_address


def test_both_kinds_are_read_and_written_back() -> None:
    for text in ("unix:/run/a b.sock", "tcp:127.0.0.1:0", "tcp:host.local:65535", "tcp:[::1]:80"):
        assert str(parse_address(text)) == text
    assert parse_address("tcp:[::1]:80") == Address(None, "::1", 80)


@pytest.mark.parametrize("text", ["", "unix:", "tcp:", "tcp:host", "tcp:host:", "tcp::80", "tcp:h:65536", "tcp:h:-1", "tcp:h:²", "udp:h:1"])
def test_anything_else_is_refused_with_what_would_be_right(text: str) -> None:
    with pytest.raises(ConfigError, match="unix:/path or tcp:host:port"):
        parse_address(text)


def test_a_path_too_long_for_a_socket_says_so() -> None:
    assert parse_address("unix:/" + "x" * 106).path is not None
    with pytest.raises(ConfigError, match="run_dir"):
        parse_address("unix:/" + "x" * 107)


def test_a_stale_file_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    address = parse_address(f"unix:{tmp_path}/a.sock")
    first = asyncio.run(bind(address))
    with pytest.raises(ConfigError, match="another process listens") as taken:
        asyncio.run(bind(address))
    assert taken.value.code == "address_taken"
    first.close()  # the file stays, as after a kill
    second = asyncio.run(bind(address))
    assert (tmp_path / "a.sock").stat().st_mode & 0o777 == 0o600
    second.close()


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.sock").write_text("precious")
    with pytest.raises(ConfigError, match="no socket has this name"):
        asyncio.run(bind(parse_address(f"unix:{tmp_path}/a.sock")))
    assert (tmp_path / "a.sock").read_text() == "precious"


def test_a_taken_port_and_a_missing_folder_are_clear_errors(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        text = f"tcp:127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigError, match=text) as taken:
            asyncio.run(bind(parse_address(text)))
        assert taken.value.code == "address_taken"
    with pytest.raises(ConfigError, match="No such file") as missing:
        asyncio.run(bind(parse_address(f"unix:{tmp_path}/no/a.sock")))
    assert missing.value.code == "bad_address"


def test_port_0_becomes_the_port_that_was_given() -> None:
    asked = parse_address("tcp:127.0.0.1:0")
    bound = asyncio.run(bind(asked))
    assert bound_address(asked, bound).port == bound.getsockname()[1] > 0
    bound.close()
