"""PURE: owns the batch sizes for which a decode step is captured. Knows no graph and no request.

A step of n rows runs in the smallest bucket that holds them; its other rows are dead: they route to no expert and read no key, so what they
cost is rows of the dense products, which read the same weights for any of them. Steps of 8, 16 and 32 rows keep the capture short.
"""

from __future__ import annotations

MAX_BATCH = 256
BUCKETS: tuple[int, ...] = (1, 2, 4, 8, *range(16, 64, 8), *range(64, 128, 16), *range(128, MAX_BATCH + 1, 32))


def bucket_of(num_rows: int) -> int:
    """The smallest bucket of so many rows."""
    assert 1 <= num_rows <= MAX_BATCH, f"{num_rows} rows: 1 to {MAX_BATCH}"
    return next(bucket for bucket in BUCKETS if bucket >= num_rows)


def buckets_up_to(max_batch: int) -> tuple[int, ...]:
    """Every bucket that batches of 1 to max_batch rows use; the last one may be larger than max_batch."""
    return tuple(bucket for bucket in BUCKETS if bucket <= bucket_of(max_batch))
