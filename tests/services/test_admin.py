"""Owns the checks of the operator's socket: what it takes, what it refuses, and that it answers after a failure."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from duomo.errors import ConfigError, EngineError
from services.admin import AdminCommand, AdminSocket, Replicas, ask, default_run_dir, is_alive, parse_command


class Pools:
    def __init__(self) -> None:
        self.counts: Replicas = {"prefill": {"RUNNING": 1}, "decode": {"RUNNING": 2}}

    def run(self, command: AdminCommand) -> Replicas:
        if command.command == "scale":
            assert command.pool is not None and command.replicas is not None
            if command.replicas == 99:
                raise EngineError("no room for 99")
            if command.replicas == 98:
                raise ValueError("a bug")
            self.counts[command.pool] = {"RUNNING": command.replicas}
        return self.counts


def test_commands_and_refusals_over_the_socket(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    assert not is_alive(path)
    door = AdminSocket(path, Pools().run)
    door.start()
    try:
        assert is_alive(path)
        assert ask(path, AdminCommand(command="status"))["decode"] == {"RUNNING": 2}
        assert ask(path, AdminCommand(command="scale", pool="decode", replicas=1))["decode"] == {"RUNNING": 1}
        for replicas, message in ((99, "no room for 99"), (98, "a bug"), (0, "from 1 to 256")):
            with pytest.raises(ConfigError, match=message):
                ask(path, AdminCommand(command="scale", pool="decode", replicas=replicas))
        with socket.socket(socket.AF_UNIX) as client:  # one that sends nothing and leaves
            client.connect(str(path))
        assert ask(path, AdminCommand(command="status"))["prefill"] == {"RUNNING": 1}
    finally:
        door.close()
    assert not path.exists()
    with pytest.raises(ConfigError, match="no running `duomo serve`"):
        ask(path, AdminCommand(command="status"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "one line of JSON"),
        (b"\xff\xfe", "one line of JSON"),
        (b"[1]", "JSON object"),
        (b'{"command": "stop"}', "status or scale"),
        (b'{"command": "scale", "pool": "router", "replicas": 2}', "pool must be"),
        (b'{"command": "scale", "pool": "decode", "replicas": true}', "whole number"),
        (b'{"command": "scale", "pool": "decode", "replicas": 257}', "1 to 256"),
    ],
)
def test_bad_commands_name_what_is_wrong(line: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_command(line)


def test_the_run_folder_is_found_by_its_port() -> None:
    assert default_run_dir(8123) != default_run_dir(8124)
    assert str(default_run_dir(8123)).endswith("-8123")
