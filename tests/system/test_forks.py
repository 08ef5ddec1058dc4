"""A fork of a process that has loaded a model: refused with a sentence, without hanging, without ending anything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_runtime import Model
from edge_runtime.prompt.templates import Renderer
from edge_runtime.system.forks import only_here
from support.forks import in_a_fork

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
PICTURE = Path(__file__).parents[2] / "examples" / "sign.png"
TEMPLATE = "{{ messages }}"


def test_what_needs_threads_is_refused_in_a_fork(exact_folder):
    with Model.load(exact_folder, exact=True, n_threads=1) as model:
        expected = str(model.chat("Why?", max_tokens=3, greedy=True))
        stream = model.chat("Why?", max_tokens=20, greedy=True, stream=True)
        next(stream)
        for work in (
            lambda: model.chat("Why?", max_tokens=3),
            lambda: model.chat_n("Why?", 2, max_tokens=3),
            lambda: next(stream),
            lambda: stream.result(),
            lambda: model.encode_image(PICTURE),
            lambda: model.trace("Why?", 2),
        ):
            assert "load models after the fork" in in_a_fork(work)
        assert "load no model before the fork" in in_a_fork(lambda: Model.load(exact_folder))
        assert "Why?" in in_a_fork(lambda: model.build_prompt("Why?").text)
        assert in_a_fork(model.close) == "None"
        assert in_a_fork(model.warm_up) == "None"
        assert stream.result().completion_tokens > 1, "a fork ended its parent's answer"
        assert str(model.chat("Why?", max_tokens=3, greedy=True)) == expected


def test_a_fork_that_exits_normally_ends_nothing_of_its_parent(exact_folder, tmp_path):
    """With everything registered for exit: the engine, the process that renders templates, temporary files."""
    file = tmp_path / "temporary"
    file.touch()
    remove = only_here(file.unlink)
    renderer = Renderer()
    end = only_here(renderer.close)
    assert renderer.render(TEMPLATE, {"messages": 1}) == "1"

    def leave(code: int) -> None:
        import atexit

        remove()
        end()
        atexit._run_exitfuncs()
        os._exit(code)

    with Model.load(exact_folder, exact=True, n_threads=1) as model:
        assert in_a_fork(lambda: 1, leave=leave) == "1"
        assert model.chat("Why?", max_tokens=2).completion_tokens
    assert file.exists()
    assert renderer._process is not None
    assert renderer._process.poll() is None
    assert renderer.render(TEMPLATE, {"messages": 2}) == "2"
    end()
    remove()
    assert renderer._process is None
    assert not file.exists()


def test_templates_are_rendered_in_forks_too(exact_folder):
    from edge_runtime.prompt.templates import render, shared_renderers

    assert render(TEMPLATE, {"messages": 1}) == "1"
    (renderer,) = [found for name, found in shared_renderers()._known.items() if name == TEMPLATE]
    with shared_renderers()._lock, renderer._lock:  # as if another thread were rendering at that moment
        assert in_a_fork(lambda: render(TEMPLATE, {"messages": 2})) == "2"
    assert render(TEMPLATE, {"messages": 3}) == "3"
