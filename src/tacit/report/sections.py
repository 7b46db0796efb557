"""The sections of the report as HTML. Every string that comes from outside passes through ``escape``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from torch import Tensor

from tacit.federated.history import RoundRecord
from tacit.report import plots, rounds
from tacit.report.data import DemoReport, LayerCost, Sample, TrainingReport
from tacit.report.units import SPACE, count, duration, percent, plural, scientific, size

_EXCHANGES = 4  # images shown share by share


def header(report: DemoReport) -> str:
    """Write the story in a sentence and the run's figures."""
    images = plural(report.test_images, "test image")
    clients = plural(len(report.label_counts), "client")
    return f"""<header>
<p class="kicker">tacit: a run from end to end</p>
<h1>Train together, <span>predict in secret.</span></h1>
<p class="lead">Without handing over a single example, {clients} trained one {escape(report.model)} on
{escape(report.dataset)}. Two servers, alice and bob, then classified {images} with it and saw
neither the images, nor the model, nor the answers.</p>
<dl class="figures">
{_figure("accuracy in the clear", percent(report.federated_accuracy), "clear")}
{_figure("accuracy encrypted", percent(report.encrypted_accuracy), "secret")}
{_figure("same class both ways", percent(report.agreement))}
{_figure("images classified encrypted", count(report.test_images))}
{_figure(f"rounds for a batch of {count(report.batch)}", count(report.rounds_per_batch))}
{_figure("a party sends, per image", size(report.bytes_online_per_image))}
{_figure("dealt ahead, per image", size(report.bytes_dealt_per_image))}
{_figure("largest logit error", scientific(report.max_abs_error))}
</dl>
</header>"""


def training_header(report: TrainingReport) -> str:
    """Write what was trained, in a sentence and figures."""
    evaluated = [record.accuracy for record in report.history if record.accuracy is not None]
    last = report.history[-1] if report.history else None
    figures = {"rounds": count(len(report.history))}
    if evaluated:
        figures |= {"accuracy at the end": percent(evaluated[-1]), "accuracy at its best": percent(max(evaluated))}
    if last and last.epsilon is not None:
        figures["ε spent"] = f"{last.epsilon:.2f}"
    if last and last.clients is not None:
        figures["worst tenth of the clients"] = percent(last.clients.worst_decile)
    if last and last.simulated_seconds is not None:
        figures["simulated time"] = duration(last.simulated_seconds)
    rows = "\n".join(_figure(name, value) for name, value in figures.items())
    return f"""<header>
<p class="kicker">tacit: a federated training</p>
<h1>Train together, <span>keep it apart.</span></h1>
<p class="lead">{plural(_clients(report.history, report.label_counts), "client")} trained one
{escape(report.model)} on {escape(report.dataset)} by {escape(report.algorithm)},
without handing over a single example.</p>
<dl class="figures">
{rows}
</dl>
</header>"""


def training(history: Sequence[RoundRecord], label_counts: Tensor | None, seconds: float, secure_sum: bool) -> str:
    """Write how the federated rounds went, and how the data lay over the clients."""
    masked = ""
    if secure_sum:
        masked = _secretly(history)
    clients = _clients(history, label_counts)
    drawn = (
        (plots.accuracy(history), "Accuracy of the global model on held-out examples, after each round."),
        (plots.loss(history), "Mean loss of the global model on held-out examples."),
    )
    shown = ""
    if clients > plots.MOST_CLIENTS:
        shown = f" The first {plots.MOST_CLIENTS} of {count(clients)} clients are shown."
    split = f"Examples of each class at each client, in a stronger colour for more; totals above.{shown}"
    wide = "" if clients <= plots.FEW_CLIENTS else "wide"
    cohorts = sorted({len(record.cohort) for record in history})
    cohort = "–".join(count(c) for c in dict.fromkeys((cohorts[0], cohorts[-1]))) if cohorts else "none"
    facts = {
        "clients": count(clients),
        "rounds": count(len(history)),
        "clients in a round": cohort,
        "training examples": "only the clients know" if label_counts is None else count(int(label_counts.sum())),
        "sent to the server": size(sum(record.bytes_up for record in history)),
        "sent to clients": size(sum(record.bytes_down for record in history)),
        "time": duration(seconds),
    }
    minima = {record.secure_sum.minimum for record in history if record.secure_sum}
    if minima:
        facts["fewest updates in a sum"] = count(min(minima))
    text = f"""<p>In each round the server sends its model to some of the clients. Each trains it on its own
examples for a while and sends back only what changed; the server averages the changes. The examples stay
where they are.{masked}</p>
{_drawn(drawn) or '<p class="note">No round of this run was evaluated.</p>'}
<div class="pair {wide}">
{"" if label_counts is None else _plot(plots.partition(label_counts), split, wide)}
{_facts(facts)}
</div>"""
    return section("Training together", text)


