# SPDX-License-Identifier: Apache-2.0
"""Runs a benchmark and kills itself at given moments; called by test_continual_resume.py.

`continual_child.py SPEC DIR METHOD SEED EVENT...`: for every EVENT, "name:k", a run in DIR/name-k
is killed at the k-th such event, then run again to its end; one in DIR/whole is left alone.
"random:k" is k kills, each at a moment drawn from the time that a whole run takes: one is killed
again and again until it is whole, then the next begins, in DIR/random-0, DIR/random-1 and so on.
Every run is a process of its own, forked before torch has computed anything.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from continual_kit import REGISTRY
from rich.console import Console
from stamina_adapters.cli import benchmark as command
from stamina_adapters.cli.benchmark import benchmark
from stamina_adapters.continual import store
from stamina_adapters.training.trainer import ContinualTrainer


class _Killer:
    """SIGKILL at the k-th event of a name."""

    def __init__(self, event: str) -> None:
        name, count = event.split(":")
        self._name, self._left = name, int(count)

    def reach(self, name: str) -> None:
        if name == self._name:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def _watch(killer: _Killer) -> None:
    """Let training, the state's rename and the appending of rows reach the killer."""
    loss, replace, append = ContinualTrainer._loss, os.replace, store.RunStore._append

    def _loss(self, *arguments, **named):
        killer.reach("step")
        return loss(self, *arguments, **named)

    def _replace(source, target):
        if Path(target).name == "state.safetensors":
            killer.reach("before-rename")
            replace(source, target)
            killer.reach("after-rename")
        else:
            replace(source, target)

    def _append(self, lines):
        if lines:
            # half of what is to be written, and a line cut in two
            data = "".join(lines).encode()
            with self._lines.open("r+b") as stream:
                stream.seek(self._length)
                stream.write(data[: len(data) * 2 // 3])
            killer.reach("half-rows")
        append(self, lines)
        if lines:
            killer.reach("after-rows")

    ContinualTrainer._loss = _loss
    store.os.replace = _replace
    store.RunStore._append = _append


def _start(spec: Path, output: Path, method: str, seed: str, event: str | None = None) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if event is not None:
                _watch(_Killer(event))
            registry = REGISTRY if method == "fake" else command.default_registry()
            with open(os.devnull, "w") as nothing:
                benchmark(spec, method, seed, output, Console(file=nothing), registry)
            status = 0
        finally:
            os._exit(status)
    return child


def _end(child: int) -> int:
    return os.waitpid(child, 0)[1]


def _kill_at_random(folder: Path, kills: int, longest: float, run: tuple[Path, str, str]) -> int:
    """Returns the status of the last run; every one before was killed or whole."""
    spec, *names = run
    number, left = 0, kills
    while True:
        child = _start(spec, folder / f"random-{number}", *names)
        if left:
            time.sleep(random.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
        status = _end(child)
        if os.WIFSIGNALED(status):
            left -= 1
        elif status or not left:
            return status
        else:
            number += 1


def main(spec: str, folder: str, method: str, seed: str, *events: str) -> None:
    run, place = (Path(spec), method, seed), Path(folder)
    started = time.monotonic()
    outcomes = [_end(_start(run[0], place / "whole", *run[1:]))]
    longest = time.monotonic() - started
    for event in events:
        if event.startswith("random:"):
            kills = int(event.removeprefix("random:"))
            outcomes.append(_kill_at_random(place, kills, longest, run))
            continue
        output = place / event.replace(":", "-")
        killed = _end(_start(run[0], output, *run[1:], event))
        if not os.WIFSIGNALED(killed):
            sys.exit(f"{event} was never reached: status {killed}")
        outcomes.append(_end(_start(run[0], output, *run[1:])))
    if any(outcomes):
        sys.exit(f"a run failed: {outcomes}")


if __name__ == "__main__":
    main(*sys.argv[1:])
