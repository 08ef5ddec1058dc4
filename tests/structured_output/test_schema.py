"""Answers that must follow a schema: valid, whole and in time, from a model that knows nothing."""

from __future__ import annotations

import json
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edge_runtime import MessageError, Model
from edge_runtime.generation.sampling import Sampler
from edge_runtime.structured_output.grammar import Grammar, allowed_ids
from edge_runtime.structured_output.keywords import KEYWORDS
from edge_runtime.structured_output.schema import bound_schema
from edge_runtime.structured_output.shortest_completion import shortest_completion
from edge_runtime.structured_output.vocabulary import GrammarVocabulary
from schema_maker import SchemaMaker, depth, keywords

N_SCHEMAS = 200
AT_ONCE = 40
MOST_TOKENS = 1024


@pytest.fixture(scope="module")
def model(exact_folder: Path):
    with Model.load(exact_folder, n_ctx=16384) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def vocabulary(model: Model) -> GrammarVocabulary:
    return model.grammar_vocabulary


def ask(model: Model, **options: Any):
    options = {"temperature": 1.0, "seed": 7, "max_tokens": MOST_TOKENS} | options
    return model.chat("Go.", stream=True, **options)


def answer(model: Model, schema: dict[str, Any], **options: Any):
    """An answer that ended by itself and is valid."""
    made = ask(model, schema=schema, **options).result()
    assert made.finish_reason == "stop", made
    jsonschema.Draft202012Validator(schema).validate(json.loads(made.answer))
    return made


def made_schemas() -> list[dict[str, Any]]:
    return [SchemaMaker(seed).schema() for seed in range(N_SCHEMAS)]


def test_the_schemas_use_every_keyword():
    schemas = made_schemas()
    counts: Counter[str] = sum(map(keywords, schemas), Counter())
    print(", ".join(f"{name}: {counts[name]}" for name in KEYWORDS))
    assert min(counts[name] for name in KEYWORDS) >= 5
    assert max(map(depth, schemas)) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("thinking", [False, True])
def test_every_answer_is_valid_and_ends_by_itself(model, thinking):
    schemas, n_tokens, n_shortened = made_schemas(), 0, 0
    for first in range(0, N_SCHEMAS, AT_ONCE):
        batch = schemas[first : first + AT_ONCE]
        running = [ask(model, schema=schema, thinking=thinking, seed=first + i) for i, schema in enumerate(batch)]
        for schema, stream in zip(batch, running, strict=True):
            made = stream.result()
            assert made.finish_reason == "stop", (schema, made)
            assert made.completion_tokens <= MOST_TOKENS
            assert thinking or not made.reasoning
            jsonschema.Draft202012Validator(schema).validate(json.loads(made.answer))
            n_tokens += made.completion_tokens
            n_shortened += made.shortened
    print(f"{n_tokens / N_SCHEMAS:.0f} tokens on average; {n_shortened} brought to their end")


def test_every_answer_is_json_of_any_kind_when_that_is_asked_for(model):
    for seed in range(5):
        made = ask(model, json=True, seed=seed).result()
        assert made.finish_reason == "stop"
        assert isinstance(json.loads(made.answer), dict)


def test_the_vocabulary_of_the_demo_model_works_too(demo):
    schema = {"type": "object", "properties": {"word": {"type": "string", "maxLength": 9}}, "required": ["word"]}
    for thinking in (False, True):
        answer(demo, schema, thinking=thinking)


def test_without_penalties_and_draws_the_most_probable_allowed_token_is_taken(model):
    schema = {"enum": ["yes", "no", "perhaps"]}
    assert len({answer(model, schema, temperature=0, seed=seed).answer for seed in range(3)}) == 1
    assert len({answer(model, schema, temperature=5, top_p=1, seed=seed).answer for seed in range(20)}) == 3


def test_a_seed_repeats_its_answer_among_others(exact_folder):
    """In float32: with a KV cache in float16, batching moves logits enough to change a draw now and then."""
    with Model.load(exact_folder, n_ctx=16384, exact=True) as model:
        repeat_among_others(model)


def repeat_among_others(model: Model) -> None:
    schema = {"type": "array", "items": {"type": "string", "maxLength": 5}, "minItems": 4, "maxItems": 6}
    alone = answer(model, schema, seed=11).answer
    others = [ask(model, seed=seed) for seed in range(3)] + [ask(model, json=True, seed=seed) for seed in range(3)]
    assert answer(model, schema, seed=11).answer == alone
    for other in others:
        other.result()


