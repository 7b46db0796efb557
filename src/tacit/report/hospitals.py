"""The report of a training among hospitals: each hospital's figures under every way of training, beside one another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from tacit.federated.history import RoundRecord
from tacit.report import html, sections
from tacit.report.units import duration, plural, size


@dataclass(frozen=True)
class Scores:
    """One model at every hospital.

    Args:
        way: how it was trained.
        accuracy: on each hospital's patients that were kept back, in the order of the hospitals.
        auc: likewise; ``None`` where all of them have the same diagnosis.
        pooled: accuracy on all of them together.
        epsilon: spent by the hospital that spent most; ``None`` without privacy.
        source: where published figures are from; empty for those of this run.
    """

    way: str
    accuracy: tuple[float, ...]
    auc: tuple[float | None, ...]
    pooled: float
    epsilon: float | None = None
    source: str = ""


@dataclass(frozen=True)
class Trained:
    """What came of one kind of model.

    Args:
        model: its name.
        scores: of every way of training it.
        history: of the training over sites.
        seconds: that it took.
    """

    model: str
    scores: tuple[Scores, ...]
    history: tuple[RoundRecord, ...]
    seconds: float


@dataclass(frozen=True)
class HospitalsReport:
    """A training among hospitals, and what came after.

    Args:
        hospitals: their names.
        trained: a kind of model each.
        journal: the last lines of one hospital's journal.
        handed_over: what was done with the trained model, in words; empty for nothing.
        seconds: of everything.
        settings: of the run, by name.
        versions: of software and machine, by name.
    """

    hospitals: tuple[str, ...]
    trained: tuple[Trained, ...]
    journal: tuple[str, ...]
    handed_over: str
    seconds: float
    settings: Mapping[str, str]
    versions: Mapping[str, str]


def render(report: HospitalsReport) -> str:
    """Make the page: a whole HTML document that needs nothing else."""
    written = [
        *(_trained(trained, report.hospitals) for trained in report.trained),
        sections.section("What one hospital wrote down", _journal(report.journal)),
        sections.provenance(report.settings, report.versions),
    ]
    if report.handed_over:
        written.insert(-2, sections.section("Handed over", f"<p>{escape(report.handed_over)}</p>"))
    return html.page("hospitals", _header(report), written)


def write(report: HospitalsReport, path: html.StrPath) -> None:
    """Write the page, all of it or nothing.

    Raises:
        InputError: nothing can be written there.
    """
    html.write_page(render(report), path)


def _header(report: HospitalsReport) -> str:
    names = ", ".join(report.hospitals[:-1]) + f" and {report.hospitals[-1]}"
    return f"""<header>
<p class="kicker">tacit: a training among hospitals</p>
<h1>Train together, <span>keep it apart.</span></h1>
<p class="lead">{escape(names)} trained models of heart disease in processes of their own, over Flower. Their
features were standardised, their updates summed and the models tried by secure sums; noise in the updates protects
single patients. All of it took {duration(report.seconds)}.</p>
</header>"""


def _trained(trained: Trained, hospitals: Sequence[str]) -> str:
    history = trained.history
    lost = sum(len(record.lost) for record in history)
    sent = size(sum(record.bytes_up for record in history))
    text = f"""<p>{plural(len(history), "round")} in {duration(trained.seconds)}; the hospitals sent {sent}. Hospitals
lost on the way: {lost}.</p>
{table(trained.scores, hospitals)}"""
    return sections.section(trained.model, text)


def table(scores: Sequence[Scores], hospitals: Sequence[str]) -> str:
    """Accuracy and AUC of every way of training, hospital by hospital."""
    heads = "".join(f"<th>{escape(name)}</th>" for name in (*hospitals, "all patients", "ε"))
    rows = "\n".join(_row(way) for way in scores)
    cited = dict.fromkeys(way.source for way in scores if way.source)
    sources = "".join(f'<p class="note">{escape(source)}.</p>\n' for source in cited)
    return f"""<div class="scroll"><table>
<thead><tr><th>trained</th>{heads}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
<p class="note">Accuracy on patients that were kept back, with the area under the ROC curve in parentheses. ε is what
the hospital has spent that spent most: over Flower, where each keeps one account, on this model and those before it.
The sums that standardise features and try models carry no noise, and no ε counts them.</p>
{sources}"""


def _row(scores: Scores) -> str:
    cells = "".join(
        f"<td>{accuracy:.1%}{'' if auc is None else f' ({auc:.2f})'}</td>"
        for accuracy, auc in zip(scores.accuracy, scores.auc, strict=True)
    )
    epsilon = "–" if scores.epsilon is None else f"{scores.epsilon:.1f}"
    pooled = "–" if math.isnan(scores.pooled) else f"{scores.pooled:.1%}"
    return f"<tr><td>{escape(scores.way)}</td>{cells}<td>{pooled}</td><td>{epsilon}</td></tr>"


def _journal(lines: Sequence[str]) -> str:
    return f'<pre class="scroll">{escape(chr(10).join(lines))}</pre>'
