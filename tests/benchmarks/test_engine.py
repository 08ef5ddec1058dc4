"""The engine's benchmarks on the tiny model: they measure what they say, and answers at once are the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import conversion, decode, first_token, report
from benchmarks.harness import memory
from benchmarks.harness.goals import Goal, finish
from benchmarks.harness.memory import Memory
from benchmarks.peers.whole import Whole

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def last_line(script: str, *arguments: object) -> dict:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["goals"]
    assert all(goal["met"] in (True, False) for goal in facts["goals"])
    return facts


@pytest.fixture
def whole(exact_folder: Path):
    from edge_runtime import Model

    side = Whole({})
    side.model = Model.load(exact_folder, exact=True, n_ctx=1024, n_threads=1)
    yield side
    side.close()


def test_eight_answers_at_once_are_those_of_one_after_the_other(whole):
    """In float32 to the last character, at temperature 0; prompts are different and of equal length."""
    prompts = whole.prompts(8, 40)
    assert len(set(prompts)) == 8
    assert {len(whole.model.build_prompt(prompt).ids) for prompt in prompts} == {40}
    alone, at_once = (whole.ask(prompts, 32, together) for together in (False, True))
    assert alone["answers"] == at_once["answers"]
    assert len(set(alone["answers"])) == 8
    assert alone["tokens"] == at_once["tokens"] == 8 * 32
    assert alone["cached"] == 0, "a request found something that another had left"


def test_the_rest_of_a_token_is_what_llama_decode_does_not_take(whole):
    whole.token(2)
    sample = whole.token(20)
    assert len(sample["inside_s"]) == len(sample["outside_s"]) == 20
    assert min(sample["inside_s"] + sample["outside_s"]) > 0
    # Both parts together are the time between the first and the last piece, but for what a reader's thread waits.
    steps = sum(sample["inside_s"]) + sum(sample["outside_s"])
    assert 0.3 * steps < sample["answer_s"] < 3 * steps
    assert decode.share({"inside_s": [0.3, 0.4], "outside_s": [0.1, 0.2]}) == pytest.approx(30)
    assert type(whole.model.engine.decoder._lib).__name__ == "module", "the clock was left in"


@pytest.mark.slow
def test_scripts_end_with_their_goals(exact_folder: Path, tmp_path: Path):
    facts = last_line("together.py", exact_folder, "--tokens", 40, "--repeats", 2, "--json", tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text()) == facts
    assert {len(ones) for ones in facts["samples_s"].values()} == {2}
    # A program that answers as llama-bench does.
    rates = [{"n_gen": 0, "avg_ts": 1.0}, {"n_gen": 8, "avg_ts": 12.5}]
    script = tmp_path / "llama-bench"
    script.write_text(f"#!/bin/sh\necho 'loading'\necho '{json.dumps(rates)}'\n")
    script.chmod(0o755)
    facts = last_line("decode.py", exact_folder, "--tokens", 8, "--repeats", 2, "--llama-bench", script)
    assert facts["llama_bench_tokens_per_s"] == [12.5, 12.5]
    assert len(facts["samples"]["load"]) == 2


@pytest.mark.slow
def test_a_pause_between_turns_leaves_less_to_read(exact_folder: Path):
    facts = last_line("turns.py", exact_folder, "--side", 56, "--pause", 1, "--repeats", 1)
    read = {what: n for what, [[n, _]] in facts["read_s"].items()}
    assert 0 < read["second turn, after a pause"] < read["second turn, asked at once"]
    assert set(facts["per_cent_of_first"]) == set(read)
    assert facts["cache_bytes"] > 0


@pytest.mark.slow
def test_first_token_takes_the_way_of_the_peer_that_works(exact_folder: Path, tmp_path: Path):
    """A peer that ends without a word unless weights are not repacked, and then takes three seconds."""
    peer = tmp_path / "llama-mtmd-cli"
    peer.write_text('#!/bin/sh\ncase "$*" in *--no-repack*) sleep 3; echo; echo word;; *) exit 132;; esac\n')
    peer.chmod(0o755)
    facts = last_line("first_token.py", exact_folder, peer, "--side", 56, "--repeats", 1)
    assert not facts["repacked_peer"]
    assert "132" in facts["failed"]["llama-mtmd-cli"][0]
    assert 3 < facts["peers_s"]["llama-mtmd-cli"] < 30
    assert facts["ours_s"]["first_token"] > 0.2
    assert facts["peak_rss_bytes"]["edge-runtime"] > 50e6


def test_a_process_that_says_nothing_is_told(tmp_path: Path):
    with pytest.raises(first_token.Failed, match="ended with 0; last line: why"):
        first_token.first_word(
            [sys.executable, "-c", "import sys; print('why', file=sys.stderr)"], 1, tmp_path / "log"
        )


def test_goals_say_whether_they_are_met(tmp_path: Path, capsys):
    goals = [Goal("ratio", 2.6, 2.5, at_least=True), Goal("load", 2.0, 2.0, " s")]
    finish({"scenario": "x", "ours_s": {}, "peers_s": {}}, goals, tmp_path / "new" / "x.json")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "ratio: 2.6 (goal: at least 2.5) met"
    assert printed[1] == "load: 2 s (goal: under 2 s) MISSED"
    assert [goal["met"] for goal in json.loads(printed[2])["goals"]] == [True, False]


def test_conversion_leaves_nothing_and_adds_up_its_steps(tmp_path: Path, checkpoint: Path, monkeypatch):
    """On the tiny checkpoint, the peer's scripts replaced by one that copies ours."""
    (tmp_path / "work").mkdir()

    def twice(source: Path, folder: Path, options) -> list:
        found = conversion.ours(source, folder, options)
        return [*found, ("again", Memory(rss=1, anon=2, high_water=1), 1.0)]

    options = type("Options", (), {"checkpoint": checkpoint, "work": tmp_path / "work", "type": "f16"})()
    options.vision_type = "f16"
    found = conversion.run(twice, options)
    assert found["seconds"] == pytest.approx(found["steps"][0]["seconds"] + 1)
    assert found["peak_rss_bytes"] > 50e6
    assert not [*(tmp_path / "work").iterdir()]
    assert {Path(name).suffix for name in found["written_bytes"]} == {".gguf"}
    assert len(set(found["digests"].values())) > 5


def test_a_step_that_fails_is_told_with_its_last_words(monkeypatch):
    command = [sys.executable, "-c", "print('too little disk'); raise SystemExit(3)"]
    with pytest.raises(SystemExit, match="exit code 3: too little disk"):
        memory.watch(command)


def test_results_become_tables():
    goals = [{"what": "load to ready", "value": 1.5, "bound": 2.0, "met": True}]
    assert "| load to ready | 1.50 | 2 | met |" in report.render({"scenario": "decode", "goals": goals})
    side = {"seconds": 2.0, "peak_anon_bytes": 1e6, "peak_rss_bytes": 3e6}
    steps = [{"step": "llama-quantize", "seconds": 1.0, "anon": 2e6, "high_water": 4e6}]
    result = {"scenario": "convert-q4_k_m-q8_0", "ours_s": 1.0, "checkpoint_bytes": 9e6, **side}
    assert len(report.render(result).splitlines()) == 3
    text = report.render(result | {"peer": side | {"steps": steps}})
    assert "| llama.cpp: llama-quantize | 1 | 2 | 4 |" in text
    assert "| llama.cpp, all steps | 2 | 1 | 3 |" in text
