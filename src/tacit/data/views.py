"""Clients' examples as index views over one data set: what a client holds is copied when it is its turn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload

import torch
from torch import Tensor

from tacit.data.examples import Examples
from tacit.errors import InputError


class ClientViews(Sequence[Examples]):
    """The examples of every client, taken from one data set by index.

    A client costs its indices, 4 bytes each below 2^31 examples, and 8 bytes more; a data set that many clients share
    is held once. ``views[k]`` copies the rows of client ``k``.

    Args:
        examples: the data set; not copied.
        parts: the indices of each client's examples, int64 of shape ``(n_k,)``, in the order of the clients.

    Raises:
        InputError: there is no client, or an index is not one of the data set.
    """

    def __init__(self, examples: Examples, parts: Iterable[Tensor]) -> None:
        pieces = list(parts)
        if not pieces:
            raise InputError("parts: give the indices of at least one client")
        sizes = torch.tensor([len(piece) for piece in pieces])
        self._init(examples, torch.cat(pieces), sizes)

    @classmethod
    def of_sizes(cls, examples: Examples, indices: Tensor, sizes: Tensor) -> ClientViews:
        """Views from all the clients' indices one after another, and how many each has (int64, shape ``(N,)``).

        Raises:
            InputError: there is no client, the sizes do not add up, or an index is not one of the data set.
        """
        views = cls.__new__(cls)
        views._init(examples, indices, sizes)
        return views

    def _init(self, examples: Examples, indices: Tensor, sizes: Tensor) -> None:
        if not len(sizes) or int(sizes.min()) < 0 or int(sizes.sum()) != len(indices):
            raise InputError(
                f"sizes: {len(sizes)} clients hold {int(sizes.sum())} examples; {len(indices)} indices are given"
            )
        if len(indices) and not (int(indices.min()) >= 0 and int(indices.max()) < len(examples)):
            span = f"{int(indices.min())} to {int(indices.max())}"
            raise InputError(f"indices from {span}: the data set has examples 0 to {len(examples) - 1}")
        self.examples = examples
        self._indices = indices.to(torch.int32 if len(examples) < 2**31 else torch.int64)
        self._ends = sizes.cumsum(0)

    def __len__(self) -> int:
        return len(self._ends)

    def sizes(self) -> Tensor:
        """How many examples each client has: int64 of shape ``(N,)``."""
        return self._ends.diff(prepend=self._ends.new_zeros(1))

    def indices(self, client: int) -> Tensor:
        """Which examples of the data set are the client's: int64 of shape ``(n_k,)``."""
        if not -len(self) <= client < len(self):
            raise IndexError(f"client {client} of {len(self)}")
        client %= len(self)
        start = int(self._ends[client - 1]) if client else 0
        return self._indices[start : int(self._ends[client])].long()

    @overload
    def __getitem__(self, client: int) -> Examples: ...

    @overload
    def __getitem__(self, client: slice) -> list[Examples]: ...

    def __getitem__(self, client: int | slice) -> Examples | list[Examples]:
        if isinstance(client, slice):
            return [self[k] for k in range(*client.indices(len(self)))]
        return self.examples.subset(self.indices(client))
