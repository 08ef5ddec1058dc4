"""Scenarios of the vision benchmark: `scenarios.toml` → checked `Scenario`s. It does not know how they are run."""

from __future__ import annotations

import tomllib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

FILE = Path(__file__).resolve().parent.parent / "scenarios.toml"
KINDS = ("time", "memory", "startup", "accuracy", "profile")
SIDES = (
    "ours-int8",
    "ours-exact",
    "mtmd-f16",
    "mtmd-q8_0",
    "openvino-int8",
    "openvino-f32",
    "torch-int8",
    "torch-bf16",
)


@dataclass(frozen=True)
class Scenario:
    """One table of `scenarios.toml`."""

    name: str
    kind: str
    about: str
    picture: list[int]
    """Width and height in pixels."""
    slices: int
    """Number of slices that every side must cut the picture into; another number would be another amount of work."""
    sides: list[str]
    repeats: int = 1
    compare_output: bool = False
    """Compare each side's output with ours in float32, so that all do the same work."""
    growth_pictures: int = 0
    growth_settled: int = 0
    """Number of pictures after which memory should no longer grow."""
    plants: list[str] | None = None
    calibrated: list[str] | None = None
    """Plants that are also measured with the result of `convert --calibrate`."""


class ScenarioError(SystemExit):
    """A scenario that cannot be run; exits with its message."""


def read_scenarios(text: str) -> dict[str, Scenario]:
    """Parse and check the text of a scenario file.

    Raises
    ------
    ScenarioError
        Naming the scenario and the key.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(f"The scenario file is no TOML: {error}.") from None
    return {name: _scenario(name, table) for name, table in tables.items()}


def _scenario(name: str, table: Any) -> Scenario:
    if not isinstance(table, dict):
        raise ScenarioError(f"Scenario {name} is {table!r}; expected a table.")
    hints = get_type_hints(Scenario)
    known = {field.name: field for field in fields(Scenario) if field.name != "name"}
    if unknown := sorted(set(table) - set(known)):
        raise ScenarioError(f"Scenario {name} has the unknown key {unknown[0]}; known are {', '.join(known)}.")
    needed = {key for key, field in known.items() if field.default is MISSING}
    if missing := sorted(needed - set(table)):
        raise ScenarioError(f"Scenario {name} lacks the key {missing[0]}.")
    for key, value in table.items():
        expected = list if "list" in str(hints[key]) else hints[key]
        if type(value) is not expected:
            raise ScenarioError(f"Scenario {name}: {key} is {value!r}; expected {expected.__name__}.")
    scenario = Scenario(name, **table)
    if scenario.kind not in KINDS:
        raise ScenarioError(f"Scenario {name}: kind is {scenario.kind!r}; expected one of {', '.join(KINDS)}.")
    if unknown := [side for side in scenario.sides if side not in SIDES]:
        raise ScenarioError(f"Scenario {name}: there is no side {unknown[0]!r}; there are {', '.join(SIDES)}.")
    if len(scenario.picture) != 2 or not all(isinstance(side, int) and side > 0 for side in scenario.picture):
        raise ScenarioError(f"Scenario {name}: picture is {scenario.picture}; expected [width, height] in pixels.")
    if scenario.repeats < 1 or scenario.slices < 1:
        raise ScenarioError(f"Scenario {name}: repeats and slices must be at least 1.")
    return scenario