# --- the end -----------------------------------------------------------------------------------------------------

LONG = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "rows": {"type": "array", "items": {"type": "string", "minLength": 3}},
    },
    "required": ["text", "rows"],
}


@pytest.mark.parametrize("max_tokens", [25, 40, 100])
def test_an_answer_is_whole_however_few_tokens_it_may_have(model, max_tokens):
    quotes = [i for i in range(len(model.tokenizer.tokens)) if b'"' in model.tokenizer.token_bytes(i)]
    for seed in range(4):  # no draw ends the text by itself
        made = answer(model, LONG, max_tokens=max_tokens, seed=seed, logit_bias=dict.fromkeys(quotes, -100.0))
        assert made.completion_tokens <= max_tokens
        assert made.shortened


def test_an_answer_is_whole_in_a_context_that_ends_early(exact_folder):
    with Model.load(exact_folder, n_ctx=100) as small:
        for thinking in (False, True):
            made = answer(small, LONG, thinking=thinking)
            assert made.shortened
            assert made.prompt_tokens + made.completion_tokens <= 101


def test_without_an_end_of_reasoning_there_is_no_form_after_it(model, monkeypatch):
    known = {text: i for text, i in model.tokenizer.special_ids.items() if text != "</think>"}
    monkeypatch.setattr(model.tokenizer, "special_ids", known)
    with pytest.raises(MessageError, match="lacks the token </think>"):
        ask(model, json=True, thinking=True)


def test_what_does_not_fit_at_all_ends_with_the_reason_length(model):
    made = ask(model, schema=LONG, max_tokens=3).result()
    assert made.finish_reason == "length"
    assert not made.shortened


def test_an_open_schema_has_its_own_budget_and_a_bounded_one_has_none(model):
    made = answer(model, {"type": "array", "items": {"type": "string"}, "minItems": 50}, max_tokens=4000)
    assert made.shortened
    assert 1000 < made.completion_tokens <= MOST_TOKENS
    bounded = {"type": "string", "minLength": 1500, "maxLength": 1600}
    made = answer(model, bounded, max_tokens=4000)
    assert not made.shortened
    assert made.completion_tokens > MOST_TOKENS / 2


def test_a_bracket_that_would_not_close_in_time_is_not_opened(model):
    many = {f"field_{i}": {"type": "string"} for i in range(40)}
    large = {"type": "object", "properties": many, "required": [*many]}
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 40}, "large": large}}
    schema["required"] = ["a"]
    endings = {answer(model, schema, max_tokens=200, seed=seed).shortened for seed in range(8)}
    assert endings == {True, False}


def test_reasoning_leaves_tokens_for_the_answer(model):
    for budget in (None, 10, 5000):
        made = answer(model, LONG, thinking=True, thinking_budget=budget, max_tokens=120, seed=2)
        assert made.completion_tokens <= 120
    assert len(made.reasoning) > 10


def test_an_end_token_in_the_reasoning_starts_the_answer(model, monkeypatch):
    monkeypatch.setattr(Sampler, "sample", lambda self, context, row: min(model.tokenizer.stop_ids))
    made = ask(model, schema={"const": "x"}, thinking=True).result()
    assert (made.answer, made.reasoning) == ('"x"', None)


def test_repetition_is_no_reason_to_end(model):
    schema = {"type": "array", "items": {"const": 0}, "minItems": 300, "maxItems": 300}
    assert json.loads(answer(model, schema).answer) == [0] * 300


def test_numbers_and_keys_come_to_an_end(model):
    for seed in range(3):
        text = answer(model, {"type": "array", "items": {"type": "number"}, "minItems": 30}, seed=seed).answer
        assert max(map(len, text.split(","))) < 30
        made = json.loads(
            answer(model, {"additionalProperties": {"type": "null"}, "type": "object"}, seed=seed).answer
        )
        assert max(map(len, made), default=0) <= 80


def test_keys_occur_once(model):
    schema = {
        "type": "object",
        "patternProperties": {"^[ab]{1,2}$": {"type": "integer"}},
        "additionalProperties": False,
        "minProperties": 6,
        "maxProperties": 6,
    }
    for seed in range(3):
        made = answer(model, schema, seed=seed)
        assert sorted(json.loads(made.answer)) == ["a", "aa", "ab", "b", "ba", "bb"]


def test_more_keys_than_there_are_is_an_error(model):
    schema = {
        "type": "object",
        "patternProperties": {"^[ab]$": {}},
        "additionalProperties": False,
        "minProperties": 3,
    }
    with pytest.raises(MessageError, match=r"different keys|no answer that ends"):
        ask(model, schema=schema).result()


