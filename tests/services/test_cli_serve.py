"""The folder of a run: whose it is, and that whatever interrupts its clearing leaves one that the next run takes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from duomo.config import DuomoConfig, ModelSection
from duomo.errors import ConfigError
from services.cli_serve import StopSignals, claimed_run_dir, wait_until_ready


def config_of(folder: Path) -> DuomoConfig:
    return DuomoConfig(model=ModelSection(path=Path(".")), run_dir=folder)


def test_clearing_that_is_interrupted_can_be_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt), claimed_run_dir(config_of(folder)) as run_dir:
        (run_dir / "a.sock").write_text("")
        (run_dir / "ray").mkdir()
        patched.setattr(shutil, "rmtree", interrupted)
    assert (folder / "ray").exists()
    with claimed_run_dir(config_of(folder)) as run_dir:
        assert [entry.name for entry in run_dir.iterdir()] == ["run.json"]
    assert not list(folder.iterdir())


def test_files_of_something_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="--run-dir"), claimed_run_dir(config_of(tmp_path)):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.fixture
def stop_signals() -> Iterator[StopSignals]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield StopSignals()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_an_interrupt_that_python_drops_still_ends_the_start(stop_signals: StopSignals) -> None:
    """As in a callback at fork or a finaliser, whose exceptions are printed and forgotten."""
    stop_signals.check()
    with contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    with pytest.raises(KeyboardInterrupt):
        stop_signals.check()
    with pytest.raises(KeyboardInterrupt):
        wait_until_ready(config_of(Path(".")), 5, stop_signals.check)
    assert not stop_signals.urgent.is_set()
