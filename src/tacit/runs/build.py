"""What each section of a config stands for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from tacit.data.examples import Dataset
from tacit.dp.clipping import AdaptiveClipping
from tacit.errors import InputError
from tacit.federated.algorithm import Algorithm
from tacit.federated.compression import Compressed
from tacit.federated.compression_schemes import Float16, StochasticQuantisation, TopK
from tacit.federated.devices import Fleet
from tacit.federated.devices_schedule import RoundPolicy
from tacit.federated.devices_trace import Trace
from tacit.federated.distributed_dp import DistributedDP
from tacit.federated.ditto import Ditto
from tacit.federated.eligibility import Eligibility
from tacit.federated.fedavg import FedAvg, Mean, Weighting, capped, uniform
from tacit.federated.fedbuff import FedBuff
from tacit.federated.fedopt import fed_adagrad, fed_adam, fed_avg_m, fed_yogi
from tacit.federated.fedprox import FedProx
from tacit.federated.fedsgd import fed_sgd
from tacit.federated.mean import weighted_mean
from tacit.federated.models import cnn, lenet, logistic, mlp, two_nn
from tacit.federated.personal import PersonalLayers, batch_norm_layers
from tacit.federated.privacy import CentralDP, Privacy, RecordDP
from tacit.federated.robust import ClippedMean, Krum, TrimmedMean, coordinate_median
from tacit.federated.scaffold import Scaffold
from tacit.federated.selection import AvailabilityAware, ByExamples, Poisson, Selection, Uniform
from tacit.runs import config
from tacit.runtimes.federation import Devices
from tacit.runtimes.simulation import least_in_sum

IMAGE_MODELS: dict[str, Callable[[], nn.Module]] = {"2nn": two_nn, "cnn": cnn, "lenet": lenet}
TABLE_MODELS: dict[str, Callable[[int, int], nn.Module]] = {"logistic": logistic, "mlp": mlp}
_LEVELS = {
    "client": {"quantile": "lets the bound on whole updates adapt"},
    "record": {"participations": "counts rounds of a client's own records"},
    "distributed": {
        "noise": "chooses the integers that are added to a sum",
        "colluding": "is about noise that clients add to a sum",
    },
}


def model(settings: config.Config, data: Dataset, origin: Path) -> nn.Module:
    """The network of ``[model]``: a built-in one, or what ``FILE.py:FACTORY`` returns when called.

    Raises:
        InputError: there is no such model, or its weights do not fit.
    """
    section = settings.model
    name = section.name
    inputs = data.train.inputs
    if name in IMAGE_MODELS:
        made = IMAGE_MODELS[name]()
    elif name in TABLE_MODELS:
        made = nn.Sequential(nn.Flatten(), TABLE_MODELS[name](inputs[0].numel(), data.classes))
    elif ":" in name:
        made = _from_file(origin, *name.rsplit(":", 1))
    else:
        known = ", ".join([*IMAGE_MODELS, *TABLE_MODELS])
        raise InputError(f"model.name={name!r}: choose one of {known}, or FILE.py:FACTORY for your own")
    if section.weights is not None:
        try:
            made.load_state_dict(load_file(origin / section.weights))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise InputError(f"model.weights={section.weights!r} cannot be loaded into {name}: {error}") from error
    _try_out(made, name, data)
    return made


def algorithm(settings: config.Config, network: nn.Module) -> Algorithm:
    """``[algorithm]`` with ``[server]``, ``[mean]`` and ``[compression]``."""
    averaging = _averaging(settings)
    made: Algorithm = averaging
    match settings.algorithm:
        case config.FedPer(personal=layers):
            made = PersonalLayers(averaging, layers)
        case config.FedBn():
            made = PersonalLayers(averaging, batch_norm_layers(network))
    match settings.compression:
        case config.Float16():
            made = Compressed(made, Float16())
        case config.Quantise(bits=bits):
            made = Compressed(made, StochasticQuantisation(bits))
        case config.TopK(fraction=fraction):
            made = Compressed(made, TopK(fraction))
    if isinstance(settings.algorithm, config.FedBuff):
        made = FedBuff(made, settings.algorithm.buffer)
    return made


def selection(settings: config.Config, devices: Devices | None) -> Selection:
    """``[selection]``.

    Raises:
        InputError: it needs to know how available clients are, but there are no devices.
    """
    match settings.selection:
        case config.Uniform(cohort=cohort):
            return Uniform(cohort)
        case config.Poisson(rate=rate):
            return Poisson(rate)
        case config.ByExamples(cohort=cohort):
            return ByExamples(cohort)
        case config.AvailabilityAware(cohort=cohort):
            if devices is None:
                raise InputError("selection.name='availability' prefers devices seldom available: add [devices]")
            return AvailabilityAware(cohort, devices.fleet.availability())


def devices(settings: config.Config, clients: int, origin: Path) -> Devices | None:
    """``[devices]``: phones with daily habits, or a trace of real ones."""
    section = settings.devices
    if section is None:
        return None
    eligibility = Eligibility(section.idle, section.charging, section.unmetered, section.hours, section.battery)
    if section.trace is None:
        fleet = Fleet.of_phones(clients, settings.seed, eligibility)
    else:
        fleet = Fleet(Trace.read(origin / section.trace, clients), eligibility, seed=settings.seed)
    policy = RoundPolicy(section.over_selection, section.deadline, section.close_at, section.minimum)
    return Devices(fleet, policy)


def least_vectors(settings: config.Config, clients: int) -> int:
    """The fewest vectors in a secure sum, which clients and server find from the same settings."""
    section, devices = settings.secure_sum, settings.devices
    asked = None if section is None else section.minimum
    everybody = torch.ones(clients, dtype=torch.int64)
    least = asked or least_in_sum(everybody, selection(settings, None))
    return max(least, 1 if devices is None else devices.minimum)


def privacy(settings: config.Config) -> Privacy | None:
    """``[privacy]``.

    Raises:
        InputError: a key belongs to another level, or clients are to be weighed by their examples.
    """
    section = settings.privacy
    if section is None:
        return None
    for level, keys in _LEVELS.items():
        for key, meaning in keys.items():
            if level != section.level and getattr(section, key) is not None:
                raise InputError(f"privacy.{key} {meaning}: it goes with level = {level!r}")
    if section.level != "record" and isinstance(settings.mean, config.Weighted) and settings.mean.by != "uniform":
        raise InputError(
            "mean.by = 'examples' weighs clients, and under client-level privacy every client weighs the same: set "
            "mean.by = 'uniform', or leave [mean] out"
        )
    amounts = (section.clip, section.delta, section.noise_multiplier, section.target_epsilon, section.budget)
    accountant, seed = section.accountant, section.noise_seed
    match section.level:
        case "record":
            return RecordDP(*amounts, section.participations, accountant=accountant, noise_seed=seed)
        case "distributed":
            noise, colluding = section.noise or "skellam", 1 if section.colluding is None else section.colluding
            return DistributedDP(*amounts, noise, colluding, accountant=accountant, noise_seed=seed)
        case "client":
            adaptive = None if section.quantile is None else AdaptiveClipping(section.quantile)
            return CentralDP(*amounts, adaptive, accountant=accountant, noise_seed=seed)


def _averaging(settings: config.Config) -> FedAvg:
    """What the clients train and send, and what the server does with it."""
    chosen = settings.algorithm
    if isinstance(chosen, config.FedSgd):
        made = fed_sgd(chosen.lr)
    else:
        batch_size = None if chosen.batch_size == "all" else int(chosen.batch_size)
        made = FedAvg(chosen.lr, batch_size, chosen.epochs)
        match chosen:
            case config.FedProx(proximal=proximal):
                made = FedProx(chosen.lr, batch_size, chosen.epochs, mu=proximal)
            case config.Ditto(proximal=proximal):
                made = Ditto(chosen.lr, batch_size, chosen.epochs, pull=proximal)
            case config.Scaffold():
                made = Scaffold(chosen.lr, batch_size, chosen.epochs)
    if settings.mean is not None:
        made = replace(made, weighting=_weighting(settings.mean), mean=_mean(settings.mean))
    server = settings.server
    match server.optimizer:
        case "sgd":
            return fed_avg_m(made, server_lr=server.lr, momentum=server.momentum)
        case "adam":
            return fed_adam(made, server_lr=server.lr)
        case "adagrad":
            return fed_adagrad(made, server_lr=server.lr)
        case "yogi":
            return fed_yogi(made, server_lr=server.lr)


def _weighting(section: config.Mean) -> Weighting:
    match section:
        case config.Weighted(by="examples", cap=None):
            return float
        case config.Weighted(by="examples", cap=int() as cap):
            return capped(cap)
    return uniform


def _mean(section: config.Mean) -> Mean:
    match section:
        case config.Weighted():
            return weighted_mean
        case config.Median():
            return coordinate_median
        case config.Trimmed(fraction=fraction):
            return TrimmedMean(fraction)
        case config.Krum(byzantine=byzantine, keep=keep):
            return Krum(byzantine, keep)
        case config.Clipped(norm=norm):
            return ClippedMean(norm)


def _try_out(network: nn.Module, name: str, data: Dataset) -> None:
    """Refuse a network that does not take this data set's examples."""
    example = data.train.inputs[:2]
    mode = network.training
    try:
        with torch.no_grad():
            outputs = network.eval()(example)
    except (RuntimeError, ValueError, IndexError) as error:
        raise InputError(
            f"model {name} does not take the examples of {data.name}, of shape {tuple(example.shape[1:])}: {error}"
        ) from error
    network.train(mode)
    if outputs.shape != (len(example), data.classes):
        raise InputError(
            f"model {name} gives outputs of shape {tuple(outputs.shape[1:])} an example, "
            f"but {data.name} has {data.classes} classes"
        )


def _from_file(origin: Path, file: str, factory: str) -> nn.Module:
    """What a factory in a file of the user's own returns."""
    path = origin / file
    specification = importlib.util.spec_from_file_location("tacit_run_model", path)
    if specification is None or specification.loader is None or not path.is_file():
        raise InputError(f"model.name names {path}, which is not a Python file")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    made = getattr(module, factory, None)
    if not callable(made) or not isinstance(network := made(), nn.Module):
        raise InputError(f"{path} has no function {factory} that returns a torch.nn.Module")
    return network
