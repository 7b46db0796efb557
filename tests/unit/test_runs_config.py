import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import pytest

from tacit.errors import InputError
from tacit.runs import config

DOCUMENTED = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def sections() -> dict[str, list[type]]:
    """Every section of a config, with the structs that it may be."""
    hints = get_type_hints(config.Config)
    found = {}
    for name, hint in hints.items():
        kinds = [
            kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
        ]
        if kinds:
            found[name] = kinds
    return found


def test_every_section_and_key_is_documented() -> None:
    parts = dict(re.findall(r"^## `\[(\w+)\]`\n(.*?)(?=^## |\Z)", DOCUMENTED, re.DOTALL | re.MULTILINE))
    assert parts.keys() == sections().keys()
    for name, kinds in sections().items():
        for kind in kinds:
            for key in kind.__struct_fields__:
                assert f"`{key}`" in parts[name], f"{name}.{key}"
            tag = kind.__struct_config__.tag
            if tag is not None:
                assert f'`"{tag}"`' in parts[name], f"{name}: {tag}"


def test_the_documented_defaults_are_the_defaults() -> None:
    parts = dict(re.findall(r"^## `\[(\w+)\]`\n(.*?)(?=^## |\Z)", DOCUMENTED, re.DOTALL | re.MULTILINE))
    checked = 0
    for name, kinds in sections().items():
        for kind in kinds:
            if kind.__struct_config__.tag is not None:
                continue
            made: Any = kind()
            for key, default in re.findall(r"^\| (`.*?`) \| (.*?) \|", parts[name], re.MULTILINE):
                for one in re.findall(r"`(\w+)`", key):
                    value = getattr(made, one)
                    expected = default.strip("`")
                    shown = (
                        {None: "–", True: "true", False: "false"}.get(value)
                        if not isinstance(value, int | float) or isinstance(value, bool)
                        else None
                    )
                    assert (shown or (f'"{value}"' if isinstance(value, str) else "")) == expected or float(
                        expected
                    ) == value
                    checked += 1
    assert checked > 25


def test_the_example_parses() -> None:
    parsed, _ = config.read(Path(__file__).parents[2] / "examples" / "training.toml")
    assert isinstance(parsed.algorithm, config.FedProx)
    assert parsed.devices is not None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("sed = 1", "top level: Object contains unknown field `sed`"),
        ("[optimiser]\nlr = 1.0", "unknown field `optimiser`"),
        ('[algorithm]\nname = "fedavg"\nproximal = 0.5', "in algorithm: Object contains unknown field `proximal`"),
        ('[algorithm]\nname = "fedvag"', "in algorithm.name: Invalid value 'fedvag'"),
        ('[algorithm]\nname = "fedavg"\nlr = "fast"', "in algorithm.lr: Expected `float`, got `str`"),
        ("[rounds]\nnumber = 3.5", "in rounds.number: Expected `int`, got `float`"),
        ('[selection]\nname = "poisson"', "missing required field `rate`"),
        ("[algorithm", "is not TOML"),
    ],
)
def test_mistakes_are_named_with_their_place(text: str, complaint: str) -> None:
    with pytest.raises(InputError, match=re.escape(complaint)) as caught:
        config.parse(text, "run.toml")
    assert str(caught.value).startswith("run.toml")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.toml cannot be read"):
        config.read(tmp_path / "nothing.toml")
    (tmp_path / "latin.toml").write_bytes(b"seed = 1 # \xff")
    with pytest.raises(InputError, match=r"latin\.toml cannot be read"):
        config.read(tmp_path / "latin.toml")
