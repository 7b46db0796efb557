"""Heart disease at four hospitals: a data set that is federated by origin.

920 patients examined for coronary artery disease (Janosi, Steinbrunn, Pfisterer and Detrano 1988, *Heart Disease*,
UCI Machine Learning Repository, CC BY 4.0; the authors ask to be named: Andras Janosi, M.D., Hungarian Institute of
Cardiology, Budapest; William Steinbrunn, M.D., University Hospital, Zurich; Matthias Pfisterer, M.D., University
Hospital, Basel; Robert Detrano, M.D., Ph.D., V.A. Medical Center, Long Beach, and Cleveland Clinic Foundation).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tacit.data.examples import Examples
from tacit.data.partition import stratified
from tacit.data.published import PublishedFile, damaged, in_folder
from tacit.errors import DataError, InputError

FILES = {
    "Cleveland": PublishedFile(
        "processed.cleveland.data", 18_461, "a74b7efa387bc9d108d7d0115d831fe9b414b29ae7124f331b622b4efa0427c8"
    ),
    "Hungary": PublishedFile(
        "processed.hungarian.data", 10_263, "d1ad108f785768cd3d7e82dc522e6f5a61eea93cccfb3a46ee8076f73fc3d796"
    ),
    "Switzerland": PublishedFile(
        "processed.switzerland.data", 4_109, "834a405ccf5b66ab4056bb77794adc8df0b7125186454c0a1d002d33c6c3b314"
    ),
    "Long Beach": PublishedFile(
        "processed.va.data", 6_737, "e7c93d8d0d2acdadfa4c5e8de768e2191e7f618b952e29623f1f0d5949ff6b8f"
    ),
}
"""The four hospitals and their files."""

COLUMNS = (
    *("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak"),
    *("slope", "ca", "thal", "num"),
)
SPARSE = ("slope", "ca", "thal")
"""Columns that most patients outside of Cleveland lack; they are dropped."""

CATEGORIES = {"cp": (1, 2, 3, 4), "restecg": (0, 1, 2)}
"""Codes without an order: an indicator for each but the first."""

PLAIN = tuple(name for name in COLUMNS[:-1] if name not in (*SPARSE, *CATEGORIES))
FEATURES = (*PLAIN, *(f"{name}={code}" for name, codes in CATEGORIES.items() for code in codes[1:]))
"""The 13 features in the order of the inputs' columns."""

TRAINING_FRACTION = 0.66


@dataclass(frozen=True)
class Hospital:
    """A hospital's patients.

    Args:
        name: one of `FILES`.
        train: inputs float32 ``(n, 13)`` in the units of the files (see `FEATURES`), targets int64 ``(n,)``: 1 if
            the disease is present.
        test: likewise.
    """

    name: str
    train: Examples
    test: Examples


@dataclass(frozen=True, eq=False)
class Moments:
    """How many examples there are and, for each of F features, the sum of its values and of their squares.

    Moments add up over hospitals, so a secure sum of them is all that pooled standardisation needs.

    Args:
        count: of the examples.
        total: float64, shape ``(F,)``.
        squares: float64, shape ``(F,)``.
    """

    count: int
    total: Tensor
    squares: Tensor

    @classmethod
    def of(cls, inputs: Tensor) -> Moments:
        """The moments of ``inputs``, shape ``(n, F)``."""
        values = inputs.double()
        return cls(len(values), values.sum(dim=0), values.square().sum(dim=0))

    def __add__(self, other: Moments) -> Moments:
        """The moments of both together."""
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> Tensor:
        """Float64, shape ``(F,)``.

        Raises:
            InputError: there is no example.
        """
        if self.count == 0:
            raise InputError("the mean of no examples: give at least one")
        return self.total / self.count

    @property
    def std(self) -> Tensor:
        """Standard deviations (of the population), float64, shape ``(F,)``.

        Raises:
            InputError: there is no example.
        """
        return (self.squares / self.count - self.mean.square()).clamp(min=0).sqrt()


