"""The gateway as it is, but blind: it sees who has room and nothing of load or prefixes, so that what it draws decides. For comparison.

python -m bench.serve.route_blind replica router --config ... --id ...
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from services.cli import main
from services.router import placing
from services.router.books import BookLimits
from services.router.legs import decode_views, prefill_views
from services.router.policy import DecodeView, PrefillView
from services.router.pools import ReplicaLink


def blind_prefills(links: Iterable[ReplicaLink], limits: BookLimits, now_s: float) -> list[PrefillView]:
    return [replace(view, queued_tokens=0, tokens_per_s=0.0, prefixes=None) for view in prefill_views(links, limits, now_s)]


def blind_decodes(links: Iterable[ReplicaLink], limits: BookLimits) -> list[DecodeView]:
    return [replace(view, prefixes=None) for view in decode_views(links, limits)]


if __name__ == "__main__":
    placing.prefill_views, placing.decode_views = blind_prefills, blind_decodes  # type: ignore[attr-defined]  # what the module calls
    main()
