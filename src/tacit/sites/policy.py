"""What a site agrees to: every reason it has against taking part, in words that the coordinator is told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from tacit.federated.eligibility import DeviceStatus, Eligibility
from tacit.runs import config
from tacit.runs.data import signature
from tacit.runtimes.flower.messages import Begin, Work
from tacit.sites.config import Allow, Unnoised

BUSY = 0.7
"""A machine whose processors have had more than so much to do each, over the last minute, is in use."""
_PROTECTION = ("none", "central", "distributed", "record")


def objections(allow: Allow, settings: config.Config, begin: Begin) -> tuple[str, ...]:
    """Why this site does not do what it is asked; empty if it does.

    Args:
        allow: what it agrees to.
        settings: of the run.
        begin: what it is asked.
    """
    return (*_of_run(allow, settings), *_of_round(allow, settings, begin))


def waiting(allow: Allow, asked: Eligibility | None = None) -> tuple[str, ...]:
    """Why this machine does not take part at this moment: the site's own conditions, and those of a run."""
    status = status_now()
    reasons = [*allow.eligibility.refusals(status), *(asked.refusals(status) if asked else ())]
    return tuple(dict.fromkeys(reasons))


def asked_for(settings: config.Config) -> Eligibility | None:
    """What a run's ``[devices]`` ask of whoever takes part."""
    section = settings.devices
    if section is None:
        return None
    return Eligibility(section.idle, section.charging, section.unmetered, section.hours, section.battery)


def status_now() -> DeviceStatus:
    """What this machine is doing; one without batteries is charging, and its network counts as unmetered."""
    now = datetime.now()
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    charging, battery = _power(Path("/sys/class/power_supply"))
    return DeviceStatus(
        idle=busy <= BUSY, charging=charging, unmetered=True, hour=now.hour + now.minute / 60, battery=battery
    )


def protection(settings: config.Config) -> str:
    """What protects single records in a run: the name that `Allow.privacy` has for it."""
    section = settings.privacy
    if section is None:
        return "none"
    return "central" if section.level == "client" else section.level


def _of_run(allow: Allow, settings: config.Config) -> Iterator[str]:
    if settings.model.name not in allow.models:
        yield f"its model {settings.model.name!r} is not among those allowed here: {', '.join(allow.models)}"
    found = protection(settings)
    if _PROTECTION.index(found) < _PROTECTION.index(allow.privacy):
        yield f"records must be protected by privacy of kind {allow.privacy!r} here, and the run has {found!r}"
    if allow.epsilon is not None and found != "record":
        yield "this site keeps a privacy budget for its records, which takes level = 'record' in the run's [privacy]"
    if settings.privacy is not None and settings.privacy.noise_seed is not None and allow.privacy != "none":
        yield "its noise comes from a seed that others know, which protects nobody"
    if settings.secure_sum is None and not allow.clear:
        yield "it has no secure sum: the coordinator would see this site's own update"
    if settings.secure_sum is not None and settings.secure_sum.protocol != "masked":
        yield f"its secure sum is {settings.secure_sum.protocol!r}; between sites it is 'masked'"
    if signature(settings).standardised and not _may_enter(allow, "features"):
        yield (
            "it adds up features without noise to standardise them, which no ε counts: a site that agrees says "
            "unnoised = ['features', …]"
        )
    if settings.rounds.number > allow.rounds:
        yield f"it has {settings.rounds.number} rounds, and at most {allow.rounds} are allowed here"


def _of_round(allow: Allow, settings: config.Config, begin: Begin) -> Iterator[str]:
    if bool(begin.frame) != (settings.secure_sum is not None):
        yield "what is asked does not fit the run: it and its configuration differ on whether there is a secure sum"
    if begin.work == "evaluate" and not _may_enter(allow, "evaluation"):
        yield "how the model does on this site's records is not added up without noise"
    if not _plausible(begin.work, begin.round, settings.rounds.number):
        yield f"round {begin.round} of {settings.rounds.number} is not a round of this run"
    if reasons := waiting(allow, asked_for(settings)):
        yield f"not now: {', '.join(reasons)}"


def _may_enter(allow: Allow, what: Unnoised) -> bool:
    """Whether records may enter a sum without noise; where they are not protected at all, no sum is an exception."""
    return allow.privacy == "none" or what in allow.unnoised


def _plausible(work: Work, round: int, rounds: int) -> bool:
    return 1 <= round <= rounds if work == "train" else round <= rounds


def _power(folder: Path) -> tuple[bool, float]:
    """Whether the machine draws power from the mains, and how full its battery is; (true, 1) if it has none."""
    charging, battery = True, 1.0
    for supply in sorted(folder.glob("BAT*")):
        try:
            charging &= (supply / "status").read_text().strip() != "Discharging"
            battery = min(battery, int((supply / "capacity").read_text()) / 100)
        except (OSError, ValueError):
            continue
    return charging, battery
