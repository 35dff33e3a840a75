"""Owns where a test leaves what it counted, for bench/results/: a file of JSON lines in the folder DUOMO_TEST_REPORTS, if that is set."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def keep(name: str, **counted: Any) -> None:
    """One more line of `name`.jsonl."""
    if folder := os.environ.get("DUOMO_TEST_REPORTS"):
        with (Path(folder) / f"{name}.jsonl").open("a") as lines:
            lines.write(json.dumps(counted) + "\n")
