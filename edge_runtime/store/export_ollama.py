"""A model → a Modelfile, from which `ollama create` makes the same model in Ollama.

It names the files in place (Ollama copies them into its store), and adds what Ollama cannot read from them:
the chat template in Go's language, the official sampling and the stop sequences. The template writes what the
official one writes for system, user and assistant turns, with thinking off and on; it has no tools.

The remaining differences are Ollama's own: it puts pictures right before the text, without a newline, prepares them
as llama.cpp does, and its repetition penalty sees the prompt.

Source: parser/parser.go and template/template.go of Ollama.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from edge_runtime.decoder.options import DEFAULT_CONTEXT
from edge_runtime.errors import ModelFileError, UnsupportedModelError
from edge_runtime.generation.sampling import MAX_NEW_TOKENS, SamplingOptions
from edge_runtime.store.find import ModelPaths, find_model
from edge_runtime.store.names import visible
from edge_runtime.system.atomic_files import why_not_written, write_whole
from edge_runtime.weights.config import OWN_PROJECTOR, check_mmproj, decoder_config
from edge_runtime.weights.gguf_file import GGUFFile

TEMPLATE = resources.files("edge_runtime.store").joinpath("ollama_template.gotmpl").read_text("utf-8").rstrip("\n")
STOPS = ("<|im_end|>", "<|endoftext|>")


def export_modelfile(name: str, folder: str | Path, *, mmproj: str | Path | None = None, force: bool = False) -> Path:
    """Write a Modelfile.

    Parameters
    ----------
    name, mmproj : the model, as for `find_model`.
    folder : where the file goes; created if needed.
    force : replace an existing one.

    Returns
    -------
    path : of the Modelfile.

    Raises
    ------
    ModelFileError
        When the model is not found or damaged, or the Modelfile cannot be written.
    UnsupportedModelError
        When the vision part is in a form that only edge-runtime reads.
    """
    paths = find_model(name, mmproj)
    _check(paths)
    path = Path(folder) / "Modelfile"
    try:
        if path.exists() and not force:
            raise ModelFileError(
                f"{path} exists already; choose another folder with -o, or pass --force to replace it."
            )
        write_whole(path, modelfile_text(paths).encode())
    except OSError as error:
        raise ModelFileError(f"{why_not_written(error, path)}; choose another folder with -o.") from None
    return path


def modelfile_text(paths: ModelPaths) -> str:
    """Text of the Modelfile for the two files of a model."""
    official = SamplingOptions.official(thinking=False)
    parameters: list[tuple[str, object]] = [
        ("temperature", official.temperature),
        ("top_k", official.top_k),
        ("top_p", official.top_p),
        ("repeat_penalty", official.repetition_penalty),
        ("num_predict", MAX_NEW_TOKENS),
        ("num_ctx", DEFAULT_CONTEXT),
        *(("stop", f'"{stop}"') for stop in STOPS),
    ]
    lines = [
        f"# {visible(paths.name)}, written by edge-runtime",
        *(f"FROM {_quoted(path)}" for path in (paths.decoder, paths.mmproj)),
        *(f"PARAMETER {key} {value}" for key, value in parameters),
        f'TEMPLATE """{TEMPLATE}"""',
    ]
    return "\n".join(lines) + "\n"


def _quoted(path: Path) -> str:
    """A path as a value. Ollama knows quotes but no escapes inside them, and rejects file names like drives."""
    text = str(path.resolve())
    if '"' in text or not text.isprintable() or any(c in path.name for c in "\\:"):
        raise ModelFileError(
            f"The path {text!r} cannot be used in a Modelfile, expected one without quotes and control characters, "
            "and a file name without colons and backslashes; move or rename the model."
        )
    return f'"{text}"'


def _check(paths: ModelPaths) -> None:
    decoder, mmproj = GGUFFile(paths.decoder), GGUFFile(paths.mmproj)
    decoder_config(decoder)
    check_mmproj(mmproj)
    if mmproj.metadata.get("clip.projector_type") == OWN_PROJECTOR:
        raise UnsupportedModelError(
            f"{paths.mmproj.name} is stored in int4 blocks that only edge-runtime reads, expected a type that "
            "Ollama reads; convert the vision part to q8_0 or f16."
        )
