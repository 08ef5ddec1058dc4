"""Documents tell the truth: links lead somewhere, code blocks run, the command line is as it is printed."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import chdir
from itertools import takewhile
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from edge_runtime import Model
from edge_runtime.cli.program import main
from edge_runtime.server.settings import Settings
from server.conftest import running
from support.document_maker import words_pdf
from support.video_maker import make_video
from tools import cli_reference

ROOT = Path(__file__).parents[2]
NOT_OURS = {"build", "dist", "models", "node_modules"}
DECISIONS = ROOT / "docs" / "decisions"

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^(```+)(\w*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)


def documents() -> list[Path]:
    """Every Markdown file of the project."""
    return [
        path
        for path in sorted(ROOT.rglob("*.md"))
        if not any(part in NOT_OURS or part.startswith(".") for part in path.relative_to(ROOT).parts)
    ]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(path: Path) -> set[str]:
    """What `#...` behind a link to this document may be, as GitHub makes them from headings."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} (.*)$", FENCE.sub("", path.read_text("utf-8")), re.MULTILINE):
        text = LINK.sub(lambda link: link[0][1 : link[0].index("]")], heading)
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        count = found[slug] = found.get(slug, -1) + 1
        if count:
            found[f"{slug}-{count}"] = 0
    return set(found)


