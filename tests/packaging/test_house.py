"""House rules that a machine can check: packages, import directions, module sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"edge_runtime": ROOT, "edge_kernels": ROOT / "kernels", "edge_converters": ROOT / "converters"}
# Who may import whom: one direction, and one door for the converters.
ALLOWED = {
    "edge_kernels": {"edge_kernels"},
    "edge_runtime": {"edge_runtime", "edge_kernels"},
    "edge_converters": {"edge_converters", "edge_runtime"},
}
DOOR = ("edge_runtime/cli.py", "edge_converters")


def modules() -> list[tuple[str, Path]]:
    return [
        (f"{package}/{path.relative_to(root / package)}", path)
        for package, root in PACKAGES.items()
        for path in sorted((root / package).rglob("*.py"))
    ]


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names & set(PACKAGES)


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda value: str(value))
def test_imports_point_one_way(name, path):
    allowed = ALLOWED[name.split("/")[0]] | ({DOOR[1]} if name == DOOR[0] else set())
    assert imported_packages(path) <= allowed


@pytest.mark.parametrize("root", ["kernels", "converters"])
def test_source_roots_are_no_packages(root):
    """An `__init__.py` there would shadow other distributions' `kernels`, and load our modules twice."""
    assert not (ROOT / root / "__init__.py").exists()


def test_the_wheel_holds_exactly_the_three_packages(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)
    assert {"edge_runtime/demo/ggml-model-Q4_K_M.gguf", "edge_runtime/chat_template.jinja"} | {
        "edge_runtime/ollama_template.gotmpl",
        *(f"edge_runtime/server/static/{path.name}" for path in (ROOT / "edge_runtime/server/static").iterdir()),
    } <= set(names)
    assert sum(1 for name in names if name.endswith("py.typed")) == 3


def test_modules_name_their_contract():
    """Every module opens with a docstring; none has grown beyond what one reads in one sitting."""
    for name, path in modules():
        source = path.read_text("utf-8")
        assert ast.get_docstring(ast.parse(source)), f"{name} has no docstring"
        assert len(source.splitlines()) <= 450, f"{name} is too long: is it two things in one?"
