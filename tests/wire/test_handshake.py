"""Who may pair, at which version, and what a stranger can try."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from duomo.errors import PeerError
from duomo.wire.handshake import Handshake, Identity, new_boot_id
from duomo.wire.messages import WIRE_VERSION, Hello

GATEWAY = Identity("router-0", "00000000000000f1", "gateway", "tiny:1", secret="s3cret")
DECODE = Identity("decode-0", "00000000000000d1", "decode", "tiny:1", "unix:/tmp/d.sock", "s3cret")


def shake(connector: Handshake, listener: Handshake) -> None:
    answer = listener.advance(connector.opening())
    assert answer is not None
    proof = connector.advance(answer)
    assert proof is not None
    assert listener.advance(proof) is None


def test_two_who_share_model_and_secret_pair() -> None:
    connector, listener = Handshake(GATEWAY, "connector"), Handshake(DECODE, "listener")
    shake(connector, listener)
    assert connector.peer is not None and listener.peer is not None
    assert (connector.peer.replica_id, connector.peer.role, connector.peer.address) == ("decode-0", "decode", "unix:/tmp/d.sock")
    assert (listener.peer.replica_id, listener.peer.boot_id) == ("router-0", "00000000000000f1")
    assert connector.version == listener.version == WIRE_VERSION


def test_no_secret_on_both_sides_is_a_shared_secret() -> None:
    shake(Handshake(dataclasses.replace(GATEWAY, secret=""), "connector"), Handshake(dataclasses.replace(DECODE, secret=""), "listener"))


@pytest.mark.parametrize("secret", ["", "s3cre", "S3cret", "s3cret ", "é"])
def test_another_secret_is_refused_by_the_connector(secret: str) -> None:
    connector, listener = Handshake(GATEWAY, "connector"), Handshake(dataclasses.replace(DECODE, secret=secret), "listener")
    answer = listener.advance(connector.opening())
    assert answer is not None
    with pytest.raises(PeerError) as refusal:
        connector.advance(answer)
    assert (refusal.value.code, refusal.value.retryable) == ("bad_secret", False)
    assert "s3cret" not in str(refusal.value)


def test_a_connector_without_the_secret_is_refused_by_the_listener() -> None:
    connector, listener = Handshake(GATEWAY, "connector"), Handshake(DECODE, "listener")
    assert listener.advance(connector.opening()) is not None
    with pytest.raises(PeerError, match="bad_secret"):
        listener.advance(connector.opening())
    assert listener.peer is None


def test_a_reflected_or_replayed_proof_is_refused() -> None:
    listener = Handshake(DECODE, "listener")
    opening = Handshake(GATEWAY, "connector").opening()
    mine = listener.advance(opening)
    assert mine is not None
    reflected = msgspec.structs.replace(opening, mac=mine.mac)
    with pytest.raises(PeerError, match="bad_secret"):
        listener.advance(reflected)

    recorded = Handshake(GATEWAY, "connector")
    first = Handshake(DECODE, "listener")
    answer = first.advance(recorded.opening())
    assert answer is not None
    proof = recorded.advance(answer)
    assert proof is not None
    again = Handshake(DECODE, "listener")
    again.advance(recorded.opening())
    with pytest.raises(PeerError, match="bad_secret"):
        again.advance(proof)


@pytest.mark.parametrize("change", [{"replica_id": "router-9"}, {"max_version": 4}, {"role": "prefill"}, {"address": "tcp:evil:1"}])
def test_fields_cannot_be_changed_on_the_way(change: dict[str, object]) -> None:
    connector, listener = Handshake(GATEWAY, "connector"), Handshake(DECODE, "listener")
    answer = listener.advance(connector.opening())
    assert answer is not None
    with pytest.raises(PeerError, match="bad_secret"):
        connector.advance(msgspec.structs.replace(answer, **change))
    with pytest.raises(PeerError, match="bad_hello"):
        listener.advance(msgspec.structs.replace(connector.opening(), **change))


def test_another_model_never_pairs() -> None:
    with pytest.raises(PeerError, match="tiny:2") as refusal:
        Handshake(DECODE, "listener").advance(Handshake(dataclasses.replace(GATEWAY, model_fingerprint="tiny:2"), "connector").opening())
    assert (refusal.value.code, refusal.value.retryable) == ("model_mismatch", False)


@pytest.mark.parametrize(
    ("low", "high", "version"), [(1, 3, None), (1, 4, 4), (4, 4, 4), (4, 5, 5), (1, 9, 5), (5, 6, 5), (6, 7, None), (-5, 0, None)]
)
def test_the_highest_version_that_both_speak(low: int, high: int, version: int | None) -> None:
    listener = Handshake(DECODE, "listener")
    opening = msgspec.structs.replace(Handshake(GATEWAY, "connector").opening(), min_version=low, max_version=high)
    if version is None:
        with pytest.raises(PeerError, match="version_mismatch"):
            listener.advance(opening)
    else:
        assert isinstance(listener.advance(opening), Hello)
        assert listener.version == version


def test_a_short_nonce_is_refused() -> None:
    opening = msgspec.structs.replace(Handshake(GATEWAY, "connector").opening(), nonce=b"short")
    with pytest.raises(PeerError, match="bad_hello"):
        Handshake(DECODE, "listener").advance(opening)


def test_boot_ids_are_64_random_bits_and_secrets_stay_out_of_logs() -> None:
    ids = {new_boot_id() for _ in range(257)}
    assert len(ids) == 257 and all(len(bytes.fromhex(boot_id)) == 8 for boot_id in ids)
    assert "s3cret" not in repr(GATEWAY)
