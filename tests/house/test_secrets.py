"""Who dials or listens between processes brings the secret, and secrets are compared in constant time. Knows the code by its text alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from source_tree import ROOT, Source, dotted, plant, sources

ROOMS = ("services", "duomo")
SECRETS = {"secret", "mac", "digest", "key", "token"}


def test_every_identity_has_the_secret() -> None:
    found = [problem for source in sources(ROOT, ROOMS) for problem in without_secret(source)]
    assert not found, "\n".join(found)
    assert sum("Identity(" in source.text for source in sources(ROOT, ROOMS)) >= 2, "gateways and replicas make them"


def test_no_secret_is_compared_byte_by_byte() -> None:
    files = [source for source in sources(ROOT, ROOMS) if source.path in ("duomo/wire/handshake.py", "duomo/api_keys.py")]
    assert len(files) == 2 and all("hmac.compare_digest(" in source.text for source in files)
    found = [problem for source in files for problem in compared(source)]
    assert not found, "\n".join(found)


def without_secret(source: Source) -> list[str]:
    """Identities that are made without naming a secret: an empty one pairs with everybody who has none."""
    calls = (node for node in ast.walk(source.tree) if isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] == "Identity")
    return [
        f"{source.path}:{node.lineno} an Identity without secret=" for node in calls if "secret" not in {each.arg for each in node.keywords}
    ]


def compared(source: Source) -> list[str]:
    """== and != with a name or attribute of a secret on either side."""
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Compare) and any(isinstance(operator, ast.Eq | ast.NotEq) for operator in node.ops):
            names = {dotted(side).split(".")[-1] for side in (node.left, *node.comparators)}
            found += [f"{source.path}:{node.lineno} compares {name}: use hmac.compare_digest" for name in sorted(names & SECRETS)]
    return found


@pytest.mark.parametrize(
    ("text", "is_caught"),
    [
        ("Identity(replica_id='a', secret=s)\n", False),
        ("Identity(replica_id='a')\n", True),
        ("handshake.Identity('a', 'b')\n", True),
    ],
)
def test_a_planted_identity_is_caught(tmp_path: Path, text: str, is_caught: bool) -> None:
    assert bool(without_secret(plant(tmp_path, "services/x.py", text))) is is_caught


@pytest.mark.parametrize(("text", "is_caught"), [("a.mac == b\n", True), ("x = digest != other\n", True), ("a.name == b.name\n", False)])
def test_a_planted_comparison_is_caught(tmp_path: Path, text: str, is_caught: bool) -> None:
    assert bool(compared(plant(tmp_path, "services/x.py", text))) is is_caught
