"""How good a classifier is on examples that it was not trained on."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tacit.data.examples import Examples
from tacit.errors import InputError


def evaluate(model: nn.Module, examples: Examples, batch: int = 1000) -> tuple[float, float]:
    """Mean cross-entropy and fraction classified correctly, computed ``batch`` examples at a time.

    The model runs in evaluation mode, and is put back in the mode it came in.

    Raises:
        InputError: there are no examples.
    """
    if len(examples) == 0:
        raise InputError("there are no examples to evaluate on: give at least one")
    was_training = model.training
    model.eval()
    loss = correct = 0.0
    with torch.inference_mode():
        for start in range(0, len(examples), batch):
            targets = examples.targets[start : start + batch]
            logits = model(examples.inputs[start : start + batch])
            loss += float(functional.cross_entropy(logits, targets, reduction="sum"))
            correct += float((logits.argmax(dim=1) == targets).sum())
    model.train(was_training)
    return loss / len(examples), correct / len(examples)
