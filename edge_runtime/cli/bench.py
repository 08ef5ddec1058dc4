"""How fast a model is on this machine: prefill, generation, picture encoding; and the settings that make it fastest.

Rates are of the decoder alone, one sequence, without sampling. `tune` looks for the settings that take the least time
for a typical request (`REQUEST_PROMPT` tokens in, `REQUEST_ANSWER` out, see `trial`), one setting after another, each
against the best so far: both in turns, `TURNS` times, medians. Machines are noisy, so a setting is kept only if it
gains more than the spread of either side's samples. A KV cache in q8_0 is used only if it is faster by more than
`WORTH_ROUNDING`, one in q4_0, which makes answers worse, never.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from edge_runtime.cli.made_models import paths_of
from edge_runtime.cli.tuning_trial import REQUEST_PROMPT, Rates, Trial, decoder_rates
from edge_runtime.decoder.options import CHUNK_TOKENS
from edge_runtime.errors import BackendUnavailable
from edge_runtime.inputs.slicing import plan_slices, slice_image
from edge_runtime.loading.load import LoadOptions, load_parts, set_threads
from edge_runtime.loading.tuning import Tuning, remember_tuning
from edge_runtime.system.memory import available_bytes
from edge_runtime.vision.encoder import ImageEncoder
from edge_runtime.weights.config import decoder_config
from edge_runtime.weights.gguf_file import GGUFFile

WORTH_ROUNDING = 0.1
"""Share of the time that a coarser KV cache must save to be used."""
NOISE = 0.03
"""Share of the time below which settings count as equally fast, however steady the samples are."""
TURNS = 3
"""Samples of each side; two if these already show no gain."""
SAMPLE_PROMPT = 128  # tokens; micro-batches differ only on whole chunks
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


@dataclass
class Side:
    """Settings, the process that uses them, and their measurements in one contest."""

    tuning: Tuning
    trial: Trial
    samples: list[Rates] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """Of the typical request, one for each sample."""
        return [rates.request_s for rates in self.samples]

    @property
    def rates(self) -> Rates:
        """Medians."""
        return Rates(median(one.prefill for one in self.samples), median(one.decode for one in self.samples))


@dataclass(frozen=True)
class Contest:
    """Result of measuring settings against the best ones so far."""

    tuning: Tuning
    rates: Rates | None
    """Medians; None when these settings are not possible here."""
    seconds: Sequence[float] = ()
    """Of the typical request, one per sample; `best_s` likewise, for the best so far, measured in turns."""
    best_s: Sequence[float] = ()
    is_kept: bool = False

    def facts(self) -> dict[str, Any]:
        """For the JSON object."""
        known = {} if self.rates is None else asdict(self.rates)
        return {
            **asdict(self.tuning),
            **known,
            "request_s": median(self.seconds) if self.seconds else None,
            "samples_s": [*self.seconds],
            "best_samples_s": [*self.best_s],
            "kept": self.is_kept,
        }


def gains_enough(candidate_s: Sequence[float], best_s: Sequence[float], min_share: float) -> bool:
    """Whether the candidate's median is smaller by more than a share of the best's and either spread."""
    spread = max(max(seconds) - min(seconds) for seconds in (candidate_s, best_s))
    return median(best_s) - median(candidate_s) > max(min_share * median(best_s), spread)


def hold_contest(best: Side, candidate: Side, n_prompt: int) -> bool:
    """Measure both in turns; False when the candidate cannot be measured."""
    best.samples, candidate.samples = [], []
    if candidate.trial.sample(n_prompt) is None:  # warm-up: computes what precedes the samples
        return False
    for turn in range(TURNS):
        if turn == 2 and min(candidate.seconds) >= max(best.seconds):
            break
        order = (best, candidate) if turn % 2 == 0 else (candidate, best)
        for side in order:
            rates = side.trial.sample(n_prompt)
            if rates is None:
                return False
            side.samples.append(rates)
    return True


def tune(
    file: GGUFFile,
    n_physical: int,
    n_logical: int,
    budget_s: float,
    report: Callable[[str, Contest], None] = lambda what, contest: None,
) -> tuple[Tuning, list[dict[str, Any]]]:
    """Find the fastest settings of a decoder on this machine.

    Parameters
    ----------
    n_physical, n_logical : cores this process may use, without and with hyper-threading.
    budget_s : no further settings are tried after this many seconds.
    report : called with each setting and its result.

    Returns
    -------
    best, trials : the settings, and every contest as a dictionary, in order; the first has only the usual
        settings.

    Raises
    ------
    BackendUnavailable
        When even the usual settings cannot be measured.
    """
    started = time.perf_counter()
    usual = Tuning(n_physical, kv_type="f16")
    with ExitStack() as processes:
        best = Side(usual, processes.enter_context(Trial(file.path, usual)))
        best.trial.sample(SAMPLE_PROMPT)
        rates = best.trial.sample(SAMPLE_PROMPT)
        if rates is None:
            raise BackendUnavailable(
                f"{file.path.name} cannot be measured: the trial with the usual settings ended without a result; "
                f"see what 'echo 128 | python -m edge_runtime.cli.tuning_trial {file.path} {{}}' says."
            )
        contests = [Contest(usual, rates, [rates.request_s], is_kept=True)]
        report(_described(usual), contests[0])
        for change, n_prompt, gain in _changes(n_physical, n_logical):
            if time.perf_counter() - started > budget_s:
                break
            tuning = replace(best.tuning, **change)
            if tuning.repack and available_bytes() < 2 * file.size_bytes:
                continue  # it would evict the weights that it should make faster
            candidate = Side(tuning, processes.enter_context(Trial(file.path, tuning)))
            if not hold_contest(best, candidate, n_prompt):
                contests.append(Contest(tuning, None))
            else:
                is_kept = gains_enough(candidate.seconds, best.seconds, gain)
                contests.append(Contest(tuning, candidate.rates, candidate.seconds, best.seconds, is_kept))
            report(_described(tuning), contests[-1])
            left = candidate
            if contests[-1].is_kept:
                best, left = candidate, best
            left.trial.close()
    return best.tuning, [contest.facts() for contest in contests]


def _changes(n_physical: int, n_logical: int) -> Iterator[tuple[dict[str, Any], int, float]]:
    """Settings to try in order, with prompt tokens per sample and the share of the time they must gain."""
    for n in (n_logical, n_physical // 2):
        if n > 1 and n != n_physical:
            yield {"n_threads": n}, SAMPLE_PROMPT, NOISE
    yield {"repack": True}, SAMPLE_PROMPT, NOISE
    yield {"kv_type": "q8_0"}, SAMPLE_PROMPT, WORTH_ROUNDING
    yield {"n_ubatch": CHUNK_TOKENS // 2}, CHUNK_TOKENS, NOISE


def _described(tuning: Tuning) -> str:
    repacked = ", repacked" if tuning.repack else ""
    return f"{tuning.n_threads} threads, ubatch {tuning.n_ubatch}, KV {tuning.kv_type}{repacked}"


def tune_model(name: str, mmproj: Path | None, budget_s: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Tune a model's decoder and store the best settings; returns the trials.

    Parameters
    ----------
    say : called with each line of the table.
    """
    from edge_kernels.machine import cpu_count

    file = GGUFFile(paths_of(name, mmproj).decoder)
    decoder_config(file)
    say(f"{'settings':<44}{'prefill':>12}{'generation':>14}{'request':>11}{'best so far':>14}")

    def report(what: str, contest: Contest) -> None:
        rates = contest.rates
        if rates is None:
            say(f"{what:<44}not possible here")
            return
        beside = f"{median(contest.best_s):>12.2f} s" if contest.best_s else f"{'–':>14}"
        request = f"{median(contest.seconds):>9.2f} s{beside}{'  kept' if contest.is_kept else ''}"
        say(f"{what:<44}{rates.prefill:>8.1f} t/s{rates.decode:>10.1f} t/s{request}")

    best, trials = tune(file, cpu_count(), allowed_cpus(), budget_s, report)
    path = remember_tuning(file, best)
    say(f"best: {_described(best)}; remembered in {path}")
    return {"tuned": asdict(best), "trials": trials}


def measure(name: str, setup: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Measure a model, loaded with these options.

    Parameters
    ----------
    setup : keyword arguments of `Model.load`.
    say : called with each line of the table.

    Returns
    -------
    facts : `scenario`, settings, `ours_s` (seconds per stage), `peers_s` (empty), tokens per second.
    """
    paths = paths_of(name, setup["mmproj"])
    options = LoadOptions(**{key: value for key, value in setup.items() if key not in ("mmproj", "cache_dir")})
    started = time.perf_counter()
    parts = load_parts(paths, options.checked())
    load_s = time.perf_counter() - started
    try:
        set_threads(parts.n_threads)
        rates = decoder_rates(parts.decoder)
        encoding = encoding_s(parts.encoder)
    finally:
        parts.caches.close()
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
