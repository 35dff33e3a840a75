"""The batch sizes that are captured."""

from __future__ import annotations

import pytest

from duomo.engine.decode_buckets import BUCKETS, MAX_BATCH, bucket_of, buckets_up_to


def test_buckets_rise_to_the_largest_batch() -> None:
    assert list(BUCKETS) == sorted(set(BUCKETS)) and BUCKETS[0] == 1 and BUCKETS[-1] == MAX_BATCH
    assert set(BUCKETS) >= {1, 2, 4, 8, 16, 24, 64, 80, 128, 160, 256} and not {72, 144} & set(BUCKETS)


def test_the_smallest_bucket_that_holds_the_rows_is_taken() -> None:
    for num_rows in range(1, MAX_BATCH + 1):
        bucket = bucket_of(num_rows)
        assert bucket >= num_rows and not any(num_rows <= other < bucket for other in BUCKETS)


def test_every_batch_up_to_a_limit_has_its_bucket() -> None:
    for limit in (1, 5, 50, 64, 256):
        assert set(buckets_up_to(limit)) == {bucket_of(num_rows) for num_rows in range(1, limit + 1)}


def test_no_batch_lies_beyond() -> None:
    for num_rows in (0, MAX_BATCH + 1):
        with pytest.raises(AssertionError, match="1 to 256"):
            bucket_of(num_rows)
