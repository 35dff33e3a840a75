"""Compiled grammars: made once, kept a while, told to whoever asked."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from duomo.errors import CapacityError, DuomoError, RequestError
from duomo.grammar import cache
from duomo.grammar.cache import Grammars
from duomo.grammar.state import Grammar
from duomo.wire.values import Constraint

MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-moe"


class Asker:
    """Who waits for one grammar."""

    def __init__(self) -> None:
        self.grammar: Grammar | None = None
        self.error: DuomoError | None = None
        self._told = asyncio.Event()

    def ready(self, grammar: Grammar) -> None:
        assert not self._told.is_set()
        self.grammar = grammar
        self._told.set()

    def failed(self, error: DuomoError) -> None:
        assert not self._told.is_set()
        self.error = error
        self._told.set()

    @property
    def is_told(self) -> bool:
        return self._told.is_set()

    async def wait(self) -> Asker:
        await asyncio.wait_for(self._told.wait(), 30)
        return self


def grammars(**limits: float) -> Grammars:
    return Grammars(MODEL, 8192, (2,), **limits)  # type: ignore[arg-type]  # limits by their names


def ask(made: Grammars, text: str) -> Asker:
    asker = Asker()
    made.ask(Constraint(kind="regex", text=text), asker.ready, asker.failed)
    return asker


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was compiled, in order."""
    texts: list[str] = []
    whole = cache.compiled

    def counted(of_model: tuple[Path, int, tuple[int, ...]], constraint: Constraint) -> Grammar:
        texts.append(constraint.text)
        return whole(of_model, constraint)

    monkeypatch.setattr(cache, "compiled", counted)
    return texts


def test_what_is_asked_for_at_once_is_compiled_once_and_then_known(compiled: list[str]) -> None:
    async def main() -> None:
        made = grammars()
        await made.warm()
        first, second = ask(made, "a+"), ask(made, "a+")
        assert not first.is_told
        assert (await first.wait()).grammar is (await second.wait()).grammar is not None
        again = ask(made, "a+")
        assert again.is_told and again.grammar is first.grammar
        assert compiled == ["a+"]

    asyncio.run(main())


def test_a_failure_is_kept_too(compiled: list[str]) -> None:
    async def main() -> None:
        made = grammars()
        bad = await ask(made, "(").wait()
        assert isinstance(bad.error, RequestError) and "unclosed" in bad.error.detail
        assert ask(made, "(").is_told and compiled == ["("]

    asyncio.run(main())


def test_only_the_latest_are_kept(compiled: list[str]) -> None:
    async def main() -> None:
        made = grammars(capacity=2)
        for text in ("a", "b", "a", "c", "a", "b"):
            assert (await ask(made, text).wait()).grammar is not None
        assert compiled == ["a", "b", "c", "b"]

    asyncio.run(main())


def test_large_ones_are_kept_as_long_as_together_they_are_not_too_large(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CAPACITY_CHARS", 10)

    async def main() -> None:
        made = grammars()
        for text in ("aaaa", "bbbb", "aaaa", "cccc", "aaaa", "bbbb", "d" * 99, "d" * 99, "bbbb"):
            assert (await ask(made, text).wait()).grammar is not None
        assert compiled == ["aaaa", "bbbb", "cccc", "bbbb", "d" * 99, "bbbb"]

    asyncio.run(main())


def test_whoever_waits_too_long_is_told_and_the_grammar_is_there_later(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    whole = cache.compiled

    def slow(of_model: tuple[Path, int, tuple[int, ...]], constraint: Constraint) -> Grammar:
        assert go_on.wait(30)
        return whole(of_model, constraint)

    monkeypatch.setattr(cache, "compiled", slow)

    async def main() -> None:
        made = grammars(limit_s=0.02)
        late = await ask(made, "a").wait()
        assert isinstance(late.error, CapacityError) and late.error.code == "constraint_timeout"
        go_on.set()
        while ask(made, "a").grammar is None:
            await asyncio.sleep(0.01)

    asyncio.run(main())


def test_a_fault_of_ours_is_told_and_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(of_model: tuple[Path, int, tuple[int, ...]], constraint: Constraint) -> Grammar:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(cache, "compiled", broken)

    async def main() -> None:
        asker = await ask(grammars(), "a").wait()
        assert asker.error is not None and asker.error.code == "constraint_failed" and "ZeroDivisionError" in asker.error.detail
        assert "planted" in caplog.text

    asyncio.run(main())


def test_a_folder_without_a_tokenizer_refuses_whoever_asks(tmp_path: Path) -> None:
    async def main() -> None:
        made = Grammars(tmp_path, 8192, (2,))
        await made.warm()
        asker = await ask(made, "a").wait()
        assert isinstance(asker.error, RequestError) and "tokenizer.json" in asker.error.detail

    asyncio.run(main())
