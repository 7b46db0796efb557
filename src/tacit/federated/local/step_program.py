"""A traced step laid out in memory: every value has its place, so that an operator is the same call every time.

Laying out runs the step once. The tensors that come of it are where later runs put theirs; views of them are made then
and never again; what depends on nothing is computed then and never again. What remains is a list of calls without
arguments.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tacit.errors import InputError, UnsupportedOperator
from tacit.federated.local.scratch import Scratch
from tacit.federated.local.step_graph import CROSS_ENTROPY, LINEAR_RELU, Product, RowSum, StepGraph, Whole
from tacit.trace import CONSTANT, Node, operator_of, substitute

FEW_ROWS = 64
"""Up to this many items in a batch, our products are faster than torch's."""
_SHAPE_ALONE = ("empty_like", "full_like", "new_empty", "new_full", "new_ones", "new_zeros", "ones_like", "zeros_like")
"""Operators that take no more than the shape of their operand."""

Call = Callable[[], object]
Put = Callable[[Tensor], Tensor]


class StepProgram:
    """One descent step on batches of one shape.

    Args:
        step: what to do.
        state: the tensors that the step takes beside its batch, in its order; trainable parameters are updated in
            place, and so are buffers.
        inputs: of the shape and dtype of a batch, in the memory where every batch will be put.
        targets: likewise.
        kernels: compiled loops, if there are.
        scratch: where what is computed is put; other programs may use it in between.

    Raises:
        UnsupportedOperator: an operator writes where the program cannot follow.
    """

    def __init__(
        self,
        step: StepGraph,
        state: Sequence[Tensor],
        inputs: Tensor,
        targets: Tensor,
        kernels: ModuleType | None,
        scratch: Scratch,
    ) -> None:
        scratch.restart()
        self._put = scratch.put
        self.draws = False
        """Whether the step draws random numbers, from torch's global generator."""
        self._kernels = kernels
        self._values: dict[str, Any] = dict(zip(step.graph.inputs, (*state, inputs, targets), strict=True))
        self._constants: set[str] = set()
        self._calls: list[Call] = []
        self._dropped = _dropped(step.graph.nodes)
        for node in step.graph.nodes:
            self._place(node)
        self._loss: Tensor = self._values[step.loss]
        weights = state[: len(step.gradients)]
        self._weights = list(zip(weights, step.gradients, strict=True))
        self._rate: float | None = None
        self._updates: list[Call] = []
        old = state[len(state) - len(step.buffers) :]
        pairs = [(a, self._values[name]) for a, name in zip(old, step.buffers, strict=True)]
        self._after: list[Call] = [partial(a.copy_, b) for a, b in pairs]

    def __call__(self, rate: float) -> float:
        """Descend by one step of learning rate ``rate``; the loss of the batch before it."""
        if rate != self._rate:
            self._rate, self._updates = rate, list(self._updates_for(rate))
        for call in self._calls:
            call()
        for call in self._updates:
            call()
        for call in self._after:
            call()
        return self._loss.item()

    def __len__(self) -> int:
        """How many calls a step makes."""
        return len(self._calls) + len(list(self._updates_for(0.0))) + len(self._after)

    def _place(self, node: Node) -> None:
        """Run a node, and note what runs it again."""
        if node.operator == CONSTANT:
            value = torch.tensor(node.args[0])
            self._values[node.name] = value if len(node.args) == 1 else value.expand(node.args[1])
            self._constants.add(node.name)
            return
        args, kwargs = (substitute(part, self._values.__getitem__) for part in (list(node.args), dict(node.kwargs)))
        if node.operator == "getitem":
            self._values[node.name] = operator.getitem(*args)
            return
        if node.name in self._dropped:
            # Drawn in the order of what it multiplies in memory, as dropout does.
            mask = self._put(torch.empty_like(self._values[self._dropped[node.name]]))
            self._values[node.name], self.draws = mask.bernoulli_(args[1]), True
            self._calls.append(partial(mask.bernoulli_, args[1]))
            return
        compiled = self._compiled(node.operator, args) if not kwargs else None
        if compiled is not None:
            self._values[node.name], call = compiled
            call()
            self._calls.append(call)
            return
        if node.operator == LINEAR_RELU:
            result = self._put(torch.addmm(*args).relu_())
            self._values[node.name] = result
            self._calls += [partial(torch.addmm, *args, out=result), result.relu_]
            return
        function: Any = operator_of(node.operator)
        draws = torch.Tag.nondeterministic_seeded in function.tags
        self.draws |= draws
        settled = all(name in self._constants for name in node.refs) or function._schema.name[6:] in _SHAPE_ALONE
        if settled and not draws:
            self._values[node.name] = function(*args, **kwargs)
            self._constants.add(node.name)
            return
        self._values[node.name], again = _laid_out(node, args, kwargs, self._put)
        if again is not None:
            self._calls.append(again)

    def _compiled(self, name: str, args: Sequence[Any]) -> tuple[Any, Call] | None:
        """The result's place and the call of a compiled loop, where one fits."""
        k = self._kernels
        if k is None:
            return None
        if name == CROSS_ENTROPY:
            logits, targets = args
            return _cross_entropy(k, logits, targets, self._put)
        if name in ("aten.addmm.default", LINEAR_RELU):
            bias, x, turned = args
            if _rows(x, turned.t()) and _plain(bias) and bias.dim() == 1:
                out = self._put(x.new_empty(len(x), turned.shape[1]))
                sizes = (*x.shape, turned.shape[1])
                at = (x.data_ptr(), turned.data_ptr(), bias.data_ptr(), out.data_ptr())
                return out, partial(k.linear, *at, *sizes, name == LINEAR_RELU)
        elif name == "aten.mm.default":
            left, right = args
            if _rows(left, right):
                out = self._put(left.new_empty(len(left), right.shape[1]))
                return out, partial(
                    k.multiply, left.data_ptr(), right.data_ptr(), out.data_ptr(), *left.shape, right.shape[1]
                )
            if _rows(left, right.t()):
                out = self._put(left.new_empty(len(left), right.shape[1]))
                operands = (left.data_ptr(), right.data_ptr(), 0, out.data_ptr())
                return out, partial(k.linear, *operands, *left.shape, right.shape[1], False)
        elif name == "aten.threshold_backward.default":
            gradient, value, threshold = args
            if _plain(gradient) and _plain(value) and gradient.shape == value.shape and threshold == 0:
                out = self._put(torch.empty_like(value))
                both = (gradient.data_ptr(), value.data_ptr(), out.data_ptr())
                return out, partial(k.relu_gradient, *both, value.numel())
        return None

    def _updates_for(self, rate: float) -> Iterator[Call]:
        """What moves every weight against its gradient."""
        k, moved, by = self._kernels, list[Tensor](), list[Tensor]()
        for weight, gradient in self._weights:
            if isinstance(gradient, Product):
                left, right = self._values[gradient.left], self._values[gradient.right]
                if gradient.transposed:
                    left, right = right.t(), left.t()
                if k is not None and _rows(left.t(), right) and _plain(right) and _plain(weight):
                    at = (left.data_ptr(), right.data_ptr(), weight.data_ptr())
                    yield partial(k.update, *at, len(right), len(left), right.shape[1], rate)
                else:
                    yield partial(weight.addmm_, left, right, alpha=-rate)
            elif isinstance(gradient, RowSum):
                rows = self._values[gradient.rows]
                if k is not None and _plain(rows) and _plain(weight):
                    yield partial(k.update_bias, rows.data_ptr(), weight.data_ptr(), *rows.shape, rate)
                else:
                    yield partial(_subtract_rows, weight, rows, rate)
            elif isinstance(gradient, Whole):
                moved.append(weight)
                by.append(self._values[gradient.gradient])
        if moved:
            yield partial(torch._foreach_add_, moved, by, alpha=-rate)


