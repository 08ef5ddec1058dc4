"""Conversations that outgrow the context: refused, or cut at their oldest turns on request."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from PIL import Image

from edge_runtime import Model, PromptTooLongError
from edge_runtime.inputs.messages import Message, parse_messages
from edge_runtime.inputs.slice_groups import Group
from edge_runtime.prompt.build import ImageLayout, Prompt
from edge_runtime.prompt.context_shift import Placed, fit, turns, without_oldest

N_CTX = 320


@pytest.fixture(scope="module")
def model(exact_folder: Path):
    with Model.load(exact_folder, exact=True, n_ctx=N_CTX) as loaded:
        yield loaded


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (70, 70), (number * 20, 255 - number * 20, 90))


def conversation(n_turns: int) -> list[dict]:
    messages: list[dict] = [{"role": "system", "content": "Be brief."}]
    for number in range(n_turns):
        messages.append({"role": "user", "content": [picture(number), f"What is number {number}?"]})
        messages.append({"role": "assistant", "content": f"It is number {number}."})
    return messages[:-1]


def ask(model: Model, messages: list[dict], **options):
    return model.chat(messages, **{"greedy": True, "max_tokens": 8, "context_shift": True} | options)


def test_it_is_refused_unless_asked_for(model):
    with pytest.raises(PromptTooLongError):
        ask(model, conversation(9), context_shift=False)


def test_the_answer_is_that_of_the_conversation_without_its_oldest_turns(model):
    messages = conversation(9)
    answer = ask(model, messages)
    n = answer.dropped_turns
    assert 0 < n < 8
    shorter = [messages[0], *messages[1 + 2 * n :]]
    expected = ask(model, shorter)
    assert (str(answer), answer.prompt_tokens) == (str(expected), expected.prompt_tokens)
    assert answer.visual_tokens == (9 - n) * model.engine.encoder.n_queries  # no picture is cut in half
    assert len(answer.slices) == 9 - n
    assert answer.prompt_tokens + 8 <= N_CTX
    prompt = model.build_prompt(messages, context_shift=True)
    assert "Be brief." in prompt.text
    assert "number 0?" not in prompt.text
    assert prompt.text.count("<image_id>0</image_id>") == 1  # renumbered
    with pytest.raises(PromptTooLongError):
        ask(model, messages[:1] + messages[1 + 2 * (n - 1) :] + conversation(9)[1:], context_shift=False)


def test_a_conversation_that_fits_stays_whole(model):
    assert ask(model, conversation(3)).dropped_turns == 0


def test_the_same_turns_stay_dropped_for_a_while_so_that_the_cache_serves(model):
    dropped = [ask(model, conversation(n)) for n in range(5, 16)]
    counts = [answer.dropped_turns for answer in dropped]
    assert counts == sorted(counts)
    assert len({count for count in counts if count}) < sum(count > 0 for count in counts)
    same = [b for a, b in itertools.pairwise(dropped) if a.dropped_turns == b.dropped_turns]
    assert all(answer.cached_tokens > answer.prompt_tokens / 2 for answer in same)


def test_a_question_that_does_not_fit_alone_is_refused_with_the_numbers(model):
    messages = [*conversation(3), {"role": "assistant", "content": "Yes."}]
    messages.append({"role": "user", "content": "word " * 500})
    with pytest.raises(PromptTooLongError, match=rf"the context holds {N_CTX}"):
        ask(model, messages)


def parsed(*roles: str) -> list[Message]:
    return parse_messages([{"role": role, "content": "x"} for role in roles])


@pytest.mark.parametrize(
    ("roles", "starts"),
    [
        ("user", [0]),
        ("system user assistant user", [1, 3]),
        ("system system user user assistant tool assistant user", [2, 7]),
        ("assistant user", [0, 1]),
        ("user assistant tool tool assistant user assistant", [0, 5]),
        ("system", []),
    ],
)
def test_turns_start_with_questions(roles, starts):
    assert turns(parsed(*roles.split())) == starts


def placed(index: int, frames: int = 1) -> Placed:
    group: Group = []
    return Placed(ImageLayout(index, (0, 0), frames), [group], [[index, frames]])


def test_frames_of_one_group_stay_together():
    messages = parse_messages(
        [{"role": "user", "content": [picture(0), "x"]}, {"role": "assistant", "content": "y"}] * 3
    )
    assert turns(messages, [placed(0), placed(1), placed(2)]) == [0, 2, 4]
    assert turns(messages, [placed(0, 2), placed(2)]) == [0, 4]
    assert turns(messages, [placed(0, 3)]) == [0]
    left, pictures = without_oldest(messages, [placed(0, 2), placed(2)], 1)
    assert left == messages[4:]
    assert [item.layout.index for item in pictures] == [0]
    assert pictures[0].sizes == [[2, 1]]


def test_no_more_than_a_quarter_is_dropped_where_turns_are_small():
    messages = parsed(*["user", "assistant"] * 50, "user")

    def build(kept, pictures):
        return Prompt("", [0] * (10 * len(kept)), [])

    for n_ctx in (400, 640, 900):
        prompt, _, n_turns = fit(build, messages, [], n_ctx, reserve_tokens=8)
        assert n_turns > 0
        assert n_ctx // 2 - 20 <= len(prompt.ids) <= n_ctx - 8
    prompt, _, n_turns = fit(build, messages, [], 30, reserve_tokens=8)
    assert (len(prompt.ids), n_turns) == (10, 50)


def test_system_messages_stay_wherever_they_are():
    turn = ["user", "assistant"]
    messages = parsed("system", *turn, "system", *turn, "user", "system", "assistant", "user")
    left, _ = without_oldest(messages, [], 3)
    assert [message.role for message in left] == ["system", "system", "system", "user"]
    left, _ = without_oldest(messages, [], 1)
    assert [message.role for message in left] == ["system", "system", *turn, "user", "system", "assistant", "user"]


@pytest.mark.parametrize(
    ("messages", "n_ctx", "left"),
    [
        ("u:90 u:20", 100, "u:20"),
        ("u:50 u:50 u:20", 100, "u:50 u:20"),
        ("u:90 u:30 u:30", 100, "u:30 u:30"),
        ("u:90 a:5 u:50 u:30", 100, "u:50 u:30"),  # the older turn is enough
        ("s:10 u:90 a:5 u:90 u:30", 100, "s:10 u:30"),
        ("u:90 u:30 a:10", 100, "u:30 a:10"),  # an answer to be continued
        ("u:90 a:10 t:30", 100, "u:90 a:10 t:30"),  # a question is not separated from its tools' results
    ],
)
def test_of_several_user_messages_the_oldest_are_dropped_where_nothing_else_helps(messages, n_ctx, left):
    roles = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    sizes = [each.split(":") for each in messages.split()]
    parsed_messages = parse_messages([{"role": roles[role], "content": "x" * int(n)} for role, n in sizes])

    def build(kept, pictures):
        return Prompt(
            " ".join(f"{message.role[0]}:{len(str(message.parts[0]))}" for message in kept),
            [0] * sum(len(str(message.parts[0])) for message in kept),
            [],
        )

    prompt, _, n_turns = fit(build, parsed_messages, [], n_ctx, reserve_tokens=4)
    assert prompt.text == left
    assert (n_turns == 0) == (left == messages)
