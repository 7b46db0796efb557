"""alice, bob and the crypto provider in this process, and models encrypted to them."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tacit.errors import InputError
from tacit.mpc.correlation import Party, Provider
from tacit.mpc.linear import Weight
from tacit.mpc.lockstep import Dealt, Meter, Tap, Trio
from tacit.mpc.shares import Share, reconstruct, share
from tacit.program.audit import Audit, audit
from tacit.program.calibrate import Calibration, calibrate, fingerprint
from tacit.program.inputs import ModelInput, checked_inputs
from tacit.program.lowering import Context
from tacit.program.optimizers import Optimizer, Sgd
from tacit.program.rewrite import Model, simplify
from tacit.program.run import Cost, cost_of, execute, load, plan_execution
from tacit.program.training import Trainer
from tacit.ring.fixed_point import FRACTION_BITS, encode
from tacit.ring.prg import Prg
from tacit.trace import trace


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

    def encrypt(
        self, model: nn.Module, example: Tensor | Sequence[Tensor], *, context: Context | None = None
    ) -> PrivateModel:
        """Share a model's weights between alice and bob.

        Args:
            model: any module whose operators have an encrypted form, in evaluation mode; it is not changed, and what
                changes in it later does not change what has been shared.
            example: an input batch, or one for each of the model's inputs; its shape after the first dimension is the
                shape of every later input, and whole numbers say that these will be whole too.
            context: the engine's settings.

        Raises:
            UnsupportedOperator: an operator has no encrypted form; nothing has been dealt or sent.
            InputError: the model cannot be traced.
            RangeError: a weight is not finite, or of magnitude 16,384 or more.
        """
        examples = (example,) if isinstance(example, Tensor) else tuple(example)
        return PrivateModel(self._trio, self._owner, model, examples, context or Context())

    def trainer(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
        *,
        optimizer: Optimizer | None = None,
        context: Context | None = None,
        **settings: Any,
    ) -> Trainer:
        """Share a model's weights between alice and bob, to train them in secret.

        Args:
            model: any module whose operators and their gradients have an encrypted form; trained in the mode that it is
                in, and not changed.
            loss: of the model's output and the labels, as a number.
            optimizer: `tacit.program.optimizers.Sgd` or `Adam`; SGD if not given.
            context: the engine's settings.
            settings: of SGD, where no optimizer is given: ``lr``, ``momentum``, ``weight_decay``, ``nesterov``.

        Raises:
            InputError: the model has nothing to train, a setting is out of range, or the context asks for exact mode or
                calibrated windows, which training has not.
            RangeError: a weight is not finite, or of magnitude 64 or more.
        """
        if optimizer is not None and settings:
            raise InputError(f"{', '.join(settings)}: settings belong to the optimizer that is given")
        return Trainer(self._trio, self._owner, model, loss, optimizer or Sgd(**settings), context or Context())

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing outlives the cluster but what the caller holds of it."""


def cluster(prg: Prg | None = None, tap: Tap | None = None) -> Cluster:
    """alice, bob and the crypto provider in this process; see `Cluster`."""
    return Cluster(prg, tap)


Loaded = tuple[dict[str, Share | Weight], dict[str, Share | Weight]]
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Program:
    """The model for one shape of each input: its graph, its state at alice and at bob, and what a run costs."""

    simple: Model
    loaded: Loaded
    cost: Cost
    first_number: int


