# SPDX-License-Identifier: Apache-2.0
"""The commands and their options; what each does is in a module of its own, loaded when called."""

import json
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from stamina_adapters.cli.options import (
    MODEL_PANEL,
    Model,
    OutputDir,
    console,
    one_line_errors,
    with_settings,
)
from stamina_adapters.config import StaminaConfig
from stamina_adapters.training.config import TrainingConfig


def _check_seed(seed: int) -> int:
    # 2^62 leaves room for a picture's number in what a generator takes
    if not 0 <= seed <= 2**62:
        raise typer.BadParameter(f"must be from 0 to 2^62, not {seed}")
    return seed


# not by min and max, which the help would print in digits
_PictureSeed = Annotated[
    int, typer.Option("--seed", callback=_check_seed, help="Picture k uses seed + k, up to 2^62.")
]
# without "range" in their types, which would take room from the names
_Pictures = Annotated[int, typer.Option("--num_images_per_prompt", metavar="<int>", min=1)]
_Steps = Annotated[int, typer.Option("--num_inference_steps", metavar="<int>", min=1)]
_Guidance = Annotated[float, typer.Option("--guidance_scale", metavar="<float>", min=0.0)]
_Batch = Annotated[int, typer.Option("--sample_batch_size", metavar="<int>", min=1)]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"stamina-kernels {metadata.version('stamina-kernels')}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Teach a Stable Diffusion model one concept after the other, and fold each into it."""


@app.command()
@with_settings
def train(
    *,
    output_dir: OutputDir,
    pretrained_model_name_or_path: Model = None,
    concepts_list: Annotated[
        Path | None,
        typer.Option(
            "--concepts_list",
            help='JSON file: [{"instance_prompt": "a photo of <v1>", "instance_data_dir": "DIR"}, '
            '...], each with an optional "token"; DIR is relative to the working directory. '
            "Default: five embedded concepts.",
        ),
    ] = None,
    training: TrainingConfig,
    adapter: StaminaConfig,
) -> None:
    """Learn concepts from folders of PNG or JPEG images, one after the other.

    Each is folded into the model when it is learned. The output folder is a stock pipeline with
    all of them; in it are concepts/, one small file for each, and training.json, the record.
    """
    from stamina_adapters.cli.train import train as run

    with one_line_errors():
        run(pretrained_model_name_or_path, concepts_list, output_dir, training, adapter, console())


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...")],
    output_dir: OutputDir,
    pretrained_model_name_or_path: Model = None,
    num_images_per_prompt: _Pictures = 4,
    seed: _PictureSeed = 0,
    num_inference_steps: _Steps = 30,
    guidance_scale: _Guidance = 3.0,
    sample_batch_size: _Batch = 8,
) -> None:
    """Make pictures from prompts; writes <prompt number>-<picture number>.png."""
    from stamina_adapters.cli.generate import generate as run

    with one_line_errors():
        run(
            pretrained_model_name_or_path,
            prompts,
            output_dir,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            batch_size=sample_batch_size,
            console=console(),
        )


@app.command()
def fold(
    concepts: Annotated[
        list[Path], typer.Argument(help="Concept files, or folders of them, in any order.")
    ],
    output_dir: OutputDir,
    pretrained_model_name_or_path: Model = None,
) -> None:
    """Fold concept files into the model they were learned on; writes a stock pipeline."""
    from stamina_adapters.cli.fold import fold as run

    with one_line_errors():
        run(pretrained_model_name_or_path, concepts, output_dir, console())


@app.command()
def benchmark(
    sequence: Annotated[
        Path, typer.Option("--sequence", metavar="SPEC.json", help="What is run; see benchmarks/.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", help="New or empty folder, or one to go on with: same SPEC."),
    ],
    methods: Annotated[
        str | None,
        typer.Option("--methods", help="Names, separated by commas. Default: all of SPEC's."),
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Numbers, separated by commas.")] = "0",
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Try settings on SPEC's tuning concepts instead: as many for every method.",
        ),
    ] = False,
) -> None:
    """Teach a model a long sequence of concepts with each method, and measure what is kept.

    Killed at any moment, the same command goes on after the last finished concept and ends with
    the same bits. Rows of results are in <method>/seed-<n>/rows.jsonl; see stamina report.
    """
    from stamina_adapters.cli.benchmark import benchmark as run
    from stamina_adapters.cli.benchmark import tune as run_tune

    with one_line_errors():
        if tune:
            run_tune(sequence, methods, output, console())
        else:
            run(sequence, methods, seeds, output, console())


