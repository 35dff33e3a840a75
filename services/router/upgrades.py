"""httptools' parser for which Upgrade is a header like any other, as HTTP lets a server have it. Knows no route and no connection.

The parser itself believes a client that offers an upgrade: the message ends behind its head, and what follows is another protocol's. So the
body of a POST that offers one (Java's HTTP client does, for h2c) would be lost, or read as a request where it comes in a packet of its own.
"""

from __future__ import annotations

from typing import Protocol, cast

import httptools

_BODILESS = (b"", b"0")


class Parsed(Protocol):
    """Whom the parser tells; the message's headers so far, their names in lower case."""

    headers: list[tuple[bytes, bytes]]

    def on_message_begin(self) -> None: ...
    def on_url(self, url: bytes) -> None: ...
    def on_header(self, name: bytes, value: bytes) -> None: ...
    def on_headers_complete(self) -> None: ...
    def on_body(self, body: bytes) -> None: ...
    def on_message_complete(self) -> None: ...


class UpgradeIgnoringParser:
    """One connection's. A message that offers an upgrade has its body read by a parser that is told only how long that is."""

    def __init__(self, told: Parsed) -> None:
        self._told = told
        self._parser = _parser(told)

    def feed_data(self, data: bytes) -> None:
        """Raises httptools' errors, and never HttpParserUpgrade."""
        while True:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as end:
                data = data[cast(int, end.args[0]) :]
                self._go_behind_head()

    @property
    def is_body_behind(self) -> bool:
        """In on_message_complete(): whether that is the end of the head alone."""
        return self._parser.should_upgrade() and bool(self._framing())

    def get_http_version(self) -> str:
        return self._parser.get_http_version()

    def get_method(self) -> bytes:
        return self._parser.get_method()

    def should_keep_alive(self) -> bool:
        return self._parser.should_keep_alive()

    def should_upgrade(self) -> bool:
        return False

    def _framing(self) -> bytes:
        """The headers that say how long the body is; none where there is no body."""
        lengths = [(name, value) for name, value in self._told.headers if name in (b"content-length", b"transfer-encoding")]
        if all(name == b"content-length" and value.strip() in _BODILESS for name, value in lengths):
            return b""
        return b"".join(b"%s: %s\r\n" % pair for pair in lengths)

    def _go_behind_head(self) -> None:
        framing = self._framing()
        if not framing:
            self._parser = _parser(self._told)
            return
        behind = _BehindHead(self._told)
        self._parser = _parser(behind)  # before it is fed: a body of no bytes ends here, and is asked for its end
        self._parser.feed_data(b"POST / HTTP/1.1\r\n%s\r\n" % framing)
        behind.is_head_over = True


class _BehindHead:
    """Hears of a head that was heard of before, and passes on what follows."""

    def __init__(self, told: Parsed) -> None:
        self._told = told
        self.is_head_over = False

    def on_message_begin(self) -> None:
        if self.is_head_over:
            self._told.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if self.is_head_over:
            self._told.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.is_head_over:
            self._told.on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.is_head_over:
            self._told.on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._told.on_body(body)

    def on_message_complete(self) -> None:
        self._told.on_message_complete()


def _parser(told: object) -> httptools.HttpRequestParser:
    """As uvicorn sets its own: requests behind one that asks to close are read."""
    parser = httptools.HttpRequestParser(told)
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser
