"""instructor with the classes of `pydantic_models`, by tool calls and by schemas.

Run by `test_client_libraries` in a process of its own; EDGE_URL is the server. Its mode JSON is not among these: it
puts the schema into the prompt and asks for any JSON, so that what comes back is the model's own doing.
"""

from __future__ import annotations

import os

import instructor
import pytest
from openai import OpenAI
from pydantic import BaseModel

from pydantic_models import MODELS

GO = [{"role": "user", "content": "Go."}]


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA], ids=lambda mode: mode.name)
def test_an_answer_is_the_object(mode: instructor.Mode, kind: type[BaseModel]):
    client = instructor.from_openai(OpenAI(base_url=f"{os.environ['EDGE_URL']}/v1", api_key="none"), mode=mode)
    found = client.chat.completions.create(
        model="demo", response_model=kind, messages=GO, max_retries=0, max_tokens=300, temperature=1, seed=1
    )
    assert isinstance(found, kind)
