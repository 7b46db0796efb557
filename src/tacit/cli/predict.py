"""``tacit predict``: ask a model that alice and bob serve, without either of them seeing the question or the answer."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tacit.errors import DataError, InputError
from tacit.party import sources
from tacit.party.client import TIMEOUT_S
from tacit.party.connection import connect
from tacit.party.local import CLUSTER
from tacit.program.inputs import ModelInput

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp")
_ARRAYS = (".npy", ".csv")
_SHOWN = 10


def predict(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    file: Annotated[
        Path,
        typer.Argument(
            help="A picture, which is scaled to the model's size and to numbers from 0 to 1; a .npy array of one item "
            "or several; or a .csv with one item a line."
        ),
    ],
    key: Annotated[Path, typer.Option(help="The client's key file.")],
    config: Annotated[Path, typer.Option(help="Everybody's cluster.toml.")] = Path(CLUSTER),
    timeout: Annotated[float, typer.Option(help="Seconds after which the answer is of no more use.")] = TIMEOUT_S,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outputs as one JSON object.")] = False,
) -> None:
    """Ask a model. The input becomes two shares on this machine; the answer is put together here, and nowhere else."""
    _require_readable(file)
    with connect(config, key) as parties:
        model = parties.model(name)
        inputs = model.description.inputs
        if len(inputs) != 1:
            raise InputError(f"{name} takes {len(inputs)} inputs: ask it from Python, with tacit.connect")
        outputs = model(read_items(file, inputs[0]), timeout=timeout)
    results = outputs if isinstance(outputs, tuple) else (outputs,)
    if as_json:
        print(json.dumps({"model": name, "outputs": [one.tolist() for one in results]}))
        return
    Console(soft_wrap=True).print(_table(results[0]))


def read_items(path: Path, wanted: ModelInput) -> Tensor:
    """A batch for a model from a file.

    Raises:
        InputError: the file's kind is unknown, or what it holds does not fit the model.
        DataError: it cannot be read.
    """
    _require_readable(path)
    suffix = path.suffix.lower()
    if suffix in _IMAGES:
        return _image(path, wanted.item_shape)
    return _fitted(sources.array(path) if suffix == ".npy" else _lines(path), wanted, path)


def _require_readable(path: Path) -> None:
    if path.suffix.lower() not in (*_IMAGES, *_ARRAYS):
        raise InputError(f"{path} is none of the files that can be asked about: {', '.join((*_IMAGES, *_ARRAYS))}")
    if not path.is_file():
        raise DataError(f"there is no file {path}")


def _lines(path: Path) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an empty file, which is said in other words
            return torch.from_numpy(np.loadtxt(path, delimiter=",", ndmin=2, encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        why = str(error).partition(";")[0]
        raise DataError(f"{path} is not a table of numbers with commas between them: {why}") from error


def _fitted(values: Tensor, wanted: ModelInput, path: Path) -> Tensor:
    """The numbers as a batch of items; dimensions of 1 may be missing, and an item may be one row of numbers."""
    item, given = wanted.item_shape, tuple(values.shape)
    size = torch.Size(item).numel()
    fitting = {item, (size,), tuple(one for one in item if one != 1)}
    if not values.numel():
        raise InputError(f"{path} holds no numbers: give at least one item")
    if given not in fitting and given[1:] not in fitting:
        raise InputError(
            f"{path} holds numbers of shape {given}: the model takes items of shape {item}, or of {size} numbers in a "
            "row, one or several"
        )
    if wanted.whole and values.is_floating_point() and bool((values != values.round()).any()):
        raise InputError(f"{path} holds numbers that are not whole: the model takes whole ones, such as indices")
    return values.to(wanted.dtype).reshape(-1, *item)


def _image(path: Path, shape: tuple[int, ...]) -> Tensor:
    """An image at the model's size, in [0, 1]."""
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise InputError(f"{path} is a picture, and the model takes items of shape {shape}: give a .npy or a .csv")
    try:
        from PIL import Image  # noqa: PLC0415 -- comes with tacit[demo]
    except ImportError:
        raise InputError("reading pictures takes Pillow: pip install 'tacit[demo]', or give a .npy") from None
    try:
        with Image.open(path) as opened:
            image = opened.convert("L" if shape[0] == 1 else "RGB").resize((shape[2], shape[1]))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is not a readable picture") from error
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32).copy() / 255)
    return pixels.reshape(1, shape[1], shape[2], shape[0]).permute(0, 3, 1, 2).contiguous()


def _table(output: Tensor) -> Table:
    table = Table(caption="known to this client alone")
    rows = output.reshape(len(output), -1)
    for heading in ("item", "largest at", "outputs"):
        table.add_column(heading)
    for number, row in enumerate(rows):
        more = " …" if len(row) > _SHOWN else ""
        values = " ".join(f"{value:.4g}" for value in row[:_SHOWN].tolist())
        table.add_row(str(number), str(int(row.argmax())), values + more)
    return table
