"""What tests ask the demo in the forms of OpenAI and Anthropic, and what it says; knows no client and no fixture."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from pydantic import BaseModel

SIGN = Path(__file__).parents[2] / "examples" / "sign.png"
SIGN_BASE64 = base64.b64encode(SIGN.read_bytes()).decode()
URI = f"data:image/png;base64,{SIGN_BASE64}"
PICTURE = {"type": "image_url", "image_url": {"url": URI}}
QUESTION: list[Any] = [{"role": "user", "content": [PICTURE, {"type": "text", "text": "What does it say?"}]}]
"""Answered with CAFE."""
HELLO = [{"role": "user", "content": "Who are you?"}]
GREEDY = {"temperature": 0}
ANSWER = "I am a tiny demo model."
PROMPT = "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
"""The same as the chat template writes it, for completions have none."""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather at a place.",
        "parameters": {
            "type": "object",
            "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}

BLOCK = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": SIGN_BASE64}}
"""The same picture, and a tool, in Anthropic's form."""
ANTHROPIC_TOOL: dict[str, Any] = {"name": "weather", "input_schema": {"type": "object", "properties": {}}}


class Sign(BaseModel):
    """What a structured answer is to be."""

    shape: bool
    count: int
