"""A model as its owner has it in files: a factory in a Python file, weights in safetensors, an example of its input.

The Python file is the owner's own and is run, on the owner's machine alone. Weights and examples are data and nothing
in them is run. Formats that are read by unpickling are refused: those of ``torch.save``, and of ``torch.export.save``,
whose reader gives weights to ``torch.load`` without its restrictions and constants to ``pickle.loads`` wherever the
file asks for it. Whoever wrote such a file runs what they want on the machine that reads it.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tacit import atomic
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


def module(text: str) -> nn.Module:
    """What the function or class that ``FILE.py:NAME`` names makes, when called with nothing.

    Raises:
        InputError: see `factory`; or it cannot be called with nothing, or makes something else than a module.
    """
    make = factory(text)
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise InputError(f"{text} cannot be called without arguments ({error}): give a function that can") from None
    made = make()
    if not isinstance(made, nn.Module):
        raise InputError(f"{text} makes a {type(made).__name__}: give what makes a torch.nn.Module")
    return made


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
        values = array(Path(text))
        return values.float() if values.is_floating_point() else values.long()
    try:
        shape = [int(size) for size in text.split(",")]
    except ValueError:
        shape = [0]
    if min(shape) < 1:
        raise InputError(f"example {text!r}: give a .npy file, or the shape of an item such as 1,28,28")
    return torch.zeros(1, *shape)


def save_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Write weights as safetensors: a file that only this user can read, and never over another one.

    Raises:
        InputError: something is there already, or nothing can be written there.
    """
    try:
        atomic.create(path, save({name: value.contiguous() for name, value in state.items()}), 0o600)
    except FileExistsError:
        raise InputError(f"{path} is there already: choose another name") from None
    except OSError as error:
        raise InputError(f"no weights can be written to {path}: {error.strerror}") from error


def array(path: Path) -> Tensor:
    """The numbers of a ``.npy`` file.

    Raises:
        DataError: the file is missing or damaged, or holds something else than real numbers.
    """
    try:
        found = np.load(path, allow_pickle=False)
        values = torch.from_numpy(found.astype(found.dtype.newbyteorder("="), copy=False))
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a readable .npy array of numbers") from error
    if values.is_complex():
        raise DataError(f"{path} holds complex numbers: give real ones")
    return values


def _refuse_pickled(text: str) -> None:
    if Path(text.partition(":")[0]).suffix.lower() in _PICKLED:
        raise InputError(
            f"{text} is read by unpickling, which runs whatever is in it: give the model as FILE.py:FACTORY and its "
            "weights as safetensors (safetensors.torch.save_file(model.state_dict(), …))"
        )
