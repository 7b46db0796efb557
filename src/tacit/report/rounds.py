"""The rounds of a training one by one, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from html import escape

from tacit.federated.history import RoundRecord
from tacit.report.units import count, percent, plural, size

_NOTHING = "–"
_ALL = 12
"""Tables of more rounds are folded away."""

_COLUMNS: dict[str, Callable[[RoundRecord], str | None]] = {
    "accuracy": lambda r: None if r.accuracy is None else percent(r.accuracy),
    "in the mean": lambda r: count(len(r.cohort)),
    "lost": lambda r: _lost(r),
    "sum": lambda r: r.secure_sum.protocol if r.secure_sum else None,
    "at least": lambda r: count(r.secure_sum.minimum) if r.secure_sum else None,
    "to reveal": lambda r: (
        f"{count(r.secure_sum.threshold)} of {count(r.secure_sum.holders)}" if r.secure_sum else None
    ),
    "ε": lambda r: None if r.epsilon is None else f"{r.epsilon:.3f}",
    "to the server": lambda r: size(r.bytes_up),
    "to clients": lambda r: size(r.bytes_down),
    "note": lambda r: escape(r.note) or None,
}


def table(history: Sequence[RoundRecord]) -> str:
    """Write a row a round; columns in which no round has anything are left out."""
    cells = {name: [value(record) for record in history] for name, value in _COLUMNS.items()}
    shown = {name: column for name, column in cells.items() if any(column)}
    head = "".join(f'<th scope="col">{name}</th>' for name in shown)
    rows = "\n".join(
        f'<tr><th scope="row">{count(record.round)}</th>'
        + "".join(f"<td>{column[at] or _NOTHING}</td>" for column in shown.values())
        + "</tr>"
        for at, record in enumerate(history)
    )
    summed = any(record.secure_sum for record in history)
    says = (
        " “At least” is the fewest updates that clients let into a sum; “to reveal”, how many of those who hold shares "
        "of a client's secret, or of its update, it takes to have it."
        if summed
        else ""
    )
    written = f"""<figure class="table">
<div class="scroll"><table class="layers rounds">
<thead><tr><th scope="col">round</th>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
<figcaption>Round by round. “In the mean” is how many clients' updates were used.{says}</figcaption>
</figure>"""
    if len(history) <= _ALL:
        return written
    return f"<details>\n<summary>{plural(len(history), 'round')}, one by one</summary>\n{written}\n</details>"


def _lost(record: RoundRecord) -> str | None:
    reasons = Counter(record.lost.values()).most_common()
    if not reasons:
        return None
    detail = "; ".join(f"{count(number)} {escape(reason)}" for reason, number in reasons)
    return f'<span title="{detail}">{count(len(record.lost))}</span>'
