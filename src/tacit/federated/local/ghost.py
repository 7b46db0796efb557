"""Sums of clipped per-example gradients without ever holding the gradients of the examples.

The gradient of a linear layer's weight at one example is a sum over its T positions (one, or those of a sequence or
an image) of outer products dY_t X_tᵀ. Its squared norm is Σ_{s,t} (X_sᵀX_t)(dY_sᵀdY_t), which for T = 1 is ‖X‖²‖dY‖²
(Goodfellow 2015); for convolutions X are the unfolded patches (Bu et al. 2022). Once the norms are known, the sum of
the clipped gradients is one matrix product over the batch, its rows scaled (Li et al. 2022). Where the T² inner
products take more room than the gradient itself, that is held after all (the rule of Bu et al. 2022).

It takes chains (`nn.Sequential`) of layers that are known to treat every example by itself. For any other model
`GhostGradients.of` answers ``None``, and `tacit.federated.local.per_example` does it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacit.dp.clipping import clip_factors
from tacit.federated.layout import Layout, trainable_parameters
from tacit.federated.local.per_example import losses
from tacit.federated.local.work import Loss

_TRAINED = (nn.Linear, nn.Conv1d, nn.Conv2d)
_BY_EXAMPLE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardtanh),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d),
)


@dataclass(frozen=True)
class _Tap:
    """What one trained layer saw: its input and the gradient of the summed loss at its output, rows by example."""

    layer: nn.Module
    inputs: Tensor
    gradients: Tensor


class GhostGradients:
    """Clipped gradients of a chain of linear, convolution and parameter-free layers; made by `of`.

    Args:
        layers: of the chain, in order.
        names: of each layer's parameters in the model: weight and bias, ``None`` for one that is not trained.
        layout: of the model.
        loss: mean loss of a batch.
    """

    def __init__(
        self, layers: list[nn.Module], names: dict[nn.Module, tuple[str | None, str | None]], layout: Layout, loss: Loss
    ) -> None:
        self._layers = layers
        self._names = names
        self._layout = layout
        self._loss = loss

    @classmethod
    def of(cls, model: nn.Module, loss: Loss) -> GhostGradients | None:
        """For a copy of ``model``, or ``None`` if it is not a chain of known layers."""
        model = copy.deepcopy(model)
        layers = list(_chain(model))
        names = {id(parameter): name for name, parameter in trainable_parameters(model).items()}
        if len({id(layer) for layer in layers}) < len(layers) or not all(map(_is_known, layers)):
            return None
        held = [id(parameter) for layer in layers for parameter in layer.parameters()]
        if len(set(held)) < len(held):
            return None
        by_layer = {
            layer: (names.get(id(layer.weight)), names.get(id(layer.bias)))
            for layer in layers
            if isinstance(layer, _TRAINED)
        }
        layout = Layout.of(model)
        for layer in layers:
            layer.requires_grad_(False)
            # What a layer gave is read again after the next one.
            if "inplace" in vars(layer):
                vars(layer)["inplace"] = False
        return cls(layers, {layer: pair for layer, pair in by_layer.items() if any(pair)}, layout, loss)

    def load(self, trained: Tensor) -> None:
        """Compute from now on with the parameters in ``trained``, shape ``(D,)``, by reference."""
        views = self._layout.views(trained)
        for layer, (weight, bias) in self._names.items():
            for attribute, name in (("weight", weight), ("bias", bias)):
                if name is not None:
                    getattr(layer, attribute).data = views[name]

    def clipped_sum(self, inputs: Tensor, targets: Tensor, bound: float, out: Tensor) -> None:
        """Write Σ_i clip(∇ℓ_i, bound) over n ≥ 1 examples to ``out``, shape ``(D,)``, every entry of it."""
        taps = self._backward(inputs, targets)
        squares = torch.zeros(len(inputs), dtype=torch.float64)
        held: list[Tensor | None] = []
        for tap in taps:
            weight, bias = self._names[tap.layer]
            squared, gradients = _weight_norms(tap) if weight is not None else (None, None)
            held.append(gradients)
            if squared is not None:
                squares += squared
            if bias is not None:
                squares += _bias_gradients(tap).square().sum(1)
        factors = clip_factors(squares, bound).to(out.dtype)
        views = self._layout.views(out)
        for tap, gradients in zip(taps, held, strict=True):
            weight, bias = self._names[tap.layer]
            if weight is not None:
                _weight_sum(tap, gradients, factors, views[weight])
            if bias is not None:
                torch.mv(_bias_gradients(tap).T, factors, out=views[bias])

    def _backward(self, inputs: Tensor, targets: Tensor) -> list[_Tap]:
        """Run the chain forward and the gradient of the summed loss back to the first trained layer's output."""
        trained: list[tuple[nn.Module, Tensor, Tensor]] = []
        activation = inputs
        with torch.enable_grad():
            for layer in self._layers:
                before, activation = activation, layer(activation)
                if layer in self._names:
                    if not activation.requires_grad:
                        activation.requires_grad_()
                    trained.append((layer, before.detach(), activation))
            total = losses(self._loss, activation, targets).sum()
            gradients = torch.autograd.grad(total, [output for _, _, output in trained], materialize_grads=True)
        return [_Tap(layer, before, d) for (layer, before, _), d in zip(trained, gradients, strict=True)]