def _dropped(nodes: Sequence[Node]) -> dict[str, str]:
    """For the random masks of dropout, ``x · (bernoulli / p)``, what they multiply."""
    drawn = {node.name for node in nodes if node.operator == "aten.bernoulli.p"}
    scaled = {
        node.name: node.refs[0] for node in nodes if node.operator.startswith("aten.div.") and node.refs[0] in drawn
    }
    products = [node for node in nodes if node.operator == "aten.mul.Tensor" and len(node.refs) == 2]
    # The first product is the forward pass's.
    return {scaled[node.refs[1]]: node.refs[0] for node in reversed(products) if node.refs[1] in scaled}


def _plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.device.type == "cpu"


def _rows(few: Tensor, right: Tensor) -> bool:
    """Whether a product of a few rows with ``right`` is one for the compiled loops."""
    return _plain(few) and _plain(right) and few.dim() == 2 and 0 < len(few) <= FEW_ROWS and right.numel() > 0


def _subtract_rows(weight: Tensor, rows: Tensor, rate: float) -> None:
    weight.sub_(rows.sum(0), alpha=rate)


def _cross_entropy(
    kernels: ModuleType, logits: Tensor, targets: Tensor, put: Put
) -> tuple[tuple[Tensor, Tensor], Call]:
    """The places of loss and gradient, and the call."""
    loss = put(logits.new_empty(()))
    gradient = put(torch.empty_like(logits, memory_format=torch.contiguous_format))
    if not (_plain(logits) and targets.dtype == torch.int64 and targets.is_contiguous()):
        return (loss, gradient), partial(_cross_entropy_by_torch, logits, targets, loss, gradient)
    at = (logits.data_ptr(), targets.data_ptr(), loss.data_ptr(), gradient.data_ptr())

    def call() -> None:
        if kernels.cross_entropy(*at, *logits.shape):
            classes = logits.shape[1]
            raise InputError(f"a target is not a class: with {classes} outputs, targets are 0 to {classes - 1}")

    return (loss, gradient), call


