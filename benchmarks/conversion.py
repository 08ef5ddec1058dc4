"""Time and peak memory of converting a checkpoint, against llama.cpp's scripts and quantizer in the same run.

    python benchmarks/make_checkpoint.py build/random --gb 17.4
    python benchmarks/conversion.py build/random [--reference build/reference] [--type q4_k_m] [--json FILE]

First `edge-runtime convert`, then, if `make reference` has installed them, llama.cpp's convert_hf_to_gguf.py (its own
choice of type: bfloat16 stays bfloat16), llama-quantize, and its script for the vision part, which writes float16 at
best. What its scripts need beforehand is not counted: the vision tensors in separate files, which
`minicpmv-surgery.py` makes from the official model class. Before each side the checkpoint is dropped from the page
cache. One side's files are deleted before the other starts, so the disk must hold the checkpoint and the peer's
intermediate file, which is as large again. Tensors of both decoders are compared by digest.

Memory is summed over a process and its children every 20 ms (see `harness/memory.py`). The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for folder in ("converters", "kernels", "."):
    sys.path.insert(0, str(ROOT / folder))

from benchmarks.harness.goals import Goal, finish  # noqa: E402
from benchmarks.harness.memory import PERIOD_S, Memory, watch  # noqa: E402
from edge_runtime.weights.gguf_file import GGUFFile  # noqa: E402

PARTS = ROOT / "benchmarks" / "peers" / "llama_conversion.py"
VISION_SCRIPT = Path("tools", "mtmd", "legacy-models", "minicpmv-convert-image-encoder-to-gguf.py")
MOST_GB, MAX_TIMES = 2.5, 1.0
REWRITTEN = ("config.json", "tokenizer_config.json")
DECODER_KEYS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("intermediate_size", "hidden_act", "rms_norm_eps", "rope_theta", "max_position_embeddings", "attention_bias"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "torch_dtype", "rope_scaling", "sliding_window"),
)


def forget_pages(folder: Path) -> None:
    """Have the kernel drop a folder's files from its page cache, where the system allows it."""
    if not hasattr(os, "posix_fadvise"):
        return
    os.sync()  # dirty pages cannot be dropped
    for path in folder.glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def digests(path: Path) -> dict[str, str]:
    """Tensor → digest of its type and bytes."""
    file = GGUFFile(path)
    return {
        name: hashlib.blake2b(file.blocks(name).tobytes(), digest_size=16, person=b"%d" % int(info.type)).hexdigest()
        for name, info in file.tensors.items()
    }


def ours(checkpoint: Path, folder: Path, options: argparse.Namespace) -> list[tuple[str, Memory, float]]:
    """Convert with edge-runtime, in one step."""
    command = [sys.executable, "-m", "edge_runtime", "convert", checkpoint, "-o", folder, "--force"]
    command += ["--type", options.type, "--vision-type", options.vision_type]
    return [("edge-runtime convert", *watch(command))]


def decoder_folder(checkpoint: Path, folder: Path) -> Path:
    """The decoder as Qwen3ForCausalLM: links to the checkpoint's own shards, and settings to match."""
    folder.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.name.startswith("model") or (path.suffix in (".json", ".txt") and path.name not in REWRITTEN):
            (folder / path.name).symlink_to(path.resolve())
    # The official class is Qwen2's with names for its tokens; without a tokenizer.json, Qwen2's must load.
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text("utf-8"))
    settings = {name: value for name, value in settings.items() if name != "auto_map"}
    settings["tokenizer_class"] = "Qwen2Tokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    known = {key: config[key] for key in DECODER_KEYS if key in config}
    known |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    (folder / "config.json").write_text(json.dumps(known), "utf-8")
    return folder


