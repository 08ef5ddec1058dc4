"""A checkpoint in the official layout → what llama.cpp's conversion scripts take; run by the reference environment.

    python save_parts.py CHECKPOINT FOLDER

`minicpmv-surgery.py` does this once the official model class is loaded, which needs code that is not here: it writes
`minicpmv.projector` and `minicpmv.clip` (both float32, under the class's names) and saves the decoder alone, which
is a Qwen3ForCausalLM.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

DECODER_KEYS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("intermediate_size", "hidden_act", "rms_norm_eps", "rope_theta", "max_position_embeddings", "attention_bias"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "torch_dtype", "rope_scaling", "sliding_window"),
)

checkpoint, folder = Path(sys.argv[1]), Path(sys.argv[2])
decoder = folder / "decoder"
decoder.mkdir(parents=True)
tensors = {}
for shard in sorted(checkpoint.glob("*.safetensors")):
    tensors |= load_file(shard)

torch.save({k: v.float() for k, v in tensors.items() if k.startswith("resampler")}, folder / "minicpmv.projector")
torch.save(
    {k.removeprefix("vpm."): v.float() for k, v in tensors.items() if k.startswith("vpm.")}, folder / "minicpmv.clip"
)
shutil.copy(checkpoint / "config.json", folder)

save_file(
    {k.removeprefix("llm."): v.contiguous() for k, v in tensors.items() if k.startswith("llm.")},
    decoder / "model.safetensors",
    metadata={"format": "pt"},
)
config = json.loads((checkpoint / "config.json").read_text())
config = {key: config[key] for key in DECODER_KEYS if key in config}
config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
(decoder / "config.json").write_text(json.dumps(config))
for file in checkpoint.iterdir():
    if file.suffix in (".json", ".txt") and not file.name.startswith(("config", "model", "preprocessor")):
        shutil.copy(file, decoder)
