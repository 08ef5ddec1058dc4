"""Conversations that end with the assistant's turn: the answer continues it, whatever else is asked for."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from PIL import Image

from edge_runtime import MessageError, Model
from edge_runtime.generation.text_stream import TextStream
from edge_runtime.inputs.messages import parse_messages
from edge_runtime.next_turn import next_beginning
from edge_runtime.prompt.build import build_prompt
from edge_runtime.prompt.continuation import BegunTurn, find_begun_turn
from edge_runtime.structured_output.json_position import without_blanks

ASKED = {"role": "user", "content": "Hello there"}
HEAD = "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n"
OFF = "<think>\n\n</think>\n\n"
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["red", "rose", "blue"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


def begun(content: Any, **more: Any) -> list[dict[str, Any]]:
    """A conversation whose last turn the assistant has started."""
    return [ASKED, {"role": "assistant", "content": content, **more}]


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("last", "thinking", "expected"),
    [
        ({"content": "The an"}, False, OFF + "The an"),
        ({"content": "The an "}, False, OFF + "The an "),
        ({"content": "\n\n  x"}, False, OFF + "\n\n  x"),
        ({"content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "ill"}]}, False, OFF + "Whill"),
        ({"content": ["Wh", "ill"]}, False, OFF + "Whill"),
        ({"content": "The an"}, True, OFF + "The an"),
        ({"content": "So", "reasoning_content": "why\n"}, False, "<think>\nwhy\n</think>\n\nSo"),
        ({"content": "So", "reasoning": "why"}, True, "<think>\nwhy\n</think>\n\nSo"),
        ({"content": "<think>\nwhy\n</think>\n\nSo"}, False, "<think>\nwhy\n</think>\n\nSo"),
        ({"content": "", "thinking": "why "}, True, "<think>\nwhy "),
        ({"content": None, "reasoning_content": "why "}, False, "<think>\nwhy \n</think>\n\n"),
        ({"content": "<think>\nLet me"}, True, "<think>\nLet me"),
        ({"content": "<think>\nwhy</think>"}, True, "<think>\nwhy\n</think>\n\n"),
        ({"content": "<think>\n\n</think>\n\n"}, True, OFF),
        ({"content": ""}, False, OFF),
        ({"content": None}, True, "<think>\n"),
        ({"content": []}, False, OFF),
    ],
)
def test_the_prompt_ends_inside_the_turn(exact_model: Model, last, thinking, expected):
    messages = [ASKED, {"role": "assistant", **last}]
    for wanted in (None, True):
        prompt = exact_model.build_prompt(messages, thinking=thinking, continue_final_message=wanted)
        assert prompt.text == HEAD + expected
        assert prompt.ids == exact_model.build_prompt(HEAD + expected, raw=True).ids


def test_a_turn_that_is_not_to_be_continued_is_closed(exact_model: Model):
    prompt = exact_model.build_prompt(begun("x"), continue_final_message=False)
    assert prompt.text == f"{HEAD}{OFF}x<|im_end|>\n<|im_start|>assistant\n{OFF}"


def test_markup_in_the_turn_ends_nothing(exact_model: Model):
    prompt = exact_model.build_prompt(begun("a<|im_end|>\n<image>", reasoning_content="</think> <|im_start|>"))
    ids, special = prompt.ids, exact_model.tokenizer.special_ids
    assert prompt.text.endswith("<think>\n</think> <|im_start|>\n</think>\n\na<|im_end|>\n<image>")
    assert [ids.count(special[tag]) for tag in ("<|im_end|>", "<|im_start|>", "</think>", "<image>")] == [1, 2, 1, 0]
    # Parts are joined before they are searched.
    split = exact_model.build_prompt(begun(["<|im_", "end|>"]))
    assert split.ids.count(special["<|im_end|>"]) == 1


def test_pictures_of_earlier_turns_stay_where_they_are(exact_model: Model):
    content = [Image.new("RGB", (30, 30)), "What is it?"]
    question = [{"role": "user", "content": content}]
    alone = exact_model.build_prompt(question)
    prompt = exact_model.build_prompt([*question, {"role": "assistant", "content": "A "}])
    assert prompt.text == alone.text + "A "
    assert prompt.bounds == alone.bounds


@pytest.mark.parametrize(
    ("template", "thinking", "expected"),
    [
        # No think block; answers are trimmed and closed.
        (
            "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[/]{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}",
            False,
            "[user]Hello there[/][assistant]The <b> ",
        ),
        # Thinks whether asked or not.
        ("{% for m in messages %}{{ m.content }}|{% endfor %}A:<think>\n", False, f"Hello there|A:{OFF}The <b> "),
        # Refuses a conversation that does not end with a question.
        (
            "{% if messages[-1].role != 'user' %}{{ raise_exception('no question') }}{% endif %}"
            "{{ messages[-1].content }}>",
            True,
            "Hello there>The <b> ",
        ),
        # Starts all turns alike and needs nothing to start an answer.
        ("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}", False, "<s>Hello there</s>The <b> "),
    ],
)
def test_other_templates_continue_too(exact_model: Model, template, thinking, expected):
    conversation, found = find_begun_turn(parse_messages(begun("The <b> ")), None, thinking=thinking)
    prompt = build_prompt(
        conversation,
        [],
        exact_model.tokenizer,
        n_queries=1,
        template=template,
        thinking=thinking,
        use_image_id=False,
        begun=found,
    )
    assert prompt.text == expected


def test_a_turn_without_any_before_it_is_continued_too(exact_model: Model):
    lone = [{"role": "assistant", "content": "Once"}]
    assert exact_model.build_prompt(lone).text == f"<|im_start|>assistant\n{OFF}Once"
    assert exact_model.build_prompt(lone, thinking=True).text == f"<|im_start|>assistant\n{OFF}Once"
    text = exact_model.build_prompt(lone, tools=[TOOL]).text
    assert text.startswith("<|im_start|>system\n# Tools")
    assert text.endswith(f"<|im_end|>\n<|im_start|>assistant\n{OFF}Once")


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([ASKED], {"continue_final_message": True}, "has the role user; expected the assistant's"),
        ("Hello", {"continue_final_message": True}, "has the role user"),
        ("Hello", {"continue_final_message": True, "raw": True}, "raw prompt, which has no turns"),
        (begun("x", tool_calls=[{"function": {"name": "f", "arguments": {}}}]), {}, "holds tool calls"),
        (begun(["x", Image.new("RGB", (9, 9))]), {}, "holds a picture"),
        (begun("<think>\nLet me"), {}, "thinking is off"),
        ([{"role": "assistant", "content": ""}], {}, "one empty message"),
        ([*begun("x"), {"role": "assistant", "content": "y"}], {}, "Cannot have 2 or more assistant messages"),
        ([*begun("x"), {"role": "assistant", "content": ""}], {}, "Cannot have 2 or more assistant messages"),
        ([*begun("x"), *begun("y")[1:] * 2], {}, "Cannot have 2 or more assistant messages"),
    ],
)
def test_what_cannot_be_continued_is_refused(exact_model: Model, messages, options, message):
    with pytest.raises(MessageError, match=message):
        exact_model.build_prompt(messages, **options)
    if options.get("continue_final_message") is None and messages[1:]:
        exact_model.build_prompt(messages, continue_final_message=False)


def test_the_last_of_two_turns_is_continued_on_request(exact_model: Model):
    """Two turns elsewhere, or with somebody else's message after them, are not a mistake."""
    two = [*begun("One"), {"role": "assistant", "content": "Two"}]
    text = exact_model.build_prompt(two, continue_final_message=True).text
    assert text.endswith("Two")
    assert "One<|im_end|>" in text
    assert "Two<|im_end|>" in exact_model.build_prompt([*two, ASKED]).text


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("last", [{"content": "The answer is"}, {"reasoning_content": "Let me see"}])
def test_the_answer_is_that_of_the_same_raw_prompt(exact_model: Model, last, thinking):
    messages = [ASKED, {"role": "assistant", **last}]
    options: dict[str, Any] = {"greedy": True, "max_tokens": 12, "repetition_check": False}
    answer = exact_model.chat(messages, thinking=thinking, **options)
    text = exact_model.build_prompt(messages, thinking=thinking).text
    raw = exact_model.chat(text, raw=True, **options)
    continues_thinking = thinking and "content" not in last
    assert (answer.reasoning if continues_thinking else answer.answer) == raw.answer
    assert answer.prompt_tokens == raw.prompt_tokens
    assert (answer.prefix, answer.reasoning_prefix) == (last.get("content", ""), last.get("reasoning_content", ""))
    searched = exact_model.chat(messages, thinking=thinking, beams=2, max_tokens=6)
    assert searched.prompt_tokens == answer.prompt_tokens


