"""Installed distributions become the wheels they were."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from edge_runtime.bundle.wheels import pack, pack_own, why_not_packed
from edge_runtime.errors import BundleError
from support.wheel_maker import make_wheel

FILES = {
    "odd/__init__.py": "def main(): pass\n",
    "odd/data, with comma.txt": "data\n",
    "odd/inner/library.so.1": b"\x7fELF\x00binary",
    "odd-1.0.data/scripts/odd-script": "#!python\nprint('script')\n",
    "odd-1.0.data/scripts/odd-shell": "#!/bin/sh\necho shell\n",
    "odd-1.0.data/data/share/odd/page.1": "page\n",
}


def install(wheel: Path, prefix: Path) -> metadata.Distribution:
    """Install a wheel below a prefix, as into an environment, with pip."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-warn-script-location"]
    subprocess.run([*pip, "--prefix", prefix, wheel], check=True, capture_output=True)
    (site,) = prefix.glob("lib/python*/site-packages")
    (found,) = metadata.distributions(name=wheel.name.split("-")[0], path=[str(site)])
    return found


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith(("RECORD", "WHEEL"))}


def tree(prefix: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.relative_to(prefix).as_posix(): (path.stat().st_mode & 0o111, path.read_bytes())
        for path in prefix.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and path.name not in ("RECORD", "direct_url.json")
    }


@pytest.mark.parametrize("tag", ["py3-none-any", "py2.py3-none-any", "cp311-abi3-manylinux_2_17_x86_64.linux_x86_64"])
def test_a_wheel_comes_back(tmp_path, tag):
    """Files, scripts, data and commands; the tags, the bytes of the files and what pip makes of them."""
    original = make_wheel(tmp_path, "odd", tag=tag, files=FILES, commands={"odd": "odd:main"})
    # pip would refuse foreign tags; what it installs does not depend on them.
    portable = make_wheel(tmp_path / "any", "odd", files=FILES, commands={"odd": "odd:main"})
    installed = install(portable, tmp_path / "one")
    info = Path(str(installed.locate_file("odd-1.0.dist-info")))
    tags = [f"{python}-{abi}-{place}" for python, abi, place in expanded(tag)]
    wheel_file = info / "WHEEL"
    wheel_file.write_text(wheel_file.read_text().replace("Tag: py3-none-any\n", "".join(f"Tag: {t}\n" for t in tags)))
    record = info / "RECORD"
    lines = [line for line in record.read_text().splitlines() if "/WHEEL," not in line]
    record.write_text("\n".join([*lines, "odd-1.0.dist-info/WHEEL,,"]) + "\n")
    assert why_not_packed(installed) == ""

    (tmp_path / "again").mkdir()
    again = pack(installed, tmp_path / "again")
    assert {*again.stem.rsplit("-", 3)[1].split(".")} == {*original.stem.rsplit("-", 3)[1].split(".")}
    assert {*again.stem.rsplit("-", 1)[1].split(".")} == {*original.stem.rsplit("-", 1)[1].split(".")}
    assert contents(again) == contents(original)


def expanded(tag: str) -> list[tuple[str, str, str]]:
    pythons, abis, places = (part.split(".") for part in tag.split("-"))
    return [(python, abi, place) for python in pythons for abi in abis for place in places]


def test_pip_installs_the_same_from_it(tmp_path):
    original = make_wheel(tmp_path, "odd", files=FILES, commands={"odd": "odd:main"})
    (tmp_path / "again").mkdir()
    again = pack(install(original, tmp_path / "one"), tmp_path / "again")
    install(again, tmp_path / "two")
    one, two = tree(tmp_path / "one"), tree(tmp_path / "two")
    assert one.keys() == two.keys()
    assert {name: mode for name, (mode, _) in one.items()} == {name: mode for name, (mode, _) in two.items()}
    assert {name: data for name, (_, data) in one.items() if "/WHEEL" not in name} == {
        name: data for name, (_, data) in two.items() if "/WHEEL" not in name
    }


def test_the_same_installation_makes_the_same_bytes(tmp_path):
    click = metadata.distribution("click")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = pack(click, tmp_path / "one"), pack(click, tmp_path / "two")
    assert one.name == two.name == f"click-{click.version}-py3-none-any.whl"
    assert one.read_bytes() == two.read_bytes()


def test_what_was_changed_is_refused(tmp_path):
    installed = install(make_wheel(tmp_path, "odd", files=FILES), tmp_path / "one")
    path = Path(str(installed.locate_file("odd/__init__.py")))
    path.write_text("def main(): print('changed')\n")
    (tmp_path / "again").mkdir()
    with pytest.raises(BundleError, match=r"odd/__init__.py was changed since it was installed; .*--wheels"):
        pack(installed, tmp_path / "again")
    path.unlink()
    with pytest.raises(BundleError, match=r"odd/__init__.py is missing"):
        pack(installed, tmp_path / "again")


def test_an_installation_without_a_record_is_told(tmp_path):
    installed = install(make_wheel(tmp_path, "odd", files=FILES), tmp_path / "one")
    Path(str(installed.locate_file("odd-1.0.dist-info/RECORD"))).unlink()
    (found,) = metadata.distributions(name="odd", path=[str(installed.locate_file(""))])
    assert why_not_packed(found) == "its installer kept no record of its files"


def test_the_own_wheel(tmp_path):
    """It holds the sources as they are, also where it is installed in editable mode, and the kernels given."""
    kernels = tmp_path / "kernels"
    (kernels / "avx2").mkdir(parents=True)
    (kernels / "avx2" / "rows.o").write_bytes(b"machine code")
    plain = pack_own(tmp_path, None, "linux_x86_64")
    (tmp_path / "with").mkdir()
    compiled = pack_own(tmp_path / "with", kernels, "linux_x86_64")
    version = metadata.version("edge-runtime")
    assert plain.name == f"edge_runtime-{version}-py3-none-any.whl"
    assert compiled.name == f"edge_runtime-{version}-py3-none-linux_x86_64.whl"
    root = Path(__file__).parents[2]
    inside = contents(compiled)
    assert inside["edge_kernels/compiled/avx2/rows.o"] == b"machine code"
    assert inside["edge_runtime/cli/program.py"] == (root / "edge_runtime/cli/program.py").read_bytes()
    assert {"edge_runtime/bundle/install.sh", "edge_runtime/demo/ggml-model-Q4_K_M.gguf"} <= inside.keys()
    assert {name.split("/")[0] for name in inside if ".dist-info/" not in name} == {
        "edge_runtime",
        "edge_kernels",
        "edge_converters",
    }
    assert not [name for name in inside if name.endswith(".pyc")]
    assert [name for name in inside if "/compiled/" in name] == ["edge_kernels/compiled/avx2/rows.o"]
    assert contents(plain).keys() == inside.keys() - {"edge_kernels/compiled/avx2/rows.o"}
