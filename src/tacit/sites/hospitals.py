"""Four hospitals train together on one machine, in real processes, on the files of the heart disease data set.

The preparation is FLamby's (Ogier du Terrail et al. 2022), see `tacit.data.heart_disease`. Each hospital's process has
its own file and nothing else; the coordinator has none. Beside what comes of it stand the same training in one process,
without privacy, on all patients pooled, at each hospital alone, and the figures that FLamby's authors published.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from tacit.data.examples import Examples
from tacit.data.heart_disease import CATEGORIES, COLUMNS, FILES, SPARSE, TRAINING_FRACTION, heart_files
from tacit.federated.evaluation import evaluate, ranking_quality
from tacit.federated.history import RoundRecord
from tacit.report.hospitals import HospitalsReport, Scores, Trained
from tacit.runs import build, config
from tacit.runs.data import Holdings, holdings, signature
from tacit.runs.train import OnBoard, OnRound, start, unwatched
from tacit.runtimes.simulation import federate
from tacit.sites.handover import hand_over
from tacit.sites.launch import Federation, processes

NAMES = ("cleveland", "hungary", "switzerland", "long-beach")
MODELS = {"logistic": 0.1, "mlp": 0.2}
"""The models that are trained, with the hospitals' learning rates."""
TAIL = 12

_CONFIG = """\
seed = {seed}
runtime = "{runtime}"

[data]
dataset = "heart"

[split]
name = "natural"

[model]
name = "{model}"

[algorithm]
name = "fedavg"
lr = {lr}
batch_size = 16

[selection]
name = "uniform"
cohort = 4

[rounds]
number = {rounds}
evaluate_every = {rounds}

[secure_sum]
most_examples = 256
"""
_PRIVACY = """
[privacy]
level = "record"
clip = 1.0
delta = 1e-3
noise_multiplier = {noise}
"""
_DATA = """\
format = "csv"
path = {path}
columns = {columns}
drop = {drop}
missing = "?"
target = "num"
above = 0
training = {training}
categories = {{ {categories} }}
"""
_ALLOW = """\
models = ["logistic", "mlp"]
privacy = "record"
epsilon = {epsilon}
delta = 1e-3
disclose = ["epsilon", "metrics"]
unnoised = ["features", "evaluation"]
"""
_FLAMBY = (
    "FLamby's published results, logistic regression, seed 42, no privacy (flamby/results/results_benchmark_fed_heart_"
    "disease/heart_seed42.csv at commit 4f6e940 of github.com/owkin/FLamby); as many patients are kept back as here, "
    "but others"
)
PUBLISHED = (
    Scores("FLamby, pooled", (0.7788, 0.7865, 0.8125, 0.8222), (None,) * 4, 0.7913, source=_FLAMBY),
    Scores("FLamby, FedAvg", (0.7596, 0.8202, 0.6875, 0.7556), (None,) * 4, 0.7756, source=_FLAMBY),
    Scores("FLamby, each alone", (0.75, 0.7528, 0.8125, 0.7333), (None,) * 4, float("nan"), source=_FLAMBY),
)


@dataclass(frozen=True)
class Setting:
    """What the hospitals do.

    Args:
        rounds: of each model.
        noise: standard deviation of the noise over the clipping norm of one patient's gradient.
        epsilon: each hospital's budget for both models together.
        seed: of everything that is not secret.
    """

    rounds: int = 15
    noise: float = 2.0
    epsilon: float = 20.0
    seed: int = 0

    def text(self, model: str, runtime: str, private: bool = True) -> str:
        """The configuration of one model's training."""
        text = _CONFIG.format(seed=self.seed, runtime=runtime, model=model, lr=MODELS[model], rounds=self.rounds)
        return text + _PRIVACY.format(noise=self.noise) if private else text


@dataclass(frozen=True)
class Progress:
    """Who is told of what.

    Args:
        tell: in words, what begins.
        on_round, on_board: see `tacit.runs.train.start`.
    """

    tell: Callable[[str], None] = lambda text: None
    on_round: OnRound | None = None
    on_board: OnBoard = unwatched


def write_federation(folder: Path, data_dir: Path | None, setting: Setting) -> Federation:
    """Keys and files of four hospitals, the SuperLink and the coordinator, in a folder.

    Raises:
        DataError: the hospitals' data is not there.
    """
    federation = Federation.make(folder, NAMES)
    for name, path in zip(NAMES, heart_files(data_dir), strict=True):
        federation.site(name, site_data(path), _ALLOW.format(epsilon=setting.epsilon))
    return federation


def site_data(path: Path) -> str:
    """The TOML of ``[data]`` for one hospital's file."""
    categories = ", ".join(f"{name} = {list(codes)}" for name, codes in CATEGORIES.items())
    return _DATA.format(
        path=json.dumps(str(path.absolute())),
        columns=json.dumps(COLUMNS),
        drop=json.dumps(SPARSE),
        training=TRAINING_FRACTION,
        categories=categories,
    )