def relative_links(path: Path) -> list[str]:
    """Links of a document that stay in the project, code left out."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text("utf-8")))
    return [link for link in LINK.findall(text) if not re.match(r"[a-z]+:", link)]


# --- links, lengths -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", documents(), ids=name_of)
def test_links_resolve(path):
    for link in relative_links(path):
        target, _, anchor = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), f"{name_of(path)}: {link} leads nowhere"
        assert there.is_relative_to(ROOT), f"{name_of(path)}: {link} leads out of the project"
        if anchor:
            assert there.suffix == ".md", f"{name_of(path)}: {link}"
            assert anchor in anchors(there), f"{name_of(path)}: {link} names no heading"


def test_anchors_are_those_of_github(tmp_path):
    path = tmp_path / "a.md"
    path.write_text("# Who may ask?\n```\n# a comment\n```\n## [`run`](a) & `--ctx N`\n## Who may ask\n", "utf-8")
    assert anchors(path) == {"who-may-ask", "run----ctx-n", "who-may-ask-1"}


@pytest.mark.parametrize(("name", "most"), [("README.md", 200), ("ARCHITECTURE.md", 80)])
def test_front_pages_stay_short(name, most):
    assert len((ROOT / name).read_text("utf-8").splitlines()) <= most


def test_paths_that_documents_name_exist():
    """`room/module.py`, `module.py` and `room/` in text, below a package, the project or the document's folder."""
    folders = ("edge_runtime", "kernels", "converters", "benchmarks", "tests", "tools")
    modules = {path.name for folder in folders for path in (ROOT / folder).rglob("*.py")}
    inside = [
        ROOT,
        *(ROOT / place for place in ("edge_runtime", "kernels/edge_kernels", "converters/edge_converters")),
    ]
    own = [ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
    named = set()
    for path in [*own, *(ROOT / "docs").rglob("*.md")]:
        text = path.read_text("utf-8")
        for script in re.findall(r"\b(?:benchmarks|demo|tests|tools)/[\w/]+\.py\b", text):
            assert (ROOT / script).exists(), f"{name_of(path)}: there is no {script}"
        for code in re.findall(r"`([^`\n]*)`", FENCE.sub("", text)):
            if re.fullmatch(r"[\w-]+\.py", code):
                assert code in modules, f"{name_of(path)}: there is no {code}"
            elif re.fullmatch(r"[\w.-]+(/[\w.-]+)*(/|\.py|/[\w.]+\.json)", code):
                places = (*inside, path.parent)
                assert any((place / code).exists() for place in places), f"{name_of(path)}: there is no {code}"
            else:
                continue
            named.add(code)
    assert {"engine/scheduler.py", "weights/blocks.py", "peers/", "benchmarks/results/turns.json"} <= named


def test_decisions_have_one_form():
    files = sorted(DECISIONS.glob("[0-9]*.md"))
    index = (DECISIONS / "README.md").read_text("utf-8")
    for number, path in enumerate(files, 1):
        lines = path.read_text("utf-8").splitlines()
        assert lines[0].startswith(f"# {number:04d}. "), f"{path.name}: numbers have no gaps"
        assert path.name.startswith(f"{number:04d}-")
        assert [line[3:] for line in lines if line.startswith("## ")] == ["Context", "Decision", "Measured", "Cost"]
        assert 10 <= len(lines) <= 30, f"{path.name} has {len(lines)} lines"
        assert f"- [{lines[0][2:]}]({path.name})\n" in index, f"docs/decisions/README.md lacks {path.name}"
    assert index.count("](0") == len(files)


def test_the_package_page_and_the_source_distribution_have_what_the_readme_links_to(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as held:
        names = {name.partition("/")[2] for name in held.getnames()}
        described = held.extractfile(f"{archive.name.removesuffix('.tar.gz')}/PKG-INFO")
        assert described is not None
        assert (ROOT / "README.md").read_text("utf-8") in described.read().decode()
    for link in relative_links(ROOT / "README.md"):
        target = link.partition("#")[0].rstrip("/")
        assert target in names or any(name.startswith(f"{target}/") for name in names), f"the sdist lacks {target}"


# --- numbers ------------------------------------------------------------------------------------------------


def result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text("utf-8"))


def row_of(begin: str) -> list[str]:
    """Cells of the README's one table row that begins so."""
    (row,) = (line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line.startswith(begin))
    return [cell.strip().strip("*") for cell in row.strip("|").split("|")]


def test_the_readmes_speed_is_that_of_the_kept_results():
    one = next(found for found in result("vision.json")["results"] if found["scenario"] == "slice")
    first, forced = result("first_token.json"), result("vision_avx2.json")["results"][0]
    peer = one["peers_s"]["mtmd-f16"]
    _, ours, theirs, ours_first, theirs_first, _ = row_of("| AMX")
    assert (ours, theirs) == (f"{one['ours_s']:.2f} s", f"{peer:.1f} s ({peer / one['ours_s']:.1f} times)")
    assert ours_first == f"{first['ours_s']['first_token']:.1f} s"
    assert theirs_first == f"{first['peers_s']['llama-mtmd-cli']:.1f} s ({first['ratio']:.1f} times)"
    ratio = forced["peers_s"]["mtmd-f16"] / forced["ours_s"]
    assert f"{ratio:.2f} times" in (ROOT / "README.md").read_text("utf-8")


def test_the_readmes_quantisation_is_that_of_the_kept_result():
    rows = {(row["decoder"], row["vision"], row["arithmetic"]): row for row in result("quality.json")["rows"]}
    written = result("conversion.json")["written_bytes"]
    of_peer = result("conversion.json")["peer"]["written_bytes"]
    sizes = {
        ("decoder", "q4_k_m"): f"{written['ggml-model-Q4_K_M.gguf'] / 1e9:.1f} GB",
        ("vision", "f16"): f"{of_peer['mmproj-model-f16.gguf'] / 1e6:,.0f} MB",
        ("vision", "q8_0"): f"{written['mmproj-model-q8_0.gguf'] / 1e6:,.0f} MB",
        ("vision", "int4"): "324 MB",
    }
    assert "int4 (324 MB)" in (ROOT / "CHANGELOG.md").read_text("utf-8"), "where it was measured is told there alone"
    file, seen = "", set()
    for line in (ROOT / "README.md").read_text("utf-8").splitlines():
        cells = [cell.strip().strip("*") for cell in line.strip("|").split("|")]
        if len(cells) == 7 and (cells[0] in ("decoder", "vision") or (file and not cells[0])):
            file, kind = cells[0] or file, cells[1]
            row = rows[(kind, "f32", "exact") if file == "decoder" else ("f32", kind, "int8")]
            assert cells[3:6] == [
                sizes.get((file, kind), "–"),
                f"{row['average']:.2%}".replace("%", " %"),
                f"{row['loss']:.4f}",
            ]
            seen.add((file, kind))
    assert seen >= set(sizes)
    assert len(seen) == 13
    shipped = rows["q4_k_m", "q8_0", "int8"]["average"]
    assert f"{shipped:.2%}".replace("%", " %") in (ROOT / "README.md").read_text("utf-8")


# --- the command line ---------------------------------------------------------------------------------------


def test_the_reference_is_the_programs_help():
    assert cli_reference.TARGET.read_text("utf-8") == cli_reference.reference(), (
        "docs/cli.md is not what the program prints; run `python tools/cli_reference.py`"
    )
    printed = CliRunner().invoke(main, ["run", "--help"], prog_name="edge-runtime", terminal_width=80).stdout
    assert f"```\n{printed.strip()}\n```" in cli_reference.TARGET.read_text("utf-8")


def test_options_that_documents_name_exist():
    """Every `edge-runtime COMMAND --option`, in text and in blocks, is one the program knows."""
    for path in documents():
        for command, rest in re.findall(
            r"edge-runtime (run|convert|bench|bundle|info|pull|list|show|rm|export ollama|serve)\b([^\n`]*)",
            path.read_text("utf-8"),
        ):
            known = CliRunner().invoke(main, [*command.split(), "--help"]).stdout
            for option in re.findall(r"(?<![\w-])--[a-z-]+", rest):
                assert option in known, f"{name_of(path)}: edge-runtime {command} has no {option}"


def command_lines() -> list[tuple[str, str]]:
    """(document, line) of every command of ours in a block, joined where a backslash ends a line."""
    return [
        (name_of(path), line.strip().removeprefix("sudo ").replace(".venv/bin/edge-runtime", "edge-runtime"))
        for path in documents()
        for line in re.sub(r"\\\n\s*", "", path.read_text("utf-8")).splitlines()
        if re.match(r"( {4}|\t)(.*\| )?(\.venv/bin/)?edge-runtime ", line)
    ]


def words_of(line: str) -> list[str]:
    """The words of one command of ours, without what a shell takes for itself."""
    reader = shlex.shlex(line[line.index("edge-runtime ") :], posix=True, punctuation_chars="<>|")
    reader.whitespace_split = True
    return list(takewhile(lambda word: word not in {"<", ">", "|"}, reader))[1:]


def parse(words: list[str]) -> None:
    """Let the program read a command line, and do nothing.

    Raises
    ------
    click.UsageError
    """
    context = main.make_context("edge-runtime", list(words), resilient_parsing=True)
    command: click.Command = main
    while isinstance(command, click.Group):
        name, *words = words or [""]
        found = command.get_command(context, name)
        if found is None:
            raise click.UsageError(f"No such command {name!r}.")
        command = found
        context = command.make_context(name, list(words), context, resilient_parsing=isinstance(command, click.Group))


def test_command_lines_can_be_read():
    lines = command_lines()
    assert len(lines) > 40
    for document, line in lines:
        try:
            parse(words_of(line))
        except click.UsageError as error:
            raise AssertionError(f"{document}: {line}: {error.message}") from None
    with pytest.raises(click.UsageError, match="No such option"):
        parse(["run", "a.png", "What?", "--slices", "4"])
    with pytest.raises(click.UsageError, match="No such command"):
        parse(["chat"])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that documents speak of."""
    folder = tmp_path_factory.mktemp("documents")
    shutil.copytree(ROOT / "examples", folder / "examples")
    for name in ("photo.jpg", "before.png", "after.png"):
        shutil.copy(ROOT / "examples" / "sign.png", folder / name)
    (folder / "scan.pdf").write_bytes(words_pdf(["CAFE", "BAR", "HOTEL", "EXIT", "ZOO", "TAXI", "STOP"]))
    (folder / "clip.mp4").write_bytes(make_video(60, 20))
    (folder / "talk.mkv").write_bytes(make_video(200, 2, kind="matroska"))
    return folder


def runnable(line: str) -> bool:
    """Whether a command needs neither a download nor a terminal: questions about files, and what is here."""
    words = words_of(line)
    if words[0] != "run":
        return words in (["list"], ["info"], ["info", "demo"])
    asks = "--preset" in words or any(" " in word for word in words)
    return asks and "--lora" not in words and "pdftotext" not in line


@pytest.fixture
def load_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands of this process that load a model in the same way share it."""
    load, close = Model.load, Model.close
    loaded: dict[str, Model] = {}

    def shared(name: str, **setup: Any) -> Model:
        key = f"{name} {setup}"
        if key not in loaded:
            loaded[key] = load(name, **setup)
        return loaded[key]

    with monkeypatch.context() as patch:
        patch.setattr(Model, "load", shared)
        patch.setattr(Model, "close", lambda self: None)
        yield
    for model in loaded.values():
        close(model)


@pytest.mark.slow
def test_questions_of_the_documents_are_answered(workplace, load_once, monkeypatch):
    """The demo stands in for every other model, and says little."""
    monkeypatch.setenv("EDGE_RUNTIME_MODELS", str(workplace / "store"))
    monkeypatch.setenv("PATH", os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    lines = {
        re.sub(r"-m (minicpm-v-4\.5|models/minicpm-v) ", "", line) for _, line in command_lines() if runnable(line)
    }
    assert len(lines) > 15
    with chdir(workplace):
        for line in sorted(lines):
            if re.search(r" < \S+$", line):
                done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
                code, said, notes = done.returncode, done.stdout, done.stderr
            else:
                few = ["--max-tokens", "16"] if " run " in line else []
                result = CliRunner().invoke(main, [*words_of(line), *few], prog_name="edge-runtime")
                code, said, notes = result.exit_code, result.stdout, result.stderr
            assert code == 0, f"{line}: {notes}"
            assert said.strip() or "--think" in line or line.endswith(" list"), line  # no answer in so few tokens
        first = CliRunner().invoke(main, ["run", "examples/sign.png", "What does it say?", "--greedy"])
    assert first.stdout == "CAFE\n", "what the README prints as the first answer"
    assert first.stderr.split("\n")[0] in re.sub(r"\n {4}", " ", (ROOT / "README.md").read_text("utf-8"))


# --- Python -------------------------------------------------------------------------------------------------

RUN_BLOCKS = """\
import json, sys
from edge_runtime import Model
for name, source in json.load(sys.stdin):
    print("\\n##", name, flush=True)
    names = {"__name__": "__main__"}
    if "model = Model.load" not in source and "model." in source:
        names["model"] = Model.load("demo")
    exec(compile(source, name, "exec"), names)
"""


def python_of(path: Path) -> str:
    """The Python blocks of a document as one program, its lines where the document has them."""
    text, lines = path.read_text("utf-8"), [""] * len(path.read_text("utf-8").splitlines())
    for block in FENCE.finditer(text):
        if block[2] == "python":
            begin = text.count("\n", 0, block.start(3))
            for number, line in enumerate(block[3].splitlines()):
                lines[begin + number] = line
    return "\n".join(lines).rstrip()


@pytest.mark.slow
def test_python_blocks_run(workplace, tmp_path, monkeypatch):
    """Each document's blocks as one program, beside a server; a failure names document and line."""
    for name in ("EDGE_RUNTIME_MODELS", "OLLAMA_MODELS", "EDGE_RUNTIME_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    programs = {name_of(path): python_of(path) for path in documents()}
    programs = {name: source for name, source in programs.items() if source}
    assert {"README.md", "docs/python-api.md", "docs/server-and-clients.md"} <= set(programs)
    with running(Settings(port=0, models=("demo",))) as served:
        given = [[name, source.replace("http://127.0.0.1:11434", served.url)] for name, source in programs.items()]
        done = subprocess.run(
            [sys.executable, "-c", RUN_BLOCKS],
            cwd=workplace,
            env={**os.environ, "OLLAMA_HOST": served.url, "NO_PROXY": "127.0.0.1"},
            input=json.dumps(given),
            capture_output=True,
            text=True,
            timeout=900,
        )
    assert done.returncode == 0, done.stderr
    said = dict(zip(programs, re.split(r"^## .*\n", done.stdout, flags=re.MULTILINE)[1:], strict=True))
    assert all(text.strip() for text in said.values()), said
    assert re.search(r'^\{"word": ?"(CAFE|BAR|HOTEL)"\}$', said["docs/python-api.md"], re.MULTILINE)
