"""The README's program runs as it stands."""

import re
from pathlib import Path

import torch


def test_the_programs_in_the_readme_run_one_after_the_other(capsys):
    text = (Path(__file__).parents[2] / "README.md").read_text()
    names: dict[str, object] = {}
    for program in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(program, names)
    printed = capsys.readouterr().out
    assert "aten.relu.default" in printed
    assert "0.2400, -9.0000" in printed
    assert isinstance(names["trained"], torch.nn.Module)
