"""Frames: a message to and from bytes, for a negotiated version. Knows no socket, no peer and no service.

A frame is a 4-byte big-endian length, then a MessagePack map of that many bytes holding the message's fields and its class
name under `type`. Whatever cannot be understood is a WireError with one of CODES; nothing else leaves the decoder.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

import msgspec

from duomo.errors import WireError
from duomo.wire.messages import SINCE, WIRE_VERSION, Drain, Message
from duomo.wire.values import Sampling

UNKNOWN_MESSAGE: Final = "unknown_message"
UNKNOWN_FIELD: Final = "unknown_field"
BAD_FIELD: Final = "bad_field"
FRAME_TOO_LARGE: Final = "frame_too_large"
NOT_MSGPACK: Final = "not_msgpack"
PEER_TOO_OLD: Final = "peer_too_old"  # of the encoder alone
CODES: Final = (UNKNOWN_MESSAGE, UNKNOWN_FIELD, BAD_FIELD, FRAME_TOO_LARGE, NOT_MSGPACK)

HEADER_BYTES: Final = 4
MAX_FRAME_BYTES: Final = 64 * 1024 * 1024
_MAX_DETAIL_CHARS: Final = 200

_HEADER = struct.Struct(">I")
_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def _newer_defaults(struct: type[msgspec.Struct]) -> tuple[tuple[str, int, object], ...]:
    """(field, version, default) of what SINCE lists of it. Found once: msgspec reads a class's annotations anew each time."""
    defaults = {field.name: field.default for field in msgspec.structs.fields(struct)}
    return tuple((field, since, defaults[field]) for (name, field), since in SINCE.items() if name == struct.__name__)


_NEWER_SAMPLING: Final = _newer_defaults(Sampling)


def append_frame(out: bytearray, message: Message, *, version: int = WIRE_VERSION, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
    """Append the frame of `message` as a peer of `version` reads it. `out` is unchanged when WireError is raised."""
    start = len(out)
    out += b"\0\0\0\0"
    try:
        if version >= WIRE_VERSION:
            _ENCODER.encode_into(message, out, start + HEADER_BYTES)
        else:
            out += _encode_older(message, version)
        num_bytes = len(out) - start - HEADER_BYTES
        if num_bytes > max_frame_bytes:
            name = type(message).__name__
            raise WireError(f"{name} of {num_bytes} bytes is over the limit of {max_frame_bytes} bytes", code=FRAME_TOO_LARGE)
    except Exception:
        del out[start:]  # a half-written frame would shift every frame after it
        raise
    _HEADER.pack_into(out, start, num_bytes)


def encode(message: Message, *, version: int = WIRE_VERSION, max_frame_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """One frame, header included."""
    out = bytearray()
    append_frame(out, message, version=version, max_frame_bytes=max_frame_bytes)
    return bytes(out)


def decode(payload: bytes | memoryview) -> Message:
    """The message of one frame's payload (without its header). Raises WireError with one of CODES."""
    try:
        return _DECODER.decode(payload)
    except msgspec.ValidationError as error:
        raise WireError(str(error)[:_MAX_DETAIL_CHARS], code=_code_of(str(error))) from error
    except UnicodeDecodeError as error:
        raise WireError("a string is not UTF-8", code=BAD_FIELD) from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise WireError(f"the frame is not one MessagePack map: {error}"[:_MAX_DETAIL_CHARS], code=NOT_MSGPACK) from error


class FrameReader:
    """Cuts a byte stream into payloads. Owns the unfinished frame between two reads.

    max_frame_bytes may be changed between frames (a peer that has not proved itself gets a small one).
    """

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self.max_frame_bytes = max_frame_bytes
        self._tail = bytearray()
        self._num_needed = 0

    def payloads(self, data: bytes) -> Iterator[memoryview]:
        """All payloads that `data` completes, in order. Raises WireError at a frame over the limit, before storing it."""
        if self._tail:
            self._tail += data
            if len(self._tail) < self._num_needed:
                return
            data = bytes(self._tail)
            self._tail = bytearray()
        view = memoryview(data)
        position, end = 0, len(data)
        self._num_needed = HEADER_BYTES
        while end - position >= HEADER_BYTES:
            (num_bytes,) = _HEADER.unpack_from(data, position)
            if num_bytes > self.max_frame_bytes:
                raise WireError(f"a frame of {num_bytes} bytes is over the limit of {self.max_frame_bytes} bytes", code=FRAME_TOO_LARGE)
            stop = position + HEADER_BYTES + num_bytes
            if stop > end:
                self._num_needed = stop - position
                break
            yield view[position + HEADER_BYTES : stop]
            position = stop
        if position < end:
            self._tail = bytearray(view[position:])


def _encode_older(message: Message, version: int) -> bytes:
    """The payload without the fields that a peer of `version` does not know. Raises WireError where one may not be left out."""
    newer = _newer(type(message).__name__, version)
    sampling = getattr(message, "sampling", None)
    newer_sampling = _newer("Sampling", version) if isinstance(sampling, Sampling) else set()
    if not newer and not newer_sampling:
        return _ENCODER.encode(message)
    if isinstance(sampling, Sampling) and asks_of_peers(sampling) > version:
        raise WireError(f"a peer of wire version {version} knows none of Sampling's {', '.join(sorted(newer_sampling))}", code=PEER_TOO_OLD)
    if isinstance(message, Drain) and not message.ends:
        raise WireError(f"a peer of wire version {version} ends after every Drain", code=PEER_TOO_OLD)
    fields = msgspec.to_builtins(message, builtin_types=(bytes,))
    for field in newer:
        del fields[field]
    for field in newer_sampling:
        del fields["sampling"][field]
    return _ENCODER.encode(fields)


def asks_of_peers(sampling: Sampling) -> int:
    """The least version of a peer that samples so."""
    return max((since for field, since, default in _NEWER_SAMPLING if getattr(sampling, field) != default), default=0)


def _newer(name: str, version: int) -> set[str]:
    return {field for (named, field), since in SINCE.items() if named == name and since > version}


def _code_of(error: str) -> str:
    if error.endswith("`$.type`") or error == "Object missing required field `type`":
        return UNKNOWN_MESSAGE
    if error.startswith("Object contains unknown field"):
        return UNKNOWN_FIELD
    return BAD_FIELD
