"""The gateway's sockets and what its process may open: limits are raised as far as they may be, and said where that is not enough."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from duomo.config_gateway import GatewaySection
from duomo.errors import ConfigError
from services.router.edge import bind_admin_port, bind_port

ROOT = Path(__file__).resolve().parents[3]
LIMITED = """
import logging, resource, sys
from duomo.config_gateway import GatewaySection
from services.router.edge import allow_connections
logging.basicConfig(stream=sys.stdout, format="%(message)s")
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
allow_connections(GatewaySection(max_connections=1000))
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(
    ("soft", "hard", "after", "is_warned"), [(256, 4000, 1768, False), (256, 1500, 1500, True), (2000, 4000, 2000, False)]
)
def test_a_process_may_open_what_its_connections_need(soft: int, hard: int, after: int, is_warned: bool) -> None:
    """In a process of its own: a hard limit that is lowered stays."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.format(soft=soft, hard=hard)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    *said, limit = done.stdout.splitlines()
    assert int(limit) == after and bool(said) is is_warned
    assert not said or "gateway.max_connections is 1000" in said[0]


def test_a_port_that_cannot_be_had_names_its_own_option() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ConfigError, match=r"--admin-port \(gateway.admin_port\)"):
            bind_admin_port(GatewaySection(admin_port=port))
        with pytest.raises(ConfigError, match=r"--port \(gateway.port\)"):
            bind_port(GatewaySection(port=port))
    with pytest.raises(ConfigError, match=r"gateway.host no.such.host.invalid \(--host\)"):
        bind_port(GatewaySection(host="no.such.host.invalid"))
    assert bind_admin_port(GatewaySection()) is None
