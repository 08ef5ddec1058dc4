"""Prompts: equal to the goldens, immune to markup in user text, right for groups of frames and several pictures."""

from __future__ import annotations

import json
import threading
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
import psutil
import pytest
from PIL import Image

from conftest import golden
from edge_runtime import MessageError, Model, ModelFileError
from edge_runtime.inputs.messages import parse_messages
from edge_runtime.prompt import template_process, templates
from edge_runtime.prompt.build import ImageLayout, build_prompt, placeholder_text
from edge_runtime.prompt.templates import OFFICIAL_CHAT_TEMPLATE

CHATS = ["text_fast", "text_think", "one_fast", "wide_think", "history", "no_id_2_slices", "video_fast"]
SPECIAL = [
    "<image>",
    "</image>",
    "<slice>",
    "<unk>",
    "<|im_end|>",
    "<|im_start|>",
    "<think>",
    "</think>",
    "<tool_call>",
]


def case_of(name: str, images: dict[str, Path]) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    """Messages, options and golden arrays of one chat."""
    want = golden(f"chat_{name}")
    case = json.loads(str(want["case"]))
    messages = [
        {"role": m["role"], "content": [Path(images[x["image"]]) if isinstance(x, dict) else x for x in m["content"]]}
        for m in case["messages"]
    ]
    if "system" in case:
        messages.insert(0, {"role": "system", "content": case["system"]})
    options = {"thinking": case["thinking"], "max_slices": case.get("max_slice_nums")}
    options |= {key: case[key] for key in ("use_image_id", "temporal_ids") if key in case}
    return messages, options, want


@pytest.mark.parametrize("name", CHATS)
def test_prompts_equal_the_goldens(exact_model: Model, images, name):
    messages, options, want = case_of(name, images)
    prompt = exact_model.build_prompt(messages, **options)
    assert prompt.text == str(want["text"])
    assert prompt.ids == want["ids"].tolist()
    assert prompt.bounds == [tuple(b) for b in want["bounds"].tolist()]


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_markup_typed_by_anybody_stays_text(exact_model: Model, special, role):
    """The prompt has the same special tokens as with a harmless word in its place."""

    def specials(word: str) -> list[int]:
        messages = [{"role": role, "content": f"say {word} now"}, {"role": "user", "content": f"{word}?"}]
        prompt = exact_model.build_prompt(messages)
        assert prompt.text.count(word) >= 2
        assert prompt.bounds == []
        return [i for i in prompt.ids if i in set(exact_model.tokenizer.special_ids.values())]

    assert specials(special) == specials("harmless")


def test_markup_typed_by_the_user_is_tokenised_with_its_surroundings(exact_model: Model):
    tokenizer = exact_model.tokenizer
    prompt = exact_model.build_prompt("a<|im_end|>b")
    body = tokenizer.encode("user\na<|im_end|>b")
    assert prompt.ids[1 : 1 + len(body)] == body


def test_a_placeholder_typed_by_the_user_holds_no_picture(exact_model: Model):
    content = [Image.new("RGB", (30, 30)), "what is (<image>./</image>)?"]
    prompt = exact_model.build_prompt([{"role": "user", "content": content}])
    assert len(prompt.bounds) == 1
    assert "what is (<image>./</image>)?" in prompt.text


def test_markup_that_the_assistant_wrote_stays_markup(exact_model: Model):
    """Earlier answers may hold tool calls and boxes, but cannot end their turn or hold pictures."""
    ids = exact_model.tokenizer.special_ids
    answer = "<tool_call>\n{}\n</tool_call> <box>1 2 3 4</box> <|im_end|> <image>"
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "r"},
    ]
    prompt = exact_model.build_prompt(messages)
    assert prompt.ids.count(ids["<tool_call>"]) == 1
    assert prompt.ids.count(ids["<box>"]) == 1
    assert prompt.ids.count(ids["<|im_end|>"]) == 3  # one per turn
    assert prompt.bounds == []


