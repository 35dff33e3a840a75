"""Owns how NIXL is imported and its agents are made: environment of UCX, log level, progress thread. Knows no ring and no write.

Why this file exists: the Python wrapper of NIXL 1.5 sets `pthrDelay = 0` for every agent, so that its progress thread spins a whole
core, and `nixl_agent_config` has no knob for it. With a pause of 1,000 us a 64 x 16 KiB write with reply falls from 47.7 to 0.46 ms
on a 2-core machine, and idle CPU to 2.5%. While an agent is made here, the wrapper sees a binding whose agent configuration keeps
our delay. Drop the proxy when upstream has the knob.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import threading
from typing import Any

from duomo.config import TransferSection
from duomo.errors import ConfigError
from services.kv_transfer import ucx_log
from services.kv_transfer.write_pieces import PIECES_A_THREAD

BACKEND = "UCX"
_KNOWN_VERSIONS = ("1.5.",)
_DISTRIBUTIONS = {"nixl-cu13": "nixl_cu13", "nixl-cu12": "nixl_cu12"}
_making = threading.Lock()


def import_nixl(section: TransferSection) -> tuple[Any, str]:
    """NIXL's wrapper module and its version. UCX reads its environment once in a process, when it is first imported.

    Raises ConfigError where NIXL is not installed or is a version that this file does not know.
    """
    wanted = {"UCX_TLS": section.ucx_tls, "UCX_NET_DEVICES": section.ucx_net_devices}
    for name, value in wanted.items():
        if value:
            os.environ[name] = value
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    if os.environ.get("NIXL_TELEMETRY_ENABLE") == "":
        del os.environ["NIXL_TELEMETRY_ENABLE"]  # NIXL refuses to start on an empty value
    for distribution, package in _DISTRIBUTIONS.items():
        try:
            version = importlib.metadata.version(distribution)
            api = importlib.import_module(f"{package}._api")
        except (importlib.metadata.PackageNotFoundError, ModuleNotFoundError):
            continue
        if not version.startswith(_KNOWN_VERSIONS) or not hasattr(api.nixlBind.nixlAgentConfig, "pthrDelay"):
            raise ConfigError(f"{distribution} {version}: the progress thread's pause works with 1.5 only: install nixl-cu13==1.5.1")
        return api, version
    raise ConfigError("kv_transfer.transport is nixl, but NIXL is not installed: pip install nixl-cu13==1.5.1")


def make_agent(api: Any, name: str, progress_delay_us: int, num_threads: int = 1) -> Any:
    """A NIXL agent on UCX whose progress thread pauses progress_delay_us between rounds, safe to call from several threads.

    num_threads: more than one of NIXL's own share writes of several descriptors (write_pieces.py); they sleep while there are none.
    """
    binding = api.nixlBind
    plain: Any = binding.nixlAgentConfig

    class PausingAgentConfig(plain):  # type: ignore[misc]  # a class of the extension module, which has no types
        """nixlAgentConfig whose pthrDelay stays what we want, whatever the wrapper assigns."""

        @property
        def pthrDelay(self) -> int:
            delay: int = plain.pthrDelay.__get__(self)
            return delay

        @pthrDelay.setter
        def pthrDelay(self, _: int) -> None:
            plain.pthrDelay.__set__(self, progress_delay_us)

    class Binding:
        """The extension module, but for its agent configuration."""

        nixlAgentConfig = PausingAgentConfig

        def __getattr__(self, attribute: str) -> Any:
            return getattr(binding, attribute)

    # capture_telemetry: NIXL times every write, for the span kv.push; its exporter (NIXL_TELEMETRY_ENABLE) stays off.
    config = api.nixl_agent_config(backends=[], sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT, capture_telemetry=True)
    shared = {"num_threads": str(num_threads), "split_batch_size": str(PIECES_A_THREAD)} if num_threads > 1 else {}
    with _making, ucx_log.of_process().is_making_agent():
        api.nixlBind = Binding()
        try:
            agent = api.nixl_agent(name, config)
        finally:
            api.nixlBind = binding
        if BACKEND in agent.get_plugin_list():
            agent.create_backend(BACKEND, shared)
    if BACKEND not in agent.backends:
        raise ConfigError(f"NIXL's {BACKEND} plugin does not load; plugins found: {', '.join(agent.get_plugin_list())}")
    return agent
