"""How fast a model is on this machine: prefill, generation, picture encoding; and which settings make it fastest.

Rates are of the decoder alone, one sequence, without sampling. `tune` looks for the settings that take least time for
a typical request (`REQUEST_PROMPT` tokens in, `REQUEST_ANSWER` out, see `trial`), one setting after another, each
with the best of those before it. A KV cache in q8_0 is taken only where it is faster by more than `WORTH_ROUNDING`,
one in q4_0, which costs answers, never.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from edge_runtime.config import decoder_config
from edge_runtime.decoder import CHUNK_TOKENS
from edge_runtime.encoder import ImageEncoder
from edge_runtime.errors import BackendUnavailable
from edge_runtime.loading import LoadOptions, load_parts, set_threads
from edge_runtime.memory import available_bytes
from edge_runtime.slicing import plan_slices, slice_image
from edge_runtime.store import find_model
from edge_runtime.trial import REQUEST_PROMPT, Rates, decoder_rates, run_trial
from edge_runtime.tuning import Tuning, remember_tuning
from edge_runtime.weights import GGUFFile

WORTH_ROUNDING = 0.1
"""Share of the time that a coarser KV cache must save to be taken."""
NOISE = 0.03
"""Share of the time below which settings count as equally fast; the one tried first stays."""
PICTURE_SIDE = 1344  # pixels; ten slices at full size


def encoding_s(encoder: ImageEncoder, repeats: int = 2) -> dict[str, float]:
    """Seconds from a decoded picture of 1344 x 1344 to its visual tokens, one picture after another.

    Returns
    -------
    seconds : `first`, which reads and packs the weights and may compile; `warm`, the median of the others;
        `per_slice` of the latter; and the number of `slices`.
    """
    noise = np.random.default_rng(0).integers(0, 256, (PICTURE_SIDE // 8, PICTURE_SIDE // 8, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((PICTURE_SIDE, PICTURE_SIDE))
    samples: list[float] = []
    n_slices = 0
    for _ in range(repeats + 1):
        started = time.perf_counter()
        slices = slice_image(picture, plan_slices(*picture.size, encoder.slicing), encoder.slicing)
        encoder.encode([[(item, -1)] for item in slices])
        samples.append(time.perf_counter() - started)
        n_slices = len(slices)
    warm = median(samples[1:])
    return {"first": samples[0], "warm": warm, "slices": n_slices, "per_slice": warm / n_slices}


def tune(
    file: GGUFFile,
    n_physical: int,
    n_logical: int,
    budget_s: float,
    tell: Callable[[str, Rates | None], None] = lambda what, rates: None,
) -> tuple[Tuning, list[dict[str, Any]]]:
    """Find the fastest settings of a decoder on this machine.

    Parameters
    ----------
    n_physical, n_logical : cores this process may use, without and with hyper-threads.
    budget_s : nothing new is tried after so many seconds.
    tell : called with each setting and what it reached, None if it did not get there.

    Returns
    -------
    best, trials : the settings, and every trial with its rates in the order they were made.
    """
    started = time.perf_counter()
    trials: list[dict[str, Any]] = []
    best = Tuning(n_physical, kv_type="f16")

    def attempt(tuning: Tuning) -> Rates | None:
        if trials and time.perf_counter() - started > budget_s:
            return None
        if tuning.repack and available_bytes() < 2 * file.size_bytes:  # it would push out what it is to make faster
            return None
        rates = run_trial(file.path, tuning)
        tell(_described(tuning), rates)
        if rates is None:  # not possible with this model or on this machine
            trials.append({**asdict(tuning), "request_s": None})
            return None
        trials.append({**asdict(tuning), **asdict(rates), "request_s": rates.request_s})
        return rates

    best_rates = attempt(best)
    if best_rates is None:
        raise BackendUnavailable(
            f"{file.path.name} cannot be measured: the trial with the usual settings ended without a result; see "
            f"what 'python -m edge_runtime.trial {file.path}' with '{{}}' says."
        )
    threads = [n for n in (n_logical, n_physical // 2) if n > 1 and n != n_physical]
    rounds: list[tuple[list[dict[str, Any]], float]] = [
        ([{"n_threads": n} for n in threads], NOISE),
        ([{"repack": True}], NOISE),
        ([{"kv_type": "q8_0"}], WORTH_ROUNDING),
        ([{"n_ubatch": CHUNK_TOKENS // 2}], NOISE),
    ]
    for changes, gain in rounds:
        base, base_s = best, best_rates.request_s
        for change in changes:
            rates = attempt(replace(base, **change))
            if rates is not None and rates.request_s < min(best_rates.request_s, base_s * (1 - gain)):
                best, best_rates = replace(base, **change), rates
    return best, trials


def _described(tuning: Tuning) -> str:
    repacked = ", repacked" if tuning.repack else ""
    return f"{tuning.n_threads} threads, ubatch {tuning.n_ubatch}, KV {tuning.kv_type}{repacked}"


def tune_model(name: str, mmproj: Path | None, budget_s: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Tune a model's decoder and remember what was best; returns the trials.

    Parameters
    ----------
    say : called with each line of the table.
    """
    from edge_kernels.compile import cpu_count

    file = GGUFFile(find_model(name, mmproj).decoder)
    decoder_config(file)
    say(f"{'settings':<44}{'prefill':>12}{'generation':>14}{'request':>11}")

    def tell(what: str, rates: Rates | None) -> None:
        if rates is None:
            say(f"{what:<44}not possible here")
            return
        say(f"{what:<44}{rates.prefill:>8.1f} t/s{rates.decode:>10.1f} t/s{rates.request_s:>9.2f} s")

    best, trials = tune(file, cpu_count(), allowed_cpus(), budget_s, tell)
    path = remember_tuning(file, best)
    say(f"best: {_described(best)}; remembered in {path}")
    return {"tuned": asdict(best), "trials": trials}


