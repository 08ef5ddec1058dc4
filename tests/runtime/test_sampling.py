"""Sampling against the official definition, as distributions over many draws; greedy against argmax."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from edge_runtime import MessageError, Model, llama
from edge_runtime.sampling import Sampler, SamplingOptions, choose_options

N_VOCAB = 300
DRAWS = 4000
# Largest deviation of an observed share: 4.5 standard errors of a share of one half, sqrt(1/4 / DRAWS) = 0.8 % each.
DEVIATION = 4.5 * 0.5 / DRAWS**0.5


def official_distribution(logits, options: SamplingOptions, generated=()) -> np.ndarray:
    """Probabilities by transformers' definition: penalty, temperature, top-k, top-p."""
    logits = logits.astype(np.float64).copy()
    for token in set(generated):
        penalty = options.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        logits[token] -= options.presence_penalty + options.frequency_penalty * list(generated).count(token)
    logits /= options.temperature
    if options.top_k:
        logits[logits < np.sort(logits)[-options.top_k]] = -np.inf
    order = np.argsort(-logits)
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities[order]) - probabilities[order]
    probabilities[order[before >= options.top_p]] = 0
    probabilities[probabilities < options.min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()


def draw(logits, options: SamplingOptions, n: int, generated=()) -> np.ndarray:
    """Shares of `n` draws through llama.cpp's chain, applied to given logits."""
    lib, counts = llama.library(), np.zeros(len(logits))
    sampler = Sampler(options, len(logits), 4096)
    for token in generated:
        lib.llama_sampler_accept(sampler._chain, token)
    data = (lib.llama_token_data * len(logits))()
    for _ in range(n):
        for i, logit in enumerate(logits):
            data[i].id, data[i].logit, data[i].p = i, logit, 0.0
        candidates = lib.llama_token_data_array(data, len(logits), -1, False)
        lib.llama_sampler_apply(sampler._chain, ctypes.byref(candidates))
        counts[candidates.data[candidates.selected].id] += 1
    sampler.close()
    return counts / n


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions.official(thinking=False),
        SamplingOptions.official(thinking=True),
        SamplingOptions(temperature=1.3),
        SamplingOptions(temperature=1.0, top_k=3),
        SamplingOptions(temperature=1.0, top_p=0.5),
        SamplingOptions(temperature=0.7, repetition_penalty=2.0),
        SamplingOptions(temperature=1.0, min_p=0.2),
        SamplingOptions(temperature=1.0, presence_penalty=1.5),
        SamplingOptions(temperature=1.0, frequency_penalty=0.9),
    ],
    ids=[
        "official",
        "official thinking",
        "temperature",
        "top_k",
        "top_p",
        "penalty",
        "min_p",
        "presence",
        "frequency",
    ],
)
def test_draws_follow_the_official_distribution(options):
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2.5, N_VOCAB).astype(np.float32)
    generated = [int(i) for i in np.argsort(-logits)[[0, 0, 2]]] + [int(np.argmin(logits))]
    want = official_distribution(logits, options, generated)
    got = draw(logits, SamplingOptions(**{**vars(options), "seed": 7}), DRAWS, generated)
    assert not got[want == 0].any()
    assert np.abs(got - want).max() < DEVIATION


def test_typical_sampling_keeps_tokens_of_typical_surprise():
    logits = np.log(np.array([0.5, 0.2, 0.15, 0.1, 0.05], np.float32))
    probabilities = np.exp(logits.astype(np.float64))
    surprise = -np.log(probabilities)
    order = np.argsort(np.abs(surprise - (probabilities * surprise).sum()))
    n = int(np.searchsorted(np.cumsum(probabilities[order]), 0.3, side="right")) + 1
    got = draw(logits, SamplingOptions(temperature=1.0, typical_p=0.3, seed=3), 500)
    assert set(np.flatnonzero(got)) == set(order[:n])
    assert 0 not in order[:n], "the most probable token is not the typical one here"


def test_temperature_zero_is_the_most_probable_token():
    logits = np.random.default_rng(2).normal(0, 1, N_VOCAB).astype(np.float32)
    shares = draw(logits, choose_options(thinking=False, temperature=0.0), 3)
    assert shares[np.argmax(logits)] == 1


def test_defaults_are_the_official_ones():
    assert choose_options(thinking=False) == SamplingOptions(0.7, 100, 0.8, 1.03)
    assert choose_options(thinking=True) == SamplingOptions(0.7, 50, 1.0, 1.0)
    assert choose_options(thinking=False, top_p=0.5) == SamplingOptions(0.7, 100, 0.5, 1.03)


@pytest.mark.parametrize("thinking", [True, False])
def test_greedy_has_no_penalty_unless_given(thinking):
    assert choose_options(thinking, greedy=True).repetition_penalty == 1.0
    assert choose_options(thinking, temperature=0).top_k == 0
    assert choose_options(thinking, greedy=True, repetition_penalty=1.2).repetition_penalty == 1.2


@pytest.mark.parametrize(
    "given",
    [{"temperature": -1}, {"top_p": 1.5}, {"top_k": -3}, {"repetition_penalty": 0}, {"seed": -1}, {"top_p": "x"}],
)
def test_values_out_of_range_are_named(given):
    with pytest.raises(MessageError, match=next(iter(given))):
        choose_options(thinking=False, **given)


def test_a_seed_repeats_an_answer(exact_model: Model):
    def ask(seed):
        return exact_model.chat("Tell me.", max_tokens=24, seed=seed).answer

    assert ask(11) == ask(11)
    assert len({ask(seed) for seed in range(5)}) > 1


def test_the_penalty_never_sees_the_prompt(exact_model: Model):
    """With the strongest penalty the first greedy token is still the prompt's most probable continuation."""
    question = "the the the the"
    first = exact_model.trace(question, 1).greedy
    plain = exact_model.chat(question, greedy=True, max_tokens=1).answer
    penalised = exact_model.chat(question, greedy=True, repetition_penalty=100.0, max_tokens=1).answer
    assert plain == penalised == exact_model.tokenizer.token_bytes(first[0]).decode(errors="ignore")
