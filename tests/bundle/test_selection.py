"""Which wheels: given ones first, then what is installed; for other machines what pip finds."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from bundle.conftest import direct_requirements, platform_tag, small_runtime, small_wheels
from edge_runtime.bundle import selection
from edge_runtime.bundle.selection import EXTRAS, check_extras, installed_extras, select
from edge_runtime.bundle.targets import Target, choose, glibc_of_tag, own_name
from edge_runtime.errors import BundleError
from support.wheel_maker import make_wheel

OTHER = next(name for name in ("linux-aarch64", "linux-x86_64") if name != own_name())


def chosen(target: Target, given: Path | None, folder: Path) -> tuple[list[str], list[str]]:
    """Names of the wheels, and what was said."""
    folder.mkdir()
    said: list[str] = []
    selected = select(target, (), given, None, folder, said.append)
    assert sorted(folder.iterdir()) == [*selected.wheels], "nothing else is left in the folder"
    return [path.name for path in selected.wheels], said


def test_given_wheels_come_first_and_the_rest_is_what_is_installed(tmp_path, wheels):
    (wheels / f"pip-{metadata.version('pip')}-py3-none-any.whl").unlink(missing_ok=True)
    for path in wheels.glob("click-*"):
        path.unlink()
    make_wheel(wheels, "tqdm", "4.66.0")  # older than the other one given
    make_wheel(wheels, "unrelated")
    names, said = chosen(choose(None, None), wheels, tmp_path / "out")
    expected = {requirement.name.replace("-", "_") for requirement in direct_requirements()} | {"edge_runtime", "pip"}
    assert {name.split("-")[0] for name in names} == expected
    assert f"click-{metadata.version('click')}-py3-none-any.whl" in names
    assert f"tqdm-{metadata.version('tqdm')}-py3-none-any.whl" in names
    assert said == [], "nothing was fetched"


def test_the_wheel_for_the_newest_system_is_taken_and_none_for_another(tmp_path, wheels):
    machine = own_name().partition("-")[2]
    version = metadata.version("numpy")
    for path in wheels.glob("numpy-*"):
        path.unlink()
    for tag in (f"manylinux_2_17_{machine}", f"manylinux_2_28_{machine}", "win_amd64", "manylinux_2_28_ppc64le"):
        make_wheel(wheels, "numpy", version, f"py3-none-{tag}")
    names, _ = chosen(choose(None, None), wheels, tmp_path / "out")
    assert [name for name in names if name.startswith("numpy")] == [
        f"numpy-{version}-py3-none-manylinux_2_28_{machine}.whl"
    ]


@pytest.mark.parametrize(("name", "reason"), [("odd.whl", "does not have the name of a wheel")])
def test_odd_names_of_wheels_are_refused(tmp_path, wheels, name, reason):
    (wheels / name).write_bytes(b"")
    with pytest.raises(BundleError, match=reason):
        chosen(choose(None, None), wheels, tmp_path / "out")


def test_damaged_wheels_are_refused(tmp_path, wheels):
    (path,) = wheels.glob("click-*")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BundleError, match=r"click-.*\.whl is damaged"):
        chosen(choose(None, None), wheels, tmp_path / "out")


def test_what_does_not_fit_is_told(tmp_path, wheels):
    for path in wheels.glob("numpy-*"):
        path.unlink()
    make_wheel(wheels, "numpy", "1.26.4")
    with pytest.raises(BundleError, match=r"numpy>=2\.0.* is not installed here; .*--wheels FOLDER"):
        chosen(choose(None, None), wheels, tmp_path / "out")


def test_extras():
    assert {*installed_extras()} <= {*EXTRAS}
    check_extras(EXTRAS)
    with pytest.raises(BundleError, match=r"--extra is 'servers'; expected one of .*serve"):
        check_extras(["servers"])


def test_a_folder_that_is_none_is_refused(tmp_path, wheels):
    with pytest.raises(BundleError, match="no folder"):
        chosen(choose(None, None), tmp_path / "nowhere", tmp_path / "out")


def test_another_machine_needs_a_wheel_of_llama(tmp_path, wheels):
    """The only package without wheels on PyPI; the sentence has both ways to one."""
    with pytest.raises(BundleError, match=rf"llama-cpp-python==\S+ has no wheel for {OTHER} on PyPI") as error:
        chosen(Target(OTHER, (3, 12)), None, tmp_path / "one")
    assert "pip wheel --no-deps llama-cpp-python==" in str(error.value)
    assert "--index-url=https://abetlen.github.io/llama-cpp-python/whl/cpu" in str(error.value)
    with pytest.raises(BundleError, match="has no wheel"):  # that of this machine does not count
        chosen(Target(OTHER, (3, 12)), wheels, tmp_path / "two")


def test_another_machine_by_pip(tmp_path, monkeypatch):
    """The real pip, which finds everything in the folder; an index is not asked."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(selection, "pack_own", small_runtime)
    given = small_wheels(tmp_path / "given", OTHER)
    make_wheel(given, "pip", "99.0")
    machine = OTHER.partition("-")[2]
    (numpy,) = given.glob("numpy-*")
    numpy.unlink()
    version = metadata.version("numpy")
    for tag in (f"cp312-cp312-manylinux_2_17_{machine}", f"cp311-cp311-manylinux_2_17_{machine}"):
        make_wheel(given, "numpy", version, tag)
    names, said = chosen(Target(OTHER, (3, 12)), given, tmp_path / "out")
    assert f"numpy-{version}-cp312-cp312-manylinux_2_17_{machine}.whl" in names
    assert f"llama_cpp_python-0.3.36-{platform_tag(OTHER)}.whl" in names
    assert "pip-99.0-py3-none-any.whl" in names
    assert len(said) == 1
    assert f"for {OTHER}, Python 3.12" in said[0]

    for path in given.glob("numpy-*"):
        path.unlink()
    with pytest.raises(BundleError, match=r"pip could not fetch .*numpy.*--wheels FOLDER"):
        chosen(Target(OTHER, (3, 12)), given, tmp_path / "again")


def test_targets():
    assert choose("linux-aarch64", "3.13") == Target("linux-aarch64", (3, 13))
    assert choose(None, None).is_here
    assert [*Target("linux-aarch64", (3, 11)).platforms(18)] == [
        "linux_aarch64",
        "manylinux_2_18_aarch64",
        "manylinux_2_17_aarch64",
        "manylinux2014_aarch64",
    ]
    for name in ("linux", "windows-x86_64", "linux-armv7l"):
        with pytest.raises(BundleError, match=r"expected --target linux-x86_64 or linux-aarch64"):
            choose(name, None)
    for python in ("3.10", "2.7", "3", "3.11.2", "x"):
        with pytest.raises(BundleError, match=r"expected 3\.11 or newer"):
            choose("linux-aarch64", python)


def test_glibc_of_tags():
    assert glibc_of_tag("manylinux_2_28_x86_64") == (2, 28)
    assert glibc_of_tag("manylinux2014_aarch64") == (2, 17)
    assert glibc_of_tag("linux_x86_64") == ()
