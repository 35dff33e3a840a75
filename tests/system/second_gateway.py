"""Owns another gateway process before a system's pools: its start, its settings, its end. Knows no request."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import yaml

from tests.ports import free_port
from tests.system.conftest import STOP_S, ReplicaSystem, System, launch


class SecondGateway(System):
    """What it sees of the pools is what is left once the first is gone."""

    def __init__(self, system: ReplicaSystem, settings: dict[str, object]) -> None:
        super().__init__(system.run_dir, free_port())
        self.redis_url = system.redis_url
        self.check_alive = system.check_alive  # type: ignore[method-assign]  # the same processes
        config = yaml.safe_load(system.config.read_text())
        config["gateway"] |= {"port": self.port} | settings
        file = system.run_dir / "second.yaml"
        file.write_text(yaml.safe_dump(config))
        arguments = ["replica", "router", "--config", str(file), "--id", "router-1"]
        system.processes["router-1"] = launch(arguments, system.run_dir / "router-1.log")
        self.wait_for_pools(len(system.reports("prefill")), len(system.reports("decode")))


@contextlib.contextmanager
def second_gateway(system: ReplicaSystem, **settings: object) -> Iterator[SecondGateway]:
    """router-1, settings of the section gateway being its own; drained at the end, and it must end well."""
    try:
        yield SecondGateway(system, settings)
    finally:
        process = system.processes.pop("router-1")
        process.send_signal(signal.SIGINT)
        code = process.wait(STOP_S)
    assert code == 0, system.logs()
