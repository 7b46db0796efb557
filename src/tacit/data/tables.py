"""A site's own data, from the files that it has them in.

A **loader** is a function of a folder and of settings that gives `Examples`: inputs as float32 of shape ``(n, …)``,
targets as int64 class numbers of shape ``(n,)``. Those here read tables (CSV, Parquet), IDX and NumPy files; a loader
of one's own is a function ``load(folder: Path) -> Examples`` in a Python file.

A table becomes examples column by column: those listed in ``drop`` go; then rows in which a value is missing; columns
with ``categories`` become indicators, one for each code but the first, after all the others; the rest are numbers in
the order of the file, or of ``features``.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tacit.data.examples import Examples
from tacit.data.idx import parse_idx
from tacit.errors import DataError, InputError


@dataclass(frozen=True)
class Table:
    """How the rows of a table become examples.

    Args:
        target: the column of the class.
        columns: the names of all columns, for a file without a line of names; empty if its first line has them.
        features: the columns to use, in this order; empty for all that are left.
        drop: columns not to use, whose values may be missing.
        missing: what stands for a missing value; an empty cell does too.
        categories: the codes of columns whose codes have no order.
        classes: the values of the target in the order of their class numbers; empty if they are the numbers.
        above: the target is whether the column is above this, in place of ``classes``.

    Raises:
        InputError: settings contradict one another.
    """

    target: str
    columns: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    missing: str = ""
    categories: Mapping[str, Sequence[float]] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    above: float | None = None

    def __post_init__(self) -> None:
        if self.target in (*self.features, *self.drop, *self.categories):
            raise InputError(f"the target {self.target!r} is a feature, dropped, or a category as well: which is it?")
        if self.classes and self.above is not None:
            raise InputError("the target is given both by its classes and by what it is above: give one")

    def examples(self, names: Sequence[str], rows: Iterable[Sequence[str]], path: Path, first: int = 1) -> Examples:
        """The examples in the rows.

        Args:
            names: of the columns.
            rows: their cells, as text.
            path, first: the file and the number of the first row's line, for errors.

        Raises:
            DataError: a column is missing, a row has another number of cells, or a cell holds what it cannot; the
                message names the line and the column, and not the value.
        """
        plain, coded = self._used(names, path)
        at = {name: names.index(name) for name in (*plain, *coded, self.target)}
        inputs, targets = [], []
        for line, cells in enumerate(rows, first):
            if len(cells) != len(names):
                raise DataError(f"{path}, line {line}: {len(cells)} cells, expected {len(names)}")
            if any(cells[place].strip() in ("", self.missing) for place in at.values()):
                continue
            numbers = [_number(cells[at[name]], name, path, line) for name in plain]
            for name in coded:
                numbers += self._indicators(_number(cells[at[name]], name, path, line), name, path, line)
            inputs.append(numbers)
            targets.append(self._class(cells[at[self.target]].strip(), path, line))
        if not inputs:
            raise DataError(f"{path}: no row has all of {', '.join(at)}")
        return Examples(torch.tensor(inputs, dtype=torch.float32), torch.tensor(targets))

    def _used(self, names: Sequence[str], path: Path) -> tuple[list[str], list[str]]:
        wanted = (self.target, *self.features, *self.drop, *self.categories)
        if absent := [name for name in wanted if name not in names]:
            raise DataError(f"{path} has no column {', '.join(map(repr, absent))}: it has {', '.join(names)}")
        used = self.features or [name for name in names if name != self.target and name not in self.drop]
        return [name for name in used if name not in self.categories], [n for n in used if n in self.categories]

    def _indicators(self, value: float, name: str, path: Path, line: int) -> list[float]:
        codes = self.categories[name]
        if value not in codes:
            known = ", ".join(f"{code:g}" for code in codes)
            raise DataError(f"{path}, line {line}, column {name!r}: expected one of {known}")
        return [float(value == code) for code in codes[1:]]

    def _class(self, cell: str, path: Path, line: int) -> int:
        if self.classes:
            if cell not in self.classes:
                raise DataError(f"{path}, line {line}: the target is none of {', '.join(self.classes)}")
            return self.classes.index(cell)
        value = _number(cell, self.target, path, line)
        if self.above is not None:
            return int(value > self.above)
        if value != int(value) or value < 0:
            raise DataError(f"{path}, line {line}: the target is no class number; list its values in classes")
        return int(value)


def read_csv(path: Path, table: Table) -> Examples:
    """The examples of a CSV file.

    Raises:
        DataError: it cannot be read, or see `Table.examples`.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if table.columns:
        return table.examples(table.columns, rows, path)
    if not rows:
        raise DataError(f"{path} is empty: its first line names the columns")
    return table.examples([name.strip() for name in rows[0]], rows[1:], path, first=2)


