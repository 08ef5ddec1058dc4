"""Our kernels inside llama.cpp: they compute its products, in every context that wants them and in no other."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_kernels.ggml_backend import compiled, library, proof, register
from edge_runtime.decoder import kernel_products
from edge_runtime.decoder.decoder import Decoder
from edge_runtime.decoder.kernel_products import kernel_setting
from edge_runtime.decoder.options import DecoderOptions
from edge_runtime.decoder.sequence_chunk import SequenceChunk
from edge_runtime.errors import BackendUnavailable

DEMO = Path(__file__).parents[2] / "edge_runtime" / "demo" / "ggml-model-Q4_K_M.gguf"


def open_decoder(*, kernels: bool | None, **options: Any) -> Decoder:
    return Decoder(DEMO, DecoderOptions(n_ctx=512, kernels=kernels, **options))


def tokens(n: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 300, n)]


def logits_of(decoder: Decoder, ids: list[int], sequence: int = 0) -> Any:
    decoder.rewind(sequence)
    decoder.step([SequenceChunk(sequence, ids)])
    return decoder.logits()


@pytest.mark.parametrize("n", [1, 2, 9, 200])
@pytest.mark.parametrize("kv_type", [None, "q8_0", "q4_0"])
def test_logits_are_as_near_to_the_exact_ones_as_llama_cpps(n, kv_type):
    """Exact: float32 KV cache, llama.cpp's own arithmetic. Both others round rows to 8 bits."""
    ids, found = tokens(n), {}
    for name, options in (
        ("ours", {"kernels": True, "kv_type": kv_type}),
        ("theirs", {"kernels": False, "kv_type": kv_type}),
        ("exact", {"kernels": None, "exact": True}),
    ):
        decoder = open_decoder(**options)
        try:
            assert decoder.uses_kernels == (name == "ours")
            found[name] = logits_of(decoder, ids)
        finally:
            decoder.close()
    spread = found["exact"].std()
    ours, theirs = (np.abs(found[name] - found["exact"]).max() for name in ("ours", "theirs"))
    assert (found["ours"] != found["theirs"]).any()  # the kernels were at work
    assert ours <= 2 * theirs + 0.02 * spread


def test_first_tokens_are_llama_cpps_wherever_its_margin_is_above_the_error():
    """The error is measured on every second prompt, the first tokens are compared on the others."""
    found = {}
    for kernels in (True, False):
        decoder = open_decoder(kernels=kernels)
        prompts = [tokens(3 + i % 60, seed=i) for i in range(96)]
        found[kernels] = np.stack([logits_of(decoder, ids) for ids in prompts])
        decoder.close()
    error = np.abs(found[True] - found[False])[::2].max()
    ours, theirs = (found[kernels][1::2] for kernels in (True, False))
    second, first = np.sort(theirs, 1)[:, -2:].T
    is_clear = first - second > 2 * error  # the first falls and the second rises by as much
    assert is_clear.sum() > 24
    assert (ours.argmax(1) == theirs.argmax(1))[is_clear].all()


@pytest.mark.parametrize("kv_type", [None, "q8_0", "q4_0"])
@pytest.mark.parametrize("n", [1, 80])
def test_attention_is_computed_by_the_kernels_too(n, kv_type):
    """Without it, ggml's own gives other bits: it is flash attention that llama.cpp hands over, in every call."""
    table, found = register._registered().table, []
    for rows in (register.ATTENTION_ROWS, 1 << 40):
        table[compiled.ATTENTION_ROWS] = rows
        try:
            decoder = open_decoder(kernels=True, kv_type=kv_type)
            logits_of(decoder, tokens(30))
            decoder.step([SequenceChunk(0, tokens(n, seed=3))])
            found.append(decoder.logits())
            decoder.close()
        finally:
            table[compiled.ATTENTION_ROWS] = register.ATTENTION_ROWS
    assert (found[0] != found[1]).any()
    assert np.corrcoef(*found)[0, 1] > 0.999


@pytest.mark.parametrize(("n", "company"), [(1, 1), (1, 7), (5, 3), (40, 1), (1, 150), (100, 30)])
@pytest.mark.parametrize("kv_type", [None, "q8_0"])
def test_a_row_does_not_depend_on_its_call(n, company, kv_type):
    """Alone or beside another sequence: the same bits, so batches and drafts change nothing in an answer."""
    decoder = open_decoder(kernels=True, kv_type=kv_type)
    try:
        found = []
        for others in ([], [SequenceChunk(1, tokens(company, seed=1))]):
            for sequence in range(2):
                decoder.rewind(sequence)
                decoder.step([SequenceChunk(sequence, tokens(30, seed=sequence))])
            rows = decoder.step([SequenceChunk(0, tokens(n, seed=2)), *others])
            found.append(decoder.logits(rows[0]))
        assert (found[0] == found[1]).all()
    finally:
        decoder.close()


def test_models_come_and_go():
    """Two at once, one with kernels and one without; then another after one is closed."""
    ids = tokens(20)
    with_, without = open_decoder(kernels=True), open_decoder(kernels=False)
    expected = logits_of(with_, ids)
    other = logits_of(without, ids)
    without.close()
    third = open_decoder(kernels=True)
    with_.close()
    assert (logits_of(third, ids) == expected).all()
    third.close()
    fourth = open_decoder(kernels=False)
    assert (logits_of(fourth, ids) == other).all()
    fourth.close()