def run(folder: Path, data_dir: Path | None, setting: Setting, progress: Progress) -> HospitalsReport:
    """Train, and compare.

    Args:
        folder: for everything; made if it is missing.
        data_dir: where the hospitals' files are; else ``TACIT_DATA``.
        setting: what is trained.
        progress: who is told.

    Raises:
        DataError: the data is not there.
        PeerError: a process did not start, or the SuperLink failed.
        TrainingError: round after round failed.
    """
    began = time.monotonic()
    federation = write_federation(folder, data_dir, setting)
    held = holdings(config.parse(setting.text("logistic", "simulation")), folder)
    trained = []
    with processes(federation):
        for model in MODELS:
            progress.tell(f"the hospitals train {model}")
            trained.append(_trained(model, folder, setting, progress))
    progress.tell("the same in one process, and other ways of training")
    compared = [_compared(one, folder, held, setting) for one in trained]
    progress.tell("the model goes to alice and bob; a clinic outside of the federation asks them")
    handed = hand_over(_loaded("logistic", folder, setting), (held.tests or ())[0], folder / "parties")
    return HospitalsReport(
        hospitals=tuple(FILES),
        trained=tuple(compared),
        journal=tuple(federation.journal(NAMES[0]).read_text(encoding="utf-8").splitlines()[-TAIL:]),
        handed_over=handed.words,
        seconds=time.monotonic() - began,
        settings={"rounds": str(setting.rounds), "noise": str(setting.noise), "seed": str(setting.seed)},
        versions=_versions(),
    )


def _trained(model: str, folder: Path, setting: Setting, progress: Progress) -> Trained:
    """One model, by the hospitals' processes."""
    began = time.monotonic()
    path = folder / f"{model}.toml"
    path.write_text(setting.text(model, "flower"), encoding="utf-8")
    outcome = start(path, folder / model, progress.on_round, None, progress.on_board)
    return Trained(model, (), outcome.history, time.monotonic() - began)


def _compared(trained: Trained, folder: Path, held: Holdings, setting: Setting) -> Trained:
    """The trained model beside other ways to train one like it."""
    model, tests = trained.model, held.tests or ()
    made = _loaded(model, folder, setting)
    epsilon = trained.history[-1].epsilon
    scores = [_scores("hospitals over Flower, private", made, tests, epsilon)]
    for way, private in (("the same in one process", True), ("in one process, no privacy", False)):
        text = setting.text(model, "simulation", private)
        found, history = _simulated(text, folder, f"{model}-{'private' if private else 'clear'}")
        scores.append(_scores(way, found, tests, history[-1].epsilon))
    everybody = Examples(
        torch.cat([own.inputs for own in held.clients]), torch.cat([own.targets for own in held.clients])
    )
    scores.append(_scores("all patients pooled, no privacy", _alone(model, everybody, setting), tests))
    alone = [_scores("", _alone(model, own, setting), tests) for own in held.clients]
    own_accuracy = tuple(score.accuracy[index] for index, score in enumerate(alone))
    own_auc = tuple(score.auc[index] for index, score in enumerate(alone))
    share = torch.tensor([float(len(test)) for test in tests])
    pooled = float((torch.tensor(own_accuracy) * share).sum() / share.sum())
    scores.append(Scores("each hospital alone, no privacy", own_accuracy, own_auc, pooled))
    published = PUBLISHED if model == "logistic" else ()
    return replace(trained, scores=(*scores, *published))


def _simulated(text: str, folder: Path, name: str) -> tuple[nn.Module, Sequence[RoundRecord]]:
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    outcome = start(path, folder / name)
    made = build.model(outcome.experiment.config, outcome.experiment.data, folder)
    made.load_state_dict(load_file(folder / name / "model.safetensors"))
    return made, outcome.history


def _alone(model: str, examples: Examples, setting: Setting) -> nn.Module:
    """A model trained on one set of examples, with as many passes over it as the hospitals make over theirs."""
    settings = config.parse(setting.text(model, "simulation", private=False))
    network = _blank(model, setting)
    algorithm = build.algorithm(settings, network)
    trained = federate(network, [examples], algorithm=algorithm, rounds=setting.rounds, cohort=1, seed=setting.seed)
    return trained.model


def _loaded(model: str, folder: Path, setting: Setting) -> nn.Module:
    """What the hospitals trained."""
    made = _blank(model, setting)
    made.load_state_dict(load_file(folder / model / "model.safetensors"))
    return made


def _blank(model: str, setting: Setting) -> nn.Module:
    settings = config.parse(setting.text(model, "simulation"))
    return build.model(settings, signature(settings).blank(), Path())


def _scores(way: str, model: nn.Module, tests: Sequence[Examples], epsilon: float | None = None) -> Scores:
    accuracy = tuple(evaluate(model, test)[1] for test in tests)
    auc = tuple(ranking_quality(model, test) for test in tests)
    counts = [len(test) for test in tests]
    pooled = sum(found * count for found, count in zip(accuracy, counts, strict=True)) / sum(counts)
    return Scores(way, accuracy, auc, pooled, epsilon)


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("tacit", "torch", "flwr")}
    return {**packages, "python": platform.python_version(), "machine": platform.machine()}
