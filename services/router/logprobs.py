"""Owns how one log-probability and its token are written in an answer. Knows no answer."""

from __future__ import annotations

from typing import Final

LOWEST_LOGPROB: Final = -9999.0  # JSON has no minus infinity; OpenAI's own floor


def finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def token_name(raw: bytes) -> str:
    """A token in the lists of OpenAI's older completions: its text; one that is no whole UTF-8 is spelled in bytes, as OpenAI does."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
