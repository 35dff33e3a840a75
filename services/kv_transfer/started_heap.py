"""Owns what Python's garbage collector looks at no more: what a process holds when it is ready to serve. Knows no service.

Libraries and a model leave some hundred thousand objects that live as long as the process. A full collection walks all of them while no
other thread of the process runs, for tenths of a second: every stream of a decode replica waits meanwhile. Set apart, they cost nothing,
and a collection walks what requests have made since.
"""

from __future__ import annotations

import gc


def freeze_started() -> None:
    """Collect what is garbage already, then set the rest apart for good. For a process that serves until it ends, once it is ready."""
    gc.collect()
    gc.freeze()
