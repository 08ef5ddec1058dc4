"""House rules that a machine can check: packages, import directions, module sizes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"edge_runtime": ROOT, "edge_kernels": ROOT / "kernels", "edge_converters": ROOT / "converters"}
# What a reader meets at once. Longer ones are listed with the reason.
MAX_ENTRIES = 12
MAX_PARAMETERS, MAX_FUNCTION_LINES, MAX_CLASS_LINES, MAX_MODULE_LINES = 12, 60, 250, 450
EXCEPTIONS: dict[str, str] = {}


def modules() -> list[tuple[str, Path]]:
    return [
        (f"{package}/{path.relative_to(root / package)}", path)
        for package, root in PACKAGES.items()
        for path in sorted((root / package).rglob("*.py"))
    ]


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
    assert {"edge_runtime/demo/ggml-model-Q4_K_M.gguf", "edge_runtime/prompt/chat_template.jinja"} | {
        "edge_runtime/store/ollama_template.gotmpl",
        *(path.relative_to(ROOT).as_posix() for path in (ROOT / "edge_runtime/server/static").rglob("*.*")),
        "edge_runtime/server/static/vendor/temml/LICENSE",
    } <= set(names)
    assert sum(1 for name in names if name.endswith("py.typed")) == 3


def test_modules_name_their_contract():
    """Every module opens with a docstring; none has grown beyond what one reads in one sitting."""
    for name, path in modules():
        source = path.read_text("utf-8")
        assert ast.get_docstring(ast.parse(source)), f"{name} has no docstring"
        assert len(source.splitlines()) <= MAX_MODULE_LINES, f"{name} is too long: is it two things in one?"


def test_the_first_folder_is_seen_at_a_glance():
    entries = subprocess.run(
        ["git", "ls-files", "edge_runtime"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    assert len([entry for entry in entries if entry.count("/") == 1]) <= MAX_ENTRIES


def definitions() -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    return [
        (f"{name}:{node.name}", node)
        for name, path in modules()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]


def test_functions_and_classes_are_short():
    too_long = [
        f"{name} has {n_lines} lines"
        for name, node in definitions()
        if name.startswith("edge_runtime/")
        for n_lines in [(node.end_lineno or 0) - node.lineno + 1]
        if n_lines > (MAX_CLASS_LINES if isinstance(node, ast.ClassDef) else MAX_FUNCTION_LINES)
        and name not in EXCEPTIONS
    ]
    assert too_long == []


def test_functions_take_few_parameters():
    """But for the commands, whose options are parameters, and the inner loops of kernels."""
    too_many = [
        f"{name} takes {n} parameters"
        for name, node in definitions()
        if not isinstance(node, ast.ClassDef) and not name.startswith("edge_runtime/cli/")
        for arguments in [node.args]
        for names in [[a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]]
        for n in [len(names) - (names[:1] in (["self"], ["cls"]))]  # nobody passes these
        if n > MAX_PARAMETERS
        and not (name.startswith("edge_kernels/") and (node.name.startswith("_") or "/simd/" in name))
        and name not in EXCEPTIONS
    ]
    assert too_many == []


def test_tests_and_benchmarks_reach_inside_by_the_documented_door():
    """`Model.engine`, whose parts are public and not stable."""
    behind = re.compile(r"\._(engine|scheduler|encoder|decoder)\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in ("tests", "benchmarks", "tools", "demo")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if behind.search(line)
    ]
    assert found == []
