"""Smaller updates: any algorithm, its clients' vectors encoded to bytes and decoded again.

What is counted as sent is the length of the real encoding, and what the server averages is what it decodes. Each
scheme states its error. Buffers and what an algorithm sends beside the vector stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from tacit.data.examples import Examples
from tacit.errors import InputError
from tacit.federated.algorithm import Algorithm, Effort, Extra, Memory, ServerState, Update
from tacit.federated.local.work import LocalSolver

ERROR = "compression.error"
"""The name under which a client remembers what its encodings have left out so far."""


class Scheme(Protocol):
    """How a vector becomes bytes."""

    @property
    def error_feedback(self) -> bool:
        """Whether a client adds what an encoding left out to the vector of its next one."""
        ...

    def encode(self, vector: Tensor, generator: torch.Generator) -> bytes:
        """The encoding of a finite floating-point ``vector`` of shape ``(D,)``."""
        ...

    def nbytes(self, size: int, dtype: torch.dtype) -> int:
        """How long the encoding of ``size`` entries of ``dtype`` is, whatever their values."""
        ...

    def decode(self, encoding: bytes, size: int, dtype: torch.dtype) -> Tensor:
        """The vector of ``size`` entries of ``dtype`` that ``encoding`` stands for.

        Raises:
            CodecError: the bytes are not an encoding of such a vector.
        """
        ...


@dataclass(frozen=True)
class Compressed:
    """``inner`` with its clients' updates compressed by ``scheme``.

    With error feedback (Stich et al. 2018, *Sparsified SGD with Memory*, algorithm 1), client k with the
    remembered error e_k sends c = encode(Δ_k + e_k) and keeps e_k ← Δ_k + e_k − decode(c): what is left out now is
    sent later. An update that is not finite is passed on as it is, for the runtime to leave out; an entry that a
    scheme cannot hold decodes to infinity, with the same consequence.

    Args:
        inner: the algorithm.
        scheme: `Float16`, `StochasticQuantisation` or `TopK`; see `tacit.federated.compression_schemes`.
    """

    inner: Algorithm
    scheme: Scheme

    def init(self, model: nn.Module, clients: int) -> ServerState:
        """See `Algorithm`."""
        return self.inner.init(model, clients)

    def client_update(
        self, state: ServerState, memory: Memory, solver: LocalSolver, examples: Examples, generator: torch.Generator
    ) -> tuple[Update, Memory]:
        """The inner algorithm's update after encoding and decoding; its bytes are those of the encoding.

        Raises:
            InputError: the inner algorithm compresses with error feedback as well.
        """
        inner_memory = {name: tensor for name, tensor in memory.items() if name != ERROR}
        update, inner_memory_now = self.inner.client_update(state, inner_memory, solver, examples, generator)
        if not update.is_finite():
            return update, memory
        if ERROR in inner_memory_now:
            raise InputError("an update is compressed with error feedback twice: wrap the algorithm in one Compressed")
        wanted = update.delta
        if self.scheme.error_feedback and ERROR in memory:
            wanted = wanted + memory[ERROR]
        encoding = self.scheme.encode(wanted, generator)
        sent = self.scheme.decode(encoding, len(wanted), wanted.dtype)
        if self.scheme.error_feedback:
            inner_memory_now = {**inner_memory_now, ERROR: wanted - sent}
        saved = update.delta.nbytes - len(encoding)
        return replace(update, delta=sent, nbytes=update.nbytes - saved), inner_memory_now

    def effort(self, state: ServerState, sizes: Tensor) -> Effort:
        """The inner algorithm's, with the bytes of the encoding."""
        effort = self.inner.effort(state, sizes)
        encoded = self.scheme.nbytes(len(state.parameters), state.parameters.dtype)
        return replace(effort, bytes_up=effort.bytes_up - state.parameters.nbytes + encoded)

    def extras(self, state: ServerState) -> Mapping[str, Extra]:
        """The inner algorithm's, which are not compressed."""
        return self.inner.extras(state)

    def combine(self, updates: Iterable[Update]) -> Update:
        """See `Algorithm`."""
        return self.inner.combine(updates)

    def server_update(self, state: ServerState, mean: Update) -> ServerState:
        """See `Algorithm`."""
        return self.inner.server_update(state, mean)