def load_heart_disease(data_dir: Path | None = None) -> tuple[Hospital, ...]:
    """Read the four hospitals' files; each hospital is a client of the natural split.

    The preparation is that of FLamby's Fed-Heart-Disease (Ogier du Terrail et al. 2022): the columns slope, ca and
    thal are dropped, then patients with a missing value; chest pain and electrocardiogram become indicators; 66 %
    of each hospital's patients, stratified by target, are for training. The split is always the same, and its
    sizes are FLamby's: 199 + 104, 172 + 89, 30 + 16 and 85 + 45; which patients are in which part differs.

    The files are looked for in ``data_dir``, or else in the folder that the environment variable ``TACIT_DATA``
    names: there in ``heart-disease/``, then in the folder itself. Each is checked line by line, then its checksum.

    Raises:
        DataError: no folder is named, or a file is missing, unreadable, damaged or not the published one; the
            message names the file and, where there is one, the line.
    """
    folder = _folder(data_dir)
    return tuple(_hospital(name, file, folder) for name, file in FILES.items())


def heart_files(data_dir: Path | None = None) -> tuple[Path, ...]:
    """Where the four hospitals' files are, in the order of `FILES`; see `load_heart_disease` for where they may be.

    Raises:
        DataError: one is missing.
    """
    folder = _folder(data_dir)
    return tuple(_path(file, folder) for file in FILES.values())


def _folder(data_dir: Path | None) -> Path:
    named = data_dir or os.environ.get("TACIT_DATA")
    if not named:
        raise DataError(
            "the heart disease files are not downloaded: set TACIT_DATA to a folder with heart-disease/ in it, "
            "and put there the four processed.*.data files of the UCI repository's data set 45"
        )
    return Path(named)


def _path(file: PublishedFile, folder: Path) -> Path:
    path = in_folder(folder, "heart-disease", file)
    if path is None:
        raise DataError(f"{file.name} is neither in {folder / 'heart-disease'} nor in {folder}: put it there")
    return path


def standardised(examples: Examples, mean: Tensor, std: Tensor) -> Examples:
    """The examples with each feature less its mean, over its standard deviation; constant features become 0.

    Args:
        examples: inputs of shape ``(n, F)``.
        mean: shape ``(F,)``; of a hospital's own training examples, or of all (see `Moments`).
        std: shape ``(F,)``.

    Raises:
        InputError: ``mean`` or ``std`` has another shape.
    """
    expected = examples.inputs.shape[1:]
    if mean.shape != expected or std.shape != expected:
        found = f"mean of shape {tuple(mean.shape)} and std of {tuple(std.shape)}"
        raise InputError(f"{found} for inputs of {tuple(expected)} features: give one of each a feature")
    scale = torch.where(std > 0, std, 1.0)
    return Examples(((examples.inputs.double() - mean) / scale).to(examples.inputs.dtype), examples.targets)


def _hospital(name: str, file: PublishedFile, folder: Path) -> Hospital:
    path = _path(file, folder)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}): check its permissions") from error
    lines = content.decode("utf-8", errors="replace").splitlines()
    patients = [patient for number, line in enumerate(lines, start=1) if (patient := _patient(path, number, line))]
    if fault := file.fault(content):
        raise damaged(path, fault)
    inputs = torch.tensor([_features(patient) for patient in patients])
    targets = torch.tensor([int(patient["num"] > 0) for patient in patients])
    everyone = Examples(inputs, targets)
    train, test = stratified(targets, TRAINING_FRACTION, torch.Generator().manual_seed(0))
    return Hospital(name, everyone.subset(train), everyone.subset(test))


def _patient(path: Path, number: int, line: str) -> dict[str, float] | None:
    """A line's values by column; ``None`` if one that is needed is missing."""
    cells = line.split(",")
    if len(cells) != len(COLUMNS):
        raise damaged(path, f"has {len(cells)} values in line {number}, expected {len(COLUMNS)}")
    values = {}
    for name, cell in zip(COLUMNS, cells, strict=True):
        if name in SPARSE:
            continue
        if cell.strip() == "?":
            return None
        try:
            value = float(cell)
        except ValueError:
            value = math.nan
        known = CATEGORIES.get(name, (0, 1, 2, 3, 4) if name == "num" else None)
        if not math.isfinite(value) or (known is not None and value not in known):
            expected = "a number or ?" if known is None else f"one of {', '.join(map(str, known))}"
            raise damaged(path, f"has {name} {cell!r} in line {number}, expected {expected}")
        values[name] = value
    return values


def _features(patient: dict[str, float]) -> list[float]:
    indicators = [float(patient[name] == code) for name, codes in CATEGORIES.items() for code in codes[1:]]
    return [patient[name] for name in PLAIN] + indicators
