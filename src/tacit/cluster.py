"""alice, bob and the crypto provider in this process, and models encrypted to them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from tacit.errors import InputError
from tacit.mpc.correlation import Party, Provider
from tacit.mpc.lockstep import Meter, Tap, Trio
from tacit.mpc.shares import Share, reconstruct, share
from tacit.program.lowering import Context
from tacit.program.rewrite import Model, simplify
from tacit.program.run import Cost, cost_of, execute, load, plan_execution
from tacit.ring.fixed_point import FRACTION_BITS, encode
from tacit.ring.prg import Prg
from tacit.trace import Graph, trace


class Cluster:
    """The three parties, for one process; a context manager.

    Args:
        prg: where all their randomness comes from; the operating system if not given. A fixed one belongs in tests
            only.
        tap: called with every message a computing party sends, to show or test what the other one sees.
    """

    def __init__(self, prg: Prg | None = None, tap: Tap | None = None) -> None:
        self._trio = Trio(prg, tap)
        self._owner = prg.derive("owner") if prg else Prg.fresh()

    @property
    def alice(self) -> Party:
        """The first computing party."""
        return self._trio.alice

    @property
    def bob(self) -> Party:
        """The second computing party, who must not collude with alice."""
        return self._trio.bob

    @property
    def provider(self) -> Provider:
        """The crypto provider, who deals randomness and sees no share of anything."""
        return self._trio.provider

    def encrypt(self, model: nn.Module, example: Tensor, *, context: Context | None = None) -> PrivateModel:
        """Share a model's weights between alice and bob.

        Args:
            model: any module whose operators have an encrypted form, in evaluation mode; it is not changed.
            example: an input batch; its shape after the first dimension is the shape of every later input.
            context: the engine's settings.

        Raises:
            UnsupportedOperator: an operator has no encrypted form; nothing has been dealt or sent.
            InputError: the model cannot be traced.
            RangeError: a weight is not finite, or of magnitude 16,384 or more.
        """
        return PrivateModel(self._trio, self._owner, model, example, context or Context())

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._trio.discard()


def cluster(prg: Prg | None = None, tap: Tap | None = None) -> Cluster:
    """alice, bob and the crypto provider in this process; see `Cluster`."""
    return Cluster(prg, tap)


@dataclass(frozen=True)
class _Program:
    graph: Graph
    cost: Cost


class PrivateModel:
    """A model of which alice and bob hold a share each; calling it runs it on a shared input. Made by
    `Cluster.encrypt`.

    The caller is the client: it shares the input, and alone puts the shares of the result together.
    """

    def __init__(self, trio: Trio, owner: Prg, model: nn.Module, example: Tensor, context: Context) -> None:
        self._trio, self._prg, self._context = trio, owner, context
        self._last: Cost | None = None
        self._name = type(model).__name__
        self._plaintext = copy.deepcopy(model).eval()
        self._item_shape = tuple(example.shape[1:])
        self._programs: dict[tuple[int, ...], _Program] = {}
        self._first_number = len(trio.alice.weights)
        simple = self._trace(_checked(example, self._item_shape))
        self._programs[tuple(example.shape)] = self._plan(simple, tuple(example.shape))
        pairs = {
            name: share(encode(value, what=f"weight {name} of {self._name}"), FRACTION_BITS, owner)
            for name, value in simple.state.items()
        }
        alice, bob = ({name: pair[i] for name, pair in pairs.items()} for i in range(2))
        numbered_from = self._first_number
        self._state = trio.load(load(simple.graph, alice, numbered_from), load(simple.graph, bob, numbered_from))

    def __call__(
        self,
        inputs: Tensor,
        *,
        clock: Callable[[], float] | None = None,
        seen: Callable[[Share, Share], None] | None = None,
    ) -> Tensor:
        """Predict in secret.

        Args:
            inputs: a real batch of any size whose items have the shape of the example's.
            clock: gives seconds, for the computing time of each layer in `counted`.
            seen: called with alice's and bob's share of the input, for demonstrations.

        Returns:
            The model's output as float32, known to the caller alone.

        Raises:
            InputError: wrong shape or dtype.
            RangeError: an input is not finite, or of magnitude 16,384 or more.
        """
        inputs = _checked(inputs, self._item_shape)
        words = encode(inputs)
        program = self._program(tuple(inputs.shape))
        pair = share(words, FRACTION_BITS, self._prg)
        if seen:
            seen(*pair)
        meter = Meter(clock)
        alice, bob = (execute(program.graph, self._state[i], [pair[i]], self._context) for i in range(2))
        results = self._trio.run(alice, bob, meter)
        self._last = cost_of(program.graph, meter)
        return reconstruct(results[0][0], results[1][0]).to(torch.float32)

    def cost(self, shape: Sequence[int] | None = None) -> Cost:
        """What a call costs: planned, not run.

        Args:
            shape: of the input batch; the example's if not given.
        """
        return self._program(tuple(shape) if shape else next(iter(self._programs))).cost

    def counted(self) -> Cost:
        """What the last call cost, as the driver counted it.

        Raises:
            InputError: there has been no call.
        """
        if self._last is None:
            raise InputError("nothing has been counted: call the model first")
        return self._last

    def deal(self, shape: Sequence[int]) -> None:
        """Deal the correlated randomness of the next call on a batch of this shape, ahead of it."""
        self._trio.deal(self._program(tuple(shape)).cost.correlations)

    def _program(self, shape: tuple[int, ...]) -> _Program:
        if shape not in self._programs:
            self._programs[shape] = self._plan(self._trace(torch.zeros(shape)), shape)
        return self._programs[shape]

    def _trace(self, example: Tensor) -> Model:
        return simplify(Model(*trace(self._plaintext, (example,))))

    def _plan(self, simple: Model, shape: tuple[int, ...]) -> _Program:
        shapes = {name: value.shape for name, value in simple.state.items()}
        return _Program(simple.graph, plan_execution(simple.graph, shapes, [shape], self._context, self._first_number))

    def __repr__(self) -> str:
        return f"PrivateModel({self._name}, input {self._item_shape}, shared by alice and bob)"


def _checked(inputs: Any, item_shape: tuple[int, ...]) -> Tensor:
    if not isinstance(inputs, Tensor):
        raise InputError(f"the input is a {type(inputs).__name__}: give a torch.Tensor")
    if inputs.dim() < 1 or tuple(inputs.shape[1:]) != item_shape:
        raise InputError(
            f"the input has shape {tuple(inputs.shape)}: the model takes (n, {', '.join(map(str, item_shape))})"
        )
    if not len(inputs):
        raise InputError("the input is an empty batch: give at least one item")
    if inputs.is_complex() or inputs.dtype == torch.bool:
        raise InputError(f"the input has dtype {inputs.dtype}: give real numbers, for example float32")
    return inputs.detach().to(torch.float32)
