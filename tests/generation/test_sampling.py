"""Sampling against the official definition, as distributions over many draws of fixed seeds; greedy is argmax."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest

from edge_runtime import MessageError, Model
from edge_runtime.decoder import llama_cpp as llama
from edge_runtime.generation.sampling import Sampler, SamplingOptions
from edge_runtime.option_checks import check_sampling
from edge_runtime.options import GenerationOptions

N_VOCAB = 300
DRAWS = 20_000
LEAST_EXPECTED = 5.0  # draws of a bin; rarer tokens share one, or chi-square is not what its name says


def chosen(**given) -> SamplingOptions:
    """What a request samples with."""
    options = GenerationOptions(**given)
    check_sampling(options, N_VOCAB)
    return options.sampling_options()


def official_distribution(logits, options: SamplingOptions, generated=()) -> np.ndarray:
    """Probabilities as in transformers: bias, penalty, temperature, top-k, top-p, min-p, typical, in this order."""
    logits = logits.astype(np.float64).copy()
    for token, bias in options.logit_bias:
        logits[token] += bias
    for token in set(generated):
        penalty = options.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        logits[token] -= options.presence_penalty + options.frequency_penalty * list(generated).count(token)
    logits /= options.temperature
    if options.top_k:
        logits[logits < np.sort(logits)[-options.top_k]] = -np.inf
    probabilities = softmax(logits)
    order = np.argsort(-probabilities)
    before = np.cumsum(probabilities[order]) - probabilities[order]
    probabilities[order[before >= options.top_p]] = 0
    probabilities[probabilities < options.min_p * probabilities.max()] = 0
    probabilities /= probabilities.sum()
    if options.typical_p < 1:
        surprise = -np.log(probabilities, where=probabilities > 0, out=np.full_like(probabilities, np.inf))
        entropy = (probabilities * np.where(probabilities > 0, surprise, 0)).sum()
        order = np.argsort(np.abs(surprise - entropy))
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= options.typical_p]] = 0
    return probabilities / probabilities.sum()


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def draw(logits, options: SamplingOptions, n: int, generated=()) -> np.ndarray:
    """Counts of `n` draws through llama.cpp's chain, applied to given logits."""
    lib, counts = llama.library(), np.zeros(len(logits), np.int64)
    sampler = Sampler(options, len(logits), 4096)
    for token in generated:
        sampler.accept(token)
    data = (lib.llama_token_data * len(logits))()
    view = np.frombuffer(data, [("id", "i4"), ("logit", "f4"), ("p", "f4")])
    for _ in range(n):
        view["id"], view["logit"], view["p"] = np.arange(len(logits)), logits, 0.0
        candidates = lib.llama_token_data_array(data, len(logits), -1, False)
        lib.llama_sampler_apply(sampler._chain, ctypes.byref(candidates))
        counts[candidates.data[candidates.selected].id] += 1
    sampler.close()
    return counts


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    """Statistic of counts against a distribution, and the bound that one fair sample in 10,000 exceeds."""
    if counts[probabilities == 0].any():
        return np.inf, 0.0
    expected = probabilities * counts.sum()
    rare = (expected > 0) & (expected < LEAST_EXPECTED)
    bins = [(counts[i], expected[i]) for i in np.flatnonzero(expected >= LEAST_EXPECTED)]
    if rare.any():
        bins.append((counts[rare].sum(), expected[rare].sum()))
    statistic = sum((count - mean) ** 2 / mean for count, mean in bins)
    freedom, z = len(bins) - 1, 3.719  # z: the standard normal's quantile of 1 - 1e-4
    if freedom == 0:
        return 0.0, 1.0
    wilson_hilferty = freedom * (1 - 2 / (9 * freedom) + z * (2 / (9 * freedom)) ** 0.5) ** 3
    return float(statistic), wilson_hilferty


def peaked_logits() -> np.ndarray:
    return np.random.default_rng(1).normal(0, 2.5, N_VOCAB).astype(np.float32)


