"""ATen operators on shares: one table, which is all that tacit can run.

A lowering takes what the ATen operator takes, with `Share`s (and loaded `Weight`s) in the place of tensors, and a
`Context`. It returns a share, or a protocol where the parties have to exchange something. Products leave their result
at the sum of their operands' scales; whatever comes next truncates on its own opening where it can (`relu`) or on
purpose (`fit`).

Plain tensors among the arguments are public constants. `docs/operators.md` lists the errors, domains and costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tacit.program.lowering import (
    arithmetic,
    backward,
    comparison,
    gradients,
    nonlinear,
    normalisation,
    pooling,
    structure,
)
from tacit.program.lowering.operands import Context

__all__ = ["BIAS_POSITIONS", "FACTOR_POSITIONS", "LOWERINGS", "Context"]

LOWERINGS: dict[str, Callable[..., Any]] = {
    **arithmetic.LOWERINGS,
    **comparison.LOWERINGS,
    **nonlinear.LOWERINGS,
    **normalisation.LOWERINGS,
    **pooling.LOWERINGS,
    **structure.LOWERINGS,
    **backward.LOWERINGS,
    **gradients.LOWERINGS,
}

FACTOR_POSITIONS: dict[str, tuple[int, ...]] = {
    **arithmetic.FACTOR_POSITIONS,
    **normalisation.FACTOR_POSITIONS,
    **structure.FACTOR_POSITIONS,
}
"""Which arguments of an operator enter a product: state tensors there are loaded as weights."""

BIAS_POSITIONS = arithmetic.BIAS_POSITIONS
"""Which arguments of a product are its weight and its bias: where both belong to a model they are loaded together."""
