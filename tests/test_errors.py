"""The exception tree: every error has a code, a phase and a retryable."""

from __future__ import annotations

import re

import pytest

from duomo import errors
from duomo.errors import PHASES, CapacityError, DuomoError, PeerError, RequestError

TREE = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DuomoError)]


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_every_error_has_a_code_a_known_phase_and_its_text(kind: type[DuomoError]) -> None:
    error = kind("block 3 is missing")
    assert re.fullmatch(r"[a-z][a-z0-9_]*", error.code)
    assert error.phase in PHASES
    assert isinstance(error.retryable, bool)
    assert str(error) == f"{error.code} ({error.phase}): block 3 is missing"
    assert kind("x", code="another_word").code == "another_word"


def test_the_tree_on_top_of_the_file_is_the_tree() -> None:
    drawn = set(re.findall(r"[|`]- (\w+)", errors.__doc__ or ""))
    assert drawn == {kind.__name__ for kind in TREE} - {"DuomoError"}


def test_what_only_some_errors_carry() -> None:
    refused = RequestError("max_tokens must be at least 1, not -5", param="max_tokens", status=422)
    assert (refused.param, refused.status, refused.retryable) == ("max_tokens", 422, False)
    full = CapacityError("decode is full", retry_after_s=2.5, code="decode_full", phase="decode.admit")
    assert (full.retry_after_s, full.code, full.phase, full.retryable) == (2.5, "decode_full", "decode.admit", True)
    assert PeerError("gone").retryable and not PeerError("not ours", retryable=False).retryable
