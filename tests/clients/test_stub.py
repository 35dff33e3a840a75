"""Every client library's calls through a real gateway, before stub replicas that say what a call needs; docs/api.md's table of them."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.call_list import TIMEOUT, CallList, Target
from tests.services.router.served_stub import ServedStub, served_stub

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "deploy" / "chat_templates" / "chatml_tools.jinja"
# litellm's import takes as long as all the other clients' calls.
CLIENTS = ("openai", "anthropic", "langchain", pytest.param("litellm", marks=pytest.mark.slow))
ALL = ("openai", "anthropic", "langchain", "litellm")


def calls_of(client: str) -> CallList:
    """Imported when it is needed: the libraries are large."""
    loaded: CallList = importlib.import_module(f"tests.clients.{client}_calls").CALLS
    return loaded


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedStub]:
    with served_stub(tmp_path_factory.mktemp("stub"), overrides={"gateway": {"chat_template": str(TEMPLATE)}}) as stub:
        yield stub


@pytest.mark.parametrize("client", CLIENTS)
def test_every_call_of_the_list_works_unchanged(served: ServedStub, client: str) -> None:
    failed = {}
    for name, (call, told) in calls_of(client).calls.items():
        served.tell(told or None)
        try:
            with served.held() if name == TIMEOUT else contextlib.nullcontext():
                call(Target(served.url, told))
        except Exception as error:  # all of them are told, and none hides another
            failed[name] = repr(error)
    assert not failed
    served.assert_quiet()


@pytest.mark.slow
def test_the_table_of_the_documentation_is_what_is_run() -> None:
    rows = re.findall(r"^\| ([^|]+) \|((?: (?:x|-) \|){4})$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    written = {(name, client) for name, marks in rows for client, mark in zip(ALL, marks.split("|"), strict=False) if mark.strip() == "x"}
    assert written == {(name, client) for client in ALL for name in calls_of(client).calls}