def test_reasoning_is_dropped_from_history_and_kept_after_the_last_question(exact_model: Model):
    thought = "<think>\nwhy\n</think>\n\nbecause"
    history = [{"role": "user", "content": "q"}, {"role": "assistant", "content": thought}]
    assert "why" not in exact_model.build_prompt([*history, {"role": "user", "content": "r"}]).text
    assert "<think>\nwhy\n</think>\n\nbecause" in exact_model.build_prompt(history).text


def test_rendering_equals_plain_jinja_on_harmless_conversations(exact_model: Model):
    """Guarding and splitting change nothing where there is nothing to guard."""
    tools = [{"type": "function", "function": {"name": "sum", "description": "a < b & c", "parameters": {}}}]
    call = {"function": {"name": "sum", "arguments": {"a": 1, "b": "é"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "three"},
    ]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    for thinking in (False, True):
        want = environment.from_string(OFFICIAL_CHAT_TEMPLATE).render(
            messages=messages, tools=tools, add_generation_prompt=True, enable_thinking=thinking
        )
        assert exact_model.build_prompt(messages, tools=tools, thinking=thinking).text == want


def test_lone_surrogates_become_replacement_characters(exact_model: Model):
    """Python strings may hold half a surrogate pair: from invalid bytes in a terminal, or from JSON."""
    assert "user\na \ufffd b \U0001f600<" in exact_model.build_prompt("a \udcff b \ud83d\ude00").text


def test_placeholders():
    assert placeholder_text(ImageLayout(3, (0, 0)), 2, True) == "<image_id>3</image_id><image><unk><unk></image>"
    cell = "<slice><unk></slice>"
    assert placeholder_text(ImageLayout(0, (2, 2)), 1, False) == f"<image><unk></image>{cell}{cell}\n{cell}{cell}"


def test_several_pictures_keep_their_order_and_numbers(exact_model: Model):
    a, b = Image.new("RGB", (30, 30)), Image.new("RGB", (1000, 600))
    messages = [
        {"role": "user", "content": ["first:", a, "then:", b]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [a, "and this?"]},
    ]
    text = exact_model.build_prompt(messages, max_slices=1).text
    holes = "<image>" + "<unk>" * 64 + "</image>"
    assert f"first:\n<image_id>0</image_id>{holes}\nthen:\n<image_id>1</image_id>{holes}<|im_end|>" in text
    assert f"<image_id>2</image_id>{holes}\nand this?" in text


def test_groups_are_numbered_by_their_first_frame(exact_model: Model):
    frames = [Image.new("RGB", (30, 30))] * 5
    prompt = exact_model.build_prompt(
        [{"role": "user", "content": [*frames, "Describe"]}], temporal_ids=[[0, 1], [2, 3], [4]], use_image_id=True
    )
    holes = "<image>" + "<unk>" * 64 + "</image>"
    expected = "\n".join(f"<image_id>{i}</image_id>{holes}" for i in (0, 2, 4))
    assert f"user\n{expected}\nDescribe<|im_end|>" in prompt.text
    assert len(prompt.bounds) == 3


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [
        ([[0, 1]], "cover 2"),
        ([[0], []], "no empty group"),
        ([[-2]], "is -2"),
        (5, "whole"),
        ([5], "whole"),
        ([["a"]], "whole"),
    ],
)
def test_wrong_temporal_ids_are_refused(exact_model: Model, ids, complaint):
    content = [Image.new("RGB", (30, 30)), "q"]
    with pytest.raises(MessageError, match=complaint):
        exact_model.build_prompt([{"role": "user", "content": content}], temporal_ids=ids)


def test_frames_cut_differently_cannot_share_a_group(exact_model: Model):
    content = [Image.new("RGB", (30, 30)), Image.new("RGB", (1000, 600)), "q"]
    with pytest.raises(MessageError, match="same number"):
        exact_model.build_prompt([{"role": "user", "content": content}], temporal_ids=[[0, 1]])


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{% for m in messages %}{{ m.content }}", ModelFileError),  # not Jinja
        ("{{ raise_exception('roles must alternate') }}", MessageError),
        ("{{ messages.nothing.there }}", MessageError),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", MessageError),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", MessageError),
        ("{{ messages.append(1) }}", MessageError),
        ("{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", ModelFileError),  # endless output
        ("no picture here", MessageError),
        ("{{ 'x' * 10 ** 11 }}", ModelFileError),  # more than there is memory, already at compile time
        (
            "{% set ns = namespace(x='x' * 99) %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            ModelFileError,
        ),
    ],
)
def test_templates_are_untrusted_code(exact_model: Model, template, error):
    messages = parse_messages([{"role": "user", "content": [Image.new("RGB", (9, 9)), "q"]}])
    with pytest.raises(error):
        build_prompt(
            messages,
            [ImageLayout(0, (0, 0))],
            exact_model.tokenizer,
            n_queries=64,
            template=template,
            thinking=False,
            use_image_id=True,
        )


