# SPDX-License-Identifier: Apache-2.0
"""The page, one HTML file without an external resource, and the Markdown file."""

from collections.abc import Sequence
from html import escape

from PIL import Image

from stamina_adapters.continual.report.curves import (
    accuracy_figure,
    balance_figure,
    distance_figure,
)
from stamina_adapters.continual.report.heat import accuracy_heat, confusion_heat, overlap_heat
from stamina_adapters.continual.report.results import OURS, Benchmark, Results, Run
from stamina_adapters.continual.report.stats import spread
from stamina_adapters.continual.report.tables import (
    Table,
    ablation_table,
    cost_table,
    growth_table,
    mask_table,
    pair_table,
    quality_table,
    tuning_table,
    unfinished_table,
)
from stamina_adapters.continual.rows import PictureRow
from stamina_adapters.continual.thumbnails import decode
from stamina_adapters.evaluation.grid import image_grid
from stamina_adapters.evaluation.html import STYLE, card, picture, png, table

_NOT_WHOLE = "Runs that are not whole"
_MORE = """
body{max-width:1240px}tr:last-child td{font-weight:400}
td:nth-child(n+2){white-space:nowrap}th{vertical-align:bottom;line-height:1.25}
tr.ours td{font-weight:650}tr.ours td:first-child{color:#0072B2}
details{margin:10px 0}summary{cursor:pointer;font-weight:600;padding:6px 0}
figure{margin:0 0 18px}.half{max-width:720px}
td.wide{white-space:normal;text-align:left;font-size:13px}
"""


def _html_table(made: Table) -> str:
    text = table(made.titles, made.rows)
    return text.replace(f"<tr><td>{OURS}</td>", f'<tr class="ours"><td>{OURS}</td>')


def _figure(data: bytes, alt: str, kind: str = "") -> str:
    return f'<figure class="{kind}">{png(data, alt)}</figure>'


def _cards(benchmark: Benchmark) -> str:
    count = benchmark.concepts
    name = OURS if benchmark.summaries(OURS, count) else (benchmark.finished() or [""])[0]
    rows = benchmark.summaries(name, count)
    if not rows:
        return ""
    final = spread(row.accuracy_final for row in rows)
    learned = spread(row.accuracy_after_learning for row in rows)
    assert final is not None and learned is not None
    cards = [
        card(f"{final.mean:.0%}", f"{name}: told as themselves after all {count} concepts"),
        card(f"{learned.mean:.0%}", f"{name}: right after each was learned"),
    ]
    ceiling = spread(row.accuracy_ceiling for row in rows)
    if ceiling is not None:
        cards.append(card(f"{ceiling.mean:.0%}", "the ceiling: each alone, trained in full"))
    others = [
        (found.mean, other)
        for other in benchmark.finished()
        if other != name
        and (found := spread(r.accuracy_final for r in benchmark.summaries(other, count)))
    ]
    if others:
        best, other = max(others)
        cards.append(card(f"{best:.0%}", f"the best of the others at the end: {other}"))
    return f'<div class="cards">{"".join(cards)}</div>'


def _grid(runs: Sequence[Run], real: dict[str, PictureRow]) -> Image.Image | None:
    """Rows concepts; columns real, right after learning, after the last; None without pictures."""
    by_stage: dict[tuple[str, int], PictureRow] = {}
    for run in runs:
        for row in run.pictures:
            by_stage.setdefault((row.stage, row.task), row)
    rows = []
    for stage, task in sorted(by_stage):
        learned = by_stage[stage, task]
        if stage != "learned" or ("final", task) not in by_stage or learned.concept not in real:
            continue
        stages = (real[learned.concept], learned, by_stage["final", task])
        shown = min(len(row.data) for row in stages)
        blocks = [[decode(data) for data in row.data[:shown]] for row in stages]
        rows.append((f"{task}: {learned.concept}", blocks))
    if not rows:
        return None
    return image_grid(rows, ("real", "right after learning", "after the last"), cell=96)


def _grids(benchmark: Benchmark, results: Results) -> str:
    parts: list[str] = []
    for name, runs in benchmark.methods.items():
        grid = _grid(runs, results.real)
        if grid is not None:
            opened = "" if parts else " open"
            parts.append(
                f"<details{opened}><summary>{escape(name)}</summary>"
                f"{picture(grid, f'{name}: real, right after learning, after the last')}</details>"
            )
    if not parts:
        return ""
    return (
        "<h2>Pictures</h2><p class='soft'>The same prompt from the same noise right after a "
        "concept was learned and after the last one: what changed between the two was "
        f"forgotten.</p>{''.join(parts)}"
    )


def _pairs(benchmark: Benchmark) -> str:
    pairs = pair_table(benchmark)
    if pairs is None:
        return ""
    return (
        "<h2>Two concepts in one prompt</h2><p class='soft'>Share of pictures that are nearest to "
        "either of the two concepts that the prompt names. Showing both at once is a known limit "
        f"of the method.</p>{_html_table(pairs)}"
    )


def _growth(benchmark: Benchmark) -> str:
    made = growth_table(benchmark)
    if made is None:
        return ""
    return (
        "<h2>The first ten and the last ten</h2><p class='soft'>Whether a method still learns, at "
        "the same cost, after dozens of concepts.</p>" + _html_table(made)
    )


def _masks(benchmark: Benchmark) -> str:
    masks = mask_table(benchmark)
    if masks is None:
        return ""
    heat = overlap_heat(benchmark)
    shown = "" if heat is None else _figure(heat, "overlap of masks", "half")
    return (
        "<h2>Masks</h2><p class='soft'>Share of the adapted weights in a concept's mask, and "
        "share of that mask that lies on earlier ones'. Masks drawn independently would overlap "
        f"by their density.</p>{_html_table(masks)}{shown}"
    )