def _chain(module: nn.Module) -> Iterator[nn.Module]:
    if type(module) is nn.Sequential and not module._forward_hooks and not module._forward_pre_hooks:
        for child in module:
            yield from _chain(child)
    else:
        yield module


def _is_known(layer: nn.Module) -> bool:
    """Whether ``layer`` treats every row by itself, and its gradient is one that `_weight_norms` knows."""
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return False
    if isinstance(layer, nn.Flatten):
        return type(layer) is nn.Flatten and layer.start_dim >= 1
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return type(layer) in _TRAINED and plain
    return type(layer) is nn.Linear or type(layer) in _BY_EXAMPLE


def _positions(tap: _Tap) -> tuple[Tensor, Tensor]:
    """Inputs ``(n, G, k, T)`` and output gradients ``(n, G, p, T)`` of G groups (1 but for grouped convolutions)."""
    layer, x, d = tap.layer, tap.inputs, tap.gradients
    n = len(x)
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        # A convolution over a line is one over an image of height 1.
        flat = isinstance(layer, nn.Conv1d)
        lead = (1,) if flat else ()
        columns = functional.unfold(
            x.unsqueeze(2) if flat else x,
            (*lead, *layer.kernel_size),
            dilation=(*lead, *layer.dilation),
            padding=(*((0,) if flat else ()), *(int(p) for p in layer.padding)),
            stride=(*lead, *layer.stride),
        )
        groups = layer.groups
        return columns.view(n, groups, -1, columns.shape[-1]), d.reshape(n, groups, len(layer.weight) // groups, -1)
    return x.reshape(n, 1, -1, x.shape[-1]).mT, d.reshape(n, 1, -1, d.shape[-1]).mT


def _weight_norms(tap: _Tap) -> tuple[Tensor, Tensor | None]:
    """Squared norms of the weight's per-example gradients, shape ``(n,)``, and these themselves if they were needed."""
    if tap.inputs.dim() == 2:
        return tap.inputs.square().sum(1).mul_(tap.gradients.square().sum(1)), None
    x, d = _positions(tap)
    if 2 * x.shape[-1] ** 2 < x.shape[1] * x.shape[2] * d.shape[2]:
        return ((x.mT @ x) * (d.mT @ d)).flatten(1).sum(1), None
    gradients = (d @ x.mT).flatten(1)
    return gradients.square().sum(1), gradients


def _weight_sum(tap: _Tap, gradients: Tensor | None, factors: Tensor, out: Tensor) -> None:
    """Write the weight's gradients, each times its factor and all added up, to ``out``."""
    if gradients is not None:
        torch.mv(gradients.T, factors, out=out.view(-1))
    elif tap.inputs.dim() == 2:
        torch.mm((tap.gradients * factors[:, None]).T, tap.inputs, out=out)
    else:
        x, d = _positions(tap)
        torch.sum((d * factors[:, None, None, None]) @ x.mT, 0, out=out.view(d.shape[1], d.shape[2], x.shape[2]))


def _bias_gradients(tap: _Tap) -> Tensor:
    """The bias's per-example gradients, shape ``(n, outputs)``."""
    if tap.gradients.dim() == 2:
        return tap.gradients
    if isinstance(tap.layer, nn.Linear):
        return tap.gradients.flatten(1, -2).sum(1)
    return tap.gradients.flatten(2).sum(2)
