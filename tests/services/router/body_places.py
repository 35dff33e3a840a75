"""Bodies that nobody means, made of ones that somebody does: any value in any place. Knows no endpoint."""

from __future__ import annotations

from hypothesis import strategies as st

# "object", "text" and the like are what types are called in bodies; "f" and "a" what they call functions and calls.
odd = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.sampled_from(["\ud800", "object", "text", "f", "a", "required", "named", "tool"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.sampled_from(["type", "text"]), inner, max_size=3),
    max_leaves=6,
)


def places(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place inside a body, and one that it lacks in each of its objects."""
    found: list[tuple[str | int, ...]] = []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inner:
        found += [(*path, key), *places(below, (*path, key))]
    return [*found, (*path, "mood")] if isinstance(value, dict) else found


def with_value(body: object, place: tuple[str | int, ...], value: object) -> object:
    """The body with this value in that place."""
    if not place:
        return value
    copy = dict(body) if isinstance(body, dict) else list(body) if isinstance(body, list) else body
    copy[place[0]] = with_value(copy.get(place[0]) if isinstance(copy, dict) else copy[place[0]], place[1:], value)
    return copy
