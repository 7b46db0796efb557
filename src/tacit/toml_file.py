"""Settings in TOML, read into msgspec structs: whatever is unknown or of the wrong type is refused by name."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tacit.errors import InputError

T = TypeVar("T")


def read(path: Path) -> str:
    """A file's text.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def tables(text: str, name: str) -> dict[str, Any]:
    """The tables of a TOML text.

    Args:
        text: the file's content.
        name: what to call it in an error.

    Raises:
        InputError: it is not TOML.
    """
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{name} is not TOML: {error}") from error


def typed(value: object, kind: type[T], where: str, name: str, documentation: str) -> T:
    """A table as a struct.

    Args:
        value: as `tables` gave it.
        kind: the struct.
        where: the table's place in the file, empty for the whole.
        name: what to call the file in an error.
        documentation: which page lists every key.

    Raises:
        InputError: a key does not exist, is missing, or has a value of the wrong type or out of range.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        complaint, _, at = str(error).partition(" - at `")
        place = re.sub(r"^\$\.?", "", at.rstrip("`"))
        place = ".".join(part for part in (where, place) if part) or "the top level"
        raise InputError(f"{name}: in {place}: {complaint}; {documentation} lists every key") from error