def _cross_entropy_by_torch(logits: Tensor, targets: Tensor, loss: Tensor, gradient: Tensor) -> None:
    aten: Any = torch.ops.aten
    logarithms = torch.log_softmax(logits, 1)
    mean, count = aten.nll_loss_forward(logarithms, targets, None, 1, -100)
    slope = aten.nll_loss_backward(torch.ones_like(mean), logarithms, targets, None, 1, -100, count)
    loss.copy_(mean)
    gradient.copy_(aten._log_softmax_backward_data(slope, logarithms, 1, logits.dtype))


def _laid_out(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any], put: Put) -> tuple[Any, Call | None]:
    """A node's result, and the call that puts it there again; no call if it is a view of an operand.

    Raises:
        UnsupportedOperator: the operator writes to an operand.
    """
    function: Any = operator_of(node.operator)
    if node.operator == "aten.view.default" and not _viewable(*args):
        # In another memory format than it was traced in, it takes a copy.
        result = put(args[0].reshape(args[1]))
        return result, partial(result.view(args[0].shape).copy_, args[0])
    if function._schema.is_mutable:
        raise UnsupportedOperator(f"{node.operator} at {node.source or 'the step'}: writes in place")
    result = function(*args, **kwargs)
    results = [result] if isinstance(result, Tensor) else list(result)
    operands = {_memory(tensor) for tensor in _tensors([*args, *kwargs.values()])}
    shared = {_memory(tensor) in operands for tensor in results if tensor is not None}
    if shared == {True}:
        return result, None
    if True in shared:
        raise UnsupportedOperator(f"{node.operator} at {node.source or 'the step'}: part of its result is a view")
    places = [tensor if tensor is None else put(tensor) for tensor in results]
    variant = _out_variant(function, args, kwargs, places)
    again = variant or partial(_copied, function, args, kwargs, places)
    return places[0] if isinstance(result, Tensor) else places, again


def _viewable(tensor: Tensor, shape: Sequence[int]) -> bool:
    try:
        tensor.view(shape)
    except RuntimeError:
        return False
    return True


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.numel() else id(tensor)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _out_variant(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], results: Sequence[Tensor | None]
) -> Call | None:
    """The call of the operator's variant that writes to given tensors, if it has one."""
    given = [(argument.name, str(argument.type)) for argument in function._schema.arguments]
    packet = function.overloadpacket
    for name in packet.overloads():
        variant = getattr(packet, name)
        arguments = variant._schema.arguments
        out = [
            argument.name for argument in arguments if argument.alias_info is not None and argument.alias_info.is_write
        ]
        taken = [(argument.name, str(argument.type)) for argument in arguments if argument.name not in out]
        if out and taken == given and len(out) == len(results) and None not in results:
            return partial(variant, *args, **kwargs, **dict(zip(out, results, strict=True)))
    return None


def _copied(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], places: Sequence[Tensor | None]
) -> None:
    result = function(*args, **kwargs)
    for place, value in zip(places, [result] if isinstance(result, Tensor) else result, strict=True):
        if place is not None:
            place.copy_(value)
