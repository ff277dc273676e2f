# SPDX-License-Identifier: Apache-2.0
"""`report.html`: one file that shows everything, with no external resource."""

from collections.abc import Sequence
from html import escape

from PIL import Image

from stamina_adapters.cli.report import DENSITY_BOUNDS, ConceptReport, DemoReport
from stamina_adapters.evaluation.html import STYLE, card, picture, table
from stamina_adapters.training.trainer import ConceptLog

_COLOURS = ("#3b6fd4", "#d9722b", "#2e9d6a", "#a34fc4", "#c43b55", "#7a7a2e", "#2b98b5")


def _cards(report: DemoReport) -> str:
    memory = report.saved_mib_eager / report.saved_mib_ours if report.saved_mib_ours else 0.0
    time = report.step_ms_eager_sd15 / report.step_ms_ours_sd15
    return "".join(
        (
            card(
                f"{report.accuracy_final:.0%}",
                f"told as themselves after all {len(report.concepts)}, among {report.identities}; "
                f"{report.accuracy_after_learning:.0%} right after learning",
            ),
            card(f"{report.accuracy_ceiling:.0%}", "the ceiling: each alone, trained in full"),
            card(f"{memory:.0f}x", "less saved for backward than eager PyTorch"),
            card(f"{time:.1f}x", "faster than eager PyTorch at SD 1.5's shapes"),
            card("none", "parameters added: everything is folded into the model"),
        )
    )


def _cells(name: str, of: ConceptReport | DemoReport) -> list[str]:
    shares = (
        of.accuracy_base,
        of.accuracy_ceiling,
        of.accuracy_after_learning,
        of.accuracy_final,
    )
    return [name, *(f"{share:.2f}" for share in shares)]


def _accuracy_table(report: DemoReport) -> str:
    titles = ("concept", "before", "alone, in full", "right after learning", "at the end")
    rows = [_cells(f"{c.token}  {c.identity}", c) for c in report.concepts]
    return table(titles, [*rows, _cells("mean", report)])


def _bar(name: str, share: float, value: str, kind: str = "") -> str:
    return (
        f'<div class="bar"><span>{escape(name)}</span><div class="track">'
        f'<div class="fill {kind}" style="width:{100 * min(share, 1.0):.1f}%"></div></div>'
        f"<span>{escape(value)}</span></div>"
    )


def _densities(report: DemoReport) -> str:
    return "".join(_bar(name, d, f"{d:.2f}") for name, d in report.mask_density.items())


def _costs(report: DemoReport) -> str:
    rows = (
        ("saved, this run", report.saved_mib_ours, report.saved_mib_eager, "MiB"),
        ("step, this run", report.step_ms_ours, report.step_ms_eager, "ms"),
        ("step, SD 1.5", report.step_ms_ours_sd15, report.step_ms_eager_sd15, "ms"),
    )
    bars = []
    for name, ours, eager, unit in rows:
        largest = max(ours, eager)
        bars.append(_bar(f"{name} ({unit})", ours / largest, f"{ours:.3g}"))
        bars.append(_bar("eager PyTorch", eager / largest, f"{eager:.3g}", "eager"))
    return "".join(bars)


def _smooth(values: Sequence[float], keep: float = 0.95) -> list[float]:
    smoothed = [values[0]]
    for value in values[1:]:
        smoothed.append(keep * smoothed[-1] + (1 - keep) * value)
    return smoothed


def _curves(logs: Sequence[ConceptLog], width: int = 960, height: int = 240) -> str:
    """Smoothed denoising loss of every concept over its steps, as SVG."""
    lines = [_smooth([step.loss for step in log.steps]) for log in logs]
    low, high = min(map(min, lines)), max(map(max, lines))
    span = (high - low) or 1.0
    left, bottom = 56, height - 28

    def point(index: int, count: int, value: float) -> str:
        x = left + (width - left - 16) * index / max(count - 1, 1)
        y = bottom - (bottom - 16) * (value - low) / span
        return f"{x:.1f},{y:.1f}"

    paths = "".join(
        f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" points="'
        + " ".join(point(k, len(line), value) for k, value in enumerate(line))
        + '"/>'
        for line, colour in zip(lines, _COLOURS, strict=False)
    )
    labels = (
        f'<text x="8" y="20">{high:.3f}</text><text x="8" y="{bottom}">{low:.3f}</text>'
        f'<text x="{left}" y="{height - 8}">step 1</text>'
        f'<text x="{width - 70}" y="{height - 8}">step {len(lines[0])}</text>'
    )
    keys = "".join(
        f'<span class="key"><span class="dot" style="background:{colour}"></span>'
        f"{escape(log.token)}</span>"
        for log, colour in zip(logs, _COLOURS, strict=False)
    )
    return f'<svg viewBox="0 0 {width} {height}">{paths}{labels}</svg><p>{keys}</p>'


def _expectations(report: DemoReport) -> str:
    answers = {text: "yes" if met else "no" for text, met in report.expectations().items()}
    rows = (
        f'<li><span class="{answer}">{answer}</span>{escape(text)}</li>'
        for text, answer in answers.items()
    )
    return f"<ul>{''.join(rows)}</ul>"


def page(report: DemoReport, grid: Image.Image, logs: Sequence[ConceptLog]) -> str:
    """The report as one HTML document."""
    low, high = DENSITY_BOUNDS
    count = len(report.concepts)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Five concepts in a row</title><style>{STYLE}</style></head><body>
<h1>{count} concepts, one after the other, one model</h1>
<p class="soft">Each was learned from its own pictures only, by a masked low-rank update of the
cross-attention keys and values, and folded into the weights before the next. No earlier picture
was seen again. {report.seconds:.0f} s in all, backend {escape(report.backend)}, {report.threads}
threads, seed {report.seed}.</p>
<div class="cards">{_cards(report)}</div>
<h2>What the model draws</h2>
<p class="soft">Real pictures, and what &ldquo;a photo of &lt;v1&gt;&rdquo; gives right after its
concept was learned and after all {count}, from the same noise: what changed between the two was
forgotten.</p>
{picture(grid, "Rows: concepts. Columns: real, right after learning, after all.")}
<h2>Identity</h2>
<p class="soft">Share of {report.pictures} generated pictures that the image encoder tells as the
right one of {report.identities} identities; chance is {1 / report.identities:.2f}. Before: pictures
of the family alone. Distance of the final pictures to real ones (A_mmd) {report.a_mmd:.3f}; drift
since learning (F_mmd) {report.f_mmd:.3f}.</p>
{_accuracy_table(report)}
<h2>How much of each layer the masks keep</h2>
<p class="soft">Mean over the concepts, committed masks. Near 0 nothing would be learned, near 1
nothing would be protected; a sound run stays between {low} and {high}.</p>
{_densities(report)}
<h2>Cost of the adapted projections</h2>
<p class="soft">Forward and backward with both regularisers, and what autograd keeps between them,
beside the same formula in eager PyTorch, measured in turns in this run.</p>
{_costs(report)}
<h2>Denoising loss while learning</h2>
{_curves(logs)}
<h2>What a sound run shows</h2>
{_expectations(report)}
<p class="soft" style="margin-top:28px">All figures: report.json. The stock pipeline: run;
load it with diffusers alone. One small file for each concept: run/concepts.</p>
</body></html>
"""
