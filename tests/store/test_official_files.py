"""The official files under either of their names, types by name, equal files, and models in several parts."""

from __future__ import annotations

import pytest

from edge_runtime.errors import ModelFileError
from edge_runtime.store.find import find_model
from edge_runtime.store.library import Library
from edge_runtime.store.names import ALIASES, OFFICIAL, parse_source, split_stem
from edge_runtime.store.pull import pull
from store.conftest import MMPROJ
from support.command import refused
from support.gguf_maker import U16, mini_decoder, mini_mmproj

NAME = "minicpm-v-4.5"
OLD, NEW = "ggml-model-{}.gguf", "MiniCPM-V-4_5-{}.gguf"


def offer(hub, *names: str, place: str = OFFICIAL, layers: int | None = None) -> None:
    """Put decoders on the hub, each another one unless their number of layers is given."""
    hub.files[f"{place}/{MMPROJ}"] = mini_mmproj().build()
    hub.files |= {f"{place}/{name}": mini_decoder(layers or n).build() for n, name in enumerate(names, 1)}


def parts(stem: str, count: int = 3) -> list[str]:
    return [f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


@pytest.mark.parametrize("form", [OLD, NEW])
def test_both_names_of_the_official_files_are_found(hub, form):
    offer(hub, *(form.format(kind) for kind in ("Q4_K_M", "Q4_K_S", "Q5_K_M", "F16")))
    entry = pull(NAME)
    assert (entry.decoder, entry.label) == (form.format("Q4_K_M"), NAME)
    for name in (NAME, f"{NAME}:latest", f"{NAME}:Q4_K_M", f"{NAME}:q4_k_m", f"hf:{OFFICIAL}", ALIASES[NAME]):
        assert find_model(name).decoder.name == form.format("Q4_K_M")
    assert pull(NAME).snapshot == entry.snapshot, "again, the same"


@pytest.mark.parametrize("form", [OLD, NEW])
@pytest.mark.parametrize("wanted", ["Q5_K_M", "q5_k_m", "{}"])
def test_any_type_is_found_by_its_name(hub, form, wanted):
    offer(hub, *(form.format(kind) for kind in ("Q4_K_M", "Q5_K_M", "Q8_0")))
    name = f"{NAME}:{wanted.format(form.format('Q5_K_M'))}"
    assert pull(name).decoder == form.format("Q5_K_M")
    assert find_model(name).decoder.name == form.format("Q5_K_M")
    with pytest.raises(ModelFileError, match=r"minicpm-v-4\.5 was not pulled"):
        find_model(NAME)
    assert pull(NAME).decoder == form.format("Q4_K_M")
    assert find_model(NAME).decoder.name == form.format("Q4_K_M")
    assert find_model(name).decoder.name == form.format("Q5_K_M")
    refused(["pull", f"{NAME}:Q3_K"], "has no decoder file 'Q3_K'; there are: .*Q5_K_M")


def test_other_repositories_keep_their_names_apart(hub):
    offer(hub, NEW.format("Q4_K_M"), place="org/other")
    refused(["pull", "hf:org/other:ggml-model-Q4_K_M.gguf"], "has no decoder file 'ggml-model-Q4_K_M")


def test_equal_files_count_once(hub):
    offer(hub, OLD.format("Q4_K_M"), NEW.format("Q4_K_M"), layers=1)
    assert pull(NAME).decoder == OLD.format("Q4_K_M")
    assert pull(f"hf:{OFFICIAL}:Q4_K_M").decoder in (OLD.format("Q4_K_M"), NEW.format("Q4_K_M"))
    pull(f"hf:{OFFICIAL}:{NEW.format('Q4_K_M')}")
    assert len(Library().entries()) == 2
    assert find_model(f"{NAME}:Q4_K_M").decoder.exists()


def test_files_that_differ_are_told_apart(hub):
    offer(hub, OLD.format("Q4_K_M"))
    offer(hub, NEW.format("Q4_K_M"), layers=2)
    refused(["pull", f"{NAME}:Q4_K_M"], "has 2 decoder files: .*Choose one with hf:")
    assert pull(NAME).decoder == OLD.format("Q4_K_M"), "the one the alias always had"


@pytest.mark.parametrize("name", ["minicpm-v-4.5:", "minicpm-v-4.5:../x", "minicpm-v-4.5:a\0"])
def test_types_that_are_none(name):
    with pytest.raises(ModelFileError, match="expected"):
        parse_source(name)


def test_a_folder_and_a_type(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    mini_mmproj().write(folder / MMPROJ)
    for layers, kind in enumerate(("Q4_K_M", "Q5_K_M", "IQ4_K_M"), 1):
        mini_decoder(layers).write(folder / NEW.format(kind))
    for wanted in ("Q5_K_M", "q5_k_m", NEW.format("Q5_K_M")):
        paths = find_model(f"{folder}:{wanted}")
        assert (paths.decoder.name, paths.name) == (NEW.format("Q5_K_M"), f"m:{wanted}")
    refused(["run", "-m", str(folder), "Hi"], r"holds 3 decoder files .* such as .*/m:Q4_K_M")
    refused(["run", "-m", f"{folder}:Q8_0", "Hi"], "holds no decoder file 'Q8_0'; there are: .*Q5_K_M")
    refused(["run", "-m", f"{folder}x:Q8_0", "Hi"], "nor an existing folder or file")
    with_colon = tmp_path / "m:Q5_K_M"
    with_colon.mkdir()
    with pytest.raises(ModelFileError, match="holds no decoder file"):
        find_model(with_colon)


def test_equal_files_of_a_folder_count_once(tmp_path):
    mini_mmproj().write(tmp_path / MMPROJ)
    mini_mmproj().write(tmp_path / NEW.format("mmproj-f16"))
    mini_decoder().write(tmp_path / OLD.format("Q4_K_M"))
    mini_decoder().write(tmp_path / NEW.format("Q4_K_M"))
    (tmp_path / "link-Q4_K_M.gguf").symlink_to(tmp_path / OLD.format("Q4_K_M"))
    assert find_model(tmp_path).decoder.exists()
    mini_decoder(2).write(tmp_path / "other.gguf")
    with pytest.raises(ModelFileError, match="holds 4 decoder files"):
        find_model(tmp_path)


def test_a_home_that_the_shell_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    mini_mmproj().write(tmp_path / MMPROJ)
    mini_decoder().write(tmp_path / OLD.format("Q4_K_M"))
    assert find_model("~", f"~/{MMPROJ}").decoder == tmp_path / OLD.format("Q4_K_M")


# ---------------------------------------------------------------- models in several parts

JOIN = r"join the parts with llama\.cpp's 'llama-gguf-split --merge"


def test_names_of_parts():
    assert split_stem("a/b-00002-of-00003.gguf") == "a/b"
    assert [split_stem(name) for name in ("b-00001-of-00001.gguf", "b.gguf", "b-1-of-3.gguf")] == [None] * 3


def part(number: int):
    """A part as llama-gguf-split writes it: all but the first hold no keys of the model."""
    made = mini_decoder()
    if number:
        made.keys.clear()
    return made.key("split.no", U16, number).key("split.count", U16, 3)


def test_a_folder_with_parts(tmp_path):
    mini_mmproj().write(tmp_path / MMPROJ)
    for number, name in enumerate(parts("m-Q4_K_M")):
        part(number).write(tmp_path / name)
    for name in (str(tmp_path), f"{tmp_path}:Q4_K_M"):
        line = refused(
            ["run", "-m", name, "Hi"], rf"has its decoder in 3 parts \(m-Q4_K_M-00001-of-00003\.gguf.*{JOIN}"
        )
        assert line.count(".gguf") == 1
    for name in parts("m-Q4_K_M"):
        refused(["run", "-m", str(tmp_path / name), "Hi"], rf"{name} is one part of a split model.*{JOIN}")
        refused(["info", str(tmp_path / name)], rf"{name} is one part of a split model.*{JOIN}")
    mini_decoder().write(tmp_path / "m-Q4_K_M.gguf")
    assert find_model(tmp_path).decoder.name == "m-Q4_K_M.gguf", "the whole file beside its parts"
    mini_mmproj().key("split.count", U16, 2).write(tmp_path / MMPROJ)
    refused(["run", "-m", str(tmp_path), "Hi"], rf"{MMPROJ} is one part of a split model.*{JOIN}")


def test_one_part_of_one_is_a_whole_file(hub, tmp_path):
    offer(hub, *parts("m-Q4_K_M", 1), place="org/one")
    assert pull("hf:org/one").decoder == "m-Q4_K_M-00001-of-00001.gguf"


@pytest.mark.parametrize("name", ["hf:org/split", "hf:org/split:Q8_0", f"hf:org/split:{parts('m-Q8_0')[1]}"])
def test_a_hub_with_parts(hub, name):
    offer(hub, *parts("m-Q8_0"), place="org/split")
    refused(["pull", name], rf"has its decoder in several files \(m-Q8_0\).*{JOIN}")
    assert hub.bytes_requests() == []
    assert Library().entries() == []


def test_a_hub_with_parts_and_whole_files(hub):
    offer(hub, *parts("sub/m-Q8_0"), "m-Q4_K_M.gguf", place="org/split")
    assert pull("hf:org/split").decoder == "m-Q4_K_M.gguf"
    refused(["pull", "hf:org/split:Q8_0"], rf"in several files \(sub/m-Q8_0\).*{JOIN}")
    offer(hub, "m-Q8_0.gguf", place="org/split")
    assert pull("hf:org/split:Q8_0").decoder == "m-Q8_0.gguf"


def test_an_mmproj_file_in_parts(hub):
    hub.files["org/p/m-Q4_K_M.gguf"] = mini_decoder().build()
    hub.files |= {f"org/p/{name}": mini_mmproj().build() for name in parts("mmproj-f16", 2)}
    refused(["pull", "hf:org/p"], rf"has its mmproj in several files \(mmproj-f16\).*{JOIN}")


def test_an_address_of_a_part(hub):
    offer(hub, *parts("m"), place="org/split")
    refused(["pull", f"{hub.url}/org/split/resolve/main/{parts('m')[0]}"], rf"is one part of a split model.*{JOIN}")
