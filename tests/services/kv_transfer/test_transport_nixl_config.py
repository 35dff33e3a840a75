"""The environment is set before UCX reads it, the progress thread pauses, and an unknown version is refused."""

from __future__ import annotations

import importlib.metadata
import os
import time
from typing import Any

import pytest

from duomo.config import TransferSection
from duomo.errors import ConfigError
from services.kv_transfer import transport_nixl_config
from services.kv_transfer.transport_nixl_config import import_nixl, make_agent

SECTION = TransferSection(ucx_net_devices="lo")


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIXL_TELEMETRY_ENABLE", "")
    monkeypatch.delenv("UCX_TLS", raising=False)
    monkeypatch.delenv("NIXL_LOG_LEVEL", raising=False)
    monkeypatch.setenv("UCX_NET_DEVICES", "eth9")
    import_nixl(SECTION)
    assert "NIXL_TELEMETRY_ENABLE" not in os.environ and "UCX_TLS" not in os.environ
    assert os.environ["NIXL_LOG_LEVEL"] == "WARN" and os.environ["UCX_NET_DEVICES"] == "lo"


def test_the_progress_thread_pauses_and_the_wrapper_is_left_as_it_was() -> None:
    api, version = import_nixl(SECTION)
    assert version.startswith("1.5.")
    binding = api.nixlBind
    seen: list[Any] = []

    def make_seen(agent_name: str, config: Any) -> Any:
        seen.append(config)
        return binding.nixlAgent(agent_name, config)

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return make_seen if name == "nixlAgent" else getattr(binding, name)

    spy = Spy()
    api.nixlBind = spy
    try:
        make_agent(api, "kv-pause", 1234)
        assert api.nixlBind is spy
    finally:
        api.nixlBind = binding
    assert [config.pthrDelay for config in seen] == [1234]


def test_an_idle_agent_costs_little_cpu() -> None:
    api, _ = import_nixl(SECTION)
    agent = make_agent(api, "kv-idle", 1000)
    time.sleep(0.1)
    before_s = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before_s < 0.2, "the progress thread spins"
    assert agent.name == "kv-idle"


def test_an_unknown_version_names_the_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.0.0")
    with pytest.raises(ConfigError, match="nixl-cu13==1.5.1"):
        import_nixl(SECTION)


def test_no_nixl_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_nixl_config, "_DISTRIBUTIONS", {"nixl-cu99": "nixl_cu99"})
    with pytest.raises(ConfigError, match="not installed"):
        import_nixl(SECTION)