def _clients(history: Sequence[RoundRecord], label_counts: Tensor | None) -> int:
    """How many clients there are, or have been heard of."""
    if label_counts is not None:
        return len(label_counts)
    return len({client for record in history for client in (*record.cohort, *record.lost)})


def _secretly(history: Sequence[RoundRecord]) -> str:
    """How updates were summed without anybody seeing one."""
    sums = [record.secure_sum for record in history if record.secure_sum]
    if {one.protocol for one in sums} == {"shared"}:
        said = """ Each split its changes into two shares, one for each of two servers: they have seen the sum of all,
and nobody's own part of it."""
    else:
        said = """ Each sent its changes under masks that cancel only in the sum of all: the server has seen
that sum, and nobody's own part of it."""
    if any(one.verified for one in sums):
        said += """ The two verified on their shares that no part was longer than agreed."""
    if any(one.noised_by for one in sums):
        said += """ Noise that hides whether any one client was there was in the sum before anybody saw it."""
    return said


def circumstances(history: Sequence[RoundRecord]) -> str:
    """Write what the training met and spent: privacy, devices, evenness, bytes; nothing if there is nothing to tell."""
    drawn = (
        (plots.epsilon(history), "Privacy spent: ε of (ε, δ), added up over the rounds."),
        (plots.worst_decile(history), "Accuracy at the worst tenth of the clients; the thin line is the mean client."),
        (plots.accuracy_in_time(history), "Accuracy against the time that the simulated devices needed."),
        (plots.participation(history), "Clients that finished each round; in grey, those that were lost on the way."),
        (plots.sent(history), "Bytes that the clients sent to the server, added up over the rounds."),
    )
    lost = Counter(reason for record in history for reason in record.lost.values())
    reasons = {reason: plural(number, "client") for reason, number in lost.most_common()}
    text = _drawn(drawn)
    if reasons:
        text += f"\n<h3>Why clients were lost</h3>\n{_facts(reasons)}"
    if history:
        text += f"\n{rounds.table(history)}"
    return section("What it met and spent", text)


def provenance(settings: Mapping[str, str], versions: Mapping[str, str]) -> str:
    """Write the settings and versions that the run can be repeated with."""
    text = f"""<div class="pair">
<div><h3>Settings</h3>
{_facts({name: escape(value) for name, value in settings.items()})}</div>
<div><h3>Versions</h3>
{_facts({name: escape(value) for name, value in versions.items()})}</div>
</div>"""
    return section("To run it again", text)


def predicting(report: DemoReport) -> str:
    """Write what the encrypted model answered: a gallery and the confusion matrix."""
    missed = round((1 - report.encrypted_accuracy) * report.test_images)
    split = round((1 - report.agreement) * report.test_images)
    outcome = f"{count(missed)} of {plural(report.test_images, 'image')} got a wrong class"
    apart = "none" if split == 0 else count(split)
    gallery = ""
    if report.samples:
        tiles = "\n".join(_tile(sample) for sample in report.samples)
        gallery = f"""<figure>
<ul class="gallery">
{tiles}
</ul>
<figcaption>Test images and the class predicted on shares, with its probability. A heavy frame and “✗” mark a
wrong class and give the true one; a dashed frame and “≠” mark a class that differs from the prediction in the
clear, and give that one.</figcaption>
</figure>"""
    text = f"""<p>Each image was split into two shares, and the model too. Alice and bob computed on shares
from the first layer to the last, and only the client put the two halves of the answer together. {outcome};
{apart} got another class than in the clear.</p>
{gallery}
{_confusion(report.confusion)}"""
    return section("Predicting in secret", text)


def parties(report: DemoReport) -> str:
    """Write what each party saw: shares as pictures, one pixel in numbers, and all views in words."""
    samples = _distinct(report.samples)
    exchanges = f"{_exchanges(samples)}\n{_pixel(samples[0])}" if samples else ""
    views = {
        "The client": "its image, and the scores of the classes. Nothing of the model beyond those.",
        "Alice": "one share of the image, one share of the weights, and differences masked with fresh random "
        "numbers: all of it uniform noise to her.",
        "Bob": "the other shares and the same masked differences: noise to him just as well.",
        "The crypto provider": "nothing of the image, the model or the result. It deals random numbers ahead "
        "of time and gets nothing back; it knows only the shape of the computation.",
    }
    rows = "\n".join(f"<div><dt>{party}</dt><dd>{view}</dd></div>" for party, view in views.items())
    text = f"""<p>A share is a number modulo 2<sup>64</sup>. One of the two is drawn at random and the other
is what is missing to the pixel, so each alone is uniform whatever the image: a blank page and this digit give
noise of exactly the same kind. Only the sum says anything.</p>
{exchanges}
<dl class="views">
{rows}
</dl>
<p class="note">This holds while all follow the protocol and no two of alice, bob and the provider pool what
they hold. The shape of the computation (layers, sizes, batch) is public.</p>"""
    return section("What each party saw", text)


