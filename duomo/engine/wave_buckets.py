"""PURE: owns the numbers of rows, and of prompts, for which a wave's layers are captured. Knows no graph and no prompt."""

from __future__ import annotations

# Steps of a quarter at most above 128 rows, where a row costs time; below, the weights' bytes are all, whatever the rows.
WAVE_BUCKETS: tuple[int, ...] = (16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1152, 1280, 1536, 1792, 2048)

MAX_WAVE_PROMPTS = 16  # of a wave that replays graphs, and of those that run before ready


def wave_buckets_up_to(max_rows: int) -> tuple[int, ...]:
    """Every bucket that waves of up to max_rows rows use; the last one may be larger, as far as there are any."""
    needed = next((bucket for bucket in WAVE_BUCKETS if bucket >= max_rows), WAVE_BUCKETS[-1])
    return tuple(bucket for bucket in WAVE_BUCKETS if bucket <= needed)
