# SPDX-License-Identifier: Apache-2.0
"""What commands show while they work: bars in a terminal, plain lines anywhere else."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console
from stamina_adapters.cli.evaluate import ConceptFigures, Figures, figures_table
from stamina_adapters.cli.progress import RunProgress
from stamina_adapters.cli.train import summary_table
from stamina_adapters.training.trainer import StepReport

# the last is what rich would take for a style
TITLES = (
    "draw landmark-000, learned alone",
    "learn 5/5 <a-very-long-name-of-a-concept>",
    "learn 1/5 [bold]",
)


def test_a_line_is_written_at_once_when_something_begins():
    written = io.BytesIO()
    # what is not flushed does not reach `written`
    with RunProgress(Console(file=io.TextIOWrapper(written), width=80)) as progress:
        done = progress.counting("draw <v1>", 2)
        assert written.getvalue() == b"draw <v1>\n"
        done(1)
        on_step = progress.training("learn 1/1 <[v1]>", 2)
        for step in range(2):
            on_step(StepReport(step=step, loss=1.0, density=0.5))
        with progress.waiting("ceiling face-000"):
            pass
    lines = ["draw <v1>", "learn 1/1 <[v1]>", "ceiling face-000"]
    assert written.getvalue().decode().splitlines() == lines


@pytest.mark.parametrize("steps", [100, 2000])
def test_no_number_is_cut_at_80_columns(steps):
    written = io.StringIO()
    console = Console(file=written, width=80, force_terminal=True, force_interactive=True)
    with RunProgress(console) as progress:
        for title in TITLES:
            on_step = progress.training(title, steps)
            on_step(StepReport(step=0, loss=0.5, density=0.84))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue()).splitlines()
    for title, line in zip(TITLES, shown[-len(TITLES) :], strict=True):
        assert line.startswith(title[:30])
        numbers = rf"1/{steps} 0:00:00 loss 0\.5000  density 0\.84"
        assert re.search(numbers, line), line


def test_a_token_in_square_brackets_is_shown_as_it_is():
    last = SimpleNamespace(sampled=0.1, committed=0.1)
    log = SimpleNamespace(token="[bold]", images=4, probes=[last], densities={}, seconds=1.0)
    row = ConceptFigures(token="[bold]", accuracy=None, cosine=1.0, mmd=0.0)
    figures = Figures(
        model="m", judged_by="clip[red]", pictures=3, accuracy=None, cosine=1.0, a_mmd=0.0,
        kid=None, concepts=[row],
    )  # fmt: skip
    for table, names in (
        (summary_table([log], None), ["[bold]", "seconds"]),
        (figures_table(figures), ["[bold]", "clip[red]"]),
    ):
        console = Console(file=io.StringIO(), width=120)
        console.print(table)
        assert all(name in console.file.getvalue() for name in names)


def test_the_density_shown_is_the_committed_one(pipe):
    """Of all weights, as the masks were committed: the last step's was measured earlier."""
    layers = [path for path, module in pipe.unet.named_modules() if path.endswith("attn2.to_k")]
    sizes = [pipe.unet.get_submodule(path).weight.numel() for path in layers]
    assert len(set(sizes)) > 1
    densities = {path: 0.2 + 0.6 * (k == 0) for k, path in enumerate(layers)}
    expected = 0.2 + 0.6 * sizes[0] / sum(sizes)
    last = SimpleNamespace(sampled=0.1, committed=0.1)
    stale = [SimpleNamespace(density=0.99)]
    log = SimpleNamespace(
        token="<v1>", images=4, probes=[last], steps=stale, densities=densities, seconds=1.0
    )
    (found,) = summary_table([log], pipe).columns[4].cells
    assert found == f"{expected:.2f}"
