"""Which models can be trained with differential privacy."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from tacit.errors import InputError


def refuse_batch_statistics(model: nn.Module) -> None:
    """Refuse a model some layer of which computes with, or remembers, statistics of more than one example.

    Batch normalisation mixes the examples of a batch, so that clipping the gradient of one example does not bound what
    that example changes.

    Raises:
        InputError: there is such a layer.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) or (isinstance(layer, _InstanceNorm) and layer.track_running_stats):
            raise _refused(name, layer)


def refuse_running_statistics(model: nn.Module, sent: Collection[str]) -> None:
    """Refuse a model whose running statistics are among the buffers that clients send: no noise would cover them.

    Args:
        model: any.
        sent: names of the buffers that leave the clients.

    Raises:
        InputError: there are such statistics.
    """
    for name, layer in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(layer, _BatchNorm | _InstanceNorm) and f"{prefix}running_mean" in sent:
            raise _refused(name, layer)


def _refused(name: str, layer: nn.Module) -> InputError:
    return InputError(
        f"{name or 'the model'} is {type(layer).__name__}, whose statistics over examples no noise covers: under "
        "differential privacy use GroupNorm, LayerNorm or InstanceNorm without running statistics"
    )
