"""PURE: owns the numbers of rows, and of prompts, for which a wave's layers are captured. Knows no graph and no prompt."""

from __future__ import annotations

# Twelve, as many as are captured within a minute (design 3.3). Rows past a wave's own take no expert, so that they cost dense products and
# attention alone. Below 256 rows the experts' bytes are all, whatever the rows. Above, 512 is the chunk of our own baseline, and between
# buckets there are half as many rows more at most, a third from 768 on. Up to 4,096 rows, and a little further, launching kernel by kernel
# would take the host longer than the GPU needs for a model of OLMoE's width.
WAVE_BUCKETS: tuple[int, ...] = (16, 64, 128, 256, 512, 768, 1024, 1280, 1536, 2048, 3072, 4096)

ALONE_MIN_ROWS = 1024  # from here on twice: for a prompt alone, and for several or under a prefix (gpu_captured_layers.py)
MAX_WAVE_PROMPTS = 16  # of a wave that replays graphs, and of those that run before ready


def wave_buckets_up_to(max_rows: int) -> tuple[int, ...]:
    """Every bucket that waves of up to max_rows rows use; the last one may be larger, as far as there are any."""
    needed = next((bucket for bucket in WAVE_BUCKETS if bucket >= max_rows), WAVE_BUCKETS[-1])
    return tuple(bucket for bucket in WAVE_BUCKETS if bucket <= needed)
