"""The markup of a chat's output: what is read does not depend on how it comes in pieces, and nothing of it is lost."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router import markup
from services.router.markup import OutputReader, OutputStyle
from services.router.output_parts import CallArguments, CallBlock, CallOpened, ReasoningBlock, TextBlock, blocks_of

BOTH = OutputStyle("hermes", "outside")
WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln \\"K\\" {", "days": [1, {"a": "]"}]}}\n</tool_call>'
CITY = '{"city": "Köln \\"K\\" {", "days": [1, {"a": "]"}]}'


def _blocks(pieces: list[str], style: OutputStyle = BOTH) -> list[tuple[str, ...]]:
    reader = OutputReader(style)
    parts = [part for piece in pieces for part in reader.push(piece)] + reader.finish()
    shown: list[tuple[str, ...]] = []
    for block in blocks_of(parts):
        if isinstance(block, CallBlock):
            assert block.call_id.startswith("call_") and len(block.call_id) == 29
            shown.append(("call", block.name, block.arguments))
        else:
            shown.append(("think" if isinstance(block, ReasoningBlock) else "text", block.text))
    assert len({part.call_id for part in parts if isinstance(part, CallOpened)}) == sum(one[0] == "call" for one in shown)
    return shown


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("", []),
        ("hello ", [("text", "hello ")]),
        ("<think>\nwell,\n so\n</think>\n\nHello\n", [("think", "well,\n so"), ("text", "Hello\n")]),
        ("\n<think>only", [("think", "only")]),
        ("<think>a</think>", [("think", "a")]),
        ("<think></think>\nhi", [("text", "hi")]),
        ("<thinking> hi", [("text", "<thinking> hi")]),
        ("say <think> loudly", [("text", "say <think> loudly")]),
        ("<thi", [("text", "<thi")]),
        (WEATHER, [("call", "weather", CITY)]),
        (WEATHER.removesuffix("\n</tool_call>"), [("call", "weather", CITY)]),
        ("<think>x</think>\nSure.\n" + WEATHER + "\n", [("think", "x"), ("text", "Sure."), ("call", "weather", CITY)]),
        (WEATHER + "\n" + WEATHER, [("call", "weather", CITY)] * 2),
        (WEATHER.removesuffix("</tool_call>") + WEATHER + "\nDone.", [("call", "weather", CITY)] * 2 + [("text", "Done.")]),
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', [("call", "f", '{"a": 1}')]),
        ('<tool_call>{"name": "f"}</tool_call> bye', [("call", "f", "{}"), ("text", "bye")]),
        ('<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>', [("call", "f", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [("call", "f", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}, "id": 3}</tool_call>', [("call", "f", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "arguments": {"a": ', [("call", "f", '{"a": ')]),
        ('ok \n<tool_call>{"name": "f', [("text", 'ok \n<tool_call>{"name": "f')]),
        ("the \n<tool_call> mark", [("text", "the \n<tool_call> mark")]),
        ('<tool_call>{"nom": 1}</tool_call> x', [("text", '<tool_call>{"nom": 1}</tool_call> x')]),
        ("<tool_call>[1]</tool_call>" + WEATHER, [("text", "<tool_call>[1]</tool_call>"), ("call", "weather", CITY)]),
        ("a < b <tool", [("text", "a < b <tool")]),
    ],
)
def test_what_is_said_is_read_the_same_whole_and_by_characters(said: str, read: list[tuple[str, ...]]) -> None:
    assert _blocks([said]) == read
    assert _blocks(list(said)) == read


def test_an_output_may_start_inside_and_styles_may_be_off() -> None:
    inside = OutputStyle(None, "inside")
    assert _blocks(["so\n", "</think>", "\nhi ", WEATHER], inside) == [("think", "so"), ("text", "hi " + WEATHER)]
    assert _blocks(["<think>a</think>b", WEATHER], OutputStyle("hermes", "none")) == [
        ("text", "<think>a</think>b"),
        ("call", "weather", CITY),
    ]
    assert not OutputStyle().has_markup and _blocks(["<think>" + WEATHER], OutputStyle()) == [("text", "<think>" + WEATHER)]


@pytest.mark.parametrize("call", ['{"name": "\\ud800", "arguments": {}}', '{"arguments": {"city": "\\udfff"}, "name": "weather"}'])
def test_half_a_character_in_a_call_makes_it_text(call: str) -> None:
    """No answer could be written with it."""
    told = f"<tool_call>\n{call}\n</tool_call>"
    for pieces in ([told], list(told)):
        assert all(str(part).encode() for part in _blocks(pieces, OutputStyle("hermes", "none")))
        assert not [block for block in _blocks(pieces, OutputStyle("hermes", "none")) if block[0] == "call"]


def test_where_calls_are_not_parallel_the_first_alone_is_passed_on() -> None:
    alone = OutputStyle("hermes", "none", is_parallel=False)
    assert _blocks(list(WEATHER + WEATHER + " end"), alone) == [("call", "weather", CITY), ("text", "end")]


def test_arguments_are_passed_on_as_they_grow_and_text_at_once() -> None:
    reader = OutputReader(BOTH)
    assert blocks_of(reader.push("Hi there")) == [TextBlock("Hi there")]
    opened = reader.push('<tool_call>{"name": "f", "arguments": {"a"')
    assert isinstance(opened[0], CallOpened) and opened[1] == CallArguments(0, '{"a"') and reader.has_called
    assert reader.push(': "x\\') == [CallArguments(0, ': "x\\')]
    assert reader.push('"}}') == [CallArguments(0, '"}}')], "an escaped quote ends no string"
    assert reader.push('"}}') == [CallArguments(0, '"}')]


def test_a_name_without_an_end_is_not_read_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    head, num_looks = markup._CALL_HEAD, 0

    class CountedHead:
        def match(self, text: str, start: int, end: int) -> re.Match[str] | None:
            nonlocal num_looks
            num_looks += 1
            assert end == markup._MAX_HEAD_CHARS
            return head.match(text, start, end)

    monkeypatch.setattr(markup, "_CALL_HEAD", CountedHead())
    long = '<tool_call>{"name": "' + "f" * 5000 + '", "arguments": {"a":1}}</tool_call>'
    assert _blocks(list(long)) == [("call", "f" * 5000, '{"a": 1}')], "passed on once it is complete"
    assert 0 < num_looks <= markup._MAX_HEAD_CHARS + 1
    assert _blocks([long]) == _blocks(list(long))


PIECES = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    " ",
    "\n",
    "a",
    "<",
    '{"name": "f", "arguments": {"x": "}"}}',
    "{",
    '"',
    "\\",
    "}",
]


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12), st.data())
def test_no_cut_changes_what_is_read(said: list[str], data: st.DataObject) -> None:
    text = "".join(said)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    style = data.draw(st.sampled_from([BOTH, OutputStyle("hermes", "inside"), OutputStyle("hermes", "none", is_parallel=False)]))
    assert _blocks(pieces, style) == _blocks([text], style)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_text_without_markup_stays_as_it_is(text: str) -> None:
    if "<" not in text:
        assert _blocks(list(text)) == ([("text", text)] if text else [])


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=8), st.recursive(st.integers() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3))))
def test_any_arguments_come_out_as_the_json_they_were(arguments: dict[str, object]) -> None:
    for text in (json.dumps(arguments), json.dumps(arguments, ensure_ascii=False, indent=1)):
        said = f'<tool_call>\n{{"name": "f", "arguments": {text}}}\n</tool_call>'
        assert _blocks(list(said)) == [("call", "f", text)]
