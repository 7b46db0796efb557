"""What a run's TOML file may say: every section and key, its type and its default.

`docs/training.md` documents each of them. An unknown section or key is refused, and so is a value of the wrong type;
values out of range are refused by what they configure, before anything is trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from tacit import toml_file


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A section of the file. Those with a ``name`` have the keys of what is named, and no others."""


class Data(_Section, frozen=True):
    """The examples, and which part of each client's its own evaluation keeps back."""

    dataset: Literal["digits", "mnist", "heart", "sites"] = "digits"
    dir: str | None = None
    held_out: float = 0.0
    shape: tuple[int, ...] | None = None
    classes: int | None = None
    standardise: bool = False


class Iid(_Section, tag="iid", tag_field="name", frozen=True):
    """Equal parts at random."""

    clients: int = 10


class Dirichlet(_Section, tag="dirichlet", tag_field="name", frozen=True):
    """Equal parts, each with its own mixture of classes."""

    clients: int = 10
    alpha: float = 0.5


class Shards(_Section, tag="shards", tag_field="name", frozen=True):
    """A few classes each."""

    clients: int = 10
    shards_per_client: int = 2


class Quantity(_Section, tag="quantity", tag_field="name", frozen=True):
    """Parts of very different sizes."""

    clients: int = 10
    alpha: float = 0.5


class Natural(_Section, tag="natural", tag_field="name", frozen=True):
    """As the data set itself is divided: for ``heart``, a client for each of the four hospitals."""


class Model(_Section, frozen=True):
    """What is trained."""

    name: str = "2nn"
    initial: Literal["normal", "xavier", "he", "default"] = "he"
    weights: str | None = None


class _Local(_Section, frozen=True):
    lr: float = 0.1
    batch_size: int | Literal["all"] = 10
    epochs: int = 1


class FedSgd(_Section, tag="fedsgd", tag_field="name", frozen=True):
    """One gradient of all the examples a client and round."""

    lr: float = 0.1


class FedAvg(_Local, tag="fedavg", tag_field="name", frozen=True):
    """Federated averaging."""


class FedProx(_Local, tag="fedprox", tag_field="name", frozen=True):
    """Federated averaging with a pull towards the global model."""

    proximal: float = 0.01


class Scaffold(_Local, tag="scaffold", tag_field="name", frozen=True):
    """Federated averaging with control variates."""


class FedPer(_Local, tag="fedper", tag_field="name", kw_only=True, frozen=True):
    """Federated averaging of all but the layers that are named."""

    personal: tuple[str, ...]


class FedBn(_Local, tag="fedbn", tag_field="name", frozen=True):
    """Federated averaging of all but batch normalisation."""


class Ditto(_Local, tag="ditto", tag_field="name", frozen=True):
    """Federated averaging, and a personal model a client beside it."""

    proximal: float = 0.1


class FedBuff(_Local, tag="fedbuff", tag_field="name", frozen=True):
    """Asynchronous federated averaging; needs ``[devices]``."""

    buffer: int = 10
    concurrency: int = 100


class Server(_Section, frozen=True):
    """The server's optimizer on the pseudo-gradient."""

    optimizer: Literal["sgd", "adam", "adagrad", "yogi"] = "sgd"
    lr: float = 1.0
    momentum: float = 0.0


class Weighted(_Section, tag="weighted", tag_field="name", frozen=True):
    """The mean weighted by examples, by nothing, or by examples up to a cap."""

    by: Literal["examples", "uniform"] = "examples"
    cap: int | None = None


class Median(_Section, tag="median", tag_field="name", frozen=True):
    """The median of each entry."""


class Trimmed(_Section, tag="trimmed", tag_field="name", frozen=True):
    """The mean of each entry without the largest and smallest."""

    fraction: float = 0.1


class Krum(_Section, tag="krum", tag_field="name", frozen=True):
    """The updates closest to the others."""

    byzantine: int
    keep: int = 1


class Clipped(_Section, tag="clipped", tag_field="name", frozen=True):
    """The mean of updates clipped in norm."""

    norm: float


Mean = Weighted | Median | Trimmed | Krum | Clipped


