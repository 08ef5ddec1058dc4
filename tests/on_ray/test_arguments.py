"""What needs no cluster: arguments of the deployment, names and memory of models."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from edge_runtime.errors import DownloadError, ModelFileError
from edge_runtime.ray.placing import PROCESS_BYTES, everywhere, memory_needed, model_here
from edge_runtime.store.names import DEMO


def test_names_mean_the_same_on_every_node(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert everywhere("models/a:Q5_K_M") == str(tmp_path / "models" / "a:Q5_K_M")
    assert everywhere("~/a") == str(Path.home() / "a")
    for name in (DEMO, "minicpm-v-4.5", "hf:someone/else:Q8_0"):
        assert everywhere(name) == name


def test_models_are_pulled_where_they_are_not(tmp_path, monkeypatch):
    """Paths and Ollama's models are not: nobody knows from where."""
    monkeypatch.setenv("EDGE_RUNTIME_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert model_here(DEMO).name == DEMO
    with pytest.raises(DownloadError):
        model_here("hf:someone/else")
    for name in (str(tmp_path / "nowhere"), "ollama:nothing"):
        with pytest.raises(ModelFileError):
            model_here(name)


def test_memory_grows_with_the_context():
    small, large = (memory_needed(model_here(DEMO), {"n_ctx": n_ctx}) for n_ctx in (256, 2048))
    assert PROCESS_BYTES < small < large < 2 * PROCESS_BYTES


@pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `ray`")
def test_arguments_of_the_deployment(monkeypatch):
    app = pytest.importorskip("edge_runtime.ray.app")
    monkeypatch.setenv("EDGE_RUNTIME_API_KEY", "a-key-of-the-owner")
    arguments = app.Arguments(
        max_replicas=4,
        memory_gb=7,
        load={"n_ctx": 4096},
        server={"max_queue": 32, "allowed_hosts": ["ai.example.org"]},
    )
    settings = arguments.settings()
    assert settings.api_key == "a-key-of-the-owner"
    assert (settings.max_queue, settings.max_queue_per_client) == (32, 32)
    assert settings.allowed_hosts == ("ai.example.org",)
    for wrong, reason in (
        ({"min_replicas": 3, "max_replicas": 2}, "expected at least min_replicas, 3"),
        ({"replicas": 2}, "Extra inputs are not permitted"),
        ({"server": {"max_queues": 3}}, "server holds max_queues; expected some of"),
        ({"server": {"models": ["x"]}}, "server holds models"),
    ):
        with pytest.raises(ValueError, match=reason):
            app.Arguments(**wrong)
    deployed = app.app(arguments)._bound_deployment
    assert deployed.ray_actor_options["memory"] == 7e9
    assert deployed._deployment_config.autoscaling_config.max_replicas == 4
    fixed = app.app({"min_replicas": "2", "max_replicas": "2"})._bound_deployment
    assert fixed.num_replicas == 2
    assert fixed._deployment_config.autoscaling_config is None
    assert PROCESS_BYTES < fixed.ray_actor_options["memory"] < 2 * PROCESS_BYTES
