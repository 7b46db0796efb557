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
from tacit.program.calibrate import Calibration, calibrate
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

    def trainer(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
        *,
        optimizer: Optimizer | None = None,
        context: Context | None = None,
        **settings: float,
    ) -> Trainer:
        """Share a model's weights between alice and bob, to train them in secret.

        Args:
            model: any module whose operators and their gradients have an encrypted form; trained in the mode that it is
                in, and not changed.
            loss: of the model's output and the labels, as a number.
            optimizer: `tacit.program.optimizers.Sgd` or `Adam`; SGD if not given.
            context: the engine's settings.
            settings: of SGD, where no optimizer is given: ``lr``, ``momentum``, ``weight_decay``.

        Raises:
            InputError: the model has nothing to train, a setting is out of range, or the context asks for exact mode or
                calibrated windows, which training has not.
            RangeError: a weight is not finite, or of magnitude 64 or more.
        """
        if optimizer is not None and settings:
            raise InputError(f"{', '.join(settings)}: settings belong to the optimizer that is given")
        if context is not None and (context.exact or context.windows):
            raise InputError("training has no exact mode and no calibrated windows: leave them out of its context")
        return Trainer(self._trio, self._owner, model, loss, optimizer or Sgd(**settings), context or Context())

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing outlives the cluster but what the caller holds of it."""


def cluster(prg: Prg | None = None, tap: Tap | None = None) -> Cluster:
    """alice, bob and the crypto provider in this process; see `Cluster`."""
    return Cluster(prg, tap)


Loaded = tuple[dict[str, Share | Weight], dict[str, Share | Weight]]


@dataclass(frozen=True)
class _Program:
    """The model for one input shape: its graph, its state at alice and at bob, and what a run costs."""

    simple: Model
    loaded: Loaded
    cost: Cost
    first_number: int


class PrivateModel:
    """A model of which alice and bob hold a share each; calling it runs it on a shared input.

    Made by `Cluster.encrypt`. The caller is the client: it shares the input, and alone puts the shares of the result
    together.
    """

    def __init__(self, trio: Trio, owner: Prg, model: nn.Module, example: Tensor, context: Context) -> None:
        self._trio, self._prg, self._context = trio, owner, context
        self._plaintext = copy.deepcopy(model).eval()
        self._name = type(model).__name__
        self._item_shape = tuple(example.shape[1:])
        # Embeddings take whole numbers, and torch tells them by their dtype.
        self._dtype = torch.int64 if example.dtype in (torch.int32, torch.int64) else torch.float32
        self._programs: dict[tuple[int, ...], _Program] = {}
        self._dealt: dict[tuple[int, ...], deque[Dealt]] = {}
        self._last: Cost | None = None
        for name, value in self._plaintext.state_dict().items():
            encode(value, what=f"{name} of {self._name}")
        self._program(tuple(_checked(example, self._item_shape).shape))

    def __call__(
        self,
        inputs: Tensor,
        *,
        clock: Callable[[], float] | None = None,
        seen: Callable[[Share, Share], None] | None = None,
    ) -> Any:
        """Predict in secret.

        Args:
            inputs: a real batch of any size whose items have the shape of the example's.
            clock: gives seconds, for the computing time of each layer in `counted`.
            seen: called with alice's and bob's share of the input, for demonstrations.

        Returns:
            The model's output as float32, a tuple where it has several, known to the caller alone.

        Raises:
            InputError: wrong shape or dtype.
            RangeError: an input is not finite, or of magnitude 16,384 or more.
        """
        inputs = _checked(inputs, self._item_shape)
        words, shape = encode(inputs), tuple(inputs.shape)
        program = self._program(shape)
        pair = share(words, FRACTION_BITS, self._prg)
        if seen:
            seen(*pair)
        waiting = self._dealt.get(shape)
        meter = Meter(clock)
        alice, bob = (execute(program.simple.graph, program.loaded[i], [pair[i]], self._context) for i in range(2))
        results = self._trio.run(alice, bob, meter, waiting.popleft() if waiting else None)
        self._last = cost_of(program.simple.graph, meter)
        outputs = tuple(reconstruct(*shares).to(torch.float32) for shares in zip(*results, strict=True))
        return outputs if len(outputs) > 1 else outputs[0]

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
        """Deal the correlated randomness of one later call on a batch of this shape, ahead of it."""
        dealt = self._trio.deal(self._program(tuple(shape)).cost.correlations)
        self._dealt.setdefault(tuple(shape), deque()).append(dealt)

    def audit(self, inputs: Tensor) -> Audit:
        """Compare every operator on shares with floating point, on sample inputs of the owner's; see `audit`."""
        inputs = _checked(inputs, self._item_shape)
        return audit(self._program(tuple(inputs.shape)).simple, [inputs.to(self._dtype)], self._context)

    def calibrate(self, samples: Tensor, margin: float = 4.0) -> Calibration:
        """Choose comparison windows on sample inputs of the owner's, in the clear; see `calibrate`."""
        samples = _checked(samples, self._item_shape)
        simple = self._program(tuple(samples.shape)).simple
        return calibrate(simple, [samples.to(self._dtype)], replace(self._context, windows={}), margin)

    def _program(self, shape: tuple[int, ...]) -> _Program:
        """The model for inputs of this shape, traced, planned and loaded when it is first needed."""
        if shape not in self._programs:
            simple = simplify(Model(*trace(self._plaintext, (torch.zeros(shape, dtype=self._dtype),))))
            shapes = {name: value.shape for name, value in simple.state.items()}
            known = next((one for one in self._programs.values() if _same(one.simple.state, simple.state)), None)
            # Weights are numbered from the same place whenever they are the same weights.
            first = known.first_number if known else len(self._trio.alice.weights)
            cost = plan_execution(simple.graph, shapes, [shape], self._context, first)
            loaded = known.loaded if known else self._load(simple, first)
            self._programs[shape] = _Program(simple, loaded, cost, first)
        return self._programs[shape]

    def _load(self, simple: Model, first: int) -> Loaded:
        pairs = {
            name: share(encode(value, what=f"{name} of {self._name}, folded"), FRACTION_BITS, self._prg)
            for name, value in simple.state.items()
        }
        alice, bob = ({name: pair[i] for name, pair in pairs.items()} for i in range(2))
        return self._trio.load(load(simple.graph, alice, first), load(simple.graph, bob, first))

    def __repr__(self) -> str:
        return f"PrivateModel({self._name}, input {self._item_shape}, shared by alice and bob)"


def _same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two traces of the model take the same state; constants may follow the input's shape."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


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
