"""Options that several commands have: which model, and how it answers; and what keywords of `Model` they become."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edge_runtime.cache.disk import DEFAULT_LIMIT_BYTES
from edge_runtime.cli.document_options import SliceLimits
from edge_runtime.inputs.image import PIXEL_LIMIT
from edge_runtime.store.names import DEMO
from edge_runtime.system.priority import MAX_NICENESS, be_nice

LOW_MEMORY = "Keep one layer of the vision part in memory at a time; chosen by itself where nothing else fits."


def nice_option(command: Callable[..., None]) -> Callable[..., None]:
    """`--nice`, which takes effect as the command line is read: threads inherit the priority when they start."""

    def lower(context: click.Context, _parameter: click.Parameter, n: int) -> None:
        if not context.resilient_parsing:
            be_nice(n)

    return click.option(
        "--nice",
        type=click.IntRange(0, MAX_NICENESS),
        default=0,
        metavar="N",
        expose_value=False,
        callback=lower,
        help="Let other programs go first: 1, a little, to 19.  [0]",
    )(command)


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that choose and set up a model."""
    count: dict[str, Any] = {"type": click.IntRange(1), "metavar": "N"}
    file: dict[str, Any] = {"type": click.Path(path_type=Path), "metavar": "FILE"}
    for option in reversed(
        (
            click.option(
                "-m",
                "--model",
                metavar="MODEL",
                help="demo, a pulled model, a folder or a file.  [demo]",
            ),
            click.option("--mmproj", **file, help="mmproj file, if not beside the decoder."),
            click.option(
                "-c", "--ctx", **count, help="Context length in tokens.  [8192; low memory: 4096; or what fits]"
            ),
            click.option("-t", "--threads", **count, help="Threads; at most the processors.  [physical cores]"),
            nice_option,
            click.option("--exact", is_flag=True, help="Compute as the official float32 code."),
            click.option(
                "--kv-type",
                type=click.Choice(["f16", "q8_0", "q4_0"]),
                metavar="TYPE",
                help="KV cache in f16, q8_0 or q4_0.  [f16; low memory: q8_0]",
            ),
            click.option("--low-memory", is_flag=True, help=LOW_MEMORY),
            click.option("--lora", **file, help="LoRA adapter (GGUF) to answer with."),
            click.option(
                "--cache-dir",
                type=click.Path(path_type=Path),
                metavar="DIR",
                help="Cache encoded pictures and computed prompts here.",
            ),
            click.option(
                "--cache-limit",
                type=click.FloatRange(0, min_open=True),
                metavar="GB",
                default=DEFAULT_LIMIT_BYTES / 2**30,
                help="Maximum size of DIR.  [4]",
            ),
            click.option("--force", is_flag=True, help="Load it even if memory seems insufficient."),
        )
    ):
        command = option(command)
    return command


DRAFTS = click.option(
    "--drafts",
    default="auto",
    metavar="NAMES",
    callback=lambda _context, _option, value: value if value in ("auto", "off") else value.split(","),
    help="Guess tokens from: grammar, suffix; or off. No guess changes an answer.  [auto]",
)


def request_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of one request; what is not given keeps the official default."""
    count: dict[str, Any] = {"type": click.IntRange(1), "metavar": "N"}
    for option in reversed(
        (
            click.option("--think", is_flag=True, help="Reason before answering."),
            click.option(
                "--think-budget",
                "thinking_budget",
                type=click.IntRange(0),
                metavar="N",
                help="Maximum tokens of reasoning.",
            ),
            click.option("--greedy", is_flag=True, help="Always take the most probable token."),
            click.option("--max-tokens", **count, default=2048, help="Maximum tokens to generate.  [2048]"),
            click.option(
                "--max-slices",
                type=SliceLimits(),
                metavar="N[,N...]",
                help="Maximum cells per picture; or one N per file.  [9]",
            ),
            *_choosing_tokens(),
            click.option("--stop", multiple=True, metavar="TEXT", help="Text that ends the answer; may be repeated."),
            click.option(
                "--no-repetition-check",
                "repetition_check",
                is_flag=True,
                default=True,
                flag_value=False,
                help="Let an answer repeat itself.",
            ),
            DRAFTS,
            click.option("--context-shift", is_flag=True, help="Drop the oldest turns if they do not fit."),
            click.option("--schema", metavar="FILE_OR_JSON", help="JSON schema that the answer must follow."),
            click.option(
                "--max-pixels", **count, default=PIXEL_LIMIT, help="Maximum pixels per picture.  [200 million]"
            ),
        )
    ):
        command = option(command)
    return command


def _choosing_tokens() -> tuple[Callable[[Callable[..., None]], Any], ...]:
    """Options of sampling and search."""
    return (
        click.option("--temperature", type=click.FloatRange(0), metavar="X", help="0 is greedy.  [0.7]"),
        click.option("--top-p", type=click.FloatRange(0, 1), metavar="X", help="[0.8; thinking: 1]"),
        click.option("--top-k", type=click.IntRange(0), metavar="N", help="[100; thinking: 50]"),
        click.option(
            "--repetition-penalty",
            type=click.FloatRange(0, min_open=True),
            metavar="X",
            help="[1.03; thinking: 1]",
        ),
        click.option("--min-p", type=click.FloatRange(0, 1), metavar="X", help="[0]"),
        click.option("--typical-p", type=click.FloatRange(0, 1), metavar="X", help="[1]"),
        click.option("--presence-penalty", type=float, metavar="X", help="[0]"),
        click.option("--frequency-penalty", type=float, metavar="X", help="[0]"),
        click.option(
            "--beams", type=click.IntRange(1), metavar="N", help="Beam search with N beams; officially 3.  [1: none]"
        ),
        click.option("--seed", type=click.IntRange(0), metavar="N", help="Seed, for repeatable answers.  [random]"),
    )


def take_request(options: dict[str, Any], adapter: str | None, logprobs: int | None) -> dict[str, Any]:
    """Take the values of `request_options` and what else is left of a command's options: keywords of `Model.chat`."""
    return {
        "adapter": adapter,
        "thinking": options.pop("think"),
        "pixel_limit": options.pop("max_pixels"),
        "logprobs": logprobs is not None,
        "top_logprobs": logprobs or 0,
        **options,
    }


def take_setup(options: dict[str, Any]) -> tuple[str, dict[str, Any], str | None]:
    """Remove the values of `model_options` from a command's options.

    Returns
    -------
    name, setup, adapter : the model, keyword arguments of `Model.load`, and the adapter for requests.
    """
    setup = {name: options.pop(name) for name in ("mmproj", "exact", "force", "kv_type", "low_memory", "cache_dir")}
    setup |= {"n_ctx": options.pop("ctx"), "n_threads": options.pop("threads")}
    setup["cache_limit"] = max(1, int(options.pop("cache_limit") * 2**30))
    lora: Path | None = options.pop("lora")
    adapter = None if lora is None else lora.name
    setup["adapters"] = {} if lora is None else {adapter: lora}
    return options.pop("model") or DEMO, setup, adapter
