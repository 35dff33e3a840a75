"""Owns the check of what tells a hang from idleness, by a scripted clock. Knows no process: test_membership.py ends one that hangs."""

from __future__ import annotations

import pytest

from duomo.errors import EngineError
from services.kv_transfer.membership import Progress


def test_progress_tells_a_hang_from_idleness() -> None:
    now_s = 0.0
    progress = Progress(5.0, clock=lambda: now_s)
    now_s = 100.0
    progress.check()
    assert progress.age_s() == 0
    progress.pending()
    now_s = 104.0
    progress.pending()  # more work does not hide that nothing moved
    assert progress.age_s() == 4
    progress.check()
    now_s = 105.5
    with pytest.raises(EngineError, match="no step has finished"):
        progress.check()
    progress.advance()
    progress.check()
    now_s = 200.0
    progress.idle()
    progress.check()
    assert progress.num_steps == 1
