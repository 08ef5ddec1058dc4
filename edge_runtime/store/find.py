"""Model names → files.

A name is the built-in `demo`, a pulled model, one that came with the installation, a folder, or a decoder with its
mmproj file beside it.
"""

from __future__ import annotations

import filecmp
import os
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from edge_runtime.errors import JOIN_PARTS, ModelFileError
from edge_runtime.store import ollama
from edge_runtime.store.library import Library
from edge_runtime.store.names import ALIASES, DEMO, Source, fits, parse_source, split_stem, type_of
from edge_runtime.store.shipped import ShippedModel, find_shipped

ADAPTER_PREFIX = "adapter-"
"""Files with this prefix are LoRA adapters, which `edge-runtime convert --lora-adapter` writes beside the model."""


@dataclass(frozen=True)
class ModelPaths:
    """The two files of a model."""

    name: str
    decoder: Path
    mmproj: Path


def find_model(name: str | Path | ModelPaths, mmproj: str | Path | None = None) -> ModelPaths:
    """Find the files of a model.

    Parameters
    ----------
    name : `demo`, a name as `edge-runtime pull` takes it, the name of a model that came with the installation, a
        folder, a folder and a type (`FOLDER:Q5_K_M`), or a decoder file; or the paths themselves.
    mmproj : the mmproj file, when it is not the only one beside the decoder.

    Raises
    ------
    ModelFileError
        When a file is missing, a model was not pulled, or a folder holds several candidates.
    """
    if isinstance(name, ModelPaths):
        return name if mmproj is None else replace(name, mmproj=_given(mmproj))
    try:
        return _find(name, mmproj)
    except OSError as error:
        raise ModelFileError(
            f"The model {str(name)!r} cannot be read: {error.strerror or error}; check the path and its permissions."
        ) from None


def _find(name: str | Path, mmproj: str | Path | None) -> ModelPaths:
    if name == DEMO:  # always the built-in one; a folder of that name is given as ./demo
        folder = Path(str(resources.files("edge_runtime").joinpath("demo")))
        return ModelPaths(
            DEMO, _only(folder, _decoders(folder), "decoder"), _only(folder, _mmprojs(folder), "mmproj")
        )
    source = parse_source(name) if isinstance(name, str) else None
    if source is not None:  # likewise: an alias is never a folder, which is given as ./minicpm-v-4.5
        return _pulled(source, str(name), mmproj)
    path, wanted = _folder_and_type(name)
    if not path.exists() and (shipped := find_shipped(str(name))) is not None:
        return _in_folder(shipped, mmproj)
    if path.is_dir():
        decoder = _only(path, _decoders(path), "decoder", wanted)
        label = path.resolve().name + (f":{wanted}" if wanted else "")
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
    if (entry is None or not entry.complete) and (shipped := find_shipped(name)) is not None:
        return _in_folder(shipped, mmproj)
    if entry is None or not entry.complete:
        state = "was not pulled" if entry is None else "was not pulled completely"
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


def _in_folder(model: ShippedModel, mmproj: str | Path | None) -> ModelPaths:
    folder = model.folder
    return ModelPaths(
        model.name,
        _only(folder, _decoders(folder), "decoder"),
        _given(mmproj) if mmproj is not None else _only(folder, _mmprojs(folder), "mmproj"),
    )


def _folder_and_type(name: str | Path) -> tuple[Path, str]:
    """A path, and the part of a decoder's name after a colon, if only the path before the colon exists."""
    path = _path(name)
    before, colon, wanted = str(name).rpartition(":")
    if colon and wanted and not path.exists() and _path(before).is_dir():
        return _path(before), wanted
    return path, ""


def _path(name: str | Path) -> Path:
    return Path(os.path.expanduser(name))  # noqa: PTH111 - shells leave the ~ of --model=~/x alone


def _given(mmproj: str | Path) -> Path:
    path = _path(mmproj)
    if not path.is_file():
        raise ModelFileError(f"The mmproj file {mmproj} does not exist; check the path.")
    return path


def _decoders(folder: Path) -> list[Path]:
    return sorted(p for p in _models(folder) if not is_mmproj(p))


def _mmprojs(folder: Path) -> list[Path]:
    return sorted(p for p in _models(folder) if is_mmproj(p))


def _models(folder: Path) -> list[Path]:
    return [p for p in folder.glob("*.gguf") if not p.name.startswith(ADAPTER_PREFIX)]


def is_mmproj(path: Path) -> bool:
    """Official and converted files are named so; glob leaves out hidden files, which are unfinished conversions."""
    return "mmproj" in path.name.lower()


def _only(folder: Path, candidates: list[Path], what: str, wanted: str = "") -> Path:
    """The only file of its kind, or the one with `wanted` in its name; identical files of one type count as one."""
    whole = [path for path in candidates if split_stem(path.name) is None]
    fitting = [path for path in whole if not wanted or fits(path.name, wanted)]
    is_one_type = bool(wanted) or len({type_of(path.name) or path.name for path in fitting}) == 1
    if fitting and is_one_type and all(_is_same(fitting[0], other) for other in fitting[1:]):
        return fitting[0]
    parts = [path.name for path in candidates if split_stem(path.name) and (not wanted or fits(path.name, wanted))]
    if parts and not fitting:
        raise ModelFileError(
            f"{folder} has its {what} in {len(parts)} parts ({parts[0]}, ...), expected a single file; {JOIN_PARTS}."
        )
    if wanted and candidates and not fitting:
        raise ModelFileError(
            f"{folder} holds no {what} file {wanted!r}; there are: {', '.join(path.name for path in whole)}. Choose "
            "another."
        )
    candidates = fitting
    if not candidates:
        expected = "mmproj*.gguf" if what == "mmproj" else "*.gguf (not named mmproj)"
        raise ModelFileError(
            f"{folder} holds no {what} file ({expected}); convert the checkpoint, or download both files of the "
            "model into one folder."
        )
    option = "--mmproj FILE" if what == "mmproj" else f"-m FILE, or by a part of its name, such as {folder}:Q4_K_M"
    raise ModelFileError(
        f"{folder} holds {len(candidates)} {what} files ({', '.join(p.name for p in candidates)}), expected one; "
        f"choose with {option}."
    )


def _is_same(one: Path, other: Path) -> bool:
    """Whether two paths are the same file, or have the same contents."""
    return one.samefile(other) or filecmp.cmp(one, other, shallow=False)
