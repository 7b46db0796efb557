"""Momentum and adaptive learning rates at the server.

Reddi et al. 2021, *Adaptive Federated Optimization* (ICLR), algorithm 2; for FedAvgM, Hsu et al. 2019, *Measuring the
Effects of Non-Identical Data Distribution for Federated Visual Classification*.

Each function takes what the clients do, a `FedAvg` or a kind of it, and returns it with a server optimizer. Δ is the
mean update; moments start at m = 0 and, as in the paper, v = τ². For any other optimizer of ``torch.optim`` set
``FedAvg.server_optimizer``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar, overload

import torch
from torch import Tensor

from tacit.errors import InputError
from tacit.federated.fedavg import FedAvg

Clients = TypeVar("Clients", bound=FedAvg)


def fed_avg_m(clients: Clients, *, server_lr: float = 1.0, momentum: float = 0.9) -> Clients:
    """FedAvgM: m ← β m + Δ, w ← w + η_s m.

    Args:
        clients: what the clients do.
        server_lr: η_s.
        momentum: β, in [0, 1).

    Raises:
        InputError: a setting is out of range.
    """
    _check_rate(server_lr)
    _check_decay("momentum", momentum)
    return replace(clients, server_optimizer=lambda p: torch.optim.SGD(p, lr=server_lr, momentum=momentum))


def fed_adagrad(clients: Clients, *, server_lr: float = 0.1, tau: float = 1e-3) -> Clients:
    """FedAdagrad: v ← v + Δ², w ← w + η_s Δ / (√v + τ), without momentum as in the paper's experiments.

    Args:
        clients: what the clients do.
        server_lr: η_s.
        tau: τ, how adaptive: the larger, the nearer to plain averaging.

    Raises:
        InputError: a setting is out of range.
    """
    _check_rate(server_lr)
    _check_tau(tau)
    return replace(
        clients,
        server_optimizer=lambda p: torch.optim.Adagrad(p, lr=server_lr, initial_accumulator_value=tau**2, eps=tau),
    )


def fed_adam(
    clients: Clients, *, server_lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.99), tau: float = 1e-3
) -> Clients:
    """FedAdam: m ← β₁ m + (1 − β₁) Δ, v ← β₂ v + (1 − β₂) Δ², w ← w + η_s m / (√v + τ).

    Unlike ``torch.optim.Adam`` without the correction of the moments' bias, as in the paper.

    Args:
        clients: what the clients do.
        server_lr: η_s.
        betas: β₁ and β₂, in [0, 1).
        tau: τ, how adaptive: the larger, the nearer to plain averaging.

    Raises:
        InputError: a setting is out of range.
    """
    return replace(clients, server_optimizer=_adaptive(server_lr, betas, tau, yogi=False))


def fed_yogi(
    clients: Clients, *, server_lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.99), tau: float = 1e-3
) -> Clients:
    """FedYogi: as `fed_adam`, but v ← v − (1 − β₂) Δ² sign(v − Δ²), which forgets large updates more slowly.

    Args:
        clients: what the clients do.
        server_lr: η_s.
        betas: β₁ and β₂, in [0, 1).
        tau: τ, how adaptive: the larger, the nearer to plain averaging.

    Raises:
        InputError: a setting is out of range.
    """
    return replace(clients, server_optimizer=_adaptive(server_lr, betas, tau, yogi=True))


class AdaptiveMoments(torch.optim.Optimizer):
    """Adam and Yogi as Reddi et al. 2021 write them.

    Args:
        params: what to optimise.
        lr: η_s.
        betas: β₁ and β₂.
        tau: τ, added to √v; v starts at τ².
        yogi: Yogi's rule for v (Zaheer et al. 2018, *Adaptive Methods for Nonconvex Optimization*), else Adam's.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, betas: tuple[float, float], tau: float, yogi: bool) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "tau": tau, "yogi": yogi})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(parameter)
                    state["square"] = torch.full_like(parameter, group["tau"] ** 2)
                mean, square, now = state["mean"], state["square"], parameter.grad.square()
                mean.lerp_(parameter.grad, 1 - first)
                if group["yogi"]:
                    square.addcmul_(now, (square - now).sign_(), value=second - 1)
                else:
                    square.lerp_(now, 1 - second)
                parameter.addcdiv_(mean, square.sqrt().add_(group["tau"]), value=-group["lr"])
        return loss


def _adaptive(
    server_lr: float, betas: tuple[float, float], tau: float, *, yogi: bool
) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    _check_rate(server_lr)
    for beta in betas:
        _check_decay("betas", beta)
    _check_tau(tau)
    return lambda p: AdaptiveMoments(p, server_lr, betas, tau, yogi)


def _check_rate(server_lr: float) -> None:
    if not (server_lr > 0 and math.isfinite(server_lr)):
        raise InputError(f"server_lr={server_lr}: the server's learning rate must be a number above 0")


def _check_decay(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise InputError(f"{name}={value}: a decay rate lies in [0, 1), such as 0.9")


def _check_tau(tau: float) -> None:
    if not (tau > 0 and math.isfinite(tau)):
        raise InputError(f"tau={tau}: give a number above 0, such as 0.001")
