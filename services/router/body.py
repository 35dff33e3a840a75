"""The body of one HTTP request and its limit. Knows no route and no field."""

from __future__ import annotations

import time
from typing import Final

from starlette.requests import ClientDisconnect, Request

from duomo.errors import RequestCancelled, RequestError

# How much of a body that is too large is read and dropped before the refusal: this many times the limit, for so long.
_DROP_FACTOR: Final = 8
_DROP_S: Final = 10.0


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body; 413 where its declared or its counted size exceeds the limit.

    What a client still sends after that is read and dropped, within bounds: closing a socket with unread bytes resets it, and a client that
    writes everything before it reads would see the reset and not the refusal. One that waits for "100 Continue" is refused at once.
    """
    declared = request.headers.get("content-length", "")
    is_too_large = declared.isascii() and declared.isdigit() and int(declared) > max_bytes
    if is_too_large and request.headers.get("expect", "").lower() == "100-continue":
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    num_bytes = 0
    until_s = time.monotonic() + _DROP_S
    try:
        async for part in request.stream():
            num_bytes += len(part)
            if is_too_large or num_bytes > max_bytes:
                is_too_large = True
                parts.clear()
                if num_bytes > _DROP_FACTOR * max_bytes or time.monotonic() > until_s:
                    break
            else:
                parts.append(part)
    except ClientDisconnect as error:
        raise RequestCancelled("The client left while sending its body.") from error
    if is_too_large:
        raise _too_large(max_bytes)
    return b"".join(parts)


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(f"The body is larger than {max_bytes} bytes.", param="body", status=413, code="body_too_large")
