"""The HTML report: well formed, complete, self-contained, and safe whatever the names in it."""

from __future__ import annotations

import dataclasses
import os
import re
import struct
import sys
import zlib
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from tacit.errors import InputError
from tacit.federated.history import RoundRecord
from tacit.federated.secure_sum.interface import Safeguards
from tacit.report import plots, rounds, sections, units
from tacit.report.html import DemoReport, LayerCost, Sample, render, write

VOID = {"meta", "img", "br", "link", "input", "hr"}
HOSTILE = """<script>alert("x")</script>'&"""


def sample(label: int = 3, plaintext: int = 3, encrypted: int = 3, classes: int = 10) -> Sample:
    image = torch.zeros(28, 28)
    image[4:24, 12:16] = 1.0
    alice = torch.frombuffer(bytearray(os.urandom(28 * 28 * 8)), dtype=torch.int64).reshape(28, 28)
    bob = (image * 2**16).to(torch.int64) - alice
    probabilities = torch.full((classes,), 0.02)
    probabilities[encrypted] = 1 - 0.02 * (classes - 1)
    return Sample(image, alice, bob, label, plaintext, encrypted, probabilities)


def record(number: int, accuracy: float | None = 0.9, loss: float | None = 0.3) -> RoundRecord:
    return RoundRecord(number, (0, 1), 200, loss, accuracy, 1_000_000, 2_000_000, 0.5)


