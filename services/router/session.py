"""PURE: which session a call belongs to: calls of the same one go to the same replicas where nothing speaks against it. Knows no replica.

The header X-Session-Id (what vLLM's and others' routers are told to look at) or OpenAI's field `prompt_cache_key`, the header first. Not
`user`: all that one user does at once would go to one place. A session is one API key's: others may use the same word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from duomo.errors import RequestError

SESSION_HEADER: Final = "x-session-id"
MAX_SESSION_CHARS: Final = 256
_PARAM: Final = "X-Session-Id"


def asked_session(values: Sequence[str]) -> str:
    """Of the header as it came, each time that it came; "" where it did not. Raises RequestError naming it and what would be right."""
    if not values:
        return ""
    if len(values) > 1:
        raise RequestError(f"'{_PARAM}' is given {len(values)} times, but must be given once.", param=_PARAM)
    return checked_session(values[0].strip(), _PARAM)


def checked_session(told: str, param: str) -> str:
    """Raises RequestError for one that is too long."""
    if len(told) > MAX_SESSION_CHARS:
        raise RequestError(f"'{param}' has {len(told)} characters, the limit is {MAX_SESSION_CHARS}.", param=param)
    return told


def session_of(header: str, field: str, salt: str) -> str:
    """Nothing where neither names one."""
    told = header or field
    return f"{salt}/{told}" if told else ""