def test_the_interpreter_is_not_needed():
    """llama.cpp's call runs while a thread of Python holds the interpreter's lock for most of the time."""
    decoder = open_decoder(kernels=True)
    alone = logits_of(decoder, tokens(30))
    done, counted = threading.Event(), [0]

    def busy() -> None:
        while not done.is_set():
            counted[0] += sum(range(1000))

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert (logits_of(decoder, tokens(30)) == alone).all()
    finally:
        done.set()
        for thread in threads:
            thread.join()
        decoder.close()
    assert counted[0]


def test_two_threads_compute_at_once():
    ids = [tokens(60, seed) for seed in range(2)]
    decoders = [open_decoder(kernels=True) for _ in ids]
    try:
        expected = [logits_of(decoder, of) for decoder, of in zip(decoders, ids, strict=True)]
        found: list[list[Any]] = [[], []]

        def run(i: int) -> None:
            found[i] += [logits_of(decoders[i], ids[i]) for _ in range(5)]

        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all((logits == expected[i]).all() for i in range(2) for logits in found[i])
        assert [len(f) for f in found] == [5, 5]
    finally:
        for decoder in decoders:
            decoder.close()


def test_small_files_exact_and_repacked_decoders_do_without(monkeypatch):
    for options in ({}, {"kernels": True, "exact": True}, {"kernels": True, "repack": True}):
        decoder = open_decoder(**{"kernels": None, **options})
        assert not decoder.uses_kernels
        decoder.close()
    monkeypatch.setattr(kernel_products, "MIN_FILE_BYTES", 0)
    decoder = open_decoder(kernels=None)
    assert decoder.uses_kernels
    decoder.close()
    monkeypatch.setenv("EDGE_RUNTIME_KERNELS", "off")
    decoder = open_decoder(kernels=None)
    assert not decoder.uses_kernels
    decoder.close()


def test_types_without_kernels_are_left_to_llama_cpp():
    """What the device would compute is read from its table: a product with any other type it must not claim."""
    table = register._registered().table
    ours = {
        name
        for code in range(proof.MAX_TYPE + 1)
        if (name := (library.function("ggml_type_name")(code) or b"").decode().upper())
        and table[compiled.KIND + code] >= 0
    }
    assert ours == {"Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "Q4_1", "IQ4_NL"}


def test_the_environment_variable_is_checked(monkeypatch):
    monkeypatch.setenv("EDGE_RUNTIME_KERNELS", "yes")
    with pytest.raises(BackendUnavailable, match="EDGE_RUNTIME_KERNELS is 'yes'; set it to on or off"):
        kernel_setting()


def test_doubts_leave_the_work_to_llama_cpp(monkeypatch, caplog):
    """A ggml that is not the one the kernels know: one line, and the answer comes all the same."""

    def refuse(*, claims_weights: bool) -> None:
        raise library.BackendError("a product differs from ggml's by 1 of its largest number.")

    monkeypatch.setattr(register, "register", refuse)
    decoder = open_decoder(kernels=True)
    try:
        assert not decoder.uses_kernels
        assert len(logits_of(decoder, tokens(3))) == decoder.config.vocabulary
    finally:
        decoder.close()
    assert [r.getMessage() for r in caplog.records if "without our kernels" in r.getMessage()] == [
        "llama.cpp computes without our kernels: a product differs from ggml's by 1 of its largest number."
    ]


@pytest.mark.parametrize(
    ("check", "found"),
    [
        (proof.check_products, "a product with Q4_0 differs from ggml's by"),
        (proof.check_attention, "attention with keys in F16 differs from ggml's by"),
    ],
)
def test_a_wrong_result_is_noticed(check, found, monkeypatch):
    registered = register._registered()
    monkeypatch.setattr(proof, "MAX_ERROR", -1.0)
    with pytest.raises(library.BackendError, match=found):
        check(registered.table, registered.new_backend)


def test_a_ggml_without_a_function_is_refused():
    with pytest.raises(library.BackendError, match="this ggml has no ggml_of_the_future"):
        library.function("ggml_of_the_future")


def run_python(text: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_any_program_of_llama_cpp_python_can_use_them():
    """Three lines before the model is loaded; the same tokens, and logits that show the kernels were at work."""
    program = """
        import llama_cpp
        {lines}
        model = llama_cpp.Llama({path!r}, n_ctx=256, n_threads=1, logits_all=True, verbose=False)
        model.eval(range(40, 60))
        print(*model.scores[19])
    """
    lines = "from edge_kernels.ggml_backend.register import register; register()"
    with_, without = (
        np.array(run_python(program.format(lines=text, path=str(DEMO))).split(), np.float64) for text in (lines, "")
    )
    assert (with_ != without).mean() > 0.9
    assert np.corrcoef(with_, without)[0, 1] > 0.999


def test_ggml_must_be_loaded_first():
    assert "import llama_cpp first" in run_python(
        """
        from edge_kernels.ggml_backend.library import BackendError
        from edge_kernels.ggml_backend.register import register
        try:
            register()
        except BackendError as error:
            print(error)
        """
    )