def test_decimal_multiples_are_decimal(model):
    schema = {"type": "array", "items": {"type": "number", "multipleOf": 0.01}, "minItems": 20, "maxItems": 20}
    for number in json.loads(answer_text(model, schema), parse_float=Decimal):
        assert number % Decimal("0.01") == 0


def answer_text(model: Model, schema: dict[str, Any]) -> str:
    made = ask(model, schema=schema).result()
    assert made.finish_reason == "stop"
    return made.answer


@pytest.mark.parametrize("name", ["cafe\u0301", "a\u0001b", "\U0001f600", "<|im_end|>", "\\/\"'", ""])
def test_odd_names_are_written_as_they_are(model, name):
    schema = {"type": "object", "properties": {name: {"const": name}}, "required": [name]}
    assert json.loads(answer(model, schema).answer) == {name: name}


def test_special_tokens_are_never_allowed(vocabulary):
    grammar = Grammar({"type": "string"}, vocabulary)
    matcher, position = grammar.matcher(), grammar.position()
    special = set(vocabulary.special_token_ids)
    for token in [vocabulary.byte_tokens[byte] for byte in b'"ab"']:
        ids = set(allowed_ids(matcher, len(vocabulary.continues_number)).tolist())
        assert ids
        assert not ids & special
        assert matcher.consume_token(token)
        position.feed(vocabulary.token_bytes[token])
    assert matcher.is_stopped()


def test_the_shortest_end_is_an_end(vocabulary):
    for seed in range(60):
        grammar = Grammar(SchemaMaker(seed).schema(), vocabulary)
        ids = shortest_completion(grammar.matcher(), grammar.position(), vocabulary)
        assert ids is not None
        text = b"".join(vocabulary.token_bytes[i] for i in ids)
        jsonschema.Draft202012Validator(SchemaMaker(seed).schema()).validate(json.loads(text))


# --- what is refused ---------------------------------------------------------------------------------------------

