"""``tacit predict``: ask a model that alice and bob serve, without either of them seeing the question or the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tacit.errors import DataError, InputError
from tacit.party.client import TIMEOUT_S
from tacit.party.connection import connect
from tacit.party.local import CLUSTER
from tacit.program.inputs import ModelInput

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp")
_SHOWN = 10


def predict(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    file: Annotated[Path, typer.Argument(help="An image, a .npy array, or a .csv with one item a line.")],
    key: Annotated[Path, typer.Option(help="The client's key file.")],
    config: Annotated[Path, typer.Option(help="Everybody's cluster.toml.")] = Path(CLUSTER),
    timeout: Annotated[float, typer.Option(help="Seconds after which the answer is of no more use.")] = TIMEOUT_S,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outputs as one JSON object.")] = False,
) -> None:
    """Ask a model. The input becomes two shares on this machine; the answer is put together here, and nowhere else."""
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
    suffix = path.suffix.lower()
    try:
        if suffix in _IMAGES:
            return _image(path, wanted.item_shape)
        if suffix == ".npy":
            values = torch.from_numpy(np.load(path, allow_pickle=False))
        elif suffix == ".csv":
            values = torch.from_numpy(np.loadtxt(path, delimiter=",", ndmin=2))
        else:
            raise InputError(f"{path}: give an image ({', '.join(_IMAGES)}), a .npy array or a .csv")
    except InputError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    size = torch.Size(wanted.item_shape).numel()
    if not values.numel() or values.numel() % size:
        raise InputError(f"{path} holds {values.numel()} numbers: the model takes items of {tuple(wanted.item_shape)}")
    return values.to(wanted.dtype).reshape(-1, *wanted.item_shape)


def _image(path: Path, shape: tuple[int, ...]) -> Tensor:
    """An image at the model's size, in [0, 1]."""
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise InputError(f"the model takes items of {shape}, which are no images: give a .npy or a .csv")
    try:
        from PIL import Image  # noqa: PLC0415 -- comes with tacit[demo]
    except ImportError:
        raise InputError("reading images takes Pillow: pip install 'tacit[demo]', or give a .npy") from None
    with Image.open(path) as opened:
        image = opened.convert("L" if shape[0] == 1 else "RGB").resize((shape[2], shape[1]))
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
