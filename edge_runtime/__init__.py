"""MiniCPM-V 4.5 on ordinary CPUs: the official model's exact inputs, from quantised GGUF files.

    from edge_runtime import Model
    model = Model.load("demo")
    print(model.chat([{"role": "user", "content": [Image.open("a.png"), "What does it say?"]}]))

Importing this module loads nothing heavy; numba and llama.cpp are imported when a model is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge_runtime.errors import (
    BackendUnavailable,
    CacheFull,
    CheckpointError,
    DownloadError,
    EdgeRuntimeError,
    EndpointError,
    EngineBusy,
    ImageError,
    MessageError,
    ModelFileError,
    NotEnoughMemoryError,
    PromptTooLongError,
    RequestCancelled,
    UnsupportedModelError,
    VideoError,
)
from edge_runtime.version import __version__

if TYPE_CHECKING:
    from edge_runtime.answers import Answer, AnswerStream, AsyncAnswer
    from edge_runtime.generation.grounding import Region
    from edge_runtime.generation.text_stream import Piece
    from edge_runtime.inputs.video.frame_choice import VideoLimits
    from edge_runtime.inputs.workers.pool import DecoderPool
    from edge_runtime.model import Model
    from edge_runtime.options import GenerationOptions
    from edge_runtime.page_by_page import PageAnswer, each_page, join_pages
    from edge_runtime.remote.model import RemoteModel
    from edge_runtime.structured_output.tools import ToolCall

__all__ = [
    "Answer",
    "AnswerStream",
    "AsyncAnswer",
    "BackendUnavailable",
    "CacheFull",
    "CheckpointError",
    "DecoderPool",
    "DownloadError",
    "EdgeRuntimeError",
    "EndpointError",
    "EngineBusy",
    "GenerationOptions",
    "ImageError",
    "MessageError",
    "Model",
    "ModelFileError",
    "NotEnoughMemoryError",
    "PageAnswer",
    "Piece",
    "PromptTooLongError",
    "Region",
    "RemoteModel",
    "RequestCancelled",
    "ToolCall",
    "UnsupportedModelError",
    "VideoError",
    "VideoLimits",
    "__version__",
    "each_page",
    "join_pages",
]

_LAZY = {
    "Model": "model",
    "Answer": "answers",
    "AnswerStream": "answers",
    "AsyncAnswer": "answers",
    "DecoderPool": "inputs.workers.pool",
    "GenerationOptions": "options",
    "PageAnswer": "page_by_page",
    "Piece": "generation.text_stream",
    "Region": "generation.grounding",
    "RemoteModel": "remote.model",
    "ToolCall": "structured_output.tools",
    "VideoLimits": "inputs.video.frame_choice",
    "each_page": "page_by_page",
    "join_pages": "page_by_page",
}


def __getattr__(name: str) -> Any:
    """Import `Model` and the other public names at first use."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"edge_runtime.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'edge_runtime' has no attribute {name!r}")
