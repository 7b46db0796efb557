"""Comparison windows as large as a model's values need, and as fine, found on sample inputs in the clear.

A comparison looks at a window of bits (`tacit.mpc.sign.Window`). Five chunks of 6 bits hold magnitudes up to 16,384,
which few operators need; every chunk less saves 8 dealt bytes a comparison, and computing. What room is left in the
chosen window goes to the fixed-point scale of the operator's result: values that stay below 1/50 can have five
fractional bits more at about the same cost, and values too large for the largest window have fewer. The model's owner,
who holds model and samples in the clear, calibrates once:

>>> calibration = private.calibrate(samples)
>>> private = parties.encrypt(model, example, context=calibration.context(model))
>>> save_model("model.safetensors", model, calibration)      # and load_model, in another program

A calibration belongs to the weights that it was made with, and is refused for any others.

**A value outside its window gives a wrong bit, and nobody is told**: a ReLU passes a negative value or blocks a
positive one, a maximum takes the smaller, and the parties compute on. Nothing that they see differs. So a window is
chosen with a margin, by default four times the largest magnitude among the samples; samples that do not resemble
later inputs make it worthless. An audit with the same context (`tacit.program.audit`) finds values outside their
windows, on whatever inputs the owner has in the clear.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tacit.errors import DataError, InputError, RangeError
from tacit.mpc.sign import MAX_CHUNKS
from tacit.program.audit import interpret, is_padded, largest_compared, window_bound
from tacit.program.lowering import Context
from tacit.program.rewrite import Model
from tacit.ring.fixed_point import FRACTION_BITS
from tacit.trace import Node

VERSION = 2
"""The version of what `Calibration.to_json` writes; others are refused."""
_LARGEST = 2.0**62
"""No word holds more, whatever its scale."""
COARSEST, FINEST = -6, 8
"""By how many fractional bits a result may have fewer or more than 16: products go on with up to 24."""
_SCALED = ("relu", "maximum", "minimum", "max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool2d_relu")
CALIBRATION_KEY = "tacit calibration"
"""Where a safetensors file has it among its metadata."""
_FINGERPRINT = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Range:
    """What one operator compares, and in which window.

    Args:
        name: the node's name, the same in every trace of the model; ``operator`` its ATen operator.
        largest: the largest magnitude among the samples, see `tacit.program.audit.largest_compared`.
        chunks: the window's size, in groups of 6 bits.
        extra: how many fractional bits more than 16 the operator's result and the window have.
    """

    name: str
    operator: str
    largest: float
    chunks: int
    extra: int = 0

    @property
    def bound(self) -> float:
        """The magnitude from which a comparison may be wrong."""
        return window_bound(self.chunks, self.extra)


@dataclass(frozen=True)
class Calibration:
    """The windows and scales of a model's operators.

    The windows and scales become public, as a program is. The rest stays with the owner: the samples' largest
    magnitudes, and the weights' fingerprint, by which a guess at the weights could be confirmed.

    Args:
        margin: how many times the largest magnitude a window holds, where the largest window is not the limit.
        ranges: one for each operator that compares.
        weights: the `fingerprint` of the model.
    """

    margin: float
    ranges: tuple[Range, ...]
    weights: str

    def context(self, model: nn.Module, base: Context | None = None) -> Context:
        """Settings with these windows and scales, otherwise as in ``base``.

        Args:
            model: what will be encrypted with them.
            base: other settings.

        Raises:
            InputError: the model has other weights than those that were calibrated.
        """
        if fingerprint(model) != self.weights:
            raise InputError(
                f"the calibration was made with other weights than this {type(model).__name__} has: calibrate it again"
            )
        windows = {one.name: one.chunks for one in self.ranges}
        return replace(
            base or Context(), windows=windows, finer={one.name: one.extra for one in self.ranges if one.extra}
        )

    def to_json(self) -> str:
        """The calibration as JSON, to be kept beside the model, and as secret."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read what `to_json` wrote.

        Raises:
            DataError: it is not that: no JSON, another version, a key missing, unknown or given twice, a value of
                another type or out of range.
        """
        try:
            content = json.loads(text, object_pairs_hook=_unique, parse_constant=_refused)
        except (ValueError, RecursionError) as error:
            raise DataError(f"the calibration is not JSON as tacit writes it: {error}") from None
        _expect(content, {"version", *(field.name for field in fields(cls))}, "a calibration")
        if type(content["version"]) is not int or content["version"] != VERSION:
            raise DataError(f"the calibration has version {content['version']!r}, this tacit reads {VERSION}")
        if not isinstance(content["ranges"], list) or not _is_number(content["margin"], 1):
            raise DataError("a calibration has a list of ranges, and a margin of 1 or more")
        if not isinstance(content["weights"], str) or not _FINGERPRINT.fullmatch(content["weights"]):
            raise DataError("a calibration names its weights by 64 hexadecimal digits")
        ranges = tuple(_range(item) for item in content["ranges"])
        if len({one.name for one in ranges}) < len(ranges):
            raise DataError("the calibration has two ranges for one operator")
        return cls(float(content["margin"]), ranges, content["weights"])

    def __str__(self) -> str:
        lines = [f"{'operator':<44}{'largest':>12}{'chunks':>8}{'bits':>6}{'bound':>12}{'margin':>10}"]
        for one in self.ranges:
            ratio = one.bound / one.largest if one.largest else math.inf
            name = f"{one.name} ({one.operator})"
            bits = FRACTION_BITS + one.extra
            lines.append(f"{name:<44}{one.largest:>12.4g}{one.chunks:>8}{bits:>6}{one.bound:>12.4g}{ratio:>10.1f}")
        return "\n".join(lines)


def calibrate(
    model: Model, inputs: Sequence[Tensor], context: Context, margin: float = 4.0, weights: str = ""
) -> Calibration:
    """Choose the smallest window for every operator that compares, and the finest scale that it holds.

    Args:
        model: the simplified program and its state, in the clear.
        inputs: sample inputs, float32; the more they resemble later ones, the more the result is worth.
        context: the engine's settings; ``chunks`` is the largest window.
        margin: a window holds this many times the largest magnitude among the samples; 1 or more. Where the largest
            window does not, ReLU, maxima and max-pooling go on with fewer fractional bits, down to 10; the others
            take the largest window.
        weights: the `fingerprint` of the model that ``model`` was traced from.

    Returns:
        The windows and scales; they hold for every batch size.

    Raises:
        InputError: the margin is below 1.
        RangeError: a value among the samples does not fit the largest window.
    """
    if not _is_number(margin, 1):
        raise InputError(f"a margin of {margin} would leave samples outside: 1 or more")
    values = interpret(model, inputs)
    ranges = []
    for node in model.graph.nodes:
        largest = largest_compared(node, values)
        if largest is None:
            continue
        # Samples on which it is always zero say nothing about an operator.
        sizes = (chunks for chunks in range(1, context.chunks) if window_bound(chunks) >= margin * largest > 0)
        chunks = next(sizes, context.chunks)
        extra = _extra(node, chunks, margin * largest)
        if not largest < window_bound(chunks, extra):
            bound = f"the largest window of {context.chunks} chunks holds {window_bound(chunks, extra):.6g}"
            raise RangeError(f"{node.name} ({node.operator}) compares larger values than it can: {bound}")
        ranges.append(Range(node.name, node.operator, largest, chunks, extra))
    return Calibration(float(margin), tuple(ranges), weights)


def _extra(node: Node, chunks: int, largest: float) -> int:
    """How many fractional bits more than 16 an operator can have, or has to have fewer."""
    # Padding stands for one number, at whatever scale; see `tacit.mpc.pooling`.
    if node.operator.partition(".")[2].partition(".")[0] not in _SCALED or not largest or is_padded(node):
        return 0
    fitting = (extra for extra in range(FINEST, COARSEST, -1) if window_bound(chunks, extra) >= largest)
    return next(fitting, COARSEST)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and values of a module's parameters and buffers, in hexadecimal."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_model(path: str | Path, model: nn.Module, calibration: Calibration) -> None:
    """Write a model's weights and its calibration to one safetensors file.

    Args:
        path: of the file; it holds the weights in the clear, for their owner.
        model: the one that was calibrated.
        calibration: goes into the file's metadata, as JSON.

    Raises:
        InputError: the model has other weights than those that were calibrated; nothing has been written.
    """
    calibration.context(model)
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    # Tied weights share memory, which the format does not know.
    state = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    save_file(state, partial, {CALIBRATION_KEY: calibration.to_json()})
    os.replace(partial, path)


def load_model(path: str | Path, model: nn.Module) -> Calibration:
    """Read what `save_model` wrote.

    Args:
        path: of the file.
        model: of the class that was saved; its weights become those of the file.

    Returns:
        The calibration of these weights.

    Raises:
        DataError: the file is missing or damaged, does not fit the model, or holds the calibration of other weights;
            the model is as it was.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(CALIBRATION_KEY)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a readable model: {error}") from error
    if text is None:
        raise DataError(f"{path} holds no calibration: it was not written by save_model")
    calibration, filled = Calibration.from_json(text), copy.deepcopy(model)
    try:
        filled.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(f"{path} does not hold the weights of this {type(model).__name__}") from error
    if fingerprint(filled) != calibration.weights:
        raise DataError(f"{path} holds the calibration of other weights: calibrate again")
    model.load_state_dict(state)
    return calibration


def _range(item: Any) -> Range:
    _expect(item, {field.name for field in fields(Range)}, "a range")
    texts = all(isinstance(item[key], str) and item[key] for key in ("name", "operator"))
    chunks, extra = item["chunks"], item["extra"]
    whole = type(chunks) is int and type(extra) is int
    if not texts or not whole or not 1 <= chunks <= MAX_CHUNKS or not _is_number(item["largest"], 0):
        raise DataError(f"a range has a name, an operator, a largest magnitude and 1 to {MAX_CHUNKS} chunks")
    if not COARSEST <= extra <= FINEST:
        raise DataError(f"a range has {COARSEST} to {FINEST} fractional bits more than {FRACTION_BITS}")
    return Range(item["name"], item["operator"], float(item["largest"]), chunks, extra)


def _expect(content: Any, keys: set[str], what: str) -> None:
    if not isinstance(content, dict) or content.keys() != keys:
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{what} has the keys {sorted(keys)}, not {found}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key is given twice")
    return content


def _refused(constant: str) -> float:
    raise ValueError(f"{constant} is not a number")


def _is_number(value: Any, least: float) -> bool:
    return type(value) in (int, float) and least <= value < _LARGEST
