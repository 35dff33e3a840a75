"""PURE: decides whose prompts may share KV: those that come with the same API key and `cache_salt`. Knows no request, and keeps no key."""

from __future__ import annotations

import hashlib


def cache_salt(authorization: str) -> str:
    """What salts the prefix hashes of a call with this Authorization header, on every gateway the same; "" where it brings none.

    A digest: replicas need not know keys. Whoever does not know a key can neither be given what its holder left in a prefix cache nor learn
    from times or cached_tokens that it is there. Where the gateway asks for keys, it is this one that it has looked at (auth.py).
    """
    scheme, _, credentials = authorization.strip().partition(" ")
    key = credentials.strip() or scheme
    return _digest(key, b"duomo prefix") if key else ""


def salted(salt: str, own: str) -> str:
    """What salts them where the body names a salt of its own: only calls of the same key that name the same one share; "" names none."""
    return _digest(f"{salt}/{own}", b"duomo own salt") if own else salt


def _digest(text: str, person: bytes) -> str:
    """person: of what kind of text, so that none of one kind is another's."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16, person=person).hexdigest()
