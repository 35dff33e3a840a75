"""API keys: what is kept of one, who is found by it, and lines that are none."""

from __future__ import annotations

import pytest

from duomo.api_keys import KeyRing, hashed, make_key, parse_entries, parse_line
from duomo.errors import ConfigError


def test_a_key_is_found_by_its_holder_alone_and_nothing_of_it_is_kept() -> None:
    keys = [make_key(f"tenant-{number}", ["inference"]) for number in range(7)]
    text = "# a comment\n\n" + "\n".join(entry.line() for _, entry in keys)
    ring = KeyRing(parse_entries(text))
    for number, (key, _) in enumerate(keys):
        holder = ring.holder(key)
        assert holder is not None and (holder.name, holder.scopes) == (f"tenant-{number}", ("inference",))
        secret = key.rsplit("-", 1)[1]
        assert len(bytes.fromhex(secret)) == 32 and secret not in text, "256 random bits, and only their hash is kept"
        for wrong in (key[:-1], key + "0", key.upper(), key.replace("duomo-", "duomo--"), secret, key[: key.rindex("-")]):
            assert ring.holder(wrong) is None, wrong
    one, other = keys[0][0].split("-"), keys[1][0].split("-")
    assert ring.holder(f"duomo-{one[1]}-{other[2]}") is None, "one key's id with another's secret"
    for nobodys in ("", "duomo", "duomo-", "duomo--", "x" * 100_000, "é", "\udcff"):
        assert ring.holder(nobodys) is None
    assert KeyRing(()).holder(keys[0][0]) is None


def test_equal_keys_have_different_hashes_and_both_are_found() -> None:
    first, second = hashed("token-abc123", "a", ["inference"]), hashed("token-abc123", "b", ["admin"])
    assert first.digest != second.digest, "each has a salt of its own"
    holder = KeyRing((first, second)).holder("token-abc123")
    assert holder is not None and holder.name == "a"
    assert KeyRing((second,)).holder("token-abc12") is None
    assert parse_line(first.line()) == first


def test_scopes_are_kept_in_one_order_and_each_once() -> None:
    _, entry = make_key("ops", ["admin", "inference", "admin"])
    assert entry.scopes == ("inference", "admin") and parse_line(entry.line()) == entry


@pytest.mark.parametrize("name", ["", "a b", "-a", "ä", "a" * 65, "a\n", "#a"])
def test_a_name_that_would_break_a_line_or_a_log_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="name must be"):
        make_key(name, ["inference"])


@pytest.mark.parametrize("scopes", [[], ["root"], ["inference", ""]])
def test_a_scope_that_is_none_is_refused(scopes: list[str]) -> None:
    with pytest.raises(ConfigError, match="inference, metrics, admin"):
        make_key("a", scopes)


@pytest.mark.parametrize("key", ["", "two words", "tab\tbed", "x" * 513])
def test_a_key_that_no_header_could_bring_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        hashed(key, "a", ["inference"])
    assert not key or key not in str(refusal.value)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("alice inference", "2 words"),
        ("alice inference - zz 00", "hexadecimal"),
        ("alice inference - 00 00", "16"),
        (f"alice root - {'0' * 32} {'0' * 64}", "'root'"),
        (f"al/ice inference - {'0' * 32} {'0' * 64}", "name"),
    ],
)
def test_a_line_that_is_none_is_refused_by_its_number(line: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"line 2: .*{why}"):
        parse_entries("# head\n" + line)


def test_two_of_one_name_are_refused() -> None:
    lines = [make_key("alice", ["inference"])[1].line() for _ in range(2)]
    with pytest.raises(ConfigError, match="line 2: .*alice"):
        parse_entries("\n".join(lines))


def test_two_of_one_id_are_refused_but_for_those_without() -> None:
    key, first = make_key("alice", ["inference"])
    second = hashed(key, "bob", ["admin"], first.key_id)
    with pytest.raises(ConfigError, match=f"line 2: the key bob has the ID of another, {first.key_id}"):
        parse_entries(f"{first.line()}\n{second.line()}")
    without = [hashed(f"own {name}".replace(" ", "-"), name, ["inference"]).line() for name in ("carol", "dave")]
    assert len(parse_entries("\n".join(without))) == 2
