"""Measuring and tuning: what is printed, what is remembered, for which file, and who uses it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge_runtime import BackendUnavailable, Model
from edge_runtime.cli import tuning_trial as trial
from edge_runtime.cli.bench import NOISE, TURNS, WORTH_ROUNDING, gains_enough, tune
from edge_runtime.cli.program import main
from edge_runtime.cli.tuning_trial import SAMPLE_ANSWER, Rates, Sampling, Trial
from edge_runtime.decoder import llama_context
from edge_runtime.decoder.options import DecoderOptions
from edge_runtime.loading import load as loading
from edge_runtime.loading.tuning import Tuning, forget_tuning, remember_tuning, remembered_tuning, tuning_path
from edge_runtime.weights.gguf_file import GGUFFile

pytestmark = pytest.mark.every_core


@pytest.fixture(autouse=True)
def data_folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr("platformdirs.user_data_dir", lambda name: str(tmp_path / name))
    return tmp_path


@pytest.fixture
def decoder(demo: Model) -> GGUFFile:
    return demo.engine.decoder.file


def run(*arguments: str) -> list[str]:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def test_bench_prints_a_table_and_json():
    *table, last = run("bench", "-m", "demo")
    facts = json.loads(last)
    assert [line.split()[0] for line in table] == ["load", "prefill", "generation", "picture", "per"]
    assert facts["scenario"] == "bench"
    assert facts["peers_s"] == {}
    assert min(facts["ours_s"].values()) > 0
    assert facts["prefill_tokens_per_s"] > facts["decode_tokens_per_s"] > 0


def test_tune_remembers_what_was_best_and_loading_uses_it(decoder, data_folder):
    *table, last = run("bench", "-m", "demo", "--tune")
    facts = json.loads(last)
    best = Tuning(**facts["tuned"])
    assert remembered_tuning(decoder) == best
    assert len(facts["trials"]) >= 4
    assert {trial["n_ubatch"] for trial in facts["trials"]} == {256, 512}
    assert {trial["repack"] for trial in facts["trials"]} == {False, True}
    assert {trial["kv_type"] for trial in facts["trials"]} == {"f16", "q8_0"}
    assert all(trial["request_s"] is None or len(trial["samples_s"]) >= 2 for trial in facts["trials"][1:])
    assert any(line.startswith("best:") for line in table)
    assert [path.suffix for path in (data_folder / "edge-runtime" / "tuning").iterdir()] == [".json"]


@pytest.fixture
def opened_with(monkeypatch):
    """Load the demo model and return the options its decoder was opened with."""

    def load(**options) -> DecoderOptions:
        seen: list[DecoderOptions] = []
        make, load_model = loading.Decoder, llama_context.load_model
        with monkeypatch.context() as patch:
            patch.setattr(loading, "Decoder", lambda file, setup: seen.append(setup) or make(file, setup))
            # Repacked weights cannot be computed with on every machine; what is asked for is all that counts here.
            patch.setattr(llama_context, "load_model", lambda file, *, repack: load_model(file, repack=False))
            with Model.load("demo", **options) as model:
                assert model.chat("Hello", greedy=True, max_tokens=4).completion_tokens
        return seen[0]

    return load


def test_loading_takes_the_tuning_unless_told_otherwise(decoder, opened_with):
    remember_tuning(decoder, Tuning(2, 256, repack=True, kv_type="q8_0"))
    found = opened_with()
    assert (found.n_threads, found.n_ubatch, found.repack, found.kv_type) == (2, 256, True, "q8_0")
    given = opened_with(n_threads=1, kv_type="f16")
    assert (given.n_threads, given.n_ubatch, given.kv_type) == (1, 256, "f16")
    assert opened_with(exact=True).kv_type == "f32"
    low = opened_with(low_memory=True)
    assert (low.n_ubatch, low.repack, low.kv_type) == (128, False, "q8_0")
    untouched = opened_with(tuned=False)
    assert (untouched.n_ubatch, untouched.repack, untouched.kv_type) == (512, False, "f16")


def test_a_tuning_belongs_to_one_file(decoder, tmp_path):
    copy = tmp_path / "other.gguf"
    shutil.copy(decoder.path, copy)
    remember_tuning(decoder, Tuning(1))
    assert remembered_tuning(GGUFFile(copy)) is None
    assert remembered_tuning(decoder) == Tuning(1)
    forget_tuning(decoder)
    assert remembered_tuning(decoder) is None


def test_a_tuning_belongs_to_one_machine(decoder, monkeypatch):
    remember_tuning(decoder, Tuning(1))
    with monkeypatch.context() as patch:
        patch.setattr("edge_runtime.loading.tuning.machine_identity", lambda: "another")
        assert remembered_tuning(decoder) is None
        remember_tuning(decoder, Tuning(3))
        assert remembered_tuning(decoder) == Tuning(3)
    assert remembered_tuning(decoder) == Tuning(1)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", "nonsense", "\0\xff", '{"MACHINE": 3}', '{"MACHINE": {"n_threads": -1}}'),
        *('{"MACHINE": {"kv_type": "x"}}', '{"MACHINE": {"n_ubatch": 100000}}', '{"MACHINE": {"nope": 1}}'),
        '{"MACHINE": {"repack": "yes"}}',
    ],
)
def test_a_damaged_tuning_is_none(decoder, text):
    from edge_runtime.loading.tuning import machine_identity

    path = tuning_path(decoder)
    path.parent.mkdir(parents=True)
    path.write_text(text.replace("MACHINE", machine_identity()), "latin-1")
    assert remembered_tuning(decoder) is None
    remember_tuning(decoder, Tuning(2))
    assert remembered_tuning(decoder) == Tuning(2)


class MadeUp:
    """Trials on a machine that is made up.

    Parameters
    ----------
    gains : `SETTING=VALUE` to the share of the time that it saves.
    slow_calls : which samples, of all that are taken, come in a moment when everything takes twice as long.
    """

    def __init__(self, gains: dict[str, float], slow_calls: range = range(0)) -> None:
        self.gains, self.slow_calls, self.n_calls = gains, slow_calls, 0
        self.n_open = 0

    def __call__(self, path: Path, tuning: Tuning) -> MadeUp:
        one = MadeUp(self.gains)
        one.__dict__ |= {"machine": self, "tuning": tuning}
        return one

    def __enter__(self) -> MadeUp:
        self.machine.n_open += 1
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        self.machine.n_open -= 1

    def sample(self, n_prompt: int) -> Rates | None:
        factor = 1.0
        for setting, gain in self.gains.items():
            name, value = setting.split("=")
            factor *= 1 - gain if str(getattr(self.tuning, name)) == value else 1
        self.machine.n_calls += 1
        factor *= 1 + (self.machine.n_calls in self.machine.slow_calls)
        return Rates(100 / factor, 10 / factor)


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ({}, Tuning(4, kv_type="f16")),
        ({"n_threads=8": NOISE + 0.02}, Tuning(8, kv_type="f16")),
        ({"n_threads=8": NOISE / 2}, Tuning(4, kv_type="f16")),
        ({"n_ubatch=256": 0.3}, Tuning(4, 256, kv_type="f16")),
        ({"kv_type=q8_0": WORTH_ROUNDING - 0.01}, Tuning(4, kv_type="f16")),
        ({"kv_type=q8_0": WORTH_ROUNDING + 0.01, "repack=True": 0.5}, Tuning(4, repack=True, kv_type="q8_0")),
    ],
)
def test_the_best_is_what_gains_enough(decoder, monkeypatch, gains, expected):
    machine = MadeUp(gains)
    monkeypatch.setattr("edge_runtime.cli.bench.Trial", machine)
    best, trials = tune(decoder, 4, 8, budget_s=60)
    assert best == expected
    assert [trial["kept"] for trial in trials].count(True) == 1 + len(
        [name for name in gains if str(getattr(best, name.split("=")[0])) == name.split("=")[1]]
    )
    assert len(trials) == 6
    assert len(tune(decoder, 4, 8, budget_s=0)[1]) == 1


@pytest.mark.parametrize("start", range(1, 40))
def test_a_slow_moment_of_the_machine_makes_no_decision(decoder, monkeypatch, start):
    """Four samples in a row take twice as long, whenever that is: nothing that gains nothing is kept."""
    monkeypatch.setattr("edge_runtime.cli.bench.Trial", MadeUp({}, range(start, start + 4)))
    best, _ = tune(decoder, 4, 8, budget_s=60)
    assert best == Tuning(4, kv_type="f16")


def test_a_gain_must_be_more_than_the_samples_spread():
    assert gains_enough([9.0, 9.1, 8.9], [10.0, 10.1, 9.9], 0.03)
    assert not gains_enough([9.0, 9.1, 7.9], [10.0, 10.1, 9.9], 0.03)
    assert not gains_enough([9.0, 9.1, 8.9], [10.0, 12.1, 9.9], 0.03)
    assert not gains_enough([9.8, 9.8, 9.8], [10.0, 10.0, 10.0], 0.03)
    assert not gains_enough([10.0, 10.0], [9.0, 9.0], 0.03)


def test_sides_are_measured_in_turns_and_processes_end(decoder, monkeypatch):
    machine = MadeUp({"n_threads=8": 0.2})
    monkeypatch.setattr("edge_runtime.cli.bench.Trial", machine)
    _, trials = tune(decoder, 4, 8, budget_s=60)
    assert len(trials[1]["samples_s"]) == len(trials[1]["best_samples_s"]) == TURNS
    assert len(trials[2]["samples_s"]) == 2  # half the threads gain nothing: two turns tell
    assert machine.n_open <= 0


def test_settings_that_end_the_process_are_left_out(decoder, monkeypatch):
    class Crashing(MadeUp):
        """A real child process where weights are repacked, ended by a signal or by itself."""

        def __call__(self, path: Path, tuning: Tuning):
            if not tuning.repack:
                return super().__call__(path, tuning)
            with monkeypatch.context() as patch:
                patch.setattr(trial.sys, "executable", shutil.which("false") or "false")
                return Trial(path, tuning)

    monkeypatch.setattr("edge_runtime.cli.bench.Trial", Crashing({}))
    best, trials = tune(decoder, 2, 2, budget_s=60)
    assert not best.repack
    assert [trial["request_s"] is None for trial in trials] == [trial["repack"] for trial in trials]


def test_a_trial_measures_in_its_own_process(decoder):
    with Trial(decoder.path, Tuning(1, kv_type="f16")) as one:
        for n_prompt in (16, 512, 16):
            rates = one.sample(n_prompt)
            assert rates is not None
            assert min(rates.prefill, rates.decode) > 0
    assert one.sample(16) is None
    with Trial(decoder.path, Tuning(1, kv_type="nonsense")) as one:
        assert one.sample(16) is None


def test_samples_end_at_the_same_place(demo):
    """So that attention has as much to look at however many tokens are measured; all but those are computed once."""
    decoder, computed = demo.engine.decoder, []
    step = decoder.step
    decoder.rewind(0)  # other tests have left something there
    sampling = Sampling(decoder)
    try:
        decoder.step = lambda parts, *more: computed.append(len(parts[0].keys)) or step(parts, *more)
        for n_prompt in (128, 128, 512):
            sampling.take(n_prompt)
            assert decoder.held(0) == 512 + SAMPLE_ANSWER
    finally:
        del decoder.step
        decoder.rewind(0)
    answer = [1] * SAMPLE_ANSWER
    assert computed == [8, 512 - 128 - 8, 128, *answer, 128, *answer, 512, *answer]


def test_a_model_that_cannot_be_measured_is_told(decoder, monkeypatch):
    monkeypatch.setattr("edge_runtime.cli.bench.Trial.sample", lambda self, n_prompt: None)
    with pytest.raises(BackendUnavailable, match="cannot be measured"):
        tune(decoder, 2, 2, budget_s=60)
