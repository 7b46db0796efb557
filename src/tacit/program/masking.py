"""Which operators of a training step are products, and the masked operands that they take.

A tensor may enter several products, seen through transposes and reshapings. `mask_operands` gives it one node that
masks it (`tacit.mpc.masked`) and writes each product as an operator on masked operands and the views they are taken
through. Convolutions' gradients are two such products and a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from tacit.errors import UnsupportedOperator
from tacit.program.lowering.backward import PARAMETER_BITS
from tacit.ring.fixed_point import FRACTION_BITS
from tacit.trace import Node, Ref

_CONVOLUTION_BACKWARD = "aten.convolution_backward.default"
_MATRIX_PRODUCTS = ("aten.mm.default", "aten.bmm.default", "aten.mv.default", "aten.dot.default")


def namer(node: Node) -> Callable[..., Node]:
    """Makes nodes that belong to ``node``, named after it."""

    def new(suffix: str, operator: str, *args: Any) -> Node:
        return replace(node, name=f"{node.name}_{suffix}", operator=operator, args=args, kwargs={})

    return new


_View = Callable[[Node], tuple[tuple[str, tuple[Any, ...]], ...]]
_VIEWS: dict[str, _View] = {
    "aten.alias.default": lambda node: (),
    "aten.clone.default": lambda node: (),
    "aten.detach.default": lambda node: (),
    "aten.view.default": lambda node: (("reshape", (node.shape,)),),
    "aten._unsafe_view.default": lambda node: (("reshape", (node.shape,)),),
    "aten.expand.default": lambda node: (("expand", (node.shape,)),),
    "aten.permute.default": lambda node: (("permute", (tuple(node.args[1]),)),),
    "aten.t.default": lambda node: (("transpose", (0, 1)),) if len(node.shape) == 2 else (),
    "aten.transpose.int": lambda node: (("transpose", node.args[1:]),),
    "aten.squeeze.dim": lambda node: (("reshape", (node.shape,)),),
    "aten.squeeze.dims": lambda node: (("reshape", (node.shape,)),),
    "aten.unsqueeze.default": lambda node: (("unsqueeze", node.args[1:]),),
    "aten.select.int": lambda node: (("select", node.args[1:]),),
    "aten.slice.Tensor": lambda node: (("slice", node.args[1:]),),
    "aten.flip.default": lambda node: (("flip", (tuple(node.args[1]),)),),
}


def mask_operands(nodes: list[Node], numbers: Sequence[str], constants: Iterable[str]) -> list[Node]:
    """Rewrite products to operators on operands that are masked once each.

    Args:
        nodes: the step.
        numbers: inputs that are public numbers of the step.
        constants: inputs that are public tensors.

    Raises:
        UnsupportedOperator: a form of a product that has no gradient here.
    """
    masking = _Masking(nodes, numbers, constants)
    return [new for node in nodes for new in masking.rewritten(node)]


class _Masking:
    def __init__(self, nodes: Iterable[Node], numbers: Sequence[str], constants: Iterable[str]) -> None:
        self._producers = {node.name: node for node in nodes}
        self._numbers, self._public = numbers, {*numbers, *constants}
        self._masks: dict[str, Node] = {}

    def rewritten(self, node: Node) -> list[Node]:
        """The nodes to put in the place of ``node``: masks that are not there yet, then the product."""
        before = len(self._masks)
        nodes = self._product(node)
        return [*list(self._masks.values())[before:], *nodes]

    def _product(self, node: Node) -> list[Node]:
        new, operator, args = namer(node), node.operator, node.args
        if operator == "getitem" and self._producers[args[0].name].operator == _CONVOLUTION_BACKWARD:
            return [self._convolution_gradient(node, self._producers[args[0].name])]
        if operator == _CONVOLUTION_BACKWARD:
            return []
        if operator == "aten.mean.dim":
            return [replace(node, operator="tacit.mean")]
        if operator == "aten.rsqrt.default":
            return [replace(node, operator="tacit.inverse_root")]
        if operator == "aten.pow.Tensor_Scalar" and args[1] == 2:
            return [self._of_masked(node, "tacit.multiply", args[0], args[0], scale=PARAMETER_BITS)]
        if any(isinstance(arg, Ref) and self._is_public(arg.name) for arg in args):
            weighs = operator == "aten.mul.Tensor" and args[0].name in self._numbers
            return [replace(node, operator="tacit.weigh", args=args[::-1]) if weighs else node]
        if operator == "aten.mul.Tensor" and len(node.refs) == 2:
            return [self._of_masked(node, "tacit.multiply", *args, scale=PARAMETER_BITS)]
        if operator in _MATRIX_PRODUCTS:
            return [self._of_masked(node, "tacit.matmul", *args)]
        if operator == "aten.addmm.default":
            if node.kwargs:
                raise UnsupportedOperator(f"{operator} at {node.source}: has no encrypted form with alpha or beta")
            product = self._of_masked(new("product", ""), "tacit.matmul", *args[1:])
            return [product, replace(node, operator="aten.add.Tensor", args=(Ref(product.name), args[0]))]
        if operator == "aten.convolution.default":
            x, w, bias = args[:3]
            geometry, transposed = _geometry(args[3:])
            # A transposed convolution is what the gradient of a convolution for its input is.
            op = "tacit.convolve_input_gradient" if transposed else "tacit.convolve"
            sizes = (tuple(node.shape[2:]),) if transposed else ()
            product = self._of_masked(new("product", "") if bias else node, op, x, w, *sizes, *geometry)
            if not bias:
                return [product]
            column = new("bias", "aten.view.default", bias, [-1, *[1] * len(geometry[0])])
            total = replace(node, operator="aten.add.Tensor", args=(Ref(product.name), Ref(column.name)))
            return [product, column, total]
        return [node]

    def _convolution_gradient(self, node: Node, backward: Node) -> Node:
        """One of the three results of ``convolution_backward``: for the input, the weight, or the bias."""
        gradient, x, w = backward.args[:3]
        geometry, transposed = _geometry(backward.args[4:10])
        sizes = tuple(node.shape[2:])
        if node.args[1] == 2:
            spatial = range(2, 2 + len(geometry[0]))
            return replace(node, operator="aten.sum.dim_IntList", args=(gradient, [0, *spatial]))
        if node.args[1] == 1:
            left, right = (x, gradient) if transposed else (gradient, x)
            return self._of_masked(node, "tacit.convolve_weight_gradient", left, right, sizes, *geometry)
        if transposed:
            return self._of_masked(node, "tacit.convolve", gradient, w, *geometry)
        return self._of_masked(node, "tacit.convolve_input_gradient", gradient, w, sizes, *geometry)

    def _of_masked(self, node: Node, operator: str, x: Ref, y: Ref, *geometry: Any, scale: int = FRACTION_BITS) -> Node:
        args = (*self._operand(x, scale), *self._operand(y, scale), *geometry)
        return replace(node, operator=operator, args=args, kwargs={})

    def _operand(self, ref: Ref, scale: int) -> tuple[Ref, tuple[Any, ...]]:
        """The mask of what ``ref`` is a view of, and that view."""
        views: tuple[Any, ...] = ()
        name = ref.name
        while name in self._producers and self._producers[name].operator in _VIEWS:
            views = (*_VIEWS[self._producers[name].operator](self._producers[name]), *views)
            name = self._producers[name].args[0].name
        if name not in self._masks:
            masked = f"{name}_masked"
            self._masks[name] = Node(masked, "tacit.mask", (Ref(name), masked, scale), {})
        return Ref(self._masks[name].name), views

    def _is_public(self, name: str) -> bool:
        if name not in self._producers:
            return name in self._public
        return all(map(self._is_public, self._producers[name].refs))


def _geometry(args: Sequence[Any]) -> tuple[tuple[Any, ...], bool]:
    """Stride, padding, dilation and groups of a convolution, and whether it is transposed."""
    stride, padding, dilation, transposed, _, groups = args
    return (tuple(stride), tuple(padding), tuple(dilation), groups), transposed
