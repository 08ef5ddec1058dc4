"""Model names → files: the built-in `demo`, what was pulled, a folder, or a decoder with its mmproj beside it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from edge_runtime import ollama
from edge_runtime.errors import ModelFileError
from edge_runtime.library import Library
from edge_runtime.sources import ALIASES, Source, parse_source

DEMO = "demo"
ADAPTER_PREFIX = "adapter-"
"""Files of this name are LoRA adapters, which `edge-runtime convert --lora-adapter` puts beside the model."""


@dataclass(frozen=True)
class ModelPaths:
    """The two files of a model."""

    name: str
    decoder: Path
    mmproj: Path


def find_model(name: str | Path, mmproj: str | Path | None = None) -> ModelPaths:
    """Find the files of a model.

    Parameters
    ----------
    name : `demo`, a name as `edge-runtime pull` takes it, a folder, or a decoder file.
    mmproj : the mmproj file, when it is not the only one beside the decoder.

    Raises
    ------
    ModelFileError
        When a file is missing, when a model was not pulled, or when a folder holds several candidates.
    """
    try:
        return _find(name, mmproj)
    except OSError as error:
        raise ModelFileError(
            f"The model {str(name)!r} cannot be read: {error.strerror or error}; check the path and its permissions."
        ) from None


def _find(name: str | Path, mmproj: str | Path | None) -> ModelPaths:
    if name == DEMO:  # always the built-in one; a folder of that name is ./demo
        folder = Path(str(resources.files("edge_runtime").joinpath("demo")))
        return ModelPaths(
            DEMO, _only(folder, _decoders(folder), "decoder"), _only(folder, _mmprojs(folder), "mmproj")
        )
    source = parse_source(name) if isinstance(name, str) else None
    if source is not None:  # likewise: an alias is never a folder, which would be ./minicpm-v-4.5
        return _pulled(source, str(name), mmproj)
    path = Path(name)
    if path.is_dir():
        decoder = _only(path, _decoders(path), "decoder")
        label = path.resolve().name
    elif path.exists():
        decoder, label = path, path.stem
    else:
        raise ModelFileError(
            f"The model {str(name)!r} is neither 'demo' nor an existing folder or file; give a folder made by "
            f"'edge-runtime convert', a .gguf file, or the name of a model to pull ({', '.join(ALIASES)}, "
            "hf:ORG/REPO)."
        )
    if mmproj is not None:
        return ModelPaths(label, decoder, _given(mmproj))
    return ModelPaths(label, decoder, _only(decoder.parent, _mmprojs(decoder.parent), "mmproj"))


def _pulled(source: Source, name: str, mmproj: str | Path | None) -> ModelPaths:
    """Files of a model in the store, or in Ollama's."""
    if source.kind == "ollama":
        model = ollama.find(source.place)
        return ModelPaths(name, model.decoder.path, _given(mmproj) if mmproj is not None else model.mmproj.path)
    library = Library()
    entry = library.find(source)
    if entry is None or not entry.complete:
        state = "was not pulled" if entry is None else "was not pulled to its end"
        raise ModelFileError(f"The model {name} {state}; run 'edge-runtime pull {name}'.")
    if entry.kind != "gguf":
        raise ModelFileError(
            f"{name} is a checkpoint, expected GGUF files; run 'edge-runtime convert {name} -o FOLDER', then name "
            "that folder."
        )
    folder = library.snapshot(entry)
    if mmproj is None and not entry.mmproj:
        raise ModelFileError(f"{name} was pulled without an mmproj file; name one with --mmproj FILE.")
    paths = ModelPaths(name, folder / entry.decoder, _given(mmproj) if mmproj is not None else folder / entry.mmproj)
    for path in (paths.decoder, paths.mmproj):
        if not path.is_file():
            raise ModelFileError(f"{path} is missing from the store; run 'edge-runtime pull {name}'.")
    return paths


def _given(mmproj: str | Path) -> Path:
    if not Path(mmproj).is_file():
        raise ModelFileError(f"The mmproj file {mmproj} does not exist; check the path.")
    return Path(mmproj)


def _decoders(folder: Path) -> list[Path]:
    return sorted(p for p in _models(folder) if not _is_mmproj(p))


def _mmprojs(folder: Path) -> list[Path]:
    return sorted(p for p in _models(folder) if _is_mmproj(p))


def _models(folder: Path) -> list[Path]:
    return [p for p in folder.glob("*.gguf") if not p.name.startswith(ADAPTER_PREFIX)]


def _is_mmproj(path: Path) -> bool:
    """Official and converted files are named so; hidden files are unfinished conversions, which glob leaves out."""
    return "mmproj" in path.name.lower()


def _only(folder: Path, candidates: list[Path], what: str) -> Path:
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        expected = "mmproj*.gguf" if what == "mmproj" else "*.gguf (not named mmproj)"
        raise ModelFileError(
            f"{folder} holds no {what} file ({expected}); convert the checkpoint, or download both files of the "
            "model into one folder."
        )
    option = "--mmproj FILE" if what == "mmproj" else "-m FILE"
    raise ModelFileError(
        f"{folder} holds {len(candidates)} {what} files ({', '.join(p.name for p in candidates)}), expected one; "
        f"choose with {option}."
    )