def _unfinished(benchmark: Benchmark) -> str:
    made = unfinished_table(benchmark)
    return "" if made is None else f"<h3>{_NOT_WHOLE}</h3>{_html_table(made)}"


def _differences(benchmark: Benchmark) -> str:
    told = benchmark.differences()
    return f"<p class='soft'>{escape(told)}</p>" if told else ""


def _main(benchmark: Benchmark, results: Results) -> str:
    """Everything about one benchmark."""
    count = benchmark.concepts
    first = next(iter(benchmark.methods.values()))[0].run
    counts = sorted({n for runs in benchmark.methods.values() for r in runs for n in r.summaries})
    shorter = "".join(
        f"<details><summary>After {n} concepts</summary>"
        f"{_html_table(quality_table(benchmark, n))}</details>"
        for n in reversed(counts[:-1])
        if n > 1
    )
    return f"""
<h1>{count} concepts, one after the other, one model</h1>
<p class="soft">Benchmark {escape(benchmark.name)}. Every concept is learned from its own pictures
only and no earlier picture is seen again. {first.pictures} pictures of each prompt are told apart
among {first.identities} identities; chance is {1 / first.identities:.2f}. Figures are means over
seeds, &plusmn; one standard deviation.</p>{_differences(benchmark)}
{_cards(benchmark)}
<h2>What was learned and what was kept</h2>
<p class="soft">F_mmd is drift since learning: small for a method that keeps its concepts and for
one that never learned them, so it stands beside accuracy right after learning. A_mmd is distance
to real pictures at the end. Lower is better for both and for KID.</p>
{_html_table(quality_table(benchmark, count))}{_unfinished(benchmark)}
{shorter}
{_growth(benchmark)}
{_figure(accuracy_figure(benchmark), "accuracy over tasks")}
{_figure(balance_figure(benchmark), "accuracy after learning and at the end", "half")}
{_figure(distance_figure(benchmark), "A_mmd, F_mmd and accuracy after learning over tasks")}
{_grids(benchmark, results)}
<h2>Every concept at every checkpoint</h2>
<p class="soft">Brighter is better; fading down a column is forgetting, fading along a row is
losing the ability to learn.</p>
{_figure(accuracy_heat(benchmark), "accuracy of every concept at every checkpoint")}
<h2>Who is taken for whom</h2>
<p class="soft">Pictures after the last concept. A dark diagonal is right; a dark column is a
concept that replaces others.</p>
{_figure(confusion_heat(benchmark), "confusion between concepts")}
{_masks(benchmark)}
{_pairs(benchmark)}
<h2>What it costs</h2>
<p class="soft">Trained: parameters under the optimiser, of the whole model's. Stored to sample:
parameters by which the model has grown. Carried to learn on: bytes kept only for the next concept.
Peak memory is the growth of the process while a concept is learned.</p>
{_html_table(cost_table(benchmark, count))}
"""


def _heading(benchmark: Benchmark) -> str:
    reached = f"{benchmark.concepts} concepts" if benchmark.concepts else "no checkpoint reached"
    return f"{benchmark.name}: {reached}"


def _also(benchmark: Benchmark) -> str:
    """A smaller benchmark, such as the ablations, as one table."""
    return (
        f"<h2>{escape(_heading(benchmark))}</h2>{_differences(benchmark)}"
        f"{_html_table(ablation_table(benchmark, benchmark.concepts))}{_unfinished(benchmark)}"
    )


def _tuning(results: Results) -> str:
    if not results.tuning:
        return ""
    return (
        "<h2>How settings were chosen</h2><p class='soft'>On concepts that are never evaluated, "
        "as many trials for every method.</p><details><summary>All trials</summary>"
        f"{_html_table(tuning_table(results.tuning))}</details>"
    )


def page(results: Results) -> str:
    """The results as one HTML document."""
    # there are figures to draw from the first checkpoint on
    main = [one for one in results.benchmarks[:1] if one.concepts]
    if main:
        title, body = f"{main[0].concepts} concepts in a row", _main(main[0], results)
    else:
        title = "Tuning" if results.tuning else _NOT_WHOLE
        body = f"<h1>{title}</h1>"
    body += "".join(map(_also, results.benchmarks[len(main) :])) + _tuning(results)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{STYLE}{_MORE}</style></head><body>
{body}
</body></html>
"""


def markdown(results: Results) -> str:
    """The same figures as Markdown tables."""
    parts: list[str] = []
    for index, benchmark in enumerate(results.benchmarks):
        count, unfinished = benchmark.concepts, unfinished_table(benchmark)
        parts.append(f"## {_heading(benchmark)}\n\n")
        if told := benchmark.differences():
            parts.append(f"{told}\n\n")
        if index:
            parts.append(ablation_table(benchmark, count).markdown() + "\n")
            if unfinished:
                parts.append(unfinished.markdown() + "\n")
            continue
        tables: Sequence[tuple[str, Table | None]] = (
            ("Learned and kept", quality_table(benchmark, count)),
            (_NOT_WHOLE, unfinished),
            ("The first ten and the last ten", growth_table(benchmark)),
            ("Cost", cost_table(benchmark, count)),
            ("Masks", mask_table(benchmark)),
            ("Two concepts in one prompt", pair_table(benchmark)),
        )
        parts += [f"### {t}\n\n{made.markdown()}\n" for t, made in tables if made is not None]
    if results.tuning:
        parts.append(f"## How settings were chosen\n\n{tuning_table(results.tuning).markdown()}")
    return "".join(parts)