BEST = [int(i) for i in np.argsort(-peaked_logits())]
GENERATED = [BEST[0], BEST[0], BEST[2], BEST[-1]]
CASES = {
    "official": SamplingOptions.official(thinking=False),
    "official thinking": SamplingOptions.official(thinking=True),
    "hot": SamplingOptions(temperature=1.3),
    "cold": SamplingOptions(temperature=0.3),
    "top_k": SamplingOptions(temperature=1.0, top_k=3),
    "top_k of one": SamplingOptions(temperature=1.0, top_k=1),
    "top_p": SamplingOptions(temperature=1.0, top_p=0.5),
    "min_p": SamplingOptions(temperature=1.0, min_p=0.2),
    "typical_p": SamplingOptions(temperature=1.0, typical_p=0.4),
    "penalty": SamplingOptions(temperature=0.7, repetition_penalty=2.0),
    "presence": SamplingOptions(temperature=1.0, presence_penalty=1.5),
    "frequency": SamplingOptions(temperature=1.0, frequency_penalty=0.9),
    "bias": SamplingOptions(temperature=1.0, logit_bias=((BEST[1], -100.0), (BEST[20], 3.0), (BEST[-1], 9.0))),
    "all": SamplingOptions(
        0.8, 40, 0.9, 1.2, 0.01, 0.95, 0.1, 0.2, logit_bias=((BEST[3], 1.0), (BEST[0], -1.0)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_draws_follow_the_official_distribution(options):
    """And not the one without these options, so that the test could tell."""
    logits = peaked_logits()
    counts = draw(logits, replace(options, seed=7), DRAWS, GENERATED)
    statistic, bound = chi_square(counts, official_distribution(logits, options, GENERATED))
    assert statistic < bound
    statistic, bound = chi_square(counts, official_distribution(logits, SamplingOptions(temperature=1.0)))
    assert statistic > bound


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_a_penalty_holds_for_the_whole_answer(name):
    """The window is the context: a token said first counts as long as anything fits."""
    n_ctx, said, fresh = 1000, 7, 8
    logits = np.zeros(N_VOCAB, np.float32)
    logits[[said, fresh]] = 3.0, 2.9
    sampler = Sampler(chosen(greedy=True, **{name: 1.5}), N_VOCAB, n_ctx)
    ids = np.arange(N_VOCAB)
    assert sampler.choose(ids, logits) == said
    sampler.accept(said)
    for _ in range(n_ctx - 1):
        assert sampler.choose(ids, logits) == fresh
        sampler.accept(9)
    assert sampler.choose(ids, logits) == fresh
    sampler.close()


def test_seeds_draw_independently():
    """Answers of neighbouring seeds, as `chat_n` takes them, are as different as those of any others."""
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    first = np.zeros(4, np.int64)
    for seed in range(2000):
        first += draw(logits, SamplingOptions(temperature=1.0, seed=seed), 1)
    statistic, bound = chi_square(first, np.exp(logits.astype(np.float64)))
    assert statistic < bound


def test_typical_sampling_keeps_tokens_of_typical_surprise():
    logits = np.log(np.array([0.5, 0.2, 0.15, 0.1, 0.05], np.float32))
    options = SamplingOptions(temperature=1.0, typical_p=0.3, seed=3)
    want, got = official_distribution(logits, options), draw(logits, options, 500)
    assert set(np.flatnonzero(got)) == set(np.flatnonzero(want))
    assert got[0] == 0, "the most probable token is not the typical one here"


def test_a_ban_of_minus_100_is_one_and_a_bias_comes_before_everything_else():
    logits = peaked_logits()
    banned = SamplingOptions(temperature=0.0, logit_bias=((BEST[0], -100.0),))
    assert np.flatnonzero(draw(logits, banned, 1)) == BEST[1]
    lifted = SamplingOptions(temperature=1.0, top_k=1, logit_bias=((BEST[-1], 100.0),))
    assert np.flatnonzero(draw(logits, lifted, 3)) == BEST[-1]


def test_temperature_zero_is_the_most_probable_token():
    logits = np.random.default_rng(2).normal(0, 1, N_VOCAB).astype(np.float32)
    counts = draw(logits, chosen(temperature=0.0), 3)
    assert counts[np.argmax(logits)] == 3


def test_defaults_are_the_official_ones():
    assert chosen() == SamplingOptions(0.7, 100, 0.8, 1.03)
    assert chosen(thinking=True) == SamplingOptions(0.7, 50, 1.0, 1.0)
    assert chosen(top_p=0.5) == SamplingOptions(0.7, 100, 0.5, 1.03)


@pytest.mark.parametrize("thinking", [True, False])
def test_greedy_has_no_penalty_unless_given(thinking):
    assert chosen(thinking=thinking, greedy=True).repetition_penalty == 1.0
    assert chosen(thinking=thinking, temperature=0).top_k == 0
    assert chosen(thinking=thinking, greedy=True, repetition_penalty=1.2).repetition_penalty == 1.2


@pytest.mark.parametrize(
    "given",
    [
        *(
            {"temperature": -1},
            {"top_p": 1.5},
            {"top_k": -3},
            {"repetition_penalty": 0},
            {"seed": -1},
            {"top_p": "x"},
        ),
        *({"temperature": float("nan")}, {"logit_bias": [1]}, {"logit_bias": {-1: 1.0}}, {"logit_bias": {300: 1.0}}),
        *({"logit_bias": {1: 101}}, {"logit_bias": {1: float("nan")}}, {"logit_bias": {"x": 1}}),
        *({"logit_bias": {1: True}}, {"logit_bias": {True: 1}}, {"logit_bias": {1.0: 1}}, {"logit_bias": {"²": 1}}),
    ],
    ids=str,
)
def test_values_out_of_range_are_named(given):
    with pytest.raises(MessageError, match=next(iter(given))):
        chosen(**given)


def test_a_bias_may_have_ids_as_json_has_them():
    assert chosen(logit_bias={"7": 1, 3: -2.5}).logit_bias == ((3, -2.5), (7, 1.0))


@pytest.mark.parametrize("given", [{"greedy": True}, {"temperature": 0.5}, {"top_k": 4}, {"presence_penalty": 1.0}])
def test_a_search_refuses_what_it_would_not_use(given):
    with pytest.raises(MessageError, match=f"{next(iter(given))} .*leave one of them out"):
        chosen(sampling=False, **given)
    assert chosen(sampling=False, seed=3).repetition_penalty == 1.2


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
