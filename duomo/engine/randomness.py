"""Owns the random numbers of sampling: a pure function of (seed, choice, position). Knows no batch and keeps no state.

Three rounds of SplitMix64's finaliser (Steele, Lea and Flood 2014), one for each word of the counter.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, choice: int, position: int) -> float:
    """In [0, 1), 53 bits. seed: any integer, its low 64 bits count; position: the sampled token's place in prompt + output."""
    state = _mix(seed & _MASK)
    state = _mix((state + choice) & _MASK)
    return (_mix((state + position) & _MASK) >> 11) * 2.0**-53
