"""Model names → files. So far: the built-in `demo`, a folder, or a decoder file with its mmproj file beside it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from edge_runtime.errors import ModelFileError

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
    name : `demo`, a folder, or a decoder file.
    mmproj : the mmproj file, when it is not the only one beside the decoder.

    Raises
    ------
    ModelFileError
        When a file is missing, or when a folder holds several candidates.
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
    path = Path(name)
    if path.is_dir():
        decoder = _only(path, _decoders(path), "decoder")
        label = path.resolve().name
    elif path.exists():
        decoder, label = path, path.stem
    else:
        raise ModelFileError(
            f"The model {str(name)!r} is neither 'demo' nor an existing folder or file; give a folder made by "
            "'edge-runtime convert', or a .gguf file."
        )
    if mmproj is not None:
        if not Path(mmproj).is_file():
            raise ModelFileError(f"The mmproj file {mmproj} does not exist; check the path.")
        return ModelPaths(label, decoder, Path(mmproj))
    return ModelPaths(label, decoder, _only(decoder.parent, _mmprojs(decoder.parent), "mmproj"))


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
