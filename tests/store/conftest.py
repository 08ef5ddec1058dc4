"""Fixtures of the model store: a hub of this machine instead of the real one, and a store of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.store import download
from support.gguf_maker import mini_decoder, mini_mmproj
from support.hub_server import Hub, serve

DECODER, MMPROJ = "ggml-model-Q4_K_M.gguf", "mmproj-model-f16.gguf"
KEY = "hf_not_a_real_key"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty model store, and no Ollama store."""
    monkeypatch.setenv("EDGE_RUNTIME_MODELS", str(tmp_path / "store"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    return tmp_path / "store"


@pytest.fixture
def hub(store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the pair `org/pair`, reached where huggingface_hub looks; waiting costs nothing."""
    from huggingface_hub import close_session, constants

    pair = {DECODER: mini_decoder().build(), MMPROJ: mini_mmproj().build(), "README.md": b"# Pair\n"}
    with serve(Hub({f"org/pair/{name}": data for name, data in pair.items()})) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 10)
        monkeypatch.setattr(download, "FIRST_WAIT_S", 0.0)
        monkeypatch.setattr(download, "MAX_WAIT_S", 0.01)
        monkeypatch.setenv("HF_TOKEN", KEY)
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        close_session()
        yield hub
        close_session()
