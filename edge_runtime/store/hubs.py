"""A repository on Hugging Face or ModelScope → its files, and which of them make a model.

Names, sizes and checksums come from the hub's list, which is untrusted: each is checked before it is used. Keys
are taken from where the hubs' own tools keep them (HF_TOKEN or `hf auth login`; MODELSCOPE_API_TOKEN or `modelscope
login`), sent to the hub alone and never shown.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote, urlencode

from edge_runtime.errors import JOIN_PARTS, BackendUnavailable, DownloadError
from edge_runtime.store.download import MAX_BYTES, RemoteFile, ask, probe, refuse_offline
from edge_runtime.store.names import (
    Source,
    checked_path,
    file_of_address,
    fits,
    is_meant,
    is_sha256,
    split_stem,
    visible,
)

USUAL_DECODER, USUAL_MMPROJ = "q4_k_m", "f16"
"""Chosen when a repository offers several and none was asked for: the sizes most people want."""

_GIT_ID = re.compile(r"[0-9a-f]{40}")
# What `convert` reads from a checkpoint; code and pickles are never fetched.
_CHECKPOINT = re.compile(r"[^/.][^/]*\.(safetensors|json|jinja)|merges\.txt")


@dataclass(frozen=True)
class Listing:
    """Files of a repository."""

    files: list[RemoteFile]
    revision: str = ""
    """Commit; empty where the server has none."""
    licence: str = ""
    """As the repository states it; empty: unknown."""


@dataclass(frozen=True)
class Choice:
    """The files that make a model."""

    kind: Literal["gguf", "checkpoint"]
    decoder: RemoteFile | None
    mmproj: RemoteFile | None
    others: tuple[RemoteFile, ...] = ()

    @property
    def files(self) -> tuple[RemoteFile, ...]:
        """All of them."""
        return tuple(file for file in (self.decoder, self.mmproj, *self.others) if file is not None)


def list_files(source: Source, mmproj: str | None = None) -> Listing:
    """List the files at a model's source.

    Parameters
    ----------
    mmproj : the second address, for a model given by addresses.

    Raises
    ------
    DownloadError
        When the server refuses, cannot be reached, or answers with something else.
    BackendUnavailable
        For ModelScope, when its package is not installed.
    """
    if source.kind == "hf":
        return _hugging_face(source.place)
    if source.kind == "ms":
        return _modelscope(source.place)
    return _addresses(source, mmproj)


def endpoint_of(source: Source) -> str:
    """Address of the hub that a model comes from, as configured on this machine; empty if it comes from no hub."""
    if source.kind == "hf":
        from huggingface_hub import constants

        return str(constants.ENDPOINT)
    if source.kind == "ms":
        with contextlib.suppress(ImportError):
            from modelscope_hub import get_default_config

            return str(get_default_config().endpoint)
    return ""


def choose(source: Source, listing: Listing, mmproj: str | None = None) -> Choice:
    """Choose a decoder with its mmproj file, or the files of a checkpoint.

    Parameters
    ----------
    mmproj : the mmproj file or a part of its name, when it is not the usual one.

    Raises
    ------
    DownloadError
        When the repository holds neither, or several that match; names them.
    """
    if source.kind == "url":
        decoder, *others = listing.files
        for file in listing.files:
            if split_stem(file.path) is not None:
                raise DownloadError(
                    f"{file.path} is one part of a split model, expected a single file; {JOIN_PARTS}."
                )
        return Choice("gguf", decoder, others[0] if others else None)
    gguf = [file for file in listing.files if file.path.lower().endswith(".gguf")]
    if not gguf and not source.file:
        files = tuple(file for file in listing.files if _CHECKPOINT.fullmatch(file.path))
        if not any(file.path == "config.json" for file in files) or not any(
            file.path.endswith(".safetensors") for file in files
        ):
            raise DownloadError(
                f"{source.name} holds neither GGUF files nor a checkpoint (config.json and *.safetensors); check "
                "the name."
            )
        for file in files:
            checked_path(file.path)
        return Choice("checkpoint", None, None, files)
    decoders = [file for file in gguf if "mmproj" not in file.path.lower()]
    projectors = [file for file in gguf if "mmproj" in file.path.lower()]
    return Choice(
        "gguf",
        _one(source, decoders, source.file, USUAL_DECODER, "decoder", f"{source.kind}:{source.place}:FILE"),
        _one(source, projectors, mmproj or "", USUAL_MMPROJ, "mmproj", "--mmproj FILE"),
    )


def _one(source: Source, files: list[RemoteFile], wanted: str, usual: str, what: str, option: str) -> RemoteFile:
    is_decoder = what == "decoder"
    found = [
        file
        for file in files
        if not wanted or (is_meant(file.path, source) if is_decoder else fits(file.path, wanted))
    ]
    whole = [file for file in found if split_stem(file.path) is None]
    if found and not whole:
        stems = ", ".join(sorted({visible(split_stem(file.path) or "") for file in found}))
        raise DownloadError(
            f"{source.name} has its {what} in several files ({stems}), expected a single file; download them and "
            f"{JOIN_PARTS}, or choose another with {option}."
        )
    exact = [file for file in whole if file.path == wanted]
    preferred = _different([file for file in whole if not wanted and fits(file.path, usual)])
    found = _different(whole) if wanted else whole  # if none was asked for, no file without a type is the usual one
    for candidates in (exact, found, preferred):
        if len(candidates) == 1:
            checked_path(candidates[0].path)
            return candidates[0]
    names = ", ".join(sorted(visible(file.path) for file in found or files)[:20]) or "none"
    if not found:
        raise DownloadError(
            f"{source.name} has no {what} file{f' {wanted!r}' if wanted else ''}; there are: {names}. Choose another."
        )
    raise DownloadError(f"{source.name} has {len(found)} {what} files: {names}. Choose one with {option}.")


def _different(files: list[RemoteFile]) -> list[RemoteFile]:
    """Files without duplicates, compared by digest."""
    return [
        file
        for i, file in enumerate(files)
        if not file.digest or all(file.digest != earlier.digest for earlier in files[:i])
    ]


def _hugging_face(repository: str) -> Listing:
    from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented there

    from edge_runtime.version import __version__

    what, endpoint = f"hf:{repository}", constants.ENDPOINT
    name, version = "edge-runtime", __version__
    api = HfApi(endpoint=endpoint, library_name=name, library_version=version)
    info = ask(what, lambda: api.model_info(repository, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT))
    headers = {key: str(value) for key, value in build_hf_headers(library_name=name, library_version=version).items()}
    revision = info.sha if isinstance(info.sha, str) and _GIT_ID.fullmatch(info.sha) else ""

    def described(entry: Any) -> RemoteFile:
        path = _text(entry.rfilename)
        url = hf_hub_url(repository, path, revision=revision or None, endpoint=endpoint)
        stored = entry.lfs
        size, digest = (stored.size, f"sha256:{stored.sha256}") if stored else (entry.size, f"git:{entry.blob_id}")
        if size is None or not _is_digest(digest):  # a mirror whose lists say less
            facts = ask(f"{what}:{path}", lambda: get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT))
            kind = "sha256" if is_sha256(facts.etag) else "git"
            size, digest = facts.size, f"{kind}:{facts.etag}"
        return RemoteFile(path, url, _size(size, path), digest if _is_digest(digest) else "", headers=headers)

    wanted = [entry for entry in info.siblings or [] if _is_wanted(_text(entry.rfilename))]
    return Listing([described(entry) for entry in wanted], revision, _licence(info.tags))


def _licence(tags: object) -> str:
    texts = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
    found = [text.removeprefix("license:") for text in texts if text.startswith("license:")]
    return visible(found[0])[:80] if found else ""


def _modelscope(repository: str) -> Listing:
    try:
        from modelscope_hub import HubApi, HubError, get_default_config
    except ImportError:
        raise BackendUnavailable(
            "Models from ModelScope need the package modelscope-hub, which is not installed; "
            "run: pip install 'edge-runtime[modelscope]'."
        ) from None
    what, config = f"ms:{repository}", get_default_config()
    refuse_offline(what)  # its own requests ignore the switch
    try:
        entries = HubApi(config).list_repo_files(repository, "model")
    except HubError as error:
        raise DownloadError(
            f"{what} could not be listed ({type(error).__name__}); check the name and the connection. Set "
            "a token in MODELSCOPE_API_TOKEN or with 'modelscope login'."
        ) from None
    # The file addresses take the key as a cookie; httpx drops both when a redirect leaves the host.
    headers = (
        {"Authorization": f"Bearer {config.token}", "Cookie": f"m_session_id={config.token}"} if config.token else {}
    )

    def described(entry: Any) -> RemoteFile:
        path = _text(entry.path)
        query = urlencode({"Revision": "master", "FilePath": path})
        url = f"{config.endpoint}/api/v1/models/{quote(repository)}/repo?{query}"
        digest = f"sha256:{entry.sha256}"
        return RemoteFile(path, url, _size(entry.size, path), digest if _is_digest(digest) else "", headers=headers)

    return Listing([described(entry) for entry in entries if _is_wanted(_text(entry.path))])


def _addresses(source: Source, mmproj: str | None) -> Listing:
    from edge_runtime.store.names import parse_source

    sources = [source]
    if mmproj is not None:
        second = parse_source(mmproj)
        if second is None or second.kind != "url":
            raise DownloadError(
                f"--mmproj is {visible(mmproj)!r}; expected a web address too, since the decoder comes from one."
            )
        sources.append(second)
    files = []
    for one in sources:
        size, version = probe(one.address, {})
        digest = f"sha256:{one.sha256}" if one.sha256 else ""
        path = file_of_address(one.place)
        files.append(RemoteFile(path, one.address, _size(size, path), digest, version))
    if len({file.path.lower() for file in files}) < len(files):
        raise DownloadError(f"Both addresses end in {files[0].path!r}; expected a decoder and another mmproj file.")
    return Listing(files)


def _is_wanted(path: str) -> bool:
    return path.lower().endswith(".gguf") or _CHECKPOINT.fullmatch(path) is not None


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise DownloadError(f"The hub lists a file without a name ({value!r:.40}); check HF_ENDPOINT.")
    return value


def _size(value: object, path: str) -> int | None:
    """A size from an untrusted list: unknown, or a whole number of bytes that a disk could hold."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_BYTES:
        raise DownloadError(
            f"The hub lists {visible(path)[:120]} with the size {value!r:.40}; expected a number of bytes. Check "
            "HF_ENDPOINT."
        )
    return value


def _is_digest(digest: str) -> bool:
    kind, _, text = digest.partition(":")
    return is_sha256(text) if kind == "sha256" else _GIT_ID.fullmatch(text) is not None
