"""Personal layers: part of the network stays at each client.

FedPer (Arivazhagan et al. 2019, *Federated Learning with Personalization Layers*) keeps the last layers personal;
FedBN (Li et al. 2021, *FedBN: Federated Learning on Non-IID Features via Local Batch Normalization*, ICLR) the batch
normalisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tacit.data.examples import Examples
from tacit.errors import InputError
from tacit.federated.algorithm import Algorithm, Effort, Extra, Memory, ServerState, Update
from tacit.federated.fedavg import FedAvg
from tacit.federated.layout import Layout, trainable_parameters
from tacit.federated.local.work import LocalSolver


@runtime_checkable
class Personalised(Protocol):
    """An algorithm that gives every client a model of its own."""

    def personalise(self, state: ServerState, memory: Memory, layout: Layout) -> ServerState:
        """What a client uses in place of the global model: parameters of ``layout``, the whole model's."""
        ...


def personalised(algorithm: Algorithm) -> Personalised | None:
    """``algorithm``, or what it wraps as its ``inner``, if that gives every client a model of its own."""
    while not isinstance(algorithm, Personalised):
        if (inner := getattr(algorithm, "inner", None)) is None:
            return None
        algorithm = inner
    return algorithm


@dataclass(frozen=True)
class PersonalLayers:
    """Federated averaging of all layers but some.

    A client trains the whole network from the global layers and its own personal ones; it sends, and the server
    averages, the global ones only. Their parameters and buffers never leave the client, and count as no bytes.
    What the server knows of them are their initial values. FedPer::

        PersonalLayers(FedAvg(lr=0.05), layers=("4",))          # the last layer, by its name in the model

    FedBN::

        PersonalLayers(FedAvg(lr=0.05), layers=batch_norm_layers(model))

    The global model that a run ends with has the initial values in these layers: judge and use it with a client's
    own (`personalise`).

    Args:
        averaging: how the clients train, and how the server combines the global layers: `FedAvg` or a kind of it
            that sends nothing else (so not SCAFFOLD).
        layers: names of modules (all within), of trainable parameters or of buffers.

    Raises:
        InputError: no layer is given.
    """

    averaging: FedAvg = field(default_factory=FedAvg)
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.layers:
            raise InputError("layers=(): name at least one layer to keep at the clients, or use FedAvg itself")

    def init(self, model: nn.Module, clients: int) -> ServerState:
        """The state before the first round, of the global layers.

        Raises:
            InputError: a layer is not in the model, or no global layer is left to train, or ``averaging`` sends more
                than a model.
        """
        tensors = trainable_parameters(model) | dict(model.named_buffers())
        for layer in self.layers:
            if not any(_within(name, layer) for name in tensors):
                raise InputError(
                    f"layers={layer!r}: the model has no such layer to train; there are {', '.join(tensors)}"
                )
        with _frozen(parameter for name, parameter in trainable_parameters(model).items() if self._is_personal(name)):
            state = self.averaging.init(model, clients)
        if state.shared:
            raise InputError(
                f"{self.averaging} sends {', '.join(state.shared)} for the whole model: use FedAvg or FedProx"
            )
        resident = {name: value.detach().clone() for name, value in tensors.items() if self._is_personal(name)}
        _, buffers = self._split(state.buffers)
        return replace(state, buffers=buffers, resident=resident)

    def client_update(
        self, state: ServerState, memory: Memory, solver: LocalSolver, examples: Examples, generator: torch.Generator
    ) -> tuple[Update, Memory]:
        """Train the whole network; send the global layers, remember the personal ones."""
        whole = self.personalise(state, memory, solver.layout)
        result = solver(self.averaging.work(whole, examples, generator))
        own, sent = self._split(solver.layout.views(result.parameters))
        own_buffers, sent_buffers = self._split(result.buffers)
        shared = replace(result, parameters=state.layout.flatten(sent), buffers=sent_buffers)
        remembered = {name: value.clone() for name, value in own.items()} | own_buffers
        return self.averaging.sent(state, shared, len(examples)), remembered

    def personalise(self, state: ServerState, memory: Memory, layout: Layout) -> ServerState:
        """The global layers and a client's own; before its first round, those of the initial model."""
        own = {name: memory.get(name, initial) for name, initial in state.resident.items()}
        tensors = {**state.layout.views(state.parameters), **own}
        personal_buffers = {name: value for name, value in own.items() if name not in layout.names}
        return replace(
            state, layout=layout, parameters=layout.flatten(tensors), buffers={**state.buffers, **personal_buffers}
        )

    def effort(self, state: ServerState, sizes: Tensor) -> Effort:
        """That of the inner algorithm, for the bytes of the global layers."""
        return self.averaging.effort(state, sizes)

    def extras(self, state: ServerState) -> Mapping[str, Extra]:
        """Those of the inner algorithm."""
        return self.averaging.extras(state)

    def combine(self, updates: Iterable[Update]) -> Update:
        """The mean of the global layers' updates."""
        return self.averaging.combine(updates)

    def server_update(self, state: ServerState, mean: Update) -> ServerState:
        """The server optimizer's step of the global layers."""
        return self.averaging.server_update(state, mean)

    def _is_personal(self, name: str) -> bool:
        return any(_within(name, layer) for layer in self.layers)

    def _split(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The personal ones, and the others."""
        own = {name: value for name, value in tensors.items() if self._is_personal(name)}
        return own, {name: value for name, value in tensors.items() if name not in own}


def batch_norm_layers(model: nn.Module) -> tuple[str, ...]:
    """The names of the batch normalisation layers of ``model``, for FedBN.

    Raises:
        InputError: there is none.
    """
    names = tuple(name for name, module in model.named_modules() if isinstance(module, _BatchNorm))
    if not names:
        raise InputError("the model has no batch normalisation to keep at the clients: FedBN is of no use here")
    return names


def _within(name: str, layer: str) -> bool:
    return name == layer or name.startswith(f"{layer}.")


@contextmanager
def _frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Without gradients meanwhile, so that layouts leave them out."""
    held = list(parameters)
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)