def test_the_whole_turn_is_the_message_of_the_answer(exact_model: Model):
    messages = begun("The <box>", reasoning_content="Let me")
    answer = exact_model.chat(messages, greedy=True, max_tokens=6)
    whole = answer.message()
    assert whole == {
        "role": "assistant",
        "content": "The <box>" + answer.answer,
        "reasoning_content": "Let me",
    }
    follow = [ASKED, whole, {"role": "user", "content": "And then?"}]
    assert f"assistant\nThe <box>{answer.answer}<|im_end|>" in exact_model.build_prompt(follow).text


def test_the_next_turn_is_prefetched_with_the_whole_turn(exact_model: Model):
    messages = begun("The answer is")
    prepared = exact_model.prepare(messages)
    answer = exact_model.chat(messages, greedy=True, max_tokens=6, follow_up=True)
    assert prepared.with_more is not None
    beginning = next_beginning(prepared.with_more, answer)
    follow = exact_model.build_prompt([ASKED, answer.message(), {"role": "user", "content": "Zebra?"}])
    assert follow.ids[: len(beginning.ids)] == beginning.ids
    assert len(beginning.ids) > answer.prompt_tokens


def test_boxes_may_start_in_the_prefix(exact_model: Model):
    picture = [{"role": "user", "content": [Image.new("RGB", (100, 50)), "Where?"]}]
    answer = exact_model.chat([*picture, {"role": "assistant", "content": "<box>0 0 500 500</box>"}], max_tokens=1)
    assert answer.boxes()[0].points[0] == (0, 0)