@app.command()
def evaluate(
    pretrained_model_name_or_path: Annotated[
        Path,
        typer.Option(
            "--pretrained_model_name_or_path",
            # beside the mark of what is required, there is no room for a type
            metavar="",
            help="Folder that knows the concepts.",
            rich_help_panel=MODEL_PANEL,
        ),
    ],
    concepts_list: Annotated[
        Path,
        typer.Option("--concepts_list", help="The JSON file that it learned them from."),
    ],
    clip: Annotated[
        Path | None,
        typer.Option("--clip", help="Local CLIP folder that judges. Default: the shipped encoder."),
    ] = None,
    num_images_per_prompt: _Pictures = 16,
    seed: _PictureSeed = 10_000,
    num_inference_steps: _Steps = 20,
    guidance_scale: _Guidance = 3.0,
    sample_batch_size: _Batch = 16,
    output: Annotated[
        Path | None, typer.Option("--output", help="New JSON file for the figures.")
    ] = None,
) -> None:
    """Measure how well a model draws the concepts that it has learned."""
    from stamina_adapters.cli.evaluate import evaluate as run
    from stamina_adapters.cli.workspace import check_guidance
    from stamina_adapters.continual.spec import SamplingSpec

    with one_line_errors():
        check_guidance(guidance_scale)
        sampling = SamplingSpec(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            scheduler="model",
            pictures=num_images_per_prompt,
            batch_size=sample_batch_size,
            noise_seed=seed,
        )
        run(pretrained_model_name_or_path, concepts_list, clip, sampling, output, console())


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Rows, in any depth.")],
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder for the pages. Default: the first DIR.")
    ] = None,
    collect: Annotated[
        Path | None,
        typer.Option("--collect", help="Also copy the rows there, one file for each run."),
    ] = None,
) -> None:
    """Make report.html and report.md from the rows of benchmarks, and from nothing else."""
    from stamina_adapters.cli.results import report as run

    with one_line_errors():
        run(folders, output, collect, console())


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    explain: Annotated[
        tuple[int, int, int, int] | None,
        typer.Option(
            "--explain",
            metavar="O I TOKENS R",
            help="Instead: how a GPU would compute O x I masked weights, rank R, and why so.",
        ),
    ] = None,
) -> None:
    """Show versions, devices and backends, and why one is missing."""
    from stamina_adapters.cli import info as command

    if explain is not None:
        with one_line_errors():
            explained = command.explain(*explain)
        if as_json:
            typer.echo(json.dumps(command.as_json(explained), indent=1))
        else:
            command.show_explained(explained, console())
        return
    found = command.collect()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        command.show(found, console())


@app.command()
def pretrain(
    output_dir: Annotated[
        Path, typer.Option("--output_dir", help="Checkpoints and the model; resumes what is there.")
    ] = Path("pretrain-output"),
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, help="Default: the shipped model's, and its gate's."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Measure the gate of a model instead of training one.")
    ] = False,
    pretrained_model_name_or_path: Model = None,
) -> None:
    """Train the embedded model from scratch, or measure whether concepts can be learned on it."""
    from stamina_adapters.cli.pretrain import check as run_check
    from stamina_adapters.cli.pretrain import pretrain as run

    with one_line_errors():
        if check:
            run_check(pretrained_model_name_or_path, seed, console())
        else:
            run(output_dir, seed, console())


@app.command()
@with_settings
def demo(
    *,
    output: Annotated[Path, typer.Option("--output", help="New or empty folder.")],
    training: TrainingConfig,
    adapter: StaminaConfig,
) -> None:
    """Learn five embedded concepts in a row and report what was learned, kept and saved.

    Takes about five minutes on two cores. Writes report.html, report.json, grid.png and run/.
    """
    from stamina_adapters.cli.demo import demo as run

    with one_line_errors():
        run(output, training, adapter, console())