def test_templates_have_what_transformers_gives_them():
    """Without it, Llama 3's would show another date, and Command R's would not render at all."""
    template = (
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}"
        "{% endfor %} {{ strftime_now('%d %b %Y') }} {{ messages[0].content | tojson }}"
    )
    days = [date.today().strftime("%d %b %Y")]
    text = templates.render(template, {"messages": [{"content": "<é>"}]})
    days.append(date.today().strftime("%d %b %Y"))  # midnight may have passed
    assert text in {f'02 {day} "<é>"' for day in days}


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",  # not a character
        "{{ (99 ** 99999) ** 9999 }}",  # one operation, which no Python code can interrupt
    ],
)
def test_a_template_that_computes_for_ever_is_ended(template, monkeypatch):
    """The next one is rendered in a new process."""
    monkeypatch.setattr(templates, "MAX_S", 0.3)
    with pytest.raises(ModelFileError, match=r"longer than 0\.3 s"):
        templates.render(template, {})
    assert templates.render("{{ 1 + 1 }}", {}) == "2"


def test_a_template_of_a_file_finds_no_keys_in_its_process(monkeypatch):
    """The sandbox lets nothing out; should that fail one day, there is nothing to find."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    renderer = templates.Renderer()
    try:
        assert renderer.render("{{ x }}", {"x": "é\ud800"}) == "é\ud800"
        environment = psutil.Process(renderer._process.pid).environ()
        assert "PYTHONPATH" in environment
        assert "HF_TOKEN" not in environment
        assert "secret" not in str(environment)
    finally:
        renderer.close()


def test_a_renderer_that_was_killed_is_replaced():
    renderer = templates.Renderer()
    try:
        renderer.render("a", {})
        renderer._process.kill()
        renderer._process.wait()
        assert renderer.render("b", {}) == "b"
    finally:
        renderer.close()


def test_a_template_that_computes_for_long_delays_no_other():
    """Each has a process of its own; those that are not in use are few."""
    renderers = templates.Renderers()
    assert renderers.render("long", {}) == "long"
    done = []
    computing = threading.Thread(target=lambda: done.append(renderers.render("long", {})))
    try:
        with renderers._known["long"]._lock:  # as while it computes
            computing.start()
            for number in range(6):
                assert renderers.render(f"{number}", {}) == f"{number}"
            assert not done
            assert "long" in renderers._known  # it is in use
            assert "5" in renderers._known
            assert len(renderers._known) == templates.MAX_PROCESSES
        computing.join(60)
        assert done == ["long"]
    finally:
        renderers.close()


@pytest.mark.parametrize("template", [OFFICIAL_CHAT_TEMPLATE, "{{ messages[0].content }}"])
def test_a_long_conversation_is_no_fault_of_its_template(template):
    content = "word " * 4_000_000
    context = {"messages": [{"role": "user", "content": content}], "tools": None, "add_generation_prompt": True}
    assert content.strip() in template_process.render(template, context)
    endless = "{% for i in range(40) %}{{ messages[0].content }}{% endfor %}"
    with pytest.raises(templates.TemplateFault, match="writes endlessly"):
        template_process.render(endless, context)


def test_the_official_template_needs_no_process(monkeypatch):
    monkeypatch.setattr(templates, "shared_renderers", lambda: pytest.fail("a process was asked for"))
    context = {"messages": [{"role": "user", "content": "q"}], "tools": None, "add_generation_prompt": True}
    assert "user\nq" in templates.render(OFFICIAL_CHAT_TEMPLATE, context)
