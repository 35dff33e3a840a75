"""PURE: decides whose prompts may share KV: those that come with the same API key. Knows no request, and keeps no key."""

from __future__ import annotations

import hashlib


def cache_salt(authorization: str) -> str:
    """What salts the prefix hashes of a call with this Authorization header, on every gateway the same; "" where it brings none.

    A digest: replicas need not know keys. Whoever does not know a key can neither be given what its holder left in a prefix cache nor learn
    from times or cached_tokens that it is there. Where the gateway asks for keys, it is this one that it has looked at (auth.py).
    """
    scheme, _, credentials = authorization.strip().partition(" ")
    key = credentials.strip() or scheme
    return hashlib.blake2b(key.encode(), digest_size=16, person=b"duomo prefix").hexdigest() if key else ""
