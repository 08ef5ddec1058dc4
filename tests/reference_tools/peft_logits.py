"""Random LoRAs of the decoder, saved by PEFT, and PyTorch's logits with them; run by the reference environment.

    python peft_logits.py DECODER FOLDER SETTINGS

SETTINGS is a list in JSON, each entry for `peft.LoraConfig`; the first makes FOLDER/lora-0 and FOLDER/lora-0.npy. The
decoder is a folder that holds a Qwen3ForCausalLM.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3ForCausalLM


def make(decoder: str, folder: Path, settings: dict[str, Any]) -> None:
    """Write one LoRA and its logits."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM.from_pretrained(decoder, dtype=torch.float32, attn_implementation="eager")
    config = LoraConfig(init_lora_weights=False, **settings)
    model = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # large enough to change what is most probable
                parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
        if config.use_dora:
            for name, parameter in model.named_parameters():
                if "magnitude" in name:
                    parameter.uniform_(1, 2)
        model.save_pretrained(folder)
        ids = torch.arange(3, 60, 2)[None]
        np.save(folder.with_suffix(".npy"), model(ids).logits[0, -1].numpy())


for i, settings in enumerate(json.loads(sys.argv[3])):
    make(sys.argv[1], Path(sys.argv[2]) / f"lora-{i}", settings)
