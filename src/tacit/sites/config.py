"""site.toml: what a site has, and what it allows; it never leaves the site.

::

    name = "cleveland"                  # as in federation.toml
    federation = "federation.toml"      # who coordinates, and who else takes part
    identity = "cleveland.key"          # made by `tacit keys new cleveland`
    state = "cleveland.state"           # folder for the journal, the privacy ledger and what algorithms remember

    [data]
    format = "csv"
    path = "heart.csv"
    target = "num"

    [allow]
    models = ["logistic", "mlp"]
    privacy = "record"
    epsilon = 8.0

`docs/deploy/federation.md` documents every key.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import torch

from tacit import toml_file
from tacit.data.examples import Examples
from tacit.data.partition import stratified
from tacit.data.tables import Table, read_csv, read_idx, read_numpy, read_parquet
from tacit.errors import DataError, InputError
from tacit.federated.eligibility import Eligibility

_DOCUMENTATION = "docs/deploy/federation.md"
Disclosure = Literal["epsilon", "metrics", "examples"]
Unnoised = Literal["features", "evaluation"]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the file."""


class _Data(_Section, kw_only=True, frozen=True):
    training: float = 1.0


class CsvData(_Data, tag="csv", tag_field="format", kw_only=True, frozen=True):
    """A CSV file; the keys are those of `Table`."""

    path: str
    target: str
    columns: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    missing: str = ""
    categories: Mapping[str, tuple[float, ...]] = msgspec.field(default_factory=dict)
    classes: tuple[str, ...] = ()
    above: float | None = None

    @property
    def table(self) -> Table:
        """How its rows become examples."""
        return Table(
            self.target,
            self.columns,
            self.features,
            self.drop,
            self.missing,
            self.categories,
            self.classes,
            self.above,
        )


class ParquetData(CsvData, tag="parquet", tag_field="format", kw_only=True, frozen=True):
    """A Parquet file; likewise."""


class IdxData(_Data, tag="idx", tag_field="format", kw_only=True, frozen=True):
    """Two gzip-compressed IDX files."""

    inputs: str
    targets: str


class NumpyData(_Data, tag="numpy", tag_field="format", kw_only=True, frozen=True):
    """Two ``.npy`` files."""

    inputs: str
    targets: str


class OwnData(_Data, tag="own", tag_field="format", kw_only=True, frozen=True):
    """``FILE.py:FUNCTION``: a loader of the site's own."""

    loader: str


class Allow(_Section, frozen=True):
    """What the site agrees to.

    Args:
        models: names of models that may be trained; ``FILE.py:FACTORY`` for one whose code lies beside site.toml.
        minimum: the fewest sites in a sum.
        clear: whether the coordinator may see this site's own update, where a run has no secure sum.
        privacy: the least protection of its records: ``"record"``: noise that the site adds itself; ``"distributed"``:
            that or noise that all sites add together; ``"central"``: those or noise that the coordinator adds; or
            ``"none"``.
        epsilon, delta: the site's own privacy budget for its records, over all runs; ``epsilon`` may be left out.
        hours, idle, charging, unmetered, battery: when it takes part, see `Eligibility`.
        disclose: what it tells the coordinator of itself.
        rounds: the most rounds of a run.
        unnoised: which secure sums that carry no noise, and that no ε counts, its records may enter where they are to
            be protected: ``"features"``: the moments of its features, to standardise by; ``"evaluation"``: how the
            model does on what it keeps back.
    """

    models: tuple[str, ...] = ("logistic", "mlp", "2nn", "cnn", "lenet")
    minimum: int = 3
    clear: bool = False
    privacy: Literal["record", "distributed", "central", "none"] = "record"
    epsilon: float | None = None
    delta: float = 1e-5
    hours: tuple[float, float] | None = None
    idle: bool = False
    charging: bool = False
    unmetered: bool = False
    battery: float = 0.0
    disclose: tuple[Disclosure, ...] = ("epsilon",)
    rounds: int = 1000
    unnoised: tuple[Unnoised, ...] = ("evaluation",)

    @property
    def eligibility(self) -> Eligibility:
        """When the site takes part."""
        return Eligibility(self.idle, self.charging, self.unmetered, self.hours, self.battery)


class _File(_Section, frozen=True):
    name: str
    federation: str
    identity: str
    state: str
    data: CsvData | ParquetData | IdxData | NumpyData | OwnData
    allow: Allow = Allow()


@dataclass(frozen=True)
class SiteFile:
    """What site.toml says; all paths are absolute.

    Args:
        name: of the site.
        federation, identity, state: files, and a folder.
        data: where its data is.
        allow: what it agrees to.
        folder: where the file is.
    """

    name: str
    federation: Path
    identity: Path
    state: Path
    data: CsvData | ParquetData | IdxData | NumpyData | OwnData
    allow: Allow
    folder: Path

    @classmethod
    def read(cls, path: Path) -> SiteFile:
        """The file at a path.

        Raises:
            InputError: it cannot be read, or says what it cannot.
        """
        tables = toml_file.tables(toml_file.read(path), str(path))
        parsed = toml_file.typed(tables, _File, "", str(path), _DOCUMENTATION)
        allow, folder = parsed.allow, path.absolute().parent
        if allow.minimum < 3:
            raise InputError(
                f"{path}: allow.minimum={allow.minimum}: a sum of fewer than 3 tells one site another's vector"
            )
        if not 0 < parsed.data.training <= 1:
            raise InputError(f"{path}: data.training={parsed.data.training}: train on a fraction above 0, up to 1")
        allow.eligibility  # noqa: B018 -- refuses hours that cannot be
        return cls(
            parsed.name,
            folder / parsed.federation,
            folder / parsed.identity,
            folder / parsed.state,
            parsed.data,
            allow,
            folder,
        )

    def examples(self) -> tuple[Examples, Examples]:
        """The site's examples to train on, and those that it keeps back.

        Which are kept back is always the same: drawn class by class from a fixed seed.

        Raises:
            DataError: they cannot be read, or are damaged; the message names file, line and column.
        """
        everything = self._load()
        if not len(everything):
            raise DataError(f"{self.folder}: there are no examples in the site's data")
        generator = torch.Generator().manual_seed(0)
        train, kept = stratified(everything.targets, self.data.training, generator)
        return everything.subset(train), everything.subset(kept)

    def _load(self) -> Examples:
        match self.data:
            case ParquetData() as data:
                return read_parquet(self.folder / data.path, data.table)
            case CsvData() as data:
                return read_csv(self.folder / data.path, data.table)
            case IdxData(inputs=inputs, targets=targets):
                return read_idx(self.folder / inputs, self.folder / targets)
            case NumpyData(inputs=inputs, targets=targets):
                return read_numpy(self.folder / inputs, self.folder / targets)
            case OwnData(loader=loader):
                return _own(self.folder, loader)


def _own(folder: Path, loader: str) -> Examples:
    """What a loader in a file of the site's own gives."""
    file, _, function = loader.rpartition(":")
    path = folder / file
    specification = importlib.util.spec_from_file_location("tacit_site_loader", path)
    if specification is None or specification.loader is None or not path.is_file():
        raise InputError(f"data.loader names {path}, which is not a Python file: give FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    load = getattr(module, function, None)
    if not callable(load):
        raise InputError(f"{path} has no function {function!r}")
    made = load(folder)
    if not isinstance(made, Examples):
        raise DataError(f"{loader} gives a {type(made).__name__}: a loader gives tacit.data.examples.Examples")
    return made
