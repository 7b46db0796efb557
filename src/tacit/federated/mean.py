"""The mean of a cohort's updates, folded one by one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from tacit.errors import InputError, TooFewUpdates
from tacit.federated.algorithm import Update


def weighted_mean(updates: Iterable[Update]) -> Update:
    """The mean of the updates by their weights; keeps no more than a running mean.

    Floating-point buffers (batch normalisation) become the same mean; other buffers (counters) become their
    maximum; the loss is the mean by examples; examples, bytes, weights and extras add up.

    Raises:
        TooFewUpdates: there is no update.
        InputError: the weights add up to 0.
    """
    remaining = iter(updates)
    first = next(remaining, None)
    if first is None:
        raise TooFewUpdates("there is no update to combine: a round needs at least one client")
    own = replace(first, delta=first.delta.clone())
    del first
    combined = reduce(_fold, remaining, own)
    if not combined.weight > 0:
        raise InputError(f"the weights of the updates add up to {combined.weight}: give at least one client some")
    return combined


def _fold(a: Update, b: Update) -> Update:
    """The weighted mean of two; overwrites the vector of the first."""
    weight, examples = a.weight + b.weight, a.examples + b.examples
    share = b.weight / weight if weight else 0.0

    def mean(x: Tensor, y: Tensor) -> Tensor:
        return torch.lerp(x, y, share) if x.is_floating_point() else torch.maximum(x, y)

    return Update(
        delta=a.delta.lerp_(b.delta, share),
        buffers={name: mean(a.buffers[name], b.buffers[name]) for name in a.buffers},
        examples=examples,
        loss=a.loss + b.examples / examples * (b.loss - a.loss),
        nbytes=a.nbytes + b.nbytes,
        weight=weight,
        extra={name: a.extra[name] + b.extra[name] for name in a.extra},
    )
