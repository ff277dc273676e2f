# SPDX-License-Identifier: Apache-2.0
"""`stamina info`."""

from typing import Any

from rich.console import Console
from rich.table import Table

from stamina_adapters.embedded import assets_dir
from stamina_kernels import info


def collect() -> dict[str, Any]:
    """`stamina_kernels.info()` and whether the embedded model is installed; plain JSON types."""
    folder = assets_dir()
    return {**info(), "embedded_model": str(folder) if folder.is_dir() else None}


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
    console.print(f"platform        {found['platform']}", soft_wrap=True)
    console.print(f"devices         {', '.join(found['devices'])}", soft_wrap=True)
    console.print(f"threads         {found['threads']}")
    console.print(
        f"embedded model  {found['embedded_model'] or 'missing: reinstall the package'}",
        soft_wrap=True,
    )