def read_parquet(path: Path, table: Table) -> Examples:
    """The examples of a Parquet file.

    Raises:
        InputError: pyarrow is not installed.
        DataError: the file cannot be read, or see `Table.examples`.
    """
    try:
        from pyarrow import ArrowException, parquet  # noqa: PLC0415
    except ImportError:
        raise InputError("Parquet files are read with pyarrow: install it by `pip install 'tacit[parquet]'`") from None
    try:
        content = parquet.read_table(path)
    except (OSError, ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    columns = ([_cell(value) for value in column.to_pylist()] for column in content.columns)
    return table.examples(content.column_names, list(zip(*columns, strict=True)), path)


def read_idx(inputs: Path, targets: Path) -> Examples:
    """Grey images and their labels in two gzip-compressed IDX files, as MNIST has them: pixels in [0, 1].

    Raises:
        DataError: a file is missing or damaged, or there are not as many labels as images.
    """
    pixels = parse_idx(_content(inputs), 3, inputs)
    return _paired(pixels.unsqueeze(1).float() / 255, parse_idx(_content(targets), 1, targets).long(), inputs)


def read_numpy(inputs: Path, targets: Path) -> Examples:
    """Inputs and class numbers in two ``.npy`` files.

    Raises:
        DataError: a file is missing, damaged, holds objects, or there are not as many targets as inputs.
    """
    arrays = []
    for path in (inputs, targets):
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} cannot be read as a NumPy array of numbers: {error}") from error
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
            raise DataError(f"{path} does not hold one array of numbers")
        arrays.append(torch.from_numpy(np.ascontiguousarray(array)))
    found, classes = arrays
    if classes.is_floating_point():
        raise DataError(f"{targets} holds fractions: targets are whole class numbers")
    return _paired(found.float(), classes.long(), inputs)


def check_examples(examples: Examples, shape: tuple[int, ...], classes: int) -> None:
    """Refuse examples that do not fit what is to be trained.

    Raises:
        DataError: inputs have another shape or are not finite, or a target is no class.
    """
    inputs, targets = examples.inputs, examples.targets
    if inputs.dtype != torch.float32 or targets.dtype != torch.int64:
        raise DataError(f"inputs of {inputs.dtype}, targets of {targets.dtype}: expected float32 and int64")
    if tuple(inputs.shape[1:]) != shape:
        raise DataError(f"examples of shape {tuple(inputs.shape[1:])} here, expected {shape}")
    if not bool(inputs.isfinite().all()):
        raise DataError("inputs are not all finite numbers")
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise DataError(f"targets here are not all classes 0 to {classes - 1}")


def _number(cell: str, name: str, path: Path, line: int) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{path}, line {line}, column {name!r}: expected a number")
    return value


def _cell(value: object) -> str:
    return "" if value is None else str(float(value)) if isinstance(value, bool) else str(value)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _paired(inputs: Tensor, targets: Tensor, path: Path) -> Examples:
    if targets.dim() != 1 or len(inputs) != len(targets):
        raise DataError(f"{path} holds {len(inputs)} inputs, but there are targets of shape {tuple(targets.shape)}")
    return Examples(inputs, targets)
