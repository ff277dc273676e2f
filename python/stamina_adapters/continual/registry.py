# SPDX-License-Identifier: Apache-2.0
"""The methods that a benchmark can run, and what tuning tries for each."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from stamina_adapters.continual.spec import BenchmarkSpec
from stamina_adapters.training.config import describe
from stamina_adapters.training.errors import InputError
from stamina_adapters.training.registry import METHODS, SEARCH


@dataclass(frozen=True)
class Registry:
    """`methods`: name -> factory of settings; `search`: name -> settings that tuning tries."""

    methods: Mapping[str, Callable[[dict[str, Any]], Any]]
    search: Mapping[str, Sequence[dict[str, Any]]]

    def check(self, name: str, argument: str, lines: Collection[str] = ()) -> None:
        """Raise `InputError` for a method that is not registered.

        It names what could be given instead: `lines` of a specification, then what is registered.
        """
        if name in self.methods:
            return
        nearest = get_close_matches(name, [*lines, *self.methods], n=1)
        meant = f"; did you mean {nearest[0]!r}?" if nearest else ""
        own = f"the specification's {', '.join(lines)}; registered are " if lines else ""
        known = ", ".join(sorted(self.methods))
        raise InputError(f"{argument}: no method {name!r}{meant}; there are {own}{known}")

    def make(self, name: str, settings: dict[str, Any], argument: str) -> Any:
        """A new method. Raises `InputError` for settings that it does not take."""
        self.check(name, argument)
        try:
            return self.methods[name](json.loads(json.dumps(settings)))
        except ValidationError as error:
            raise InputError(f"{argument}: settings of {name!r}: {describe(error)}") from error
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{argument}: settings of {name!r}: {reason}") from error


def default_registry() -> Registry:
    """The library's own methods."""
    return Registry(METHODS, SEARCH)


def chosen_lines(spec: BenchmarkSpec, methods: str | None, registry: Registry) -> list[str]:
    """The lines to run: those named, separated by commas, or all of the specification.

    Raises `InputError` for a name that is neither a line of the specification nor a method.
    """
    given = list(spec.methods) if methods is None else methods.split(",")
    names = [name.strip() for name in given]
    if not names:
        raise InputError("--sequence: names no methods; give some with --methods")
    if not all(names):
        raise InputError("--methods: is empty; name methods, separated by commas")
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InputError(f"--methods: {name!r} is named twice; name it once")
        if name in (".", "..") or "/" in name or name.startswith("."):
            raise InputError(f"--methods: {name!r} cannot name a folder; rename it")
        line = spec.line(name)
        if name in spec.methods:
            registry.check(str(line.method), f"--sequence: methods.{name}")
        else:
            registry.check(name, "--methods", spec.methods)
        registry.make(str(line.method), line.settings, f"--sequence: methods.{name}")
        spec.training_of(line.training, 0, f"--sequence: methods.{name}.training")
    return names


def chosen_seeds(text: str) -> list[int]:
    """Seeds from their list, separated by commas. Raises `InputError`."""
    seeds = []
    for part in text.split(","):
        if not part.strip().isdecimal():
            raise InputError(f"--seeds {text!r}: must be numbers from 0, separated by commas")
        seeds.append(int(part))
    if len(set(seeds)) != len(seeds):
        raise InputError(f"--seeds {text!r}: names a seed twice; name it once")
    return seeds
