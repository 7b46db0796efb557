"""docs/spec/attacks.md lists the attacks of tests/defences.py, and the tests that it and THREATMODEL.md name exist."""

import ast
import re
from pathlib import Path

from defences import DEFENCES

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "spec" / "attacks.md").read_text()
THREATS = (ROOT / "THREATMODEL.md").read_text()


def names_in(path: Path) -> set[str]:
    """The tests in a file, those of classes by ``Class::test``."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found.add(node.name)
            found |= {f"{node.name}::{child.name}" for child in node.body if isinstance(child, ast.FunctionDef)}
    return found


def test_every_attack_is_listed_with_its_tests() -> None:
    rows = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \|$", TEXT, re.MULTILINE)
    listed = {attack: set(re.findall(r"`(\w+)`", tests)) for attack, _, tests in rows if attack != "attack"}
    expected = {defence.attack: {test.split("::")[-1] for test in defence.tests} for defence in DEFENCES}
    assert len(expected) == len(DEFENCES)
    assert listed == expected
    assert all(stops.strip() for _, stops, _ in rows)


def test_every_test_that_is_named_is_there() -> None:
    for defence in DEFENCES:
        for test in defence.tests:
            file, name = test.split("::", 1)
            assert name in names_in(ROOT / "tests" / file), test
    everywhere = {name.split("::")[-1] for path in (ROOT / "tests").rglob("test_*.py") for name in names_in(path)}
    assert set(re.findall(r"`((?:test_|Test)\w+)`", TEXT + THREATS)) <= everywhere
