"""A model as its owner has it in files: a factory in a Python file, weights in safetensors, an example of its input.

The Python file is the owner's own and is run, on the owner's machine alone. Weights and examples are data and nothing
in them is run. Formats that are read by unpickling are refused: those of ``torch.save``, and of ``torch.export.save``,
whose reader gives weights to ``torch.load`` without its restrictions and constants to ``pickle.loads`` wherever the
file asks for it. Whoever wrote such a file runs what they want on the machine that reads it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tacit.errors import DataError, InputError
from tacit.program.calibrate import CALIBRATION_KEY, Calibration, load_model

_PICKLED = (".pt", ".pt2", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")


def factory(text: str) -> Callable[[], nn.Module]:
    """The function or class that ``FILE.py:NAME`` names; the file is run.

    Raises:
        InputError: there is no such file or name.
    """
    _refuse_pickled(text)
    file, _, name = text.rpartition(":")
    path = Path(file)
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.suffix == ".py" else None
    if not path.is_file() or spec is None or spec.loader is None:
        raise InputError(f"{text!r} is no model: give FILE.py:FACTORY, where FACTORY() makes the module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[[], nn.Module] | None = getattr(module, name, None)
    if not callable(found):
        raise InputError(f"{path} has no function or class {name!r} that makes a model")
    return found


def load_weights(module: nn.Module, path: Path) -> Calibration | None:
    """Give a module the weights of a safetensors file, all of them.

    Returns:
        The calibration that the file holds, if it holds one.

    Raises:
        DataError: the file is missing or damaged, or does not hold the weights of this module.
        InputError: it is of a format that is read by unpickling.
    """
    _refuse_pickled(str(path))
    try:
        with safe_open(path, framework="pt") as file:
            calibrated = CALIBRATION_KEY in (file.metadata() or {})
            state = {} if calibrated else {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a readable safetensors file: {error}") from error
    if calibrated:
        return load_model(path, module)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        why = " ".join(str(error).split())
        raise DataError(f"{path} does not hold the weights of this {type(module).__name__}: {why}") from None
    return None


def example(text: str) -> Tensor:
    """An example batch: a ``.npy`` file that holds one, or the shape of an item of real numbers, such as ``1,28,28``.

    Raises:
        InputError: it is neither.
        DataError: the file is damaged, or holds something else than numbers.
    """
    _refuse_pickled(text)
    if text.endswith(".npy"):
        try:
            values = torch.from_numpy(np.load(text, allow_pickle=False))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{text} is not a readable array of numbers: {error}") from error
        return values.float() if values.is_floating_point() else values.long()
    try:
        shape = [int(size) for size in text.split(",")]
    except ValueError:
        shape = [0]
    if min(shape) < 1:
        raise InputError(f"example {text!r}: give a .npy file, or the shape of an item such as 1,28,28")
    return torch.zeros(1, *shape)


def _refuse_pickled(text: str) -> None:
    if Path(text.partition(":")[0]).suffix.lower() in _PICKLED:
        raise InputError(
            f"{text} is read by unpickling, which runs whatever is in it: give the model as FILE.py:FACTORY and its "
            "weights as safetensors (safetensors.torch.save_file(model.state_dict(), …))"
        )
