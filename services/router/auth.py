"""Who may call which path: keys and their scopes, and room for one more connection. Stands in front of every route; knows none of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from duomo.api_keys import KeyEntry
from duomo.api_keys import Scope as KeyScope
from duomo.config_gateway import is_loopback
from services.router.keys import Keys
from services.router.refusals import refusal

OVER_LIMIT_EXTENSION: Final = "duomo.over_limit"  # put into the ASGI scope by client_protocol.py: gateway.max_connections is reached
BODY_DUE_EXTENSION: Final = "duomo.body_due"  # and this: () -> bool, whether the request's body is still on its way
HOLDER: Final = "duomo.key"  # and this by us: the KeyEntry of who calls, where keys are asked for
# How much of a refused request's body is read and dropped, and for how long: closing a socket with unread bytes resets it, and a client
# that writes everything before it reads would see the reset and not the refusal.
_DROP_BYTES: Final = 16 * 1024 * 1024
_DROP_S: Final = 5.0

_CHALLENGE: Final = {"www-authenticate": "Bearer"}
_CALL_BY_NAME: Final = (
    "Without keys, what needs the scope admin is for calls to localhost, 127.0.0.1 or [::1] alone: the Host that this one names may be "
    "a web page's. With keys (gateway.api_keys_file) any is taken."
)


def presented_key(headers: Headers) -> str:
    """The key; "" for none, and for an Authorization of another scheme than Bearer. Authorization goes before x-api-key.

    The same header salts the call's prefixes (calls.py): were the two chosen differently, a caller could prove itself by its own key and
    look for prefixes under another's.
    """
    if headers.get("authorization"):
        scheme, _, key = headers["authorization"].strip().partition(" ")
        return key.strip() if scheme.lower() == "bearer" else ""
    return headers.get("x-api-key", "").strip()


def needed_scopes(path: str, *, metrics_need_key: bool) -> tuple[KeyScope, ...]:
    """Any of these opens the path; none: everybody may. What no route has is as closed as inference, so that nobody learns of routes."""
    if path == "/health" or path.startswith("/health/"):
        return ()
    if path == "/metrics":
        return ("metrics", "admin") if metrics_need_key else ()
    return ("admin",) if path.startswith("/admin/") else ("inference",)


def is_misled(scope: Scope, host: str) -> bool:
    """Whether a page in a browser on this machine may have made the call, under a name of its own that it let lead here (DNS rebinding).

    host: where we listen. Where other machines reach us they may call us what they like, and over TLS a page's name would have to be the
    certificate's. A browser always says what name it was given.
    """
    if not is_loopback(host) or scope["scheme"] == "https":
        return False
    return not all(is_loopback(_host_of(value)) for value in Headers(scope=scope).getlist("host"))


def _host_of(value: str) -> str:
    """A Host header's name or address, without its port and brackets."""
    name = value.strip().lower()
    return name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]


class Guard:
    """ASGI middleware. needed: which scopes open a path, any of them. refused: hears the code and the call of each refusal.

    host: where this application listens. Where no keys are asked for, and that is loopback, admin's paths are for who calls it so.
    """

    def __init__(
        self, app: ASGIApp, keys: Keys, needed: Callable[[str], tuple[KeyScope, ...]], refused: Callable[[str, Scope], None], host: str
    ) -> None:
        self._app = app
        self._keys = keys
        self._needed = needed
        self._refused = refused
        self._host = host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        needed = self._needed(scope["path"])
        if needed and (scope.get("extensions") or {}).get(OVER_LIMIT_EXTENSION):
            told = ("The server has as many connections as it takes (gateway.max_connections).", None, "too_many_connections")
            await self._refuse(503, told, {"retry-after": "1", "connection": "close"}, scope, receive, send)
            return
        if "admin" in needed and not self._keys.are_asked_for and is_misled(scope, self._host):
            await self._refuse(403, (_CALL_BY_NAME, None, "foreign_host"), {}, scope, receive, send)
            return
        if needed and self._keys.are_asked_for:
            headers = Headers(scope=scope)
            holder = self._keys.holder(presented_key(headers))
            if holder is None:
                await self._refuse(401, (_why_not_known(headers), None, "invalid_api_key"), _CHALLENGE, scope, receive, send)
                return
            scope[HOLDER] = holder
            if not set(needed) & set(holder.scopes):
                told = (f"This API key has no scope {' or '.join(needed)}.", None, "insufficient_scope")
                await self._refuse(403, told, {}, scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _refuse(
        self, status: int, told: tuple[str, None, str], headers: dict[str, str], scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._refused(told[2], scope)
        is_due: Callable[[], bool] | None = (scope.get("extensions") or {}).get(BODY_DUE_EXTENSION)
        if is_due is None or not is_due() or "connection" in headers:
            await refusal(scope["path"], status, told, headers)(scope, receive, send)
            return
        # On a connection that lived on, a stranger could go on sending for as long as it likes.
        answer = refusal(scope["path"], status, told, headers | {"connection": "close"})
        await send({"type": "http.response.start", "status": status, "headers": answer.raw_headers})
        await send({"type": "http.response.body", "body": answer.body, "more_body": True})
        await _drop_body(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _drop_body(receive: Receive) -> None:
    num_bytes = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DROP_S):
            while num_bytes < _DROP_BYTES:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return


def holder_of(scope: Scope) -> KeyEntry | None:
    """Whose call it is; None where no keys are asked for."""
    holder = scope.get(HOLDER)
    return holder if isinstance(holder, KeyEntry) else None


def _why_not_known(headers: Headers) -> str:
    """Never with a part of the key: OpenAI shows its ends, and answers are logged by clients."""
    if presented_key(headers):
        return "Incorrect API key provided."
    if headers.get("authorization"):
        return "Incorrect API key provided: Authorization must be 'Bearer KEY'."
    return "You didn't provide an API key: send it as 'Authorization: Bearer KEY', or as 'x-api-key: KEY'."
