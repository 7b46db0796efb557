"""How good a model is on examples that it was not trained on: all together, and client by client."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacit.data.examples import Examples
from tacit.errors import InputError
from tacit.federated.algorithm import Algorithm, Memory, ServerState
from tacit.federated.history import ClientAccuracies, RoundRecord
from tacit.federated.layout import Layout
from tacit.federated.local.work import Loss
from tacit.federated.personal import personalised


def evaluate(
    model: nn.Module, examples: Examples, batch: int = 1000, loss: Loss = functional.cross_entropy
) -> tuple[float, float]:
    """Mean loss and fraction classified correctly, computed ``batch`` examples at a time.

    The model runs in evaluation mode, and is put back in the mode it came in. The class is the largest of several
    outputs; of a single one, whether it is positive.

    Raises:
        InputError: there are no examples.
    """
    if len(examples) == 0:
        raise InputError("there are no examples to evaluate on: give at least one")
    was_training = model.training
    model.eval()
    total = correct = 0.0
    with torch.inference_mode():
        for start in range(0, len(examples), batch):
            targets = examples.targets[start : start + batch]
            outputs = model(examples.inputs[start : start + batch])
            total += float(loss(outputs, targets)) * len(targets)
            correct += float((_classes(outputs, targets) == targets).sum())
    model.train(was_training)
    return total / len(examples), correct / len(examples)


def ranking_quality(model: nn.Module, examples: Examples) -> float | None:
    """The area under the ROC curve of a classifier of two classes: how often it ranks a 1 above a 0, ties half.

    ``None`` if there are other classes, or none of one of the two.
    """
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        outputs = model(examples.inputs).double()
    model.train(was_training)
    if outputs.shape[1:] not in ((), (1,), (2,)):
        return None
    scores = outputs[:, 1] - outputs[:, 0] if outputs.shape[1:] == (2,) else outputs.flatten()
    positive = scores[examples.targets == 1]
    negative = scores[examples.targets == 0].sort().values
    if not len(positive) or not len(negative):
        return None
    above = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
    return float(above.double().mean()) / (2 * len(negative))


def evaluate_clients(
    model: nn.Module,
    algorithm: Algorithm,
    state: ServerState,
    memories: Mapping[int, Memory],
    clients: Sequence[Examples],
) -> ClientAccuracies:
    """The accuracy at every client, on examples of its own that it does not train on.

    Each is judged with the model that it would use: under a personalised algorithm its own, else the global one.

    Args:
        model: the initial global model, for its architecture; not changed.
        algorithm: that of the training.
        state: of the server.
        memories: of the clients that have any, by client.
        clients: each client's held-out examples; those without any are left out.

    Raises:
        InputError: no client has examples.
    """
    held_out = [(client, examples) for client, examples in enumerate(clients) if len(examples)]
    if not held_out:
        raise InputError("clients: none has examples to evaluate on; give at least one of them some")
    judged, layout = copy.deepcopy(model), Layout.of(model)
    personal = personalised(algorithm)
    state.load_into(judged)
    accuracies = []
    for client, examples in held_out:
        if personal is not None:
            personal.personalise(state, memories.get(client, {}), layout).load_into(judged)
        accuracies.append(evaluate(judged, examples, loss=_no_loss)[1])
    return summarise(accuracies)


def summarise(accuracies: Sequence[float]) -> ClientAccuracies:
    """How evenly accuracies, one a client and at least one, are spread over the clients."""
    ordered = torch.tensor(accuracies, dtype=torch.float64).sort().values
    worst = ordered[: max(1, len(ordered) // 10)]
    return ClientAccuracies(
        mean=float(ordered.mean()),
        worst_decile=float(worst.mean()),
        spread=float(ordered.std(correction=0)),
        count=len(ordered),
    )


def best_round(history: Iterable[RoundRecord]) -> RoundRecord | None:
    """The evaluated round with the highest accuracy, the first of equals; ``None`` if none was evaluated."""
    evaluated = [record for record in history if record.accuracy is not None]
    return max(evaluated, key=lambda record: record.accuracy or 0.0, default=None)


@dataclass(frozen=True)
class EarlyStop:
    """When training has gone far enough.

    Args:
        target_accuracy: stop after the first evaluation that reaches this fraction; ``None`` for no target.
        patience: stop after so many evaluations in a row without a new best accuracy; ``None`` never to.

    Raises:
        InputError: a setting is out of range.
    """

    target_accuracy: float | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.target_accuracy is not None and not 0 < self.target_accuracy <= 1:
            raise InputError(
                f"target_accuracy={self.target_accuracy}: give a fraction above 0 and at most 1, such as 0.97"
            )
        if self.patience is not None and self.patience < 1:
            raise InputError(f"patience={self.patience}: wait for 1 evaluation or more, or give None never to stop")

    def reason(self, history: Iterable[RoundRecord]) -> str:
        """Why to stop after the last round of ``history``; empty to go on."""
        accuracies = [record.accuracy for record in history if record.accuracy is not None]
        if not accuracies:
            return ""
        best = max(accuracies)
        if self.target_accuracy is not None and best >= self.target_accuracy:
            return f"reached {best:.2%}, at least the target of {self.target_accuracy:.2%}"
        since = len(accuracies) - 1 - accuracies.index(best)
        if self.patience is not None and since >= self.patience:
            return f"{since} evaluations without improving on {best:.2%}"
        return ""


def _no_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.zeros(())


def _classes(outputs: Tensor, targets: Tensor) -> Tensor:
    """The predicted classes, in the shape and type of the targets."""
    if outputs.ndim == targets.ndim or outputs.shape[1] == 1:
        return (outputs > 0).view_as(targets).to(targets.dtype)
    return outputs.argmax(dim=1)