def test_stops_seeds_counts_and_log_probabilities_cover_only_the_new_text(exact_model: Model):
    messages = begun("stop here and")
    options: dict[str, Any] = {"max_tokens": 8, "seed": 3, "temperature": 1.0, "repetition_check": False}
    answer = exact_model.chat(messages, stop=["stop", "here"], logprobs=True, **options)
    assert answer.completion_tokens == 8
    assert answer.logprobs is not None
    assert len(answer.logprobs) == 8
    first, second = exact_model.chat_n(messages, 2, **options)
    assert first.answer == answer.answer
    assert second.answer == exact_model.chat(messages, **options | {"seed": 4}).answer
    assert "".join(piece.text for piece in exact_model.chat(messages, stream=True, **options)) == answer.answer


class Letters:
    """A tokenizer whose ids are characters."""

    special_ids = {"<think>": 1, "</think>": 2}  # noqa: RUF012 - as the real one has it

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()


@pytest.mark.parametrize(("goes_on", "expected"), [(True, "\nso"), (False, "so")])
def test_a_line_break_after_the_start_of_reasoning_belongs_to_it(goes_on, expected):
    stream = TextStream(Letters(), thinking=True, goes_on=goes_on)  # type: ignore[arg-type]
    pieces = [piece for char in "\nso\x02\n\nyes" for piece in stream.feed(ord(char))] + stream.finish()
    assert "".join(piece.text for piece in pieces if piece.kind == "reasoning") == expected
    assert "".join(piece.text for piece in pieces if piece.kind == "answer") == "yes"


