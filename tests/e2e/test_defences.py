"""Without the line of code that stops an attack, the tests that carry it out fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from defences import DEFENCES

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def passed() -> dict[str, dict[str, bool]]:
    """Which tests pass without the defence, by attack; and under "" with all of them."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, str(ROOT / "tests" / "without.py"), str(ROOT)]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment).stdout
    return {line["attack"]: line["passed"] for line in map(json.loads, output.splitlines())}


def test_with_all_of_them_every_test_passes(passed: dict[str, dict[str, bool]]) -> None:
    assert [test for test, passes in passed[""].items() if not passes] == []


@pytest.mark.parametrize("attack", [defence.attack for defence in DEFENCES])
def test_an_attack_succeeds_without_what_stops_it(passed: dict[str, dict[str, bool]], attack: str) -> None:
    assert [test for test, passes in passed[attack].items() if passes] == []
