"""Chat templates: tools and their results rendered as transformers renders them, what a template has no place for refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from duomo.config_gateway import GatewaySection
from duomo.errors import ConfigError, ModelError, RequestError
from services.router.chat_template import ChatTemplate, template_of
from services.router.conversation import ChatMessage, Conversation, FunctionTool, ToolCall, ToolUse
from services.router.markup import OutputStyle
from tests.services.router.stub_replicas import MODEL

ROOT = Path(__file__).parents[3]
TOOLS_TEMPLATE = ROOT / "deploy" / "chat_templates" / "chatml_tools.jinja"
TOOL = FunctionTool("weather", 'Tells "weather" <é>', {"type": "object", "properties": {"city": {"type": "string"}}})
TURNS = (
    ChatMessage("system", "Be brief."),
    ChatMessage("user", "Weather in Köln & Bonn?"),
    ChatMessage("assistant", "", tool_calls=(ToolCall("a", "weather", '{"city": "Köln"}'), ToolCall("b", "weather", "{}"))),
    ChatMessage("tool", "rain", tool_call_id="a"),
    ChatMessage("tool", "sun", tool_call_id="b"),
)


def _template(**options: str) -> ChatTemplate:
    made = template_of(ROOT, {}, {}, GatewaySection(chat_template=TOOLS_TEMPLATE, **options))
    assert made is not None
    return made


def test_tools_calls_and_results_are_rendered_as_transformers_does() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(MODEL)
    calls = [
        {"id": "a", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}},
        {"id": "b", "type": "function", "function": {"name": "weather", "arguments": {}}},
    ]
    turns: list[dict[str, Any]] = [{"role": turn.role, "content": turn.content} for turn in TURNS]
    turns[2]["tool_calls"] = calls
    function = {"name": TOOL.name, "description": TOOL.description, "parameters": TOOL.parameters}
    asked = {"chat_template": TOOLS_TEMPLATE.read_text(), "tokenize": False, "add_generation_prompt": True}
    mine = _template().render(Conversation(TURNS, ToolUse((TOOL,)), {"enable_thinking": False})).text
    tools = [{"type": "function", "function": function}]
    assert mine == theirs.apply_chat_template(turns, tools=tools, enable_thinking=False, **asked)
    assert '{"city": "Köln"}' in mine and "<é>" in mine and mine.count("<|im_start|>user") == 2
    plain = _template().render(Conversation(TURNS[:2])).text
    assert plain == theirs.apply_chat_template(turns[:2], **asked) and "<tools>" not in plain


def test_the_style_goes_by_the_template_and_by_what_is_asked() -> None:
    tools = ToolUse((TOOL,), is_parallel=False)
    turns = TURNS[:2]
    assert _template().render(Conversation(turns, tools)).style == OutputStyle("hermes", "outside", False)
    assert _template().render(Conversation(turns)).style == OutputStyle(None, "outside", True)
    off = ToolUse((TOOL,), "none")
    told = _template().render(Conversation(turns, off))
    assert told.style.tool_format is None and "weather" not in told.text, "functions that may not be called are not shown"
    assert not _template(reasoning_parser="none").render(Conversation(turns)).style.has_markup
    opens = ChatTemplate({"default": "{% for m in messages %}{{ m.content }}{% endfor %}</think><think>\n"}, {})
    assert opens.render(Conversation(turns)).style.reasoning == "inside"
    plain = ChatTemplate({"default": "{{ messages[0].content }}"}, {})
    assert not plain.render(Conversation(turns)).style.has_markup
    forced = ChatTemplate({"default": "{{ messages[0].content }}"}, {}, GatewaySection(reasoning_parser="think"))
    assert forced.render(Conversation(turns)).style.reasoning == "outside"


@pytest.mark.parametrize(
    ("source", "parser", "why"),
    [
        ("{{ messages[0].content }}", "auto", "gateway.chat_template"),
        ("{{ messages[0].content }}", "hermes", "gateway.chat_template"),
        ("{{ tools }}", "auto", "gateway.tool_parser: hermes"),
        ("{{ tools }}<tool_call><function=x>", "auto", "gateway.tool_parser: hermes"),
        ("{{ tools }}<tool_call>", "none", "turned off"),
    ],
)
def test_tools_that_a_template_cannot_show_or_a_parser_cannot_read_are_refused(source: str, parser: Any, why: str) -> None:
    template = ChatTemplate({"default": source}, {}, GatewaySection(tool_parser=parser))
    with pytest.raises(RequestError, match=why) as refused:
        template.render(Conversation(TURNS[:2], ToolUse((TOOL,))))
    assert refused.value.param == "tools"
    template.render(Conversation(TURNS[:2], ToolUse((TOOL,), "none")))


def test_calls_and_results_are_refused_by_their_place_where_a_template_would_drop_them() -> None:
    template = ChatTemplate({"default": "{{ messages[0].content }}"}, {})
    for turns, param in ((TURNS[:3], "messages[2].tool_calls"), ((TURNS[1], TURNS[3]), "messages[1].role")):
        with pytest.raises(RequestError) as refused:
            template.render(Conversation(turns))
        assert refused.value.param == param
    ChatTemplate({"default": "{{ tools }}"}, {}).render(Conversation(TURNS))


def test_further_names_reach_the_template_and_its_own_are_refused() -> None:
    template = ChatTemplate({"default": "{{ bos_token }}{{ mood }}{{ messages[0].role }}"}, {"bos_token": "<s>"})
    assert template.render(Conversation(TURNS[1:2], template_kwargs={"mood": "glad"})).text == "<s>gladuser"
    for name in ("messages", "tools", "add_generation_prompt", "bos_token"):
        with pytest.raises(RequestError) as refused:
            template.render(Conversation(TURNS[1:2], template_kwargs={name: []}))
        assert refused.value.param == f"chat_template_kwargs.{name}"


def test_a_result_is_named_after_its_call() -> None:
    source = "{{ tools }}{% for m in messages if m.role == 'tool' %}{{ m.name | default('?') }}: {{ m.content }} {% endfor %}"
    turns = (*TURNS, ChatMessage("tool", "own", "mine", tool_call_id="a"), ChatMessage("tool", "lost", tool_call_id="z"))
    told = ChatTemplate({"default": source}, {}).render(Conversation(turns)).text
    assert told == "Noneweather: rain weather: sun mine: own ?: lost "


def test_a_developer_is_the_system_to_a_template_that_knows_none() -> None:
    turns = Conversation((ChatMessage("developer", "x"),))
    assert ChatTemplate({"default": "{{ messages[0].role }}"}, {}).render(turns).text == "system"
    assert ChatTemplate({"default": "{{ messages[0].role }}{# developer #}"}, {}).render(turns).text == "developer"


def test_a_second_template_serves_conversations_with_tools(tmp_path: Path) -> None:
    both = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} <tool_call>"}]
    (tmp_path / "chat_template.jinja").write_text("plain")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(both[1]["template"])
    for template in (template_of(ROOT, {"chat_template": both}, {}, None), template_of(tmp_path, {}, {}, None)):
        assert template is not None
        assert template.render(Conversation(TURNS[:2])).text == "plain"
        assert template.render(Conversation(TURNS[:2], ToolUse((TOOL,)))).text == "1 <tool_call>"


def test_a_template_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for %}")
    for file in (tmp_path / "missing.jinja", broken):
        with pytest.raises(ConfigError, match="gateway.chat_template .*" + file.name):
            template_of(tmp_path, {}, {}, GatewaySection(chat_template=file))
    with pytest.raises(ModelError, match=str(tmp_path)):
        template_of(tmp_path, json.loads('{"chat_template": "{% for %}"}'), {}, None)
