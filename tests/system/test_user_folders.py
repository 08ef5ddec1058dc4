"""Users without a home: nothing is found, nothing is written where they stand, errors are sentences."""

from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest

from edge_kernels import compile as compilation
from edge_runtime.errors import StoreError
from edge_runtime.loading import tuning
from edge_runtime.store import ollama
from edge_runtime.store.library import Entry, Library
from edge_runtime.system.user_folders import NOWHERE, user_folder


def raises(*args: object, **options: object) -> str:
    raise RuntimeError("could not determine the home directory")


def leaves_the_tilde(*args: object, **options: object) -> str:
    return "~/.local/share/edge-runtime"


@pytest.fixture(params=[raises, leaves_the_tilde], ids=["now", "formerly"])
def homeless(request, tmp_path, monkeypatch):
    """As platformdirs behaves for a user without a home, and did before; where nothing may be left."""
    for name in ("user_data_dir", "user_cache_dir", "user_data_path"):
        monkeypatch.setattr(platformdirs, name, request.param)
    monkeypatch.setattr(Path, "home", request.param)
    for name in ("EDGE_RUNTIME_MODELS", "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    yield
    assert [*tmp_path.iterdir()] == []


def test_reading_finds_nothing(homeless):
    assert Library().entries() == []
    assert Library().root.is_relative_to(NOWHERE)
    assert not tuning._folder().is_dir()
    assert not any(folder.is_dir() for folder in ollama.folders()[:1])


def test_writing_is_refused(homeless):
    with pytest.raises(StoreError, match=r"no-home-folder.*point EDGE_RUNTIME_MODELS to a folder"):
        Library().write(Entry("hf:org/pair", "gguf"))


def test_a_home_is_taken(tmp_path):
    assert user_folder(lambda: tmp_path) == tmp_path
    assert user_folder(lambda: str(tmp_path / "a")) == tmp_path / "a"
    assert NOWHERE.is_absolute()
    assert not NOWHERE.exists()
    with pytest.raises(OSError, match=r"Not a directory|File exists|No such file"):
        NOWHERE.mkdir(parents=True)


def test_machine_code_goes_to_the_temporary_folder(homeless, tmp_path_factory, monkeypatch, caplog):
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(compilation.numba.config, "CACHE_DIR", "")
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    assert compilation.cache_directory.__wrapped__().is_relative_to(temporary)
    assert "cannot be kept in a home folder, as there is none; keeping them in" in caplog.text


def test_without_any_folder_kernels_are_compiled_each_time(homeless, monkeypatch, caplog):
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(compilation.numba.config, "CACHE_DIR", "")
    monkeypatch.setattr("tempfile.gettempdir", none)
    assert compilation.cache_directory.__wrapped__() is None
    assert "every start compiles them anew" in caplog.text


def test_a_full_disk_is_no_place_for_machine_code(tmp_path, monkeypatch):
    """An empty file can be made there, but not filled."""
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(compilation.numba.config, "CACHE_DIR", "")
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(home))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    make = compilation.tempfile.TemporaryFile

    class Full:
        """A file on a full disk."""

        def __init__(self, dir: Path) -> None:
            self.file = make(dir=dir)
            self.is_full = dir.is_relative_to(home)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *args: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> None:
            if self.is_full:
                raise OSError(28, "No space left on device")
            self.file.write(data)

        def flush(self) -> None:
            self.file.flush()

    monkeypatch.setattr(compilation.tempfile, "TemporaryFile", Full)
    assert compilation.cache_directory.__wrapped__().is_relative_to(temporary)