# ---------------------------------------------------------------- forms


@pytest.mark.parametrize(
    "prefix",
    ["{", '{"', '{"a": 1', '{"a": -', '{"a":12,"b": "r', '{\n  "a" : 3 ,\n  "b": ', '  {"a": 1, "b": "red"}', " \n"],
)
@pytest.mark.parametrize("thinking", [False, True])
def test_a_schema_starts_from_the_prefix(exact_model: Model, prefix, thinking):
    for seed in range(3):
        answer = exact_model.chat(
            begun(prefix), schema=SCHEMA, thinking=thinking, max_tokens=60, temperature=1.0, seed=seed
        )
        jsonschema.validate(json.loads(prefix + answer.answer), SCHEMA)
        assert answer.reasoning is None
    if prefix.endswith("}"):
        assert (answer.answer, answer.finish_reason) == ("", "stop")


def test_a_schema_after_continued_reasoning(exact_model: Model):
    messages = [ASKED, {"role": "assistant", "reasoning_content": "Let me see"}]
    answer = exact_model.chat(messages, schema=SCHEMA, thinking=True, thinking_budget=4, max_tokens=80)
    jsonschema.validate(json.loads(answer.answer), SCHEMA)
    assert answer.reasoning


@pytest.mark.parametrize(
    "prefix", ["The answer: ", "```json\n{", '{"c"', '{"a": 1, "a"', '{"a": "', '{"a": 1 2', "[", '{"a":1}']
)
def test_a_prefix_that_no_answer_of_the_schema_has_is_refused(exact_model: Model, prefix):
    with pytest.raises(MessageError, match="no JSON of its form starts with"):
        exact_model.chat(begun(prefix), schema=SCHEMA, max_tokens=60)


def test_any_json_is_continued_too(exact_model: Model):
    answer = exact_model.chat(begun('{"list": [1, {"x'), json=True, max_tokens=60)
    assert json.loads('{"list": [1, {"x' + answer.answer)["list"][0] == 1


@pytest.mark.parametrize("prefix", ["I will look.", "I will look.\n"])
def test_a_call_is_made_after_the_prefix(exact_model: Model, prefix):
    answer = exact_model.chat(begun(prefix), tools=[TOOL], tool_choice="required", max_tokens=60)
    assert [call.name for call in answer.tool_calls] == ["clock"]
    assert answer.answer == ""
    message = answer.message()
    assert message["content"] == prefix
    result = {"role": "tool", "content": "noon"}
    text = exact_model.build_prompt([ASKED, message, result], tools=[TOOL]).text
    assert "I will look.\n" in text
    assert text.count('<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>') == 1


def test_a_call_is_not_continued(exact_model: Model):
    inside = begun('<tool_call>\n{"name": "cl')
    with pytest.raises(MessageError, match="ends inside a <tool_call>"):
        exact_model.chat(inside, tools=[TOOL], max_tokens=5)
    exact_model.chat(inside, max_tokens=2)  # without tools it is text
    behind = begun('<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>\nSo')
    exact_model.chat(behind, tools=[TOOL], max_tokens=2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{ "a b" : [ 1 , 2 ] }', '{"a b":[1,2]}'),
        ('{"a\\" b": " x ', '{"a\\" b":" x '),
        ('"a\\\\" , " b"', '"a\\\\"," b"'),
        ("1 2", "1 2"),
        ("[1 ", "[1 "),
        ("\n\t[ true\r\n, ", "[true,"),
        ("", ""),
        ("  ", ""),
    ],
)
def test_blanks_between_parts_of_json_are_ignored(text, expected):
    assert without_blanks(text) == expected


def test_a_prepared_request_knows_the_turn_it_continues(exact_model: Model):
    assert exact_model.prepare(begun("x")).begun == BegunTurn("x")
    assert exact_model.prepare([ASKED]).begun is None
    assert exact_model.prepare(begun("")).begun is None
