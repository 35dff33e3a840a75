"""PURE: how long a request may take: what its client asks for in a header, and never more than the gateway allows. Knows no request.

The header is X-Request-Timeout, in seconds, for the whole answer from its first byte in to its last byte out. LiteLLM and Portkey have one
of the same meaning under names of their own; Envoy's is in milliseconds and for the upstream alone. OpenAI's client says its read timeout
(x-stainless-read-timeout), which is for each read of a socket and not for an answer: it is not taken for a deadline.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from duomo.errors import RequestError

TIMEOUT_HEADER: Final = "x-request-timeout"
_PARAM: Final = "X-Request-Timeout"
_SECONDS: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
_SHOWN_CHARS: Final = 40


def asked_timeout_s(values: Sequence[str]) -> float | None:
    """Of the header as it came, each time that it came; None where it did not. Raises RequestError naming it and what would be right."""
    if not values:
        return None
    if len(values) > 1:
        raise RequestError(f"'{_PARAM}' is given {len(values)} times, but must be given once.", param=_PARAM)
    told = values[0].strip()
    seconds = float(told) if _SECONDS.fullmatch(told) else 0.0
    if not seconds > 0.0:
        raise RequestError(f"'{_PARAM}' is {told[:_SHOWN_CHARS]!r}, but must be seconds above 0, such as 30 or 2.5.", param=_PARAM)
    return seconds


def allowed_s(asked_s: float | None, limit_s: float) -> float:
    """limit_s where the client asks for nothing, or for more."""
    return limit_s if asked_s is None else min(asked_s, limit_s)
