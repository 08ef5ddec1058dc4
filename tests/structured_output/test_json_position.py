"""The position in a JSON text, compared with Python's own reader."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.structured_output.json_position import MAX_DIGITS, JsonPosition

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)


def at(text: str) -> JsonPosition:
    position = JsonPosition()
    assert position.feed(text.encode())
    return position


@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_a_whole_text_ends_outside_everything(value, ascii_only, indent):
    position = at(json.dumps(value, ensure_ascii=ascii_only, indent=indent))
    assert not position.in_string
    assert not position.is_at_key


@given(st.text(), st.booleans())
def test_strings_end_where_they_end(text, ascii_only):
    written = json.dumps(text, ensure_ascii=ascii_only).encode()
    position = JsonPosition()
    for i in range(len(written) - 1):
        assert position.feed(written[i : i + 1])
        assert position.in_string
    assert position.feed(b'"')
    assert not position.in_string


@pytest.mark.parametrize(
    ("text", "is_unique"),
    [
        ('{"a":1,"b":{"a":2},"c":[{"a":1}]}', True),
        ('[{"a":1},{"a":1}]', True),
        ('{"a":"a","b":"a"}', True),
        ('{"a":1,"a":2}', False),
        ('{"a":{"b":1},"a":2}', False),
        ('{"\\u0001":1,"\\u0001":1}', False),
        ('{"\\u001f":1,"\\u001F":1}', False),
        ('{"":1, "": 2}', False),
    ],
)
def test_a_duplicate_key_is_noticed(text, is_unique):
    assert JsonPosition().feed(text.encode()) == is_unique


@pytest.mark.parametrize(
    ("text", "at_key"),
    [
        ("{", True),
        ('{"a', True),
        ('{"a"', False),
        ('{"a":', False),
        ('{"a":1,', True),
        ('{"a":[1,', False),
        ("[", False),
    ],
)
def test_keys_are_distinguished_from_values(text, at_key):
    assert at(text).is_at_key == at_key


@pytest.mark.parametrize(
    ("text", "is_long"),
    [
        ("1" * MAX_DIGITS, True),
        ("-0." + "1" * (MAX_DIGITS - 1), True),
        ("1" * (MAX_DIGITS - 1), False),
        ("1e12", True),
        ("1.5e-1", False),
        (f"[{'1' * 20},2", False),
        ('"' + "1" * 20, False),
        ("true", False),
    ],
)
def test_a_number_is_long_when_more_digits_make_no_difference(text, is_long):
    assert at(text).number_is_long == is_long
