"""Prepares llama.cpp's conversion scripts and their input; runs in the environment that `make reference` makes.

    python llama_conversion.py vision CHECKPOINT FOLDER         vision tensors as the scripts take them
    python llama_conversion.py decoder LLAMA_CPP FOLDER ...     convert_hf_to_gguf.py with its arguments

The decoder is read from the official checkpoint's own shards, whose names differ only by a prefix; copies would take
another 16 GB of disk. The vision tensors are what `minicpmv-surgery.py` writes. The vocabulary's hash, by which the
script recognises tokenizers, is answered as in the tests.
"""

import runpy
import shutil
import sys
from pathlib import Path
from typing import Any


def write_vision(checkpoint: Path, folder: Path) -> None:
    """Write `minicpmv.projector` and `minicpmv.clip` in float32, with the settings beside them."""
    import torch
    from safetensors import safe_open

    parts: dict[str, dict[str, Any]] = {"resampler.": {}, "vpm.": {}}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is not a mapping
                for prefix in parts:
                    if name.startswith(prefix):
                        parts[prefix][name] = file.get_tensor(name).float()
    folder.mkdir(parents=True)
    torch.save(parts["resampler."], folder / "minicpmv.projector")
    torch.save({name.removeprefix("vpm."): value for name, value in parts["vpm."].items()}, folder / "minicpmv.clip")
    shutil.copy(checkpoint / "config.json", folder)


def convert_decoder(llama_cpp: str, *arguments: str) -> None:
    """Run the script on tensors that are named `llm.…`."""
    sys.path[:0] = [llama_cpp, f"{llama_cpp}/gguf-py"]
    sys.argv = [f"{llama_cpp}/convert_hf_to_gguf.py", *arguments]
    from conversion import base  # found in the folder given
    from conversion.qwen import Qwen3Model

    plain = Qwen3Model.filter_tensors
    Qwen3Model.filter_tensors = classmethod(lambda cls, item: plain((item[0].removeprefix("llm."), item[1])))
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    what, first, *rest = sys.argv[1:]
    if what == "vision":
        write_vision(Path(first), Path(rest[0]))
    else:
        convert_decoder(first, *rest)