class PrivateModel:
    """A model of which alice and bob hold a share each; calling it runs it on shared inputs.

    Made by `Cluster.encrypt`. The caller is the client: it shares the inputs, and alone puts the shares of the result
    together.
    """

    def __init__(
        self, trio: Trio, owner: Prg, model: nn.Module, examples: tuple[Tensor, ...], context: Context
    ) -> None:
        self._trio, self._prg, self._context = trio, owner, context
        self._plaintext = copy.deepcopy(model).eval()
        self._name = type(model).__name__
        self._inputs = tuple(ModelInput.of(example) for example in examples)
        self._programs: dict[Shapes, _Program] = {}
        self._dealt: dict[Shapes, deque[Dealt]] = {}
        self._last: Cost | None = None
        for name, value in self._plaintext.state_dict().items():
            if value.is_floating_point():  # a batch norm counts its batches, and nothing takes the count
                encode(value, what=f"{name} of {self._name}")
        self._program(tuple(tuple(example.shape) for example in self._checked(examples)))

    def __call__(
        self,
        *inputs: Tensor,
        clock: Callable[[], float] | None = None,
        seen: Callable[[Share, Share], None] | None = None,
    ) -> Any:
        """Predict in secret.

        Args:
            inputs: a real batch of any size for each of the model's inputs, items shaped as the example's.
            clock: gives seconds, for the computing time of each layer in `counted`.
            seen: called with alice's and bob's share of every input, for demonstrations.

        Returns:
            The model's output as float32, a tuple where it has several, known to the caller alone.

        Raises:
            InputError: wrong number of inputs, shape or dtype.
            RangeError: an input is not finite, or of magnitude 16,384 or more.
        """
        given = self._checked(inputs)
        words, shapes = [encode(value) for value in given], tuple(tuple(value.shape) for value in given)
        program = self._program(shapes)
        pairs = [share(value, FRACTION_BITS, self._prg) for value in words]
        for pair in pairs if seen else ():
            seen(*pair)  # type: ignore[misc]
        waiting = self._dealt.get(shapes)
        meter = Meter(clock)
        alice, bob = (
            execute(program.simple.graph, program.loaded[i], [pair[i] for pair in pairs], self._context)
            for i in range(2)
        )
        results = self._trio.run(alice, bob, meter, waiting.popleft() if waiting else None)
        self._last = cost_of(program.simple.graph, meter)
        outputs = tuple(reconstruct(*shares).to(torch.float32) for shares in zip(*results, strict=True))
        return outputs if len(outputs) > 1 else outputs[0]

    def cost(self, *shapes: Sequence[int]) -> Cost:
        """What a call costs: planned, not run.

        Args:
            shapes: of the batch for each of the model's inputs; the examples' if none are given.
        """
        return self._program(_shapes(shapes) if shapes else next(iter(self._programs))).cost

    def counted(self) -> Cost:
        """What the last call cost, as the driver counted it.

        Raises:
            InputError: there has been no call.
        """
        if self._last is None:
            raise InputError("nothing has been counted: call the model first")
        return self._last

    def deal(self, *shapes: Sequence[int]) -> None:
        """Deal the correlated randomness of one later call on batches of these shapes, ahead of it."""
        dealt = self._trio.deal(self.cost(*shapes).correlations)
        self._dealt.setdefault(_shapes(shapes) if shapes else next(iter(self._programs)), deque()).append(dealt)

    def audit(self, *inputs: Tensor) -> Audit:
        """Compare every operator on shares with floating point, on sample inputs of the owner's; see `audit`."""
        given = self._checked(inputs)
        return audit(self._simple(given), self._typed(given), self._context)

    def calibrate(self, *samples: Tensor, margin: float = 4.0) -> Calibration:
        """Choose comparison windows and scales on sample inputs of the owner's, in the clear; see `calibrate`."""
        given = self._checked(samples)
        uncalibrated = replace(self._context, windows={}, finer={})
        weights = fingerprint(self._plaintext)
        return calibrate(self._simple(given), self._typed(given), uncalibrated, margin, weights)

    def _simple(self, given: Sequence[Tensor]) -> Model:
        return self._program(tuple(tuple(value.shape) for value in given)).simple

    def _typed(self, given: Sequence[Tensor]) -> list[Tensor]:
        return [value.to(one.dtype) for value, one in zip(given, self._inputs, strict=True)]

    def _checked(self, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        return checked_inputs(inputs, self._inputs, self._name)

    def _program(self, shapes: Shapes) -> _Program:
        """The model for inputs of these shapes, traced, planned and loaded when it is first needed."""
        if shapes not in self._programs:
            blanks = tuple(torch.zeros(shape, dtype=one.dtype) for shape, one in zip(shapes, self._inputs, strict=True))
            simple = simplify(Model(*trace(self._plaintext, blanks)))
            sizes = {name: value.shape for name, value in simple.state.items()}
            known = next((one for one in self._programs.values() if one.simple.same_state(simple)), None)
            # Weights are numbered from the same place whenever they are the same weights.
            first = known.first_number if known else len(self._trio.alice.weights)
            cost = plan_execution(simple.graph, sizes, shapes, self._context, first)
            loaded = known.loaded if known else self._load(simple, first)
            self._programs[shapes] = _Program(simple, loaded, cost, first)
        return self._programs[shapes]

    def _load(self, simple: Model, first: int) -> Loaded:
        pairs = {
            name: share(encode(value, what=f"{name} of {self._name}, folded"), FRACTION_BITS, self._prg)
            for name, value in simple.state.items()
        }
        alice, bob = ({name: pair[i] for name, pair in pairs.items()} for i in range(2))
        return self._trio.load(load(simple.graph, alice, first), load(simple.graph, bob, first))

    def __repr__(self) -> str:
        shapes = ", ".join(str(one.item_shape) for one in self._inputs)
        return f"PrivateModel({self._name}, input {shapes}, shared by alice and bob)"


def _shapes(shapes: Sequence[Sequence[int]]) -> Shapes:
    return tuple(tuple(shape) for shape in shapes)
