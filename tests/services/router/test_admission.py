"""The pure decision to admit, queue or refuse."""

from __future__ import annotations

import pytest

from services.router.admission import Admit, Queue, Refuse, decide, never_fits
from services.router.policy import DecodeView, Need, PrefillView

P = PrefillView(key="p", queued_tokens=0, room_tokens=0, num_blocks=64, block_tokens=16, wave_tokens=512, max_queued_tokens=4096)
D = DecodeView(key="d", free_blocks=32, num_blocks=32, block_tokens=16, watermark_blocks=4, num_choices=0, max_choices=16)
NEED = Need(num_tokens=60, new_tokens=60, num_choices=1, ahead_tokens=256)


def _with(view: object, **fields: object) -> object:
    return type(view)(**({name: getattr(view, name) for name in view.__slots__} | fields))


def _decide(need: Need = NEED, prefills: tuple = (P,), decodes: tuple = (D,), waiting: int = 0, most: int = 3) -> object:
    return decide(need, prefills, decodes, num_waiting=waiting, max_waiting=most)


def test_room_admits_and_a_line_or_no_room_queues() -> None:
    decision = _decide()
    assert isinstance(decision, Admit) and (decision.route.decode, decision.route.num_blocks) == ("d", 8)
    assert isinstance(_decide(waiting=1), Queue), "those that wait go first"
    assert isinstance(_decide(decodes=(_with(D, free_blocks=5, num_choices=3),)), Queue)


def test_a_full_line_is_429_with_retry_after() -> None:
    decision = _decide(waiting=3)
    assert isinstance(decision, Refuse) and (decision.status, decision.code) == (429, "queue_full") and decision.retry_after_s > 0


def test_a_missing_pool_is_503_and_says_which() -> None:
    assert _decide(prefills=()).code == "no_prefill_replica"
    assert _decide(decodes=(_with(D, is_open=False),)).code == "no_decode_replica"
    assert _decide(decodes=()).status == 503


@pytest.mark.parametrize(
    ("need", "fits"),
    [
        (Need(num_tokens=500, new_tokens=12, num_choices=1, ahead_tokens=256), True),
        (Need(num_tokens=500, new_tokens=13, num_choices=1, ahead_tokens=256), False),
        (Need(num_tokens=10, new_tokens=600, num_choices=1, ahead_tokens=16), False),
        (Need(num_tokens=16, new_tokens=16, num_choices=31, ahead_tokens=16), True),
        (Need(num_tokens=16, new_tokens=16, num_choices=32, ahead_tokens=16), False),
    ],
)
def test_what_never_fits_an_empty_pool_is_400_with_the_limit(need: Need, fits: bool) -> None:
    decision = _decide(need)
    assert isinstance(decision, Admit) == fits
    if not fits:
        assert (decision.status, decision.code) == (400, "never_fits") and "512 tokens" in decision.detail


def test_a_prompt_beyond_the_prefill_pool_never_fits() -> None:
    need = Need(num_tokens=1025, new_tokens=1, num_choices=1, ahead_tokens=1)
    assert "1024" in (never_fits(need, (P,), (_with(D, num_blocks=500),)) or "")