def cost(report: DemoReport) -> str:
    """Write what the encrypted inference costs, layer by layer."""
    images, rounds = plural(report.test_images, "image"), plural(report.rounds_per_batch, "round")
    waiting = duration(report.rounds_per_batch * 0.01)
    per_image = duration(report.seconds_encrypted / report.test_images) if report.test_images else "–"
    text = f"""<p>{images} took {duration(report.seconds_encrypted)} in batches of {count(report.batch)}:
{per_image} an image. A round is one exchange of messages between alice and bob, shared by the whole batch; if
each took 10{SPACE}ms on the network, {rounds} would add {waiting} to a batch. What the provider deals does
not depend on the image and can be sent beforehand.</p>
{_layers(report.layers)}"""
    return section("What it costs", text)


def section(title: str, body: str) -> str:
    """A part of a page under a heading."""
    return f'<section>\n<h2>{title}</h2>\n<div class="body">\n{body}\n</div>\n</section>'


def _figure(name: str, value: str, kind: str = "plain") -> str:
    return f'<div class="{kind}"><dt>{name}</dt><dd>{value}</dd></div>'


def _facts(facts: Mapping[str, str]) -> str:
    rows = "\n".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">\n{rows}\n</dl>'


def _plot(svg: str, caption: str, kind: str = "") -> str:
    return f"""<figure class="plot {kind}">
<div class="scroll">{svg}</div>
<figcaption>{caption}</figcaption>
</figure>"""


def _drawn(figures: Iterable[tuple[str | None, str]]) -> str:
    """The figures that there is something to draw for, two in a row; empty if there is none."""
    drawn = [_plot(svg, caption) for svg, caption in figures if svg is not None]
    rows = (drawn[i : i + 2] for i in range(0, len(drawn), 2))
    return "\n".join('<div class="pair">\n' + "\n".join(row) + "\n</div>" for row in rows)


def _picture(darkness: Tensor, alt: str) -> str:
    height, width = darkness.shape
    image = f'<img src="{plots.picture(darkness)}" width="{width}" height="{height}" alt="{alt}">'
    return f'<span class="pane">{image}</span>'


def _tile(sample: Sample) -> str:
    marks, kinds = "", ["tile"]
    if sample.wrong:
        kinds.append("wrong")
        marks += f"<b>✗ is{SPACE}{sample.label}</b>"
    if sample.differs:
        kinds.append("differs")
        marks += f"<b>≠ clear{SPACE}{sample.plaintext}</b>"
    sure = percent(float(sample.probabilities[sample.encrypted]), 0)
    picture = _picture(plots.ink(sample.image), f"test image of a {sample.label}")
    return (
        f'<li class="{" ".join(kinds)}">{picture}'
        f'<span class="says">{sample.encrypted}</span> <span class="sure">{sure}</span>{marks}</li>'
    )


def _distinct(samples: Sequence[Sample]) -> list[Sample]:
    """The first few samples, each of another class as far as that goes."""
    firsts: dict[int, Sample] = {}
    for sample in samples:
        firsts.setdefault(sample.label, sample)
    others = [sample for sample in samples if sample is not firsts[sample.label]]
    return [*firsts.values(), *others][:_EXCHANGES]


def _exchanges(samples: Iterable[Sample]) -> str:
    rows = "\n".join(
        f"""<tr><td>{_picture(plots.share_ink(sample.alice), "alice's share: noise")}</td>
<td class="plus">{_picture(plots.share_ink(sample.bob), "bob's share: noise")}</td>
<td class="equals">{_picture(plots.sum_ink(sample.alice, sample.bob), f"the sum: a {sample.label}")}</td>
<td class="answer">{_answer(sample)}</td></tr>"""
        for sample in samples
    )
    return f"""<figure class="table">
<table class="exchanges">
<thead><tr><th scope="col">alice holds</th><th scope="col">bob holds</th><th scope="col">the client has</th>
<th scope="col">and learns</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
<figcaption>The same image in three places. Shares are drawn with the top 8 of their 64 bits as grey; the
third picture is computed from the first two, as their sum modulo 2<sup>64</sup>. The bars are the
probabilities of the classes.</figcaption>
</figure>"""


