"""A model of quite other sizes against its definition: no number of MiniCPM-V 4.5 is typed anywhere.

Hidden 512, 48 queries, 3 heads of 48 over 1 (less than hidden), another patch size, slice side, position table and
normalisation; every weight random, so that no tensor can be confused with another unnoticed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_converters import convert_checkpoint
from edge_runtime import Model
from edge_runtime.vision.tower import position_ids
from naive import NaiveModel, random_tensors, write_safetensors
from tolerances import LOGITS, RESAMPLER, VISION

CHANGES = {
    "hidden_size": 512,
    "query_num": 48,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 48,
    "num_hidden_layers": 2,
    "intermediate_size": 320,
    "rope_theta": 50_000.0,
    "rms_norm_eps": 1e-5,
    "patch_size": 10,
    "vision_config": {
        "hidden_size": 96,
        "intermediate_size": 200,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "image_size": 330,
        "patch_size": 10,
    },
}
PREPROCESSOR = {"max_slice_nums": 4, "scale_resolution": 120, "patch_size": 10, "use_image_id": False}
PREPROCESSOR |= {"norm_mean": [0.4, 0.5, 0.6], "norm_std": [0.3, 0.2, 0.25]}
PICTURE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (200, 310, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def pair(checkpoint: Path, tmp_path_factory):
    """(project's model, naive model) of the same random checkpoint."""
    folder = tmp_path_factory.mktemp("other")
    config = json.loads((checkpoint / "config.json").read_text()) | CHANGES
    for file in checkpoint.iterdir():
        if "safetensors" not in file.name:
            shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    tensors = random_tensors(config, seed=17)
    write_safetensors(folder / "model.safetensors", tensors)
    convert_checkpoint(folder, folder / "gguf", decoder_type="f32", vision_type="f32")
    with Model.load(folder / "gguf", exact=True) as model:
        yield model, NaiveModel(config, tensors)


def test_preprocessing_takes_its_numbers_from_the_file(pair):
    model, _ = pair
    slices = model.slices(PICTURE)
    assert len(slices) == 5  # 200 x 310 is more than four slices of 120 x 120; the limit is 4 cells
    assert slices[0].patches.shape[1:] == (3, 10, 10)
    first = slices[0].pixels[0, 0] / 255
    np.testing.assert_allclose(slices[0].patches[0, :, 0, 0], (first - [0.4, 0.5, 0.6]) / [0.3, 0.2, 0.25], atol=1e-6)


def test_vision_and_resampler_follow_the_definition(pair):
    model, naive = pair
    features, tokens = model.vision_features(PICTURE), model.encode_image(PICTURE)
    for item, got, visual in zip(model.slices(PICTURE), features, tokens, strict=True):
        want = naive.vision(item.patches.astype(np.float64), position_ids(*item.tgt_size, 33))
        np.testing.assert_allclose(got, want, rtol=0, atol=VISION)
        np.testing.assert_allclose(visual, naive.resample(want, *item.tgt_size), rtol=0, atol=RESAMPLER)


def test_logits_follow_the_definition(pair):
    model, naive = pair
    messages = [{"role": "user", "content": [PICTURE, "What do you see?"]}]
    prompt = model.build_prompt(messages)
    assert "<image_id>" not in prompt.text
    embeddings = naive.w["llm.model.embed_tokens.weight"][prompt.ids]
    for (first, end), item in zip(prompt.bounds, model.slices(PICTURE), strict=True):
        features = naive.vision(item.patches.astype(np.float64), position_ids(*item.tgt_size, 33))
        embeddings[first:end] = naive.resample(features, *item.tgt_size)
    trace = model.trace(messages, 1)
    np.testing.assert_allclose(trace.logits, naive.logits(embeddings), rtol=0, atol=LOGITS)
