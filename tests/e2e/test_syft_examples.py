"""The programs of examples/pysyft run as they stand, with small settings."""

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import engine  # noqa: F401  (one thread)
import tacit.syft as sy

FOLDER = Path(__file__).parents[2] / "examples" / "pysyft"
PROGRAMS = {
    "basic_tools": ([], r"average    1\.723, computed at bob\ngradient   \[18\.0, 36\.0\][^$]*allowed    5900"),
    "federated_toy": (["--rounds", "30"], r"SGD   loss 0\.0\d+ [^$]*Adam  loss 0\.\d+"),
    "trusted_aggregator": (["--rounds", "8"], r"loss after 8 rounds 0\.00\d+\nbob holds 2 objects"),
    "federated_cnn": (["--images", "300", "--epochs", "2"], r"epoch 2: 10 batches, the last at alice, loss [01]\.\d+"),
    "encrypted_programs": ([], r"sum is 25\n.*= 43\nx \* y = 125, x > y = 1, x <= y = 0, x == y \+ 20 = 1\n.*\[4, 3\]"),
    "secure_aggregation": (["--rounds", "10"], r"loss before [3-9]\.\d+\nloss after 10 rounds [01]\.\d+"),
    "secure_classification": (
        ["--train", "300", "--batches", "1", "--hidden", "50"],
        r"hits on shares (\d+), in the clear (\d+), of 50",
    ),
    "encrypted_training": (["--steps", "20"], r"step  20: absolute error 0\.13\d\nmodel \[0\.93\d+, 0\.06\d+\]"),
    "encrypted_mnist": (
        ["--images", "96", "--batch", "32", "--epochs", "2"],
        r"epoch 2: loss 0\.\d+, hits \d+ of 160",
    ),
    "resnet18": (["--size", "64", "--batch", "1"], r"labels on shares \[(\d)\], in the clear \[(\d)\]\n.*most 0\.0\d+"),
    "plans": ([], r"at phone1: \[2\.0, 3\.0\][^$]*through both phones: \[5\.0\]"),
}


@pytest.fixture(autouse=True)
def _unhooked() -> Iterator[None]:
    yield
    if sy.hook:  # whatever a program that failed left behind
        sy.hook.unhook()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_does_what_it_says(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options, expected = PROGRAMS[name]
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.delenv("TACIT_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    found = re.search(expected, capsys.readouterr().out)
    assert found
    for clear in found.groups()[1:]:
        assert abs(int(found.group(1)) - int(clear)) <= 1
    assert not hasattr(torch.Tensor, "send")


def test_the_program_in_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (FOLDER.parents[1] / "docs" / "from-pysyft.md").read_text()
    [program] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, object] = {}
    exec(program, names)
    assert capsys.readouterr().out == "tensor([2., 4., 6.])\ntensor([0.2500, 2.2500])\n"
    names["hook"].unhook()


def test_every_program_is_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {*PROGRAMS, "digits"}