REFUSED = [
    ({"type": "object", "properties": {"a": {"not": {"minLength": 3}}}}, r"\$\.properties\.a\.not cannot"),
    ({"type": "object", "properties": {"a": {"not": {}}}, "required": ["a"]}, r"required property 'a'"),
    ({"not": {}}, r"excludes every value"),
    ({"allOf": [{"type": "null"}, {"if": {"pattern": "a"}, "then": False}]}, r"\$\.allOf\[1\]\.if cannot"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"contains": {}, "maxContains": 1}}}, r"\$\.\$ref\.contains cannot"),
    (
        {"properties": {"a b": {"propertyNames": {"pattern": "a", "maxLength": 3}}}},
        r"\$\.properties\['a b'\]\.propertyNames",
    ),
    ({"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "minItems": 3}, r"no answer that ends"),
    ({"type": "array", "uniqueItems": "yes"}, r"\$\.uniqueItems is \"yes\"; expected true or false"),
    ({"$dynamicRef": "#a"}, r"\$\.\$dynamicRef cannot be enforced"),
    ({"type": "string", "maxLenght": 3}, r"\$\.maxLenght .* it seems to mean 'maxLength'"),
    ({"type": "object", "additional_properties": False}, r"it seems to mean 'additionalProperties'"),
    ({"anyOf": [{"type": "text"}, {"type": "null"}]}, r"\$\.anyOf\[0\]\.type is"),
    ({"anyOf": [{"pattern": "(?=a)"}, {"not": {}}]}, r"\$\.anyOf\[0\]\.pattern cannot be enforced"),
    ({"type": "text"}, r"\$\.type is \"text\"; expected one of null"),
    ({"type": "string", "maxLength": -1}, r"\$\.maxLength is -1"),
    ({"type": "string", "format": ["date"]}, r"\$\.format"),
    ({"type": "string", "format": "date", "maxLength": 3}, r"\$ cannot be enforced"),
    ({"type": "string", "pattern": "("}, r"\$\.pattern cannot be enforced: regex parse error: .*unclosed group"),
    ({"type": "string", "pattern": 3}, r"\$\.pattern is 3"),
    ({"type": "object", "patternProperties": {"(": {}}}, r"\$\.patternProperties\['\('\] cannot be enforced: regex"),
    (
        {"type": "object", "properties": {"s": {"type": "string", "pattern": "(?=a)b"}}},
        r"\$\.properties\.s\.pattern cannot",
    ),
    ({"$ref": "other.json"}, r"\$\.\$ref"),
    ({"properties": {"a": {"$id": "x", "type": "null"}}}, r"\$\.properties\.a\.\$id cannot be enforced: .*\$defs"),
    ({"type": "array", "items": {"$id": "https://a.example/b"}}, r"\$\.items\.\$id cannot"),
    ({"anyOf": [{"type": "null"}, {"$id": "#b"}]}, r"\$\.anyOf\[1\]\.\$id cannot"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$id": "a", "type": "null"}}}, r"\$\.\$ref\.\$id cannot"),
    ({"$ref": "#/$defs/no"}, r"not in this schema"),
    ({"anyOf": [{"$ref": "#/anyOf/²"}, {"type": "null"}]}, r"not in this schema"),
    ({"anyOf": [{"$ref": "#/anyOf/" + "9" * 5000}, {"type": "null"}]}, r"not in this schema"),
    ({"properties": {"a": 3}}, r"\$\.properties\.a is 3"),
    ({"enum": []}, r"\$\.enum"),
    ({"multipleOf": 0}, r"\$\.multipleOf"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, r"\$ cannot be enforced: .*minLength"),
    ({"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"]}, r"no answer that ends"),
    ({"$ref": "#"}, r"no answer that ends"),
    (["string"], r"type list"),
    ({"const": {1, 2}}, r"not JSON data"),
    ({"const": float("nan")}, r"not JSON data"),
]


@pytest.mark.parametrize(("schema", "message"), REFUSED)
def test_what_cannot_be_enforced_is_named(model, schema, message):
    with pytest.raises(MessageError, match=message):
        ask(model, schema=schema)


def test_the_id_of_the_whole_schema_changes_nothing(model):
    """Nested ones would: they are the base of references inside them."""
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"]}
    schema |= {"additionalProperties": False, "$defs": {"a": {"const": "b"}}}
    made = ask(model, schema={**schema, "$id": "https://a.example/b", "$schema": "https://json-schema.org/draft-07"})
    assert json.loads(made.result().answer) == {"a": "b"}


def test_deep_and_large_schemas_are_refused(model):
    deep: dict[str, Any] = {}
    for _ in range(3000):
        deep = {"items": deep}
    with pytest.raises(MessageError, match=r"nested more than|not JSON data"):
        ask(model, schema=deep)
    with pytest.raises(MessageError, match="characters"):
        ask(model, schema={"enum": ["x" * 1000] * 2000})


def test_schema_and_json_exclude_each_other(model):
    with pytest.raises(MessageError, match="expected one of them"):
        ask(model, schema={}, json=True)


# --- default bounds ----------------------------------------------------------------------------------------------


def bounded(schema: dict[str, Any]) -> dict[str, Any]:
    return json.loads(bound_schema(schema).text)


def test_what_is_unbounded_gets_a_bound():
    made = bounded({"type": "object", "properties": {"s": {"type": "string"}, "l": {"items": {"type": "integer"}}}})
    assert made["additionalProperties"] is False
    assert made["properties"]["s"]["maxLength"] > 0
    assert made["properties"]["l"]["maxItems"] > 0
    assert made["properties"]["l"]["items"]["maximum"] > 0


def test_a_pattern_may_ask_for_more_than_the_default_bound(model):
    assert len(answer(model, {"type": "string", "pattern": "^a{300}$"}).answer) == 302


def test_bounds_do_not_contradict_what_a_schema_is_combined_with(model):
    base = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    more = {"properties": {"a": {"minLength": 200}, "b": {"type": "null"}}, "required": ["b"]}
    for schema in (
        {"allOf": [base, more]},
        {"$defs": {"base": base}, "$ref": "#/$defs/base", **more},
        {"$defs": {"base": base}, "allOf": [{"$ref": "#/$defs/base"}, more]},
        {"anyOf": [base], **more},
    ):
        made = json.loads(answer(model, schema, max_tokens=2000).answer)
        assert len(made["a"]) >= 200
        assert made["b"] is None
    one, other = ({"type": "object", "properties": {name: {"type": "null"}}, "required": [name]} for name in "xy")
    schema = {"type": "object", "properties": {"a": one}, "required": ["a"], "anyOf": [{"properties": {"a": other}}]}
    assert {"x", "y"} <= set(json.loads(answer(model, schema).answer)["a"])


def test_the_given_schema_is_not_changed(model):
    schema = {"type": "object", "properties": {"s": {"type": "string"}}}
    before = json.dumps(schema)
    answer(model, schema)
    assert json.dumps(schema) == before
