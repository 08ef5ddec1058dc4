"""Options of a long command → the groups in which its help shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from edge_runtime.cli.command import Command

_SAMPLING = (
    *("greedy", "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "seed", "beams", "repetition_check"),
)
_ANSWER = ("think", "thinking_budget", "max_tokens", "stop", "schema", "drafts", "context_shift")
_MODEL = (
    *("model", "mmproj", "lora", "ctx", "threads", "nice", "kv_type", "exact", "low_memory", "force", "cache_dir"),
    *("cache_limit",),
)
ASKING: Mapping[str, Sequence[str]] = {
    "Question": ("prompt", "system", "images", "inputs", "jobs"),
    "Answer": _ANSWER,
    "Output": (
        *("output", "ordered", "retry_failed", "parallel", "as_json", "logprobs", "draw", "storyboard", "quiet"),
        "verbose",
    ),
    "Model": _MODEL,
    "Model on a server": ("endpoint", "dialect", "retries", "answer_timeout", "ray"),
    "Sampling": _SAMPLING,
    "Pictures": ("max_slices", "max_pixels", "fit", "fit_tokens"),
    "Documents": ("preset", "pages", "each_page", "dpi", "password", "page_limit"),
    "Videos": ("fps", "max_frames", "packing", "start", "end", "timestamps"),
}
"""Of `run` and `batch`, by the names of their parameters."""
SERVING: Mapping[str, Sequence[str]] = {
    "Address and access": ("host", "port", "api_key", "cors_origins", "allowed_hosts", "allow_url"),
    "Models": (
        *("models", "keep_alive", "max_memory", "n_ctx", "n_threads", "nice", "kv_type", "exact", "low_memory"),
        *("force", "tools", "cache_dir", "keeps_nothing", "cache_limit", "max_store", "max_names"),
    ),
    "Queue and connections": (
        *("max_queue", "max_queue_per_client", "upstream", "max_connections", "max_connections_per_client"),
        *("body_timeout_s", "min_bytes_per_s", "request_timeout_s", "grace_s"),
    ),
    "Limits of requests": (
        *(
            "max_body",
            "max_bodies",
            "max_values",
            "max_depth",
            "max_messages",
            "max_parts",
            "max_images",
            "max_pixels",
        ),
        *("decode_timeout_s", "max_video", "max_video_frames", "max_pages", "max_tokens", "max_files", "max_file"),
    ),
}
"""Of `serve`."""


class GroupedCommand(Command):
    """A command whose help shows its options in groups.

    Parameters
    ----------
    groups : names of parameters by the title of their group, in the order of the help. Options that no group names
        come last.
    """

    def __init__(self, *args: Any, groups: Mapping[str, Sequence[str]], **kwargs: Any) -> None:
        self._groups = groups
        super().__init__(*args, **kwargs)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, group by group."""
        rows = {
            parameter.name or "": record
            for parameter in self.get_params(ctx)
            if (record := parameter.get_help_record(ctx)) is not None
        }
        for title, names in self._groups.items():
            if found := [rows.pop(name) for name in names if name in rows]:
                with formatter.section(title):
                    formatter.write_dl(found)
        if rows:
            with formatter.section("Options"):
                formatter.write_dl([*rows.values()])
