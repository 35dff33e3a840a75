"""The three-way Hello: who we are, whether peers may pair, and at which version. Knows no socket; pure but for its nonce.

    connector -> Hello(nonce c, no mac)
    listener  -> Hello(nonce l, mac = HMAC-SHA256(secret, ["listener",  nonce c, nonce l, its fields]))
    connector -> Hello(nonce c, mac = HMAC-SHA256(secret, ["connector", nonce l, nonce c, its fields]))

The fields are min_version, max_version, boot_id, replica_id, role, model_fingerprint, address; the list is MessagePack. Fresh
nonces forbid a replay, the side's name a reflection, and the fields under the mac a downgrade. An empty secret is a key too.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec

from duomo.errors import PeerError
from duomo.wire.messages import MIN_WIRE_VERSION, WIRE_VERSION, Hello, Role

Side = Literal["connector", "listener"]

NONCE_BYTES: Final = 16


def new_boot_id() -> str:
    """64 random bits in hex: names one start of one process."""
    return secrets.token_hex(8)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this process is to its peers. address: where it listens, "" when it only connects."""

    replica_id: str
    boot_id: str
    role: Role
    model_fingerprint: str
    address: str = ""
    secret: str = field(default="", repr=False)


class Handshake:
    """One side of one handshake. `peer` and `version` stand once is_done."""

    def __init__(self, identity: Identity, side: Side) -> None:
        self._identity = identity
        self._side = side
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._first: Hello | None = None
        self.peer: Hello | None = None
        self.version = 0

    @property
    def is_done(self) -> bool:
        return self.peer is not None

    def opening(self) -> Hello:
        """The connector's first Hello."""
        return self._hello(b"")

    def advance(self, hello: Hello) -> Hello | None:
        """Take the peer's Hello and give what to answer. Raises PeerError (not retryable) where it may not pair with us."""
        self.version = self._agree_on_version(hello)
        if hello.model_fingerprint != self._identity.model_fingerprint:
            raise _refusal(
                "model_mismatch",
                f"{hello.replica_id} serves model {hello.model_fingerprint!r}, "
                f"{self._identity.replica_id} {self._identity.model_fingerprint!r}",
            )
        if len(hello.nonce) < NONCE_BYTES:
            raise _refusal("bad_hello", f"the nonce must have at least {NONCE_BYTES} bytes")
        if self._side == "listener":
            if self._first is None:
                self._first = hello
                return self._hello(hello.nonce)
            if msgspec.structs.replace(hello, mac=b"") != msgspec.structs.replace(self._first, mac=b""):
                raise _refusal("bad_hello", "the second Hello differs from the first")
        other: Side = "connector" if self._side == "listener" else "listener"
        if not hmac.compare_digest(hello.mac, _mac(self._identity.secret, other, self._nonce, hello)):
            raise _refusal("bad_secret", "the peer does not hold our wire.secret (DUOMO_SECRET)")
        self.peer = hello
        return self._hello(hello.nonce) if self._side == "connector" else None

    def _agree_on_version(self, hello: Hello) -> int:
        version = min(WIRE_VERSION, hello.max_version)
        if version < max(MIN_WIRE_VERSION, hello.min_version):
            raise _refusal(
                "version_mismatch",
                f"{hello.replica_id} speaks wire versions {hello.min_version} to {hello.max_version}, "
                f"{self._identity.replica_id} {MIN_WIRE_VERSION} to {WIRE_VERSION}",
            )
        return version

    def _hello(self, peer_nonce: bytes) -> Hello:
        """Our Hello; signed when the peer's nonce is known."""
        hello = Hello(
            min_version=MIN_WIRE_VERSION,
            max_version=WIRE_VERSION,
            boot_id=self._identity.boot_id,
            replica_id=self._identity.replica_id,
            role=self._identity.role,
            model_fingerprint=self._identity.model_fingerprint,
            address=self._identity.address,
            nonce=self._nonce,
            mac=b"",
        )
        if not peer_nonce:
            return hello
        return msgspec.structs.replace(hello, mac=_mac(self._identity.secret, self._side, peer_nonce, hello))


def _mac(secret: str, side: Side, peer_nonce: bytes, hello: Hello) -> bytes:
    signed = msgspec.msgpack.encode(
        [
            side,
            peer_nonce,
            hello.nonce,
            hello.min_version,
            hello.max_version,
            hello.boot_id,
            hello.replica_id,
            hello.role,
            hello.model_fingerprint,
            hello.address,
        ]
    )
    return hmac.digest(secret.encode(), signed, hashlib.sha256)


def _refusal(code: str, detail: str) -> PeerError:
    return PeerError(detail, code=code, retryable=False)