def report(clients: int = 3, **changes: object) -> DemoReport:
    made = DemoReport(
        dataset="digits",
        model="MLP",
        secure_sum=True,
        history=[record(1, 0.5, 1.2), record(2, None, None), record(3, 0.9, 0.3)],
        label_counts=torch.arange(clients * 10).reshape(clients, 10),
        confusion=torch.eye(10, dtype=torch.int64) * 12 + torch.eye(10, dtype=torch.int64).roll(1, 1),
        federated_accuracy=0.9731,
        encrypted_accuracy=0.9721,
        agreement=0.9987,
        max_abs_error=0.00031,
        test_images=4321,
        batch=64,
        rounds_per_batch=47,
        bytes_online_per_image=234_000.0,
        bytes_dealt_per_image=1_560_000.0,
        samples=[sample(), sample(5, 5, 5)],
        layers=[
            LayerCost("conv1", "conv2d", 1, 3_000, 9_000, 4.2),
            LayerCost("act", "relu", 46, 10**7, 0, 90.0),
        ],
        seconds_federated=12.3,
        seconds_encrypted=18.0,
        settings={"algorithm": "FedAvg"},
        versions={"torch": "2.13.0"},
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


class Page(HTMLParser):
    """Reads a page, insists that every tag is closed in order, and keeps what it saw."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


def test_page_is_well_formed_and_states_the_figures() -> None:
    page = Page(render(report()))
    for figure in ("97.31%", "97.21%", "99.87%", "4,321", "47", "234 kB", "1.56 MB", "conv2d", "10.0 MB"):
        assert figure in page.text
    for figure in ("94.2 ms", "FedAvg", "2.13.0", "3.1 × 10 −4", "90.0%", "0.3"):
        assert figure in page.text
    assert page.tags.count("svg") == 3
    assert {"header", "main", "section", "figure", "figcaption", "table", "dl"} <= set(page.tags)


def test_page_asks_nothing_of_the_network() -> None:
    text = render(report())
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    for name in ("src", "href", "xlink:href", "srcset", "poster", "data", "action"):
        assert all(value.startswith(("#", "data:image/png;base64,")) for value in page.values(name))
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]*)", text))
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert not re.search(r"https?://", text)


def test_ids_are_unique_and_references_resolve() -> None:
    text = render(report())
    page = Page(text)
    ids = page.values("id")
    assert len(ids) == len(set(ids)) > 0
    wanted = {value[1:] for value in page.values("href")} | set(re.findall(r"url\(#([^)]*)\)", text))
    assert wanted
    assert wanted <= set(ids)


def test_pictures_follow_the_page_and_stay_the_same() -> None:
    made = report()
    assert render(made) == render(made)
    for svg in (plots.accuracy(made.history), plots.loss(made.history), plots.partition(made.label_counts)):
        assert svg is not None
        assert "var(--clear)" in svg
        assert "var(--sans)" in svg
        assert "#fe01" not in svg
        assert "DejaVu" not in svg
        assert "<text" in svg
    text = render(made)
    assert set(re.findall(r"var\((--[a-z-]+)", text)) - {"--p", "--w"} <= set(re.findall(r"(--[a-z-]+):", text))


def test_every_picture_has_a_text() -> None:
    page = Page(render(report()))
    assert page.tags.count("img") == len([value for value in page.values("alt") if value])
    assert page.tags.count("svg") == len([value for value in page.values("aria-label") if value])


def test_hostile_strings_are_shown_and_not_obeyed() -> None:
    layers = [LayerCost(HOSTILE, HOSTILE, 1, 1, 1, 1.0)]
    hostile = {HOSTILE: HOSTILE}
    text = render(report(dataset=HOSTILE, model=HOSTILE, layers=layers, settings=hostile, versions=hostile))
    page = Page(text)
    assert "<script" not in text
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) == 2 + 2 + 2 + 2 + 2  # title and lead (2 each), layer, settings, versions


@pytest.mark.parametrize(
    "history",
    [
        [],
        [record(1, None, None)],
        [record(1)],
        [record(1, float("nan"), float("inf"))],
        [record(1, 0.4, None)],
    ],
    ids=["no round", "none evaluated", "one round", "diverged", "accuracy only"],
)
def test_rounds_may_be_few_or_unevaluated(history: list[RoundRecord]) -> None:
    page = Page(render(report(history=history)))
    known = [r for r in history if r.accuracy is not None and r.accuracy == r.accuracy]
    assert ("No round of this run was evaluated" in page.text) == (not known)


@pytest.mark.parametrize("clients", [1, plots.FEW_CLIENTS, plots.FEW_CLIENTS + 1, 100, plots.MOST_CLIENTS + 5])
def test_any_number_of_clients(clients: int) -> None:
    page = Page(render(report(clients)))
    assert (f"first {plots.MOST_CLIENTS} of {clients} clients" in page.text) == (clients > plots.MOST_CLIENTS)


def test_empty_and_single_edges() -> None:
    confusion = torch.zeros(2, 2, dtype=torch.int64)
    Page(render(report(samples=[sample()], label_counts=torch.zeros(1, 10, dtype=torch.int64))))
    Page(render(report(samples=[], layers=[], settings={}, versions={}, confusion=confusion, test_images=0)))


def test_wrong_and_differing_predictions_are_marked_in_words() -> None:
    good = Page(render(report()))
    assert "is\N{NO-BREAK SPACE}" not in "".join(good.words)
    assert not [kind for kind in good.values("class") if kind.startswith("tile ")]
    page = Page(render(report(samples=[sample(), sample(4, 4, 9), sample(7, 1, 7), sample(8, 6, 6)])))
    kinds = [kind for kind in page.values("class") if kind.startswith("tile")]
    assert kinds == ["tile", "tile wrong differs", "tile differs", "tile wrong"]
    for mark in ("✗ is 4", "≠ clear 4", "≠ clear 1", "✗ is 8"):
        assert mark in page.text


def test_the_sum_is_drawn_from_the_shares() -> None:
    one = sample()
    assert torch.equal(plots.sum_ink(one.alice, one.bob), plots.ink(one.image))
    assert not torch.equal(plots.sum_ink(one.alice, torch.zeros_like(one.bob)), plots.ink(one.image))
    assert plots.share_ink(torch.tensor([-1, 0, 1 << 56, -(1 << 63)])).tolist() == [255, 0, 1, 128]
    page = Page(render(report(samples=[one])))
    pixel = int(one.image.argmax())
    assert f"{int(one.alice.flatten()[pixel]) % 2**64:,}" in page.text
    assert "65,536" in page.text


def test_repr_of_a_sample_holds_no_share() -> None:
    assert "tensor" not in repr(sample())


def test_picture_is_a_png_of_ink() -> None:
    darkness = torch.arange(6, dtype=torch.uint8).reshape(2, 3)
    png = b64decode(plots.picture(darkness).removeprefix("data:image/png;base64,"))
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", png[16:24]) == (3, 2)
    start = png.index(b"IDAT") + 4
    pixels = zlib.decompress(png[start : png.index(b"IEND") - 8])
    assert pixels == bytes([0, 0, 0, 0, 1, 0, 2, 0, 0, 3, 0, 4, 0, 5])


def test_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("before")
    write(report(), path)
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    assert os.listdir(tmp_path) == ["report.html"]


def test_write_to_nowhere_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder").mkdir()
    for path in (
        tmp_path / "missing" / "r.html",
        tmp_path / "file" / "r.html",
        tmp_path / "folder",
        Path("/"),
    ):
        with pytest.raises(InputError, match="cannot write the report to") as caught:
            write(report(), path)
        assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_failed_replacement_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "report.html"
    path.write_text("before")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        write(report(), path)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["report.html"]


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"tacit\[demo\]"):
        render(report())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.size(0), "0 B"),
        (units.size(17), "17 B"),
        (units.size(999.9), "1.00 kB"),
        (units.size(1536), "1.54 kB"),
        (units.size(12_340_000), "12.3 MB"),
        (units.size(2.5e13), "25.0 TB"),
        (units.duration(0), "0 µs"),
        (units.duration(0.0042), "4.20 ms"),
        (units.duration(59.94), "59.9 s"),
        (units.duration(125), "2 min 05 s"),
        (units.percent(1.0), "100%"),
        (units.percent(0.99999), "99.99%"),
        (units.percent(0.5, 0), "50%"),
        (units.plural(1, "round"), "1 round"),
        (units.plural(1200, "batch"), "1,200 batches"),
        (units.scientific(0.00031), "3.1 × 10<sup>−4</sup>"),
        (units.scientific(0.25), "0.25"),
        (units.scientific(0.0), "0"),
    ],
)
def test_units_are_humane(text: str, expected: str) -> None:
    assert text.replace(units.SPACE, " ") == expected


def test_the_report_says_how_updates_were_summed_unseen() -> None:
    def said(**safeguards: object) -> str:
        one = dataclasses.replace(record(1), secure_sum=Safeguards(**({"protocol": "masked"} | safeguards)))
        return sections.training([one], torch.ones(2, 2, dtype=torch.int64), 1.0, secure_sum=True)

    given = {"invited": 5, "minimum": 4, "holders": 4, "threshold": 3}
    assert "under masks" in said(**given)
    assert "Noise that hides" not in said(**given)
    assert "Noise that hides" in said(**given, noised_by="clients")
    shared = said(**given | {"protocol": "shared"}, verified=True)
    assert "two shares" in shared
    assert "no part was longer" in shared


class TestRoundByRound:
    def test_says_of_each_round_who_took_part_and_how(self) -> None:
        sums = Safeguards("masked", 5, 4, 4, 3)
        first = dataclasses.replace(record(1), secure_sum=sums, epsilon=1.25, lost={3: "no vector", 4: "no vector"})
        failed = dataclasses.replace(record(2, None, None), cohort=(), epsilon=2.5, note="2 clients are left: no sum")
        written = rounds.table([first, failed])
        cells = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr><th scope=\"row\">.*?</tr>", written)]
        assert re.findall(r"<th scope=\"col\">(.*?)</th>", written)[1:] == [
            *(
                "accuracy",
                "in the mean",
                "lost",
                "sum",
                "at least",
                "to reveal",
                "ε",
                "to the server",
                "to clients",
                "note",
            )
        ]
        lost = '<span title="2 no vector">2</span>'
        sent = ["1.00\N{NO-BREAK SPACE}MB", "2.00\N{NO-BREAK SPACE}MB"]
        assert cells[0] == ["90.00%", "2", lost, "masked", "4", "3 of 4", "1.250", *sent, "–"]
        assert cells[1] == ["–", "0", "–", "–", "–", "–", "2.500", *sent, "2 clients are left: no sum"]

    def test_leaves_out_what_no_round_has(self) -> None:
        written = rounds.table([record(1)])
        assert "ε" not in written
        assert "sum" not in re.findall(r"<th scope=\"col\">(.*?)</th>", written)
        assert "“At least”" not in written

    def test_folds_many_rounds_away_and_trusts_no_text(self) -> None:
        hostile = dataclasses.replace(record(1), lost={0: HOSTILE}, note=HOSTILE)
        written = rounds.table([hostile] * 13)
        assert written.startswith("<details>")
        assert "<script" not in written
        assert "<details" not in rounds.table([hostile] * 12)
