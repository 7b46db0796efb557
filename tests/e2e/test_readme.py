"""The README's program runs as it stands."""

import re
from pathlib import Path


def test_the_program_in_the_readme_runs(capsys):
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(program, {})
    printed = capsys.readouterr().out
    assert "aten.relu.default" in printed
    assert "0.2400, -9.0000" in printed
