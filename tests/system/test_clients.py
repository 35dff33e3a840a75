"""The client libraries' calls on the real CPU system and the embedded model: the same lists as before the stub, unchanged."""

from __future__ import annotations

import pytest

from tests.clients.call_list import Target
from tests.clients.test_stub import calls_of
from tests.system.conftest import ReplicaSystem

FEW = ("chat", "stream", "tools, required", "structured output", "a timeout")


def _run(system: ReplicaSystem, client: str, names: tuple[str, ...] | None) -> None:
    calls = calls_of(client).calls
    failed = {}
    for name in names or calls:
        try:
            calls[name][0](Target(system.url, None))
        except Exception as error:  # all of them are told, and none hides another
            failed[name] = repr(error)
    assert not failed
    system.assert_quiet()


def test_a_few_calls_of_langchain_and_openai(tools_system: ReplicaSystem) -> None:
    for client in ("openai", "langchain"):
        _run(tools_system, client, FEW)


@pytest.mark.slow
def test_every_call_of_every_client(tools_system: ReplicaSystem) -> None:
    for client in ("openai", "anthropic", "langchain", "litellm"):
        _run(tools_system, client, None)
