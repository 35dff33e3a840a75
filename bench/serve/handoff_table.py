"""Owns what a person reads of a result of `duomo bench handoff`: rates, ratios to the plain copy, and what UCX wrote by. Knows no agent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def table(report: Mapping[str, Any]) -> list[str]:
    """Lines; all rates are medians in GB/s."""
    lines = [f"{report['handoff_bytes'] >> 20} MiB, {report['device']}, {report['cpu']}, {report['cores']} cores, load {report['load']}"]
    lines.append(f"ratios are to: {report['copy']}")
    for name, way in report["ways"].items():
        lanes = sorted({lane for row in way["handoffs"] for lane in row["lanes"]})
        lines += [f"{name}: {way['what']}: {' + '.join(lanes) or 'not told'}", _head("writes alone")]
        lines += [_line(f"{row['what']}, {row['message_mib']} MiB", row) for row in way["transport"]]
        lines.append(f"{_head('whole handoffs')}   its writes: GB/s, ratio")
        for row in way["handoffs"]:
            of = f"{row['slot_mib']} MiB, {row['in_flight']} in flight, {row['num_groups']} groups"
            writes = row["writes"]
            lines.append(f"{_line(of, row['whole'])}   {writes['gb_per_s']['median']:.2f} {writes['to_copy']:.2f}")
        block, digest = way["block_ms"], way["hash_gb_per_s"]
        lines.append(
            f"  a block of {way['block_kib']} KiB: {block['median']:.2f} ms (p99 {block['p99']:.2f});"
            f" idle poll {way['poll_idle_us']:.1f} us; hash {digest['median']:.1f} GB/s"
        )
    return lines


def _head(what: str) -> str:
    return f"  {what:<36} {'GB/s':>6} {'copy':>6} {'ratio':>6} {'best':>6}"


def _line(of: str, row: Mapping[str, Any]) -> str:
    """best: the ratio of the best to the best copy."""
    speed, copy = row["gb_per_s"]["median"], row["copy_gb_per_s"]["median"]
    return f"  {of:<36} {speed:>6.2f} {copy:>6.2f} {row['to_copy']:>6.2f} {row['best_to_best_copy']:>6.2f}"