def theirs(checkpoint: Path, folder: Path, options: argparse.Namespace) -> list[tuple[str, Memory, float]]:
    """Convert with llama.cpp's scripts and quantizer, step by step; intermediate files are deleted."""
    reference = options.reference.absolute()
    llama_cpp, python = reference / "llama.cpp", reference / "venv" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(llama_cpp / "gguf-py"), "HF_HUB_OFFLINE": "1"}
    decoder = decoder_folder(checkpoint, folder / "decoder")
    watch([python, PARTS, "vision", checkpoint, folder / "vision"], environment)
    plain, kind = folder / "decoder.gguf", options.type.upper()
    steps = []

    def step(what: str, *command: str | Path) -> None:
        steps.append((what, *watch(command, environment)))

    step("convert_hf_to_gguf.py", python, PARTS, "decoder", llama_cpp, decoder, "--outfile", plain)
    step("llama-quantize", reference / "bin" / "llama-quantize", plain, folder / f"ggml-model-{kind}.gguf", kind)
    plain.unlink()
    projector = folder / "vision" / "minicpmv.projector"
    vision = ["-m", folder / "vision", "--minicpmv-projector", projector, "--minicpmv_version", "6"]
    step("vision script", python, llama_cpp / VISION_SCRIPT, *vision, "--output-dir", folder / "mmproj")
    return steps


def run(side: Callable[..., list[tuple[str, Memory, float]]], options: argparse.Namespace) -> dict[str, Any]:
    """Convert with one side in a folder that is deleted afterwards; return costs and results."""
    checkpoint: Path = options.checkpoint
    work: Path = options.work or checkpoint.resolve().parent
    forget_pages(checkpoint)
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        folder = Path(temporary)
        steps = side(checkpoint, folder, options)
        written = {path.name: path.stat().st_size for path in sorted(folder.rglob("*.gguf"))}
        (decoder,) = folder.glob("ggml-model-*.gguf")
        found = digests(decoder)
    for what, peak, seconds in steps:
        rss, anon = peak.high_water / 1e9, peak.anon / 1e9
        print(f"{what:<24}{seconds:8.1f} s, peak RSS {rss:6.2f} GB, anonymous {anon:6.2f} GB", flush=True)
    return {
        "seconds": round(sum(seconds for _, _, seconds in steps), 2),
        "peak_rss_bytes": max(max(peak.rss, peak.high_water) for _, peak, _ in steps),
        "peak_anon_bytes": max(peak.anon for _, peak, _ in steps),
        "steps": [{"step": what, "seconds": round(seconds, 2), **asdict(peak)} for what, peak, seconds in steps],
        "written_bytes": written,
        "digests": found,
    }


def main() -> None:
    """Command line."""
    from edge_kernels.machine import cpu_name

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--reference", type=Path, default=ROOT / "build" / "reference", help="made by `make reference`"
    )
    parser.add_argument("--type", default="q4_k_m")
    parser.add_argument("--vision-type", default="q8_0")
    parser.add_argument("--work", type=Path, help="folder for the files, which are deleted (default: beside it)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    source = sum(path.stat().st_size for path in options.checkpoint.glob("*.safetensors"))
    free = shutil.disk_usage(options.work or options.checkpoint.resolve().parent).free
    print(f"checkpoint of {source / 1e9:.2f} GB, {free / 1e9:.1f} GB of disk free", flush=True)
    mine = run(ours, options)
    goals = [Goal("peak memory of edge-runtime convert", mine["peak_rss_bytes"] / 1e9, MOST_GB, " GB")]
    facts = {
        "scenario": f"convert-{options.type}-{options.vision_type}",
        "ours_s": mine["seconds"],
        "peers_s": {},
        "checkpoint_bytes": source,
        "sample_period_s": PERIOD_S,
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": sys.version.split()[0],
    }
    if (options.reference / "ready").exists():
        peer = run(theirs, options)
        equal = sum(peer["digests"].get(name) == digest for name, digest in mine["digests"].items())
        print(f"decoder tensors equal to llama.cpp's: {equal} of {len(peer['digests'])}")
        goals.append(Goal("time, times that of llama.cpp", mine["seconds"] / peer["seconds"], MAX_TIMES))
        facts |= {"peers_s": {"llama.cpp": peer["seconds"]}, "equal_tensors": [equal, len(peer["digests"])]}
        facts["peer"] = {name: value for name, value in peer.items() if name != "digests"}
    else:
        print(f"llama.cpp's side is left out: {options.reference} is not ready; 'make reference' brings it.")
    facts |= {name: value for name, value in mine.items() if name not in ("digests", "seconds")}
    finish(facts, goals, options.json)


if __name__ == "__main__":
    main()
