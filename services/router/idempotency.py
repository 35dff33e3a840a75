"""Requests that come twice: whoever repeats an Idempotency-Key gets the first answer again, and nothing is generated twice. Knows no Redis.

As the IETF's draft (draft-ietf-httpapi-idempotency-key-header) and Stripe have it. A name is one client's key at one endpoint. The first
request claims it; a repeat is answered with 409 while the first runs, with its answer once there is one, with 422 if the body is another.
An answer that says something of the moment and not of the request (no room, a lost replica, the deadline, a client that left) is not kept:
its name is free again, and the repeat runs.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from duomo.config_gateway import GatewaySection
from duomo.errors import CapacityError, DeadlineError, DuomoError, RequestCancelled, RequestError
from duomo.telemetry.metrics import Metrics
from services.kv_transfer.ending import end_tasks
from services.router.store import AnswerStore, ClaimName, StoredAnswer
from services.router.streams import ClientTransport, StreamResponse

KEY_HEADER: Final = "idempotency-key"
REPLAYED_HEADER: Final = "idempotent-replayed"  # Stripe's
_PARAM: Final = "Idempotency-Key"
_OWN_FAULTS: Final = ("bad_logits", "internal")
_MAX_KEY_CHARS: Final = 255
_RENEWALS_PER_LEASE: Final = 3
_STOP_WAIT_S: Final = 2.0
_PIECE_BYTES: Final = 64 * 1024
# The lowest level, and a window and memory of 32 KiB in all for each answer on its way: events of a stream repeat what is just before.
_ZLIB: Final = (1, zlib.DEFLATED, 12, 5)
_OWN_HEADERS: Final = ("content-length", "transfer-encoding", "connection", "date")

log = logging.getLogger(__name__)


class KeyInUseError(RequestError):
    """The first request with this key still runs: come back for its answer."""

    default_retryable = True


def asked_key(values: Sequence[str]) -> str | None:
    """Of the header as it came, each time that it came; None where it did not. Raises RequestError naming it and what would be right."""
    if not values:
        return None
    key = values[0].strip()
    if len(values) > 1:
        raise RequestError(f"'{_PARAM}' is given {len(values)} times, but must be given once.", param=_PARAM)
    if not 1 <= len(key) <= _MAX_KEY_CHARS or not (key.isascii() and key.isprintable()):
        raise RequestError(f"'{_PARAM}' must be 1 to {_MAX_KEY_CHARS} printable ASCII characters, such as a UUID.", param=_PARAM)
    return key


def claim_name(cache_salt: str, path: str, key: str, body: bytes, owner: str) -> ClaimName:
    """cache_salt: who asks. Digests alone: what Redis holds tells no key."""
    scope = "\0".join((cache_salt, path, key)).encode()
    return ClaimName(name=_digest(scope, b"duomo once name"), fingerprint=_digest(body, b"duomo once body"), owner=owner)


def says_the_same_again(error: DuomoError) -> bool:
    """Whether the request ran, and would end so whenever it came: then this is its answer, and is kept."""
    if isinstance(error, DeadlineError | RequestCancelled) or error.code == DeadlineError.default_code:
        return False  # of the moment
    if error.code in _OWN_FAULTS:
        return False  # of this server, which may be mended by then
    return not error.retryable and not isinstance(error, RequestError)  # nothing ran: refusing it again costs nothing


class Claim:
    """One call's right to answer for a name. Whoever was given it ends it by keep() or free(); until then its owner renews it.

    write() takes the answer's body piece by piece as it is sent; keep() keeps what was written.
    """

    def __init__(self, idempotency: Idempotency, name: ClaimName, until_s: float) -> None:
        self.name = name
        self.until_s = until_s
        self.num_bytes = 0
        self.is_over = False
        self._idempotency = idempotency
        self._packer = zlib.compressobj(*_ZLIB)
        self._packed = bytearray()

    def write(self, piece: bytes) -> None:
        """What no longer fits is not gathered."""
        if not self.is_too_large:
            self.num_bytes += len(piece)
            self._packed += self._packer.compress(piece)

    async def keep(self, response: Response) -> None:
        """The answer with this status and these headers, and the body that was written. Never raises: the client has its answer."""
        if self.is_over:
            return
        self._packed += self._packer.flush()
        if self.is_too_large:
            self._idempotency.count("too_large")
            self.free()
            return
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in response.raw_headers]
        kept = [(name, value) for name, value in headers if name not in _OWN_HEADERS]
        answer = StoredAnswer(status=response.status_code, headers=kept, packed=bytes(self._packed), num_bytes=self.num_bytes)
        self.is_over = True
        await self._idempotency.keep(self, answer)

    async def keep_whole(self, response: Response) -> None:
        self.write(bytes(response.body))
        await self.keep(response)

    async def failed(self, error: BaseException, answer: Callable[[DuomoError], Response]) -> None:
        """Before the first byte. answer: how the error is told, where that is kept."""
        if isinstance(error, DuomoError) and says_the_same_again(error):
            await self.keep_whole(answer(error))
        else:
            self.free()

    def free(self) -> None:
        """Nothing is kept; a repeat runs. A claim that was kept is let be."""
        if not self.is_over:
            self.is_over = True
            self._idempotency.free(self)

    @property
    def is_too_large(self) -> bool:
        return len(self._packed) > self._idempotency.max_answer_bytes


class RecordedResponse(Response):
    """A stream whose body its claim writes down as it goes out, and keeps before its last bytes are sent: who saw no end can ask again.

    A stream that its client left has no last piece; its key is free again.
    """

    def __init__(self, response: StreamResponse, claim: Claim) -> None:
        self.status_code = response.status_code
        self.background = None
        self.raw_headers = response.raw_headers
        self._response = response
        self._claim = claim
        response.sink.recorder = claim.write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def written(message: Message) -> None:
            if message["type"] == "http.response.body" and not message["more_body"]:
                await self._ended()
            await send(message)

        try:
            await self._response(scope, receive, written)
        finally:
            self._claim.free()

    async def _ended(self) -> None:
        error = self._response.sink.error
        if error is None or says_the_same_again(error):
            await self._claim.keep(self._response)


class Idempotency:
    """One gateway's claims. start() begins to renew them, stop() gives back what is left; both on the loop that everything runs on."""

    def __init__(self, store: AnswerStore, section: GatewaySection, metrics: Metrics) -> None:
        self.max_answer_bytes = section.idempotency_answer_bytes
        self._store = store
        self._metrics = metrics
        self._claims: dict[ClaimName, Claim] = {}
        # A renewal that overtook the end of a claim would bring it back.
        self._one_at_a_time = asyncio.Lock()
        self._renewer: asyncio.Task[None] | None = None
        self._frees: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._renewer = asyncio.get_running_loop().create_task(self._renew())

    async def stop(self) -> None:
        if self._renewer is not None:
            await end_tasks([self._renewer])
        for claim in list(self._claims.values()):
            claim.free()
        if self._frees:
            await asyncio.wait(self._frees, timeout=_STOP_WAIT_S)
            await end_tasks(self._frees)  # their leases end them
        await self._store.close()

    async def begin(self, name: ClaimName, until_s: float) -> Claim | StoredAnswer:
        """The claim, or the answer that is there. until_s: monotonic; a claim that nobody ended by then is renewed no more.

        Raises KeyInUseError (409), RequestError (422) where the key came with another body, CapacityError (503) without Redis.
        """
        try:
            found = await self._store.claim(name)
        except CapacityError:
            self.count("unavailable")
            self._free_soon(name)  # the reply alone may be lost: nobody else would end such a claim before its lease does
            raise
        if isinstance(found, StoredAnswer):
            self.count("replayed")
            return found
        self.count(found)
        if found == "in_progress":
            detail = f"A request with this '{_PARAM}' is still running; its answer can be had under the same key once it has ended."
            raise KeyInUseError(detail, param=_PARAM, status=409, code="idempotency_key_in_use")
        if found == "other_body":
            detail = f"This '{_PARAM}' came before, with another body; a new request needs a new key."
            raise RequestError(detail, param=_PARAM, status=422, code="idempotency_key_reused")
        claim = self._claims[name] = Claim(self, name, until_s)
        return claim

    def count(self, event: str) -> None:
        self._metrics.idempotency.labels(event).inc()

    async def keep(self, claim: Claim, answer: StoredAnswer) -> None:
        try:
            kept = await self._store.keep(claim.name, answer)
        except CapacityError as error:  # the lease ends, and a repeat runs
            log.warning("an answer could not be kept for its repeat: %s", error.detail)
            self.count("not_kept")
            return
        finally:
            self._claims.pop(claim.name, None)
        if isinstance(kept, str):
            self.count(kept)
            return
        num_evicted, num_bytes = kept
        self.count("kept")
        self._metrics.idempotency.labels("evicted").inc(num_evicted)
        self._metrics.idempotency_bytes.set(num_bytes)

    def free(self, claim: Claim) -> None:
        """Soon: whoever ends a call does not wait for Redis."""
        self._claims.pop(claim.name, None)
        self.count("freed")
        self._free_soon(claim.name)

    def _free_soon(self, name: ClaimName) -> None:
        task = asyncio.get_running_loop().create_task(self._free(name))
        self._frees.add(task)
        task.add_done_callback(self._frees.discard)

    async def _free(self, name: ClaimName) -> None:
        async with self._one_at_a_time:
            try:
                await self._store.free(name)
            except CapacityError:
                log.warning("an idempotency key could not be freed: it is free when its lease of %g s ends", self._store.lease_s)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._store.lease_s / _RENEWALS_PER_LEASE)
            async with self._one_at_a_time:
                now_s = time.monotonic()
                self._claims = {name: claim for name, claim in self._claims.items() if claim.until_s > now_s}
                try:
                    lost = await self._store.renew(list(self._claims))
                except CapacityError as error:
                    log.warning("idempotency keys could not be renewed: %s", error.detail)
                    continue
            for name in lost:
                log.warning("another gateway claimed an idempotency key whose request runs here: this gateway did not renew it in time")
                claim = self._claims.pop(name, None)
                if claim is not None:
                    claim.is_over = True
                    self.count("lost")


class ReplayedResponse(Response):
    """The answer as it was given, marked. Unpacked piece by piece as its client reads; who has not read all by until_s is cut off."""

    def __init__(self, answer: StoredAnswer, until_s: float, transport: ClientTransport | None) -> None:
        """until_s: monotonic; transport: the client's, None where it is not known and cannot be cut."""
        self.status_code = answer.status
        self.background = None
        headers = dict(answer.headers) | {REPLAYED_HEADER: "true"}
        if "text/event-stream" not in headers.get("content-type", ""):
            headers["content-length"] = str(answer.num_bytes)
        self.raw_headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        self._packed = answer.packed
        self._until_s = until_s
        self._transport = transport

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._until_s - time.monotonic()):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                for piece in _unpacked(self._packed):
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            log.info("the client of a kept answer did not read it in time and is cut off")
            if self._transport is not None:
                self._transport.abort()


def _unpacked(packed: bytes) -> Iterator[bytes]:
    unpacker = zlib.decompressobj()
    while packed and (piece := unpacker.decompress(packed, _PIECE_BYTES)):
        packed = unpacker.unconsumed_tail
        yield piece


def _digest(data: bytes, purpose: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16, person=purpose).hexdigest()
