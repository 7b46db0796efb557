"""What a run would have this site compute, send and spend; nothing is trained, and nobody is asked."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from tacit.dp.ledger import Ledger
from tacit.errors import BudgetExceeded
from tacit.federated.privacy import RecordDP
from tacit.identity import Identity, key_text
from tacit.runs import build, config
from tacit.runs.data import signature
from tacit.runtimes.flower.federation_file import FederationFile
from tacit.runtimes.flower.messages import FIRST, NONCE_BYTES, Begin, Terms
from tacit.sites import policy
from tacit.sites.config import SiteFile
from tacit.sites.memory import SiteMemory
from tacit.sites.work import Holding, Study


def preview(path: Path, run: Path) -> Mapping[str, str]:
    """A run's configuration against a site's file, in words by topic.

    Args:
        path: of site.toml.
        run: of the configuration, as the coordinator has announced it.

    Raises:
        InputError: a file says what it cannot.
        DataError: the site's data cannot be read, or is not such as the run is for.
    """
    file = SiteFile.read(path)
    federation, identity = FederationFile.read(file.federation), Identity.load(file.identity)
    settings, text = config.read(run)
    holding = Holding(*file.examples())
    secret = settings.secure_sum is not None
    terms = Terms(bytes(len(identity.public)), text, federation.keys)
    first = Begin(terms, 1, bytes(NONCE_BYTES), "train", FIRST, b"?" if secret else b"", 0)
    against = policy.objections(file.allow, settings, first)
    shown = {
        "coordinator": key_text(federation.coordinator),
        "sites": ", ".join(site.name for site in federation.sites),
        "data": f"{len(holding.train)} examples to train on, {len(holding.kept)} kept back to try models on",
        "refused": "; ".join(against) or "no: this site would take part",
    }
    index = federation.keys.index(identity.public)
    with closing(Ledger()) as nobodys:
        study = Study.of(terms, settings, index, holding, file.folder, nobodys, file.allow.minimum, file.allow.epsilon)
        costs = _privacy(study, settings, file)
    state = study.fresh
    batch = getattr(settings.algorithm, "batch_size", "all")
    epochs = getattr(settings.algorithm, "epochs", 1)
    shown |= {
        "trains": f"{settings.model.name}, {state.layout.size:,} parameters",
        "how": f"{type(settings.algorithm).__name__}, {epochs} passes a round in batches of {batch}, up to "
        f"{settings.rounds.number} rounds",
        "receives": f"{state.nbytes:,} bytes of model a round",
        "sends": _sends(study, len(federation.sites)),
        "discloses": ", ".join(file.allow.disclose) or "nothing beside",
        "adds up": _unnoised(settings, file),
        "privacy": costs,
    }
    return shown


def _sends(study: Study, sites: int) -> str:
    if study.secure_mean is None:
        return f"its own update of {study.fresh.layout.size:,} numbers, which the coordinator sees"
    encoding = study.contents(study.fresh, sites).encoding
    size = -(-encoding.ring.bits * encoding.length // 8)
    return (
        f"a masked vector of {encoding.length:,} numbers of {encoding.ring.bits} bits, {size:,} bytes; the coordinator "
        f"sees sums of at least {study.minimum} sites only"
    )


def _unnoised(settings: config.Config, file: SiteFile) -> str:
    """What is summed without noise."""
    wanted = ["moments of features"] if signature(settings).standardised else []
    if settings.rounds.evaluate_every and ("evaluation" in file.allow.unnoised or file.allow.privacy == "none"):
        wanted.append("how the model does on what is kept back")
    return f"without noise: {', '.join(wanted) or 'nothing'}"


def _privacy(study: Study, settings: config.Config, file: SiteFile) -> str:
    privacy = build.privacy(settings)
    if privacy is None:
        return "none: updates and sums can tell of single records"
    if study.private is None or not isinstance(privacy, RecordDP):
        return f"by noise of kind {policy.protection(settings)!r}, for which this site keeps no account"
    taken, rounds = 0, settings.rounds.number
    try:
        while taken < rounds and not study.private.spend(taken + 1, [0]):
            taken += 1
    except BudgetExceeded:
        pass  # the last round that it can afford
    budget = "" if file.allow.epsilon is None else f" of this site's budget of {file.allow.epsilon:g}"
    epsilon = study.private.spent().epsilon
    return (
        f"noise at this site: ε = {epsilon:.3g} at δ = {privacy.delta:g} after {taken} of {rounds} rounds; "
        f"ε = {_spent(file, privacy):.3g}{budget} is spent on earlier runs"
    )


def _spent(file: SiteFile, privacy: RecordDP) -> float:
    path = SiteMemory(file.state).ledger
    if not path.exists():
        return 0.0
    with closing(Ledger(path)) as ledger:
        return max((ledger.epsilon(name, privacy.delta, privacy.accountant) for name in ledger.subjects), default=0.0)
