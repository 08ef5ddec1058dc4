"""Libraries that people call the server through: LiteLLM by three of its providers, and pydantic-ai by both APIs.

Run by `test_client_libraries` in a process of its own, as they leave connections open; EDGE_URL is the server.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import pytest

from server.asked import ANSWER, HELLO, QUESTION, SIGN, WEATHER, Sign

URL = os.environ["EDGE_URL"]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.fixture(params=["openai/demo", "hosted_vllm/demo", "ollama_chat/demo"])
def ask(request: pytest.FixtureRequest) -> Any:
    """LiteLLM's `completion`, by one of its providers."""
    litellm = pytest.importorskip("litellm")
    base = URL if request.param.startswith("ollama") else f"{URL}/v1"
    options = {"model": request.param, "api_base": base, "api_key": "none", "temperature": 0, "max_tokens": 60}
    return lambda **fields: litellm.completion(**{"messages": HELLO, **options, **fields})


def test_litellm_answers(ask: Any):
    assert ask().choices[0].message.content == ANSWER
    chunks = [chunk for chunk in ask(stream=True) if chunk.choices]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert ask(messages=QUESTION).choices[0].message.content == "CAFE"


def test_litellm_keeps_schemas(ask: Any):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    assert 0 <= json.loads(ask(response_format=form).choices[0].message.content)["a"] <= 99


def test_litellm_calls_tools():
    litellm = pytest.importorskip("litellm")
    options: dict[str, Any] = {
        "model": "openai/demo",
        "api_base": f"{URL}/v1",
        "api_key": "none",
        "messages": HELLO,
        "tools": [WEATHER],
        "tool_choice": "required",
        "max_tokens": 60,
    }
    whole = litellm.completion(**options)
    built = litellm.stream_chunk_builder([*litellm.completion(**options, stream=True)], messages=HELLO)
    for reply in (whole, built):
        (choice,) = reply.choices
        assert choice.finish_reason == "tool_calls"
        assert 1 <= json.loads(choice.message.tool_calls[0].function.arguments)["days"] <= 9


@pytest.fixture(params=["OpenAIChatModel", "OpenAIResponsesModel"])
def agent(request: pytest.FixtureRequest) -> Any:
    """Makes agents of pydantic-ai that ask one of the APIs."""
    pydantic_ai = pytest.importorskip("pydantic_ai")
    models = pytest.importorskip("pydantic_ai.models.openai")
    providers = pytest.importorskip("pydantic_ai.providers.openai")
    provider = providers.OpenAIProvider(base_url=f"{URL}/v1", api_key="none")
    model = getattr(models, request.param)("demo", provider=provider)
    settings = {"temperature": 0.0, "max_tokens": 100}
    return lambda **options: pydantic_ai.Agent(model, model_settings=settings, **options)


def test_pydantic_ai_answers(agent: Any):
    first = agent().run_sync("Who are you?")
    assert first.output == ANSWER
    assert agent().run_sync("Who are you?", message_history=first.all_messages()).output

    async def streamed() -> list[str]:
        async with agent().run_stream("Who are you?") as result:
            return [piece async for piece in result.stream_text(delta=True)]

    assert "".join(asyncio.run(streamed())) == ANSWER


def test_pydantic_ai_sees(agent: Any):
    pydantic_ai = pytest.importorskip("pydantic_ai")
    picture = pydantic_ai.BinaryContent(SIGN.read_bytes(), media_type="image/png")
    assert agent().run_sync(["What does it say?", picture]).output == "CAFE"


@pytest.mark.parametrize("kind", ["NativeOutput", "ToolOutput"])
def test_pydantic_ai_gets_what_it_asks_for(agent: Any, kind: str):
    """By a schema, and by a call that is forced."""
    output = getattr(pytest.importorskip("pydantic_ai"), kind)(Sign)
    result = agent(output_type=output).run_sync("Hi")
    assert isinstance(result.output, Sign)
    assert agent().run_sync("Who are you?", message_history=result.all_messages()).output
