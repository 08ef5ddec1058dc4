"""Names of models: what is understood, and that nothing a stranger can write leads out of a folder."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import ModelFileError
from edge_runtime.store.hubs import fits
from edge_runtime.store.library import Entry, Library, StoredFile, parse_record
from edge_runtime.store.names import ALIASES, checked_path, file_of_address, ollama_parts, parse_source

ROOT = Path("/store")
TEXT = st.text(max_size=60) | st.text(alphabet="./\\:~%@#?-_ab \0\n\x1b\u202e", max_size=30)
NAMES = st.one_of(
    TEXT,
    *(TEXT.map(lambda text, start=start: start + text) for start in ("hf:", "ms:", "ollama:", "https://", "hf:a/")),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)

UNDERSTOOD = {
    "minicpm-v-4.5": ("hf", "openbmb/MiniCPM-V-4_5-gguf", "ggml-model-Q4_K_M.gguf"),
    "hf:org/repo": ("hf", "org/repo", ""),
    "hf:org/repo:Q8_0": ("hf", "org/repo", "Q8_0"),
    "hf:org/repo:sub/a.gguf": ("hf", "org/repo", "sub/a.gguf"),
    "ms:OpenBMB/MiniCPM-V-4_5": ("ms", "OpenBMB/MiniCPM-V-4_5", ""),
    "ollama:openbmb/minicpm-v4.5:8b": ("ollama", "openbmb/minicpm-v4.5:8b", ""),
    "https://host/a/b.gguf?x=1": ("url", "https://host/a/b.gguf", ""),
    "http://127.0.0.1:80/b.gguf": ("url", "http://127.0.0.1:80/b.gguf", ""),
    f"https://host/b.gguf#sha256={'a' * 64}": ("url", "https://host/b.gguf", ""),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_names_that_are_understood(name):
    source = parse_source(name)
    assert (source.kind, source.place, source.file) == UNDERSTOOD[name]
    assert parse_source(source.name).name == source.name


@pytest.mark.parametrize("name", ["demo", "models/x", "C:\\models", "a.gguf", "", "hf", "MINICPM-V-4.5", "ollama/x"])
def test_names_that_are_paths(name):
    assert parse_source(name) is None


REFUSED = ["hf:", "hf:repo", "hf:a/b/c", "hf:../b", "hf:a/..", "hf:a/b:", "hf:a/b:../c", "hf:a/b:/c", "hf:a/b.git"]
REFUSED += [
    "hf:/etc/passwd",
    "hf:a/b:c\0",
    "hf:a b/c",
    "hf:a/b:.hidden",
    "ms:x",
    "ollama:",
    "ollama:../x",
    "ollama:a:",
]
REFUSED += [
    "ollama:/x",
    "ollama:a/b/c/d",
    "ollama:.x",
    "ollama:a:../../x",
    "ollama:a..b",
    "http://host/a.gguf",
    "https://",
]
REFUSED += [
    "https:///a.gguf",
    "https://host/a.bin",
    "https://host/",
    "https://host/%2e%2e%2fa.gguf",
    "https://h:x/a.gguf",
]
REFUSED += ["https://host/..gguf", "https://host/a.gguf#sha256=abc", "https://host/a.gguf#x", "https://[/a.gguf"]
REFUSED += ["https://host/\x1b.gguf", "hf:a/" + "b" * 2000, "https://host/" + "b" * 2000 + ".gguf"]


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_are_refused(name):
    with pytest.raises(ModelFileError, match="expected") as error:
        parse_source(name)
    assert "\x1b" not in str(error.value)
    assert len(str(error.value)) < 1500


def test_passwords_in_addresses_are_refused_and_not_repeated():
    with pytest.raises(ModelFileError, match="user name or password") as error:
        parse_source("https://me:secret@host/a.gguf")
    assert "secret" not in str(error.value)


def test_signatures_in_addresses_are_not_kept():
    source = parse_source("https://host/a.gguf?signature=secret")
    assert source.address.endswith("?signature=secret")
    assert "secret" not in source.name


def test_every_alias_names_a_file_of_a_repository():
    for alias, name in ALIASES.items():
        assert parse_source(alias).name == name
        assert parse_source(alias).file


@given(NAMES)
@settings(max_examples=500)
def test_any_name_is_understood_or_refused(name):
    try:
        source = parse_source(name)
    except ModelFileError:
        return
    if source is not None:
        assert parse_source(source.name).name == source.name
        assert Library(ROOT).folder(source.name).parent == ROOT
        entry = Entry(source.name, "gguf", snapshot="0123456789ab")
        assert Library(ROOT).snapshot(entry).resolve().is_relative_to(Library(ROOT).folder(source.name))


@given(TEXT)
@settings(max_examples=500)
def test_any_name_has_a_folder_of_its_own_below_the_root(name):
    folder = Library(ROOT).folder(name)
    assert folder.parent == ROOT
    assert set(folder.name) <= set(string.ascii_lowercase + string.digits + "-")
    assert len(folder.name) < 100
    assert folder != Library(ROOT).folder(name + "x")


@given(TEXT)
@settings(max_examples=500)
def test_any_path_stays_inside_or_is_refused(path):
    for check in (checked_path, file_of_address):
        try:
            checked = check(path)
        except ModelFileError:
            continue
        joined = (ROOT / checked).resolve()
        assert joined.is_relative_to(ROOT)
        assert joined != ROOT
        assert not any(c in checked for c in "\\:\0\x1b\n\u202e")


@given(TEXT)
@settings(max_examples=500)
def test_any_ollama_name_stays_inside_or_is_refused(name):
    try:
        parts = ollama_parts(name)
    except ModelFileError:
        return
    assert len(parts) == 4
    manifest = ROOT.joinpath("manifests", *parts)
    assert len(manifest.resolve().relative_to(ROOT / "manifests").parts) == 4


RECORD: dict[str, Any] = {
    "format": 1,
    "name": "hf:a/b:c.gguf",
    "kind": "gguf",
    "snapshot": "0" * 12,
    "decoder": "c.gguf",
    "mmproj": "",
    "revision": "",
    "licence": "",
    "pulled": "",
    "complete": True,
    "files": [{"path": "c.gguf", "size": 1, "digest": ""}],
}


def read_or_refused(record: Any) -> Entry | None:
    """The entry of a record, which leads nowhere else; None where it is refused."""
    try:
        entry = parse_record(json.dumps(record).encode(), ROOT / "model.json")
    except ModelFileError:
        return None
    assert parse_source(entry.name).name == entry.name
    assert entry.kind in ("gguf", "checkpoint", "ollama")
    assert re.fullmatch(r"([0-9a-f]{12})?", entry.snapshot), "a folder's name, and no path"
    texts = [text for part in (entry, *entry.files) for text in vars(part).values() if isinstance(text, str)]
    assert all(text.isprintable() for text in texts), "no sequence that moves a terminal"
    snapshot = Library(ROOT).snapshot(entry)
    assert snapshot.resolve().is_relative_to(Library(ROOT).folder(entry.name))
    paths = [file.path for file in entry.files]
    for path in paths:
        assert (snapshot / path).resolve().is_relative_to(snapshot.resolve())
        assert (snapshot / path).resolve() != snapshot.resolve()
    assert {entry.decoder, entry.mmproj} <= {"", *paths}
    return entry


def with_file(path: Any) -> dict[str, Any]:
    """A record whose decoder has another path, in both places."""
    return {**RECORD, "decoder": path, "files": [{"path": path, "size": 1, "digest": ""}]}


@given(JSON)
@settings(max_examples=300)
def test_any_record_is_read_or_refused(value):
    """Any JSON for all of it, for each of its values, and for each of a file."""
    read_or_refused(value)
    for key in RECORD:
        entry = read_or_refused({**RECORD, key: value})
        if entry is not None and key not in ("format", "files"):
            assert type(getattr(entry, key)) is type(RECORD[key]), key
    read_or_refused({**RECORD, "files": [*RECORD["files"], value]})
    for key, good in RECORD["files"][0].items():
        entry = read_or_refused({**RECORD, "files": [{**RECORD["files"][0], key: value}]})
        assert entry is None or type(value) is type(good)
    read_or_refused(with_file(value))
    entry = read_or_refused({**RECORD, "more": value})
    assert entry is None, "a record of a later version"


@given(st.lists(st.from_regex(r"[a-z0-9]{1,9}(/[a-z0-9]{1,9}){0,2}\.gguf", fullmatch=True), min_size=1, unique=True))
def test_a_sound_record_is_read(paths):
    """So the refusals above and below have their reasons."""
    files = [{"path": path, "size": size, "digest": "abc"} for size, path in enumerate(paths)]
    entry = read_or_refused({**RECORD, "files": files, "decoder": paths[0], "mmproj": paths[-1]})
    assert entry is not None
    assert entry.files == tuple(StoredFile(path, size, "abc") for size, path in enumerate(paths))
    assert (entry.decoder, entry.mmproj, entry.complete) == (paths[0], paths[-1], True)


@pytest.mark.parametrize(
    "path",
    [
        *("/etc/passwd", "../c.gguf", "a/../../c.gguf", "..", ".", "", "a//c.gguf", ".hidden", "a\\..\\c.gguf"),
        *("C:\\c.gguf", "C:c.gguf", "c.gguf:stream", "con", "nul.gguf", "c.gguf.", "a" * 300, "/".join("ab" * 999)),
    ],
)
def test_a_record_with_a_path_that_leads_elsewhere_is_refused(path):
    assert read_or_refused(RECORD) is not None
    with pytest.raises(ModelFileError, match=r"^The record .*model.json is damaged or of another version; pull the"):
        parse_record(json.dumps(with_file(path)).encode(), ROOT / "model.json")
    other = {"path": path, "size": 1, "digest": ""}  # which is neither decoder nor mmproj
    assert read_or_refused({**RECORD, "files": [*RECORD["files"], other]}) is None


@pytest.mark.parametrize(
    "change",
    [
        *({"complete": 1}, {"complete": None}, {"format": 2}, {"format": None}, {"kind": "zip"}, {"kind": None}),
        *(
            {"name": "https://h/a.gguf?x=1"},
            {"name": "demo"},
            {"snapshot": "0" * 11},
            {"snapshot": "../../../../"},
            {"files": None},
        ),
        *(
            {"files": []},
            {"files": RECORD["files"] * 2},
            {"mmproj": "d.gguf"},
            {"licence": "\x1b[31m"},
            {"pulled": 5},
        ),
        *({"files": [RECORD["files"][0] | change]} for change in ({"size": -1}, {"size": True}, {"size": 1.5})),
        *({"files": [RECORD["files"][0] | change]} for change in ({"digest": None}, {"mode": 7}, {"path": 5})),
    ],
    ids=repr,
)
def test_a_record_with_one_thing_wrong_is_refused(change):
    assert read_or_refused(RECORD | change) is None


@given(
    st.dictionaries(
        st.sampled_from(["decoder", "mmproj", "snapshot", "name", "pulled"]), TEXT, min_size=1, max_size=2
    )
)
def test_a_record_with_one_thing_changed_is_the_same_kind_of_thing_or_refused(change):
    assert parse_record(json.dumps(RECORD).encode(), ROOT).files == (StoredFile("c.gguf", 1),)
    entry = read_or_refused({**RECORD, **change})
    if entry is not None:
        assert entry.snapshot in ("", "0" * 12)
        assert {entry.decoder, entry.mmproj} <= {"", "c.gguf"}
        assert parse_source(entry.name).name == entry.name


def test_parts_of_names_fit_between_other_characters():
    assert fits("ggml-model-Q4_K_M.gguf", "q4_k_m")
    assert fits("mmproj-model-f16.gguf", "f16")
    assert not fits("mmproj-model-bf16.gguf", "f16")
    assert not fits("ggml-model-IQ4_K_M.gguf", "Q4_K_M")
    assert not fits("ggml-model-Q4_K_M.gguf", "Q4_K_")
    assert fits("exact name.gguf", "exact name.gguf")
