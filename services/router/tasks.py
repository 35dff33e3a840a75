"""Ending background tasks for certain: a library may swallow a cancellation (asyncio.wait_for of Python 3.11 does). Knows no work."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

_AGAIN_S: Final = 0.2


async def end_tasks(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel until every task is done. Their errors are not raised."""
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_AGAIN_S)
