"""Initial weights, drawn by the server."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn

from tacit.errors import InputError

Initial = Literal["normal", "xavier", "he", "default"]

NORMAL_STD = 0.05
"""Standard deviation of the weights under ``"normal"``."""


def initialise(model: nn.Module, how: Initial, generator: torch.Generator) -> None:
    """Draw the weights of the linear and convolution layers of ``model``, in place, and zero their biases.

    With fan_in inputs to each unit and fan_out units fed by each input, weights are N(0, s²):

    - ``"normal"``: s = `NORMAL_STD`;
    - ``"xavier"``: s² = 2 / (fan_in + fan_out) (Glorot and Bengio 2010);
    - ``"he"``: s² = 2 / fan_in, for ReLU networks (He et al. 2015);
    - ``"default"``: the model stays as it came, fresh from PyTorch or trained before.

    Normalisation layers, other layers and frozen parameters are left as they are.

    Raises:
        InputError: ``how`` is none of the four.
    """
    if how not in get_args(Initial):
        raise InputError(f"initial={how!r}: choose one of {', '.join(get_args(Initial))}")
    if how == "default":
        return
    for layer in model.modules():
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        if layer.weight.requires_grad:
            if how == "normal":
                nn.init.normal_(layer.weight, std=NORMAL_STD, generator=generator)
            elif how == "xavier":
                nn.init.xavier_normal_(layer.weight, generator=generator)
            else:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
        if layer.bias is not None and layer.bias.requires_grad:
            nn.init.zeros_(layer.bias)
