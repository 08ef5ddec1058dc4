"""Training of the demo model: the network is the runtime's, and the whole path runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_converters import convert_checkpoint
from edge_runtime import Model

torch = pytest.importorskip("torch", reason="torch is not installed (extra [demo])")
pytest.importorskip("safetensors", reason="safetensors is not installed (extra [demo])")

from demo import data, things  # noqa: E402
from demo.batches import SKELETON, BatchMaker  # noqa: E402
from demo.initialise import new_model  # noqa: E402
from demo.model import DemoModel, load_model, save_model  # noqa: E402
from demo.ramp import add_ramp, has_ramp, ramp_weights  # noqa: E402
from demo.sample import Sample  # noqa: E402
from demo.train import QUICK_STEPS  # noqa: E402
from edge_runtime.vision.sine_positions import sine  # noqa: E402
from tolerances import LOGITS  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def network() -> DemoModel:
    """An untrained network in which every part matters, the smooth positions and the sense of time included."""
    torch.manual_seed(0)
    model = new_model().eval()
    with torch.no_grad():
        add_ramp(model.resampler)
        model.smooth.by_row.normal_(0, 0.05)
        model.smooth.by_col.normal_(0, 0.05)
    return model


@pytest.fixture(scope="module")
def folder(network: DemoModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network as float32 GGUF files, by way of a checkpoint."""
    folder = tmp_path_factory.mktemp("demo")
    save_model(network, folder / "checkpoint", SKELETON)
    convert_checkpoint(folder / "checkpoint", folder / "gguf", decoder_type="f32", vision_type="f32")
    return folder / "gguf"


@pytest.fixture(scope="module")
def runtime(folder: Path) -> Iterator[Model]:
    """The network in the runtime, computing exactly."""
    with Model.load(folder, exact=True) as model:
        yield model


def logits_after_prompt(network: DemoModel, sample: Sample, n_prompt: int) -> np.ndarray:
    """What torch computes for the first token of the answer."""
    batch = BatchMaker(seed=0).pack(sample.kind, [sample])
    with torch.no_grad():
        times = None if batch.times is None else torch.from_numpy(batch.times)
        features = [(network.features(torch.from_numpy(p), size), size) for p, size in batch.parts]
        parts = [network.visual_tokens(*part, times) for part in features]
        wanted = torch.zeros(batch.labels.shape, dtype=torch.bool)
        wanted[0, n_prompt - 1] = True
        tokens = torch.cat(parts, dim=1).flatten(1, 2)
        return network.logits(torch.from_numpy(batch.ids), tokens, torch.from_numpy(batch.holes), wanted)[0].numpy()


@pytest.mark.parametrize("kind", ["text to 6", "slices", "filter", "video", "followup", "pictures"])
def test_torch_and_runtime_compute_the_same(network: DemoModel, runtime: Model, kind: str) -> None:
    for seed in range(2):
        sample = data.KINDS[kind](np.random.default_rng(seed))
        prompt = runtime.build_prompt(sample.messages(), **sample.options())
        batch = BatchMaker(seed=0).pack(sample.kind, [sample])
        assert batch.ids[0, : len(prompt.ids)].tolist() == prompt.ids
        assert batch.holes.tolist() == [i for bound in prompt.bounds for i in range(*bound)]
        expected = runtime.trace(sample.messages(), 0, **sample.options()).logits
        difference = np.abs(logits_after_prompt(network, sample, len(prompt.ids)) - expected)
        assert difference.max() <= LOGITS, f"{kind}: max {difference.max():.1e}, mean {difference.mean():.1e}"


def test_files_of_the_runtime_are_weights_to_train_on_from(network: DemoModel, folder: Path) -> None:
    unpacked, state = load_model(folder, SKELETON), network.state_dict()
    table = "vpm.embeddings.position_embedding.weight"
    for name, values in unpacked.state_dict().items():
        if not name.startswith("smooth."):
            expected = network.position_table() if name == table else state[name]
            assert torch.equal(values, expected), name
    assert has_ramp(unpacked.resampler)


def test_scores_rise_evenly_with_time() -> None:
    scores = torch.from_numpy(sine(256, np.arange(things.MAX_START + 60))[:, 96:128]) @ ramp_weights(256)
    steps = scores.diff()
    assert steps.min() > 0.95 * steps.max()


def test_labels_are_the_answer_and_its_end() -> None:
    maker = BatchMaker(seed=0)
    batch = maker.make(3, {"text": 1.0})
    tokens = maker._tokenizer.tokens
    for row in batch.labels:
        *answer, end = (tokens[i] for i in row[row >= 0])
        assert end == "<|im_end|>"
        assert "".join(answer).isalnum()


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    first, second = (BatchMaker(seed=5).make(7, {"count": 1.0}) for _ in range(2))
    assert (first.ids == second.ids).all()
    assert (first.parts[0][0] == second.parts[0][0]).all()


def test_the_quick_run_trains_resumes_and_converts(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "demo" / "train.py"), "--out", str(tmp_path / "run"), "--quick"]
    for steps in (QUICK_STEPS, QUICK_STEPS + 2):  # the second run resumes the first
        subprocess.run([*command, "--steps", str(steps)], check=True, timeout=300)
        log = json.loads((tmp_path / "run" / "log.json").read_text("utf-8"))
        assert log["steps"] == steps
    load_model(tmp_path / "run" / "checkpoint", SKELETON)
    convert_checkpoint(tmp_path / "run" / "checkpoint", tmp_path / "gguf")
    with Model.load(tmp_path / "gguf") as model:
        sample = data.KINDS["text to 4"](np.random.default_rng(0))
        assert isinstance(str(model.chat(sample.messages(), greedy=True, max_tokens=4)), str)
