"""The folder of a run: whose it is, and that whatever interrupts its clearing leaves one that the next run takes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from duomo.config import DuomoConfig, ModelSection
from duomo.errors import ConfigError
from services.cli_serve import claimed_run_dir


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
