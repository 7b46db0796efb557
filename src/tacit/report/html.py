"""The HTML report of a run: one file that needs nothing else, neither network nor scripts.

``render`` and ``render_training`` make the page, ``write`` puts it on disk. The content security policy of the page
forbids any request.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path

from tacit.errors import InputError
from tacit.report import sections
from tacit.report.data import DemoReport, LayerCost, Sample, TrainingReport

__all__ = ["DemoReport", "LayerCost", "Sample", "TrainingReport", "render", "render_training", "write"]


StrPath = str | os.PathLike[str]


def render(report: DemoReport) -> str:
    """Make the page of a demonstration.

    Returns:
        A whole HTML document; the same report gives the same text.

    Raises:
        InputError: matplotlib, which comes with ``tacit[demo]``, is not installed.
    """
    written = (
        sections.training(report.history, report.label_counts, report.seconds_federated, report.secure_sum),
        sections.predicting(report),
        sections.parties(report),
        sections.cost(report),
        sections.provenance(report.settings, report.versions),
    )
    return page(f"{report.model} on {report.dataset}", sections.header(report), written)


def render_training(report: TrainingReport) -> str:
    """Make the page of a training run.

    Returns:
        A whole HTML document; the same report gives the same text.

    Raises:
        InputError: matplotlib, which comes with ``tacit[demo]``, is not installed.
    """
    written = (
        sections.training(report.history, report.label_counts, report.seconds, report.secure_sum),
        sections.circumstances(report.history),
        sections.provenance(report.settings, report.versions),
    )
    return page(f"{report.model} on {report.dataset}", sections.training_header(report), written)


def page(title: str, header: str, written: Sequence[str]) -> str:
    """A whole HTML document of a header and sections.

    Args:
        title: of the window.
        header, written: HTML.
    """
    style = resources.files("tacit.report").joinpath("style.css").read_text(encoding="utf-8")
    body = "\n".join(written)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>tacit: {escape(title)}</title>
<style>
{style}</style>
</head>
<body>
{header}
<main>
{body}
</main>
</body>
</html>
"""


def write(report: DemoReport | TrainingReport, path: StrPath) -> None:
    """Write the report's page to ``path``, all of it or nothing: a reader never finds half a file there.

    Raises:
        InputError: nothing can be written there, or matplotlib is not installed.
    """
    write_page(render(report) if isinstance(report, DemoReport) else render_training(report), path)


def write_page(text: str, path: StrPath) -> None:
    """Write a page to ``path``, all of it or nothing.

    Raises:
        InputError: nothing can be written there.
    """
    target = Path(path)
    draft = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    try:
        with draft.open("x", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, target)
    except OSError as error:
        raise InputError(f"cannot write the report to {target}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # after success there is no draft left
            draft.unlink()
