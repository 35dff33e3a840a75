"""Counting decoded tokens by the dozen says what counting each says."""

from __future__ import annotations

import numpy as np

from services.decode.routed_tokens import COUNTED_TOGETHER, RoutedTokens


def test_counts_are_those_of_all_tokens_and_few_wait() -> None:
    draw, routed = np.random.default_rng(0), RoutedTokens()
    expected_LE = np.zeros((3, 7), np.int64)
    assert not routed.count(3, 7).any(), "nothing was decoded"
    for at in range(3 * COUNTED_TOGETHER + 5):
        ids_LK = np.stack([draw.permutation(7)[:2] for _ in range(3)]).astype(np.int16)
        for layer, ids_K in enumerate(ids_LK):
            expected_LE[layer, ids_K] += 1
        routed.add(ids_LK.ravel())
        routed.count_when_due(3, 7)
        assert len(routed.uncounted) == (at + 1) % COUNTED_TOGETHER
    assert np.array_equal(routed.count(3, 7), expected_LE) and not routed.uncounted
    assert np.array_equal(routed.count(3, 7), expected_LE), "asked again"