def _answer(sample: Sample) -> str:
    probabilities = [float(p) for p in sample.probabilities]
    bars = "".join(
        f'<span class="{"top" if label == sample.encrypted else "rest"}" style="--p:{p:.3f}">{label}</span>'
        for label, p in enumerate(probabilities)
    )
    mark = f'<b class="mark">✗ is{SPACE}{sample.label}</b>' if sample.wrong else ""
    sure = percent(probabilities[sample.encrypted], 1)
    return (
        f'<span class="says">{sample.encrypted}</span> <span class="sure">{sure}</span>{mark}'
        f'<span class="bars" aria-hidden="true">{bars}</span>'
    )


def _pixel(sample: Sample) -> str:
    """One pixel, the darkest, as the numbers that the parties hold."""
    place = int(sample.image.argmax())
    alice, bob = (int(share.flatten()[place]) for share in (sample.alice, sample.bob))
    total = (alice + bob + 2**63) % 2**64 - 2**63
    row, column = divmod(place, sample.image.shape[1])
    grey = float(sample.image.flatten()[place])
    return f"""<figure class="table">
<div class="scroll"><table class="pixel">
<tr><th scope="row">alice’s share</th><td>{count(alice % 2**64)}</td></tr>
<tr><th scope="row">bob’s share</th><td>{count(bob % 2**64)}</td></tr>
<tr class="total"><th scope="row">sum modulo 2<sup>64</sup></th><td>{count(total)}</td></tr>
</table></div>
<figcaption>One pixel of the first image (row {row}, column {column}; grey level {grey:.2f}) in numbers. The
sum is the pixel in fixed point.</figcaption>
</figure>"""


def _confusion(confusion: Tensor) -> str:
    matrix = confusion.tolist()
    head = "".join(f'<th scope="col">{label}</th>' for label in range(len(matrix)))
    cells = ["".join(_cell(n, label == c, sum(row)) for c, n in enumerate(row)) for label, row in enumerate(matrix)]
    rows = "\n".join(f'<tr><th scope="row">{label}</th>{row}</tr>' for label, row in enumerate(cells))
    return f"""<figure class="table">
<div class="scroll"><table class="confusion">
<thead><tr><th scope="col">true&nbsp;↓ predicted&nbsp;→</th>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
<figcaption>Confusion matrix of the encrypted predictions. Rows are true classes; the shade is the fraction of
the row; mistakes are set in bold.</figcaption>
</figure>"""


def _cell(number: int, right: bool, row: int) -> str:
    if not number:
        return '<td class="none">·</td>'
    shade = 0.12 + 0.88 * number / row
    kind = "right" if right else "miss"
    dark = " dark" if shade > 0.55 else ""
    return f'<td class="{kind}{dark}" style="--w:{shade:.2f}">{count(number)}</td>'


def _layers(layers: Sequence[LayerCost]) -> str:
    most = {
        name: max((getattr(layer, name) for layer in layers), default=0) or 1
        for name in ("bytes_online", "bytes_dealt", "milliseconds")
    }

    def bar(value: float, name: str, text: str) -> str:
        return f'<td class="bar" style="--w:{100 * value / most[name]:.1f}%">{text}</td>'

    rows = "\n".join(
        f'<tr><th scope="row">{escape(layer.name)}</th><td class="operator">{escape(layer.operator)}</td>'
        f"<td>{count(layer.rounds)}</td>{bar(layer.bytes_online, 'bytes_online', size(layer.bytes_online))}"
        f"{bar(layer.bytes_dealt, 'bytes_dealt', size(layer.bytes_dealt))}"
        f"{bar(layer.milliseconds, 'milliseconds', duration(layer.milliseconds / 1000))}</tr>"
        for layer in layers
    )
    return f"""<figure class="table">
<div class="scroll"><table class="layers">
<thead><tr><th scope="col">layer</th><th scope="col">operator</th><th scope="col">rounds</th>
<th scope="col">a party sends</th><th scope="col">dealt ahead</th><th scope="col">time</th></tr></thead>
<tbody>
{rows}
</tbody>
<tfoot><tr class="total"><th scope="row">total</th><td></td>
<td>{count(sum(layer.rounds for layer in layers))}</td>
<td>{size(sum(layer.bytes_online for layer in layers))}</td>
<td>{size(sum(layer.bytes_dealt for layer in layers))}</td>
<td>{duration(sum(layer.milliseconds for layer in layers) / 1000)}</td></tr></tfoot>
</table></div>
<figcaption>Cost of one batch, layer by layer. “A party sends” is what alice sends bob, and as much comes
back; “dealt ahead” is what the provider sends; “time” is what alice and bob compute together. Bars compare the layers
within a column.</figcaption>
</figure>"""