class Uniform(_Section, tag="uniform", tag_field="name", frozen=True):
    """A number of clients, each as likely as another."""

    cohort: int = 5


class Poisson(_Section, tag="poisson", tag_field="name", frozen=True):
    """Each client with a probability of its own."""

    rate: float


class ByExamples(_Section, tag="examples", tag_field="name", frozen=True):
    """A number of clients, those with more examples more likely."""

    cohort: int = 5


class AvailabilityAware(_Section, tag="availability", tag_field="name", frozen=True):
    """A number of clients, those that were seldom taken first."""

    cohort: int = 5


class Rounds(_Section, frozen=True):
    """For how long, and when the model is tried."""

    number: int = 30
    evaluate_every: int = 1
    evaluate_clients_every: int = 0
    target_accuracy: float | None = None
    patience: int | None = None
    checkpoint_every: int = 1


class Devices(_Section, frozen=True):
    """Simulated devices: when they may train, how fast they are, and how the server copes."""

    trace: str | None = None
    idle: bool = True
    charging: bool = True
    unmetered: bool = True
    hours: tuple[float, float] | None = None
    battery: float = 0.0
    minimum: int = 1
    over_selection: float = 1.0
    deadline: float | None = None
    close_at: int | None = None


class Float16(_Section, tag="float16", tag_field="scheme", frozen=True):
    """Half the bytes."""


class Quantise(_Section, tag="quantise", tag_field="scheme", frozen=True):
    """Stochastic rounding to a few bits an entry."""

    bits: int = 8


class TopK(_Section, tag="topk", tag_field="scheme", frozen=True):
    """The largest entries only, the rest kept for later."""

    fraction: float = 0.01


class SecureSum(_Section, frozen=True):
    """The server sees the sum of the updates, and no single one."""

    protocol: Literal["masked", "shared"] = "masked"
    clip: float | None = None
    bits: int = 16
    minimum: int | None = None
    verified: bool = False
    most_examples: int | None = None


class Privacy(_Section, frozen=True):
    """Differential privacy."""

    level: Literal["client", "record", "distributed"] = "client"
    clip: float = 1.0
    delta: float = 1e-5
    noise_multiplier: float | None = None
    target_epsilon: float | None = None
    budget: float | None = None
    accountant: Literal["rdp", "pld"] = "rdp"
    quantile: float | None = None
    participations: int | None = None
    noise: Literal["skellam", "discrete-gaussian"] | None = None
    colluding: int | None = None
    noise_seed: int | None = None


class Execution(_Section, frozen=True):
    """What does the work on this machine, and what is left behind beside the history."""

    processes: int = 1
    solver: Literal["auto", "plain", "stacked"] = "auto"
    tensorboard: bool = False


class Config(_Section, frozen=True):
    """A whole run."""

    seed: int = 0
    runtime: Literal["simulation", "flower"] = "simulation"
    data: Data = Data()
    split: Iid | Dirichlet | Shards | Quantity | Natural = Iid()
    model: Model = Model()
    algorithm: FedSgd | FedAvg | FedProx | Scaffold | FedPer | FedBn | Ditto | FedBuff = FedAvg()
    server: Server = Server()
    mean: Mean | None = None
    selection: Uniform | Poisson | ByExamples | AvailabilityAware = Uniform()
    rounds: Rounds = Rounds()
    devices: Devices | None = None
    compression: Float16 | Quantise | TopK | None = None
    secure_sum: SecureSum | None = None
    privacy: Privacy | None = None
    execution: Execution = Execution()


def parse(text: str, name: str = "the config") -> Config:
    """The configuration in a TOML text.

    Args:
        text: the file's content.
        name: what to call it in an error.

    Raises:
        InputError: it is not TOML, has a section or key that does not exist, or a value of the wrong type.
    """
    return toml_file.typed(toml_file.tables(text, name), Config, "", name, "docs/training.md")


def read(path: Path) -> tuple[Config, str]:
    """The configuration in a file, and the file's text.

    Raises:
        InputError: the file cannot be read, or see `parse`.
    """
    text = toml_file.read(path)
    return parse(text, str(path)), text