def measure(name: str, setup: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Measure a model as it would be loaded.

    Parameters
    ----------
    setup : keyword arguments of `Model.load`.
    say : called with each line of the table.

    Returns
    -------
    facts : `scenario`, settings, `ours_s` (seconds by what was done), `peers_s` (nobody), tokens per second.
    """
    paths = find_model(name, setup["mmproj"])
    options = LoadOptions(**{key: value for key, value in setup.items() if key not in ("mmproj", "cache_dir")})
    started = time.perf_counter()
    parts = load_parts(paths, options.checked())
    load_s = time.perf_counter() - started
    try:
        set_threads(parts.n_threads)
        rates = decoder_rates(parts.decoder)
        encoding = encoding_s(parts.encoder)
    finally:
        parts.keeping.close()
        parts.decoder.close()
    rows = {
        "load": f"{load_s:.2f} s",
        "prefill": f"{rates.prefill:.1f} tokens/s",
        "generation": f"{rates.decode:.1f} tokens/s",
        f"picture of {PICTURE_SIDE} x {PICTURE_SIDE}": f"{encoding['warm']:.2f} s ({encoding['slices']} slices)",
        "per slice": f"{encoding['per_slice'] * 1000:.0f} ms",
    }
    for what, value in rows.items():
        say(f"{what:<26}{value}")
    return {
        "scenario": "bench",
        "model": paths.name,
        "kv_type": parts.decoder.kv_type,
        "prefill_tokens_per_s": round(rates.prefill, 2),
        "decode_tokens_per_s": round(rates.decode, 2),
        "ours_s": {
            "load": round(load_s, 3),
            "encode": round(encoding["warm"], 4),
            "encode_first": round(encoding["first"], 4),
            "encode_slice": round(encoding["per_slice"], 4),
            f"prefill_{REQUEST_PROMPT}": round(REQUEST_PROMPT / rates.prefill, 4),
            "token": round(1 / rates.decode, 5),
        },
        "peers_s": {},
    }


def allowed_cpus() -> int:
    """Logical processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
