"""Who imports whom: from the tables below, for all three packages."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"edge_runtime": ROOT, "edge_kernels": ROOT / "kernels", "edge_converters": ROOT / "converters"}

# From the ground up; a room or module imports what stands in lines before its own. ARCHITECTURE.md shows the same.
LEVELS = {
    "edge_runtime": """
        errors version
        system
        weights
        inputs decoder
        prompt vision
        structured_output cache
        generation
        options
        option_checks pipeline
        engine store
        loading answers
        next_turn remote
        model
        page_by_page server
        batch
        bundle ray
        cli
    """,
    "edge_kernels": """
        machine waiting reference
        threads targets signatures
        shipped
        compile
        arrays
        simd
        linear
        attention rows
        ggml_backend
        ahead
    """,
    "edge_converters": """
        sources
        plan
        calibration
        output
        convert
    """,
    "edge_runtime.server": """
        sse settings
        errors
        middleware context_tokens fetch content_parts web_page responses_store reply_parts
        registry batches
        fields media look upstream recent_rates
        inference
        metrics replies idle_memory hard_end
        state
        routing running
        openai ollama anthropic system page_facts page_preview
        app
    """,
}
# Which rooms may know the kernels and llama.cpp, each by its own modules.
KNOWS = {
    "edge_kernels": (
        "vision",
        "decoder.amx_prefill",
        "decoder.kernel_products",
        "decoder.llama_cpp",
        "loading",
        "cli",
    ),
    "llama_cpp": ("decoder",),
    "edge_converters": ("cli.program",),
}

Edges = dict[str, set[str]]


def sources() -> dict[str, Path]:
    """Every module of the three packages, by its dotted name."""
    found = {}
    for package, root in PACKAGES.items():
        for path in sorted((root / package).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


SOURCES = sources()


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that a file imports, wherever in it; the name is empty for a whole module."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module
            yield from ((node.module, alias.name) for alias in node.names)


def edges() -> Edges:
    """Module → modules of ours that it imports, in functions and for types, too."""
    return {
        name: {
            target
            for module, what in imports(path)
            if (target := f"{module}.{what}" if f"{module}.{what}" in SOURCES else module) in SOURCES
        }
        for name, path in SOURCES.items()
    }


EDGES = edges()


def circles(graph: Edges) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for after in graph[node]:
            if after not in index:
                visit(after)
                low[node] = min(low[node], low[after])
            elif after in stack:
                low[node] = min(low[node], index[after])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "b"}}) == [["a", "b", "c"]]


def test_no_circle_of_imports():
    # `edge_runtime` itself hands names on at their first use; that a type checker is told of them is no import.
    graph = {name: targets - {"edge_runtime"} for name, targets in EDGES.items()}
    assert circles(graph) == []


@pytest.mark.parametrize("package", LEVELS)
def test_imports_point_down(package):
    level = {room: i for i, line in enumerate(LEVELS[package].split("\n")) for room in line.split()}
    wrong = []
    for name, targets in EDGES.items():
        if not name.startswith(f"{package}.") or name.endswith("__main__"):
            continue
        room = name.removeprefix(f"{package}.").split(".")[0]
        assert room in level, f"{name} stands in no line of the table"
        for target in targets:
            if target.startswith(f"{package}."):
                below = target.removeprefix(f"{package}.").split(".")[0]
                if below != room and level[below] >= level[room]:
                    wrong.append(f"{name} imports {target}")
    assert wrong == []


def test_the_architecture_shows_the_table():
    table = textwrap.indent(textwrap.dedent(LEVELS["edge_runtime"]).strip(), " " * 4)
    assert f"\n\n{table}\n\n" in (ROOT / "ARCHITECTURE.md").read_text("utf-8")


def test_packages_point_one_way():
    """Kernels know nobody; the runtime knows kernels, in a few places; converters know the runtime."""
    wrong = []
    for name, path in SOURCES.items():
        package, _, inner = name.partition(".")
        for module, _ in imports(path):
            other = module.split(".")[0]
            if other in KNOWS and package == "edge_runtime":
                if not any(inner == room or inner.startswith(f"{room}.") for room in KNOWS[other]):
                    wrong.append(f"{name} imports {module}")
            elif other in PACKAGES and package == "edge_kernels" and other != package:
                wrong.append(f"{name} imports {module}")
    assert wrong == []


def test_nobody_imports_another_modules_underscore_names():
    assert [
        f"{name} imports {module}.{what}"
        for name, path in SOURCES.items()
        for module, what in imports(path)
        if module.split(".")[0] in PACKAGES and what.startswith("_") and not what.startswith("__")
    ] == []


def test_rooms_open_with_a_docstring_and_hold_nothing_else_in_it():
    """A room's `__init__` says what enters, what leaves and what it does not know; `cli` also hands `main` on."""
    for name, path in SOURCES.items():
        if path.name == "__init__.py" and name.count(".") >= 1 and name != "edge_runtime.cli":
            (docstring,) = ast.parse(path.read_text("utf-8")).body
            assert isinstance(docstring, ast.Expr), name
            assert isinstance(docstring.value, ast.Constant), name
