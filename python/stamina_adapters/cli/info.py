# SPDX-License-Identifier: Apache-2.0
"""`stamina info`."""

from typing import Any

from rich.console import Console
from rich.table import Table

from stamina_adapters.embedded import assets_dir
from stamina_adapters.training.errors import InputError
from stamina_kernels import MAX_RANK, cost, cpu, info


def _instruction_set() -> tuple[str | None, str | None]:
    """What backend `cpu` computes with, or None and why."""
    if (reason := cpu.unavailable_reason()) is not None:
        return None, reason
    try:
        return cpu.instruction_set(), None
    except RuntimeError as error:
        # STAMINA_CPU_ISA asks for one that is not there
        return None, str(error).splitlines()[0]


def collect() -> dict[str, Any]:
    """`stamina_kernels.info()`, the instruction set of backend `cpu` and the embedded model.

    Plain JSON types; embedded_model is None where it is not installed.
    """
    folder = assets_dir()
    instructions, error = _instruction_set()
    return {
        **info(),
        "cpu_instruction_set": instructions,
        "cpu_instruction_set_error": error,
        "embedded_model": str(folder) if folder.is_dir() else None,
    }


def show(found: dict[str, Any], console: Console) -> None:
    """Print it as tables."""
    versions = Table("package", "version", title="Versions")
    for package, version in found["versions"].items():
        versions.add_row(package, version or "[yellow]not installed")
    backends = Table("backend", "state", title="Backends")
    for name, backend in found["backends"].items():
        default = ", default on CPUs" if name == found["default_backend"] else ""
        missing = f"[yellow]{backend['reason']}"
        backends.add_row(name, f"[green]available{default}" if backend["available"] else missing)
    console.print(versions, backends)
    if found["default_backend_error"]:
        console.print(f"[yellow]CPU tensors: {found['default_backend_error']}", soft_wrap=True)
    console.print(f"platform        {found['platform']}", soft_wrap=True)
    console.print(f"devices         {', '.join(found['devices'])}", soft_wrap=True)
    console.print(f"threads         {found['threads']}")
    instructions = found["cpu_instruction_set"] or f"none: {found['cpu_instruction_set_error']}"
    console.print(f"instructions    {instructions}", soft_wrap=True, markup=False)
    console.print(
        f"embedded model  {found['embedded_model'] or 'missing: reinstall the package'}",
        soft_wrap=True,
    )


def explain(
    out_features: int, in_features: int, tokens: int, rank: int
) -> dict[str, tuple[cost.Choice, ...]]:
    """How backend `triton` would compute Y = X W_eff^T in bf16: sampled, then hard.

    The masks' rank is that of the update, and W differs from W_init, as from the second concept on.
    By the GPUs of this machine, or where there is none, by those that the cost model knows.
    Raises InputError for a size below 1, a rank above the kernels' or a wrong STAMINA_STRATEGY.
    """
    sizes = (out_features, in_features, tokens, rank)
    if min(sizes) < 1:
        raise InputError(f"--explain takes positive numbers, got {' '.join(map(str, sizes))}")
    if rank > MAX_RANK:
        raise InputError(f"--explain takes ranks of at most {MAX_RANK}, got {rank}")
    problems = [cost.Problem(*sizes, rank, sampled=sampled) for sampled in (True, False)]
    present = info()["devices"][1:]
    try:
        return {
            device: tuple(cost.choose(device, problem) for problem in problems)
            for device in present or cost.devices()
        }
    except ValueError as error:
        raise InputError(str(error)) from None


def as_json(explained: dict[str, tuple[cost.Choice, ...]]) -> list[dict[str, Any]]:
    """One row for every device, mask mode and launch; seconds."""
    return [
        {
            "device": device,
            "figures_of": cost.find_device(device).name,
            "backend": "triton",
            "mask": mask,
            "strategy": strategy,
            "chosen": strategy == choice.strategy,
            "reason": choice.reason,
            **launch._asdict(),
            "bound": launch.bound,
            "seconds": launch.seconds,
        }
        for device, choices in explained.items()
        for mask, choice in zip(("sampled", "hard"), choices, strict=True)
        for strategy, launches in choice.launches.items()
        for launch in launches
    ]


def _explained(title: str, choice: cost.Choice) -> Table:
    table = Table(title=title, box=None, padding=(0, 2, 0, 0))
    for heading in ("strategy", "launch", "MB", "memory", "issue", "matrix", "total", "waits for"):
        table.add_column(heading, no_wrap=True)
    for strategy, launches in choice.launches.items():
        chosen = "[green]" if strategy == choice.strategy else ""
        for launch in launches:
            times = (launch.memory_s, launch.issue_s, launch.matrix_s, launch.seconds)
            table.add_row(
                chosen + strategy, launch.what, f"{launch.bytes / 1e6:.2f}",
                *(f"{t * 1e6:.2f}" for t in times), launch.bound,
            )  # fmt: skip
    return table


def show_explained(explained: dict[str, tuple[cost.Choice, ...]], console: Console) -> None:
    """Print it as a table for every device, with what each launch would wait for, and why."""
    for device, choices in explained.items():
        for mask, choice in zip(("sampled", "hard"), choices, strict=True):
            console.print(_explained(f"{device}, {mask} mask, microseconds", choice))
        if (known := cost.find_device(device).name) not in device:
            console.print(f"[yellow]no figures of {device}: those of {known} stand in for them")
        for mask, choice in zip(("sampled", "hard"), choices, strict=True):
            console.print(f"{mask}: [green]{choice.strategy}[/], {choice.reason}", soft_wrap=True)
    console.print(
        "Of backend triton; backend cuda, which NVIDIA GPUs use where it was built, always "
        "composes. An estimate from peak rates, not a measurement: a launch takes its gap on the "
        "stream and the longest of its three waits. "
        f"{cost.VARIABLE}={' or '.join(cost.STRATEGIES)} overrides the choice.",
        soft_wrap=True,
    )
