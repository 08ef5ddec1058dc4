"""Hubs that lie: names that lead elsewhere, lists that make no sense, files that are no model."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.errors import DownloadError, ModelFileError
from edge_runtime.store.pull import pull
from store.conftest import DECODER, MMPROJ
from store.test_pull import PAIR, complete, files
from support import gguf_maker as make
from support.command import refused
from support.gguf_maker import mini_decoder, mini_mmproj
from support.hub_server import REVISION

HOSTILE_NAMES = [
    "../model.gguf",
    "/etc/model.gguf",
    "a/../../model.gguf",
    "..\\model.gguf",
    "C:\\model.gguf",
    ".gguf",
]
HOSTILE_NAMES += [
    "a//model.gguf",
    "./model.gguf",
    "\x1b[31mmodel.gguf",
    "con.gguf",
    "x" * 300 + ".gguf",
    "~/a:b.gguf",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_that_lead_elsewhere(hub, store, tmp_path, name):
    siblings = [{"rfilename": name, "size": 10, "lfs": {"sha256": "0" * 64, "size": 10, "pointerSize": 1}}]
    siblings.append({**siblings[0], "rfilename": MMPROJ})
    hub.listing = {"id": "org/pair", "sha": REVISION, "tags": [], "siblings": siblings}
    before = sorted(tmp_path.rglob("*"))
    line = refused(["pull", PAIR], "is not allowed; expected a plain path inside the repository")
    assert "\x1b" not in line
    assert sorted(tmp_path.rglob("*")) == before
    assert not hub.bytes_requests()


SIBLING = {"rfilename": DECODER, "size": 10, "blobId": "0" * 40}
HOSTILE_LISTS = {
    "no object": [],
    "no names": {"id": "x", "siblings": [{"size": 1}]},
    "a name that is a number": {"id": "x", "siblings": [{"rfilename": 5}]},
    "files that are none": {"id": "x", "siblings": "abc"},
    "a negative size": {"id": "x", "siblings": [{**SIBLING, "size": -1}]},
    "a size beyond any disk": {"id": "x", "siblings": [{**SIBLING, "size": 1 << 60}]},
    "a size that is text": {"id": "x", "siblings": [{**SIBLING, "size": "10"}]},
    "an empty list": {"id": "x", "siblings": []},
}


@pytest.mark.parametrize("listing", HOSTILE_LISTS.values(), ids=HOSTILE_LISTS.keys())
def test_lists_that_make_no_sense(hub, store, listing):
    hub.listing = listing
    refused(["pull", PAIR], "hub|is not understood|holds neither")
    assert files(store) == []


ODD = st.one_of(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    st.sampled_from(
        ["../x.gguf", "a.gguf", "mmproj.gguf", "config.json", "a.safetensors", "/x.gguf", "0" * 40, "f" * 64]
    ),
)
SIBLINGS = st.lists(
    st.dictionaries(st.sampled_from(["rfilename", "size", "blobId"]), ODD)
    | st.fixed_dictionaries(
        {"rfilename": ODD, "lfs": st.fixed_dictionaries({"sha256": ODD, "size": ODD, "pointerSize": ODD})}
    ),
    max_size=4,
)


@given(st.fixed_dictionaries({"id": ODD}, optional={"siblings": SIBLINGS | ODD, "sha": ODD, "tags": ODD}))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_list_is_refused_or_leads_nowhere_else(hub, store, listing):
    hub.listing = listing
    with pytest.raises((DownloadError, ModelFileError)):
        pull(PAIR)
    assert complete() == []
    assert {path.name for path in store.parent.iterdir()} <= {"store"}


def symlink(files: dict[str, bytes]) -> None:
    """What git keeps of a symbolic link: a small file with its target."""
    files[f"org/pair/{DECODER}"] = b"../../../../../../etc/passwd"


def bad_offset(files: dict[str, bytes]) -> None:
    file = mini_decoder()
    file.tensors["output_norm.weight"].offset = 1 << 62
    files[f"org/pair/{DECODER}"] = file.build()


def many_tensors(files: dict[str, bytes]) -> None:
    file = mini_decoder()
    file.n_tensors = 1 << 60
    files[f"org/pair/{DECODER}"] = file.build()


def huge_tensor(files: dict[str, bytes]) -> None:
    file = mini_mmproj()
    file.tensors["v.patch_embd.bias"].dims = (1 << 60,)
    files[f"org/pair/{MMPROJ}"] = file.build()


def other_model(files: dict[str, bytes]) -> None:
    files[f"org/pair/{DECODER}"] = mini_decoder().key("general.architecture", make.STRING, "llama").build()


def other_width(files: dict[str, bytes]) -> None:
    files[f"org/pair/{MMPROJ}"] = mini_mmproj(256).build()


def swapped(files: dict[str, bytes]) -> None:
    decoder, mmproj = f"org/pair/{DECODER}", f"org/pair/{MMPROJ}"
    files[decoder], files[mmproj] = files[mmproj], files[decoder]


BAD_MODELS = {
    symlink: "(too few|instead of b'GGUF')",
    bad_offset: "cut short or its header is wrong",
    many_tensors: "announces 1152921504606846976 tensors",
    huge_tensor: "impossible shape",
    other_model: "architecture 'llama', expected 'qwen3'",
    other_width: "has hidden size 128, but the visual tokens of mmproj-model-f16.gguf have 256",
    swapped: "is a file of type mmproj, expected decoder",
}


DAMAGED = {
    **{change: {DECODER} for change in (symlink, bad_offset, many_tensors, other_model)},
    huge_tensor: {MMPROJ},
}
"""What no model may have; the others are sound files that do not go together."""


@pytest.mark.parametrize(("change", "reason"), BAD_MODELS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_what_arrives_is_no_model_that_runs(hub, store, change, reason):
    change(hub.files)
    refused(["pull", PAIR], reason, after_notes=True)
    assert complete() == []
    refused(["run", "-m", PAIR, "Hi"], "was not pulled")
    assert not [path for path in store.rglob("*") if path.is_symlink()]
    assert not DAMAGED.get(change, set()) & set(files(store)), "no other command may run it"


def test_a_refused_file_is_fetched_again_and_the_others_are_not(hub, store):
    bad_offset(hub.files)
    for n_pulls in (1, 2):
        refused(["pull", PAIR], "cut short or its header is wrong", after_notes=True)
        assert len(hub.bytes_requests(DECODER)) == n_pulls
        assert len(hub.bytes_requests(MMPROJ)) == 1
