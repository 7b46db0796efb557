"""Runs tests on a copy of the source that lacks one defence at a time, and says which of them failed.

    python tests/without.py PATH_OF_REPOSITORY [WORD …]

One JSON object a line: the attack, and for each test that carries it out whether it passed; with an empty attack, where
nothing is left out, all tests. What takes long to import is imported once; each defence has a process of its own.
"""

import importlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from defences import DEFENCES, Defence

HEAVY = ("torch", "numpy", "numba", "scipy.stats", "msgspec", "safetensors.torch", "dp_accounting", "typer", "rich")


class Failures:
    """A plugin of pytest that notes which tests fail, in their fixtures too."""

    def __init__(self) -> None:
        self.nodes: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a failure."""
        if report.failed:
            self.nodes.append(report.nodeid)


def outcomes(root: Path, copy: Path, defence: Defence) -> dict[str, bool]:
    """Whether each test passes without the defence; in a process of its own."""
    source = (copy / defence.file).read_text()
    if source.count(defence.line) != 1:
        raise SystemExit(f"{defence.attack}: its line is not once in {defence.file}")
    (copy / defence.file).write_text(source.replace(defence.line, defence.without))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        sys.path.insert(0, str(copy / "src"))
        failures = Failures()
        arguments = ["-q", "-p", "no:cacheprovider", "--rootdir", str(root)]
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            code = pytest.main([*arguments, *(str(root / "tests" / test) for test in defence.tests)], [failures])
        passed = {test: not any(test in node for node in failures.nodes) for test in defence.tests}
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            passed[f"they cannot be run: {code!r}"] = True
        os.write(writer, json.dumps(passed).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    (copy / defence.file).write_text(source)
    return json.loads(answer or b'{"the process died": true}')


def main(root: Path, words: Sequence[str]) -> None:
    """Go through the defences whose attack has one of the words, or all."""
    for name in HEAVY:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(root / "src", copy / "src")
        everything = tuple({test for defence in DEFENCES for test in defence.tests})
        nothing = Defence("", everything, DEFENCES[0].file, DEFENCES[0].line, DEFENCES[0].line)
        for defence in (nothing, *DEFENCES):
            if not words or any(word in defence.attack for word in words):
                print(json.dumps({"attack": defence.attack, "passed": outcomes(root, copy, defence)}), flush=True)


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
