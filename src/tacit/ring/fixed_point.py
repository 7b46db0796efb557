"""Real numbers as ring elements: x is held as round(x * 2^bits) in Z/2^64.

One word carries 16 fractional bits unless a value says otherwise. Comparison on shares looks at a window of 31 bits, so
encoding accepts magnitudes below 2^(30 - bits): 16,384 at 16 bits. A value outside is an error here, never a silent
wrap-around.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tacit.errors import InputError, RangeError

FRACTION_BITS = 16
MAGNITUDE_BITS = 30


def encode(values: Tensor, bits: int = FRACTION_BITS, *, what: str = "input") -> Tensor:
    """Round real numbers to the nearest multiple of 2^-bits.

    Args:
        values: real tensor (floating, integer or bool), any shape.
        bits: fractional bits, in [0, 30].
        what: how an error calls the tensor.

    Returns:
        int64 of the same shape, each within half a unit of ``values * 2^bits``.

    Raises:
        InputError: the dtype is not real.
        RangeError: a value is not finite, or its magnitude is 2^(30 - bits) or more.
    """
    if values.is_complex() or values.is_quantized:
        raise InputError(f"{what} has dtype {values.dtype}: only real dtypes can be encoded, convert it to float32")
    scaled = values.detach().to(torch.float64) * 2.0**bits
    if not scaled.is_meta and not bool((scaled.abs() < 2.0**MAGNITUDE_BITS).all()):
        if not bool(torch.isfinite(scaled).all()):
            raise RangeError(f"{what} holds NaN or infinity: only finite numbers can be encoded")
        limit = 2.0 ** (MAGNITUDE_BITS - bits)
        raise RangeError(f"{what} holds a value outside ±{limit:g}, the range at {bits} fractional bits: rescale it")
    return scaled.round_().to(torch.int64)


def decode(words: Tensor, bits: int) -> Tensor:
    """The real numbers that int64 ``words`` stand for at ``bits`` fractional bits, as float64 of the same shape."""
    return words.to(torch.float64) * 2.0**-bits
