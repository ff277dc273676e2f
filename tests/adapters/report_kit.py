# SPDX-License-Identifier: Apache-2.0
"""What the tests of the report share: made-up rows, and the command."""

import random

from cli_kit import run
from PIL import Image
from stamina_adapters.continual.rows import (
    CheckpointRow,
    ConceptRow,
    PairRow,
    PictureRow,
    RunRow,
    SummaryRow,
    to_line,
)
from stamina_adapters.continual.thumbnails import encode


def made_run(method, seed, concepts, *, forgets=0.0, tires=0.0, masks=False, name="made"):
    """Rows of a run whose concepts lose `forgets` for each later one, and are learned ever worse
    by `tires`."""
    chance = random.Random(f"{method}{seed}")
    labels = {"method": method, "seed": seed}
    checkpoints = [k for k in (1, 5, 10, 25, 50) if k <= concepts]
    rows = [
        RunRow(
            benchmark=name,
            concepts=concepts,
            identities=max(concepts, 2),
            pictures=16,
            training={},
            settings={},
            versions={},
            device="cpu",
            threads=1,
            **labels,
        )
    ]

    def share(value):
        return min(1.0, max(0.0, value + chance.gauss(0, 0.03)))

    learned = []
    for task in range(1, concepts + 1):
        learned.append(share(0.95 - tires * task))
        rows.append(
            ConceptRow(
                task=task,
                concept=f"face-{task:03d}",
                token=f"<v{task}>",
                family="face",
                accuracy=learned[-1],
                cosine=0.8,
                mmd=0.2,
                told=[(task - 1, 16)],
                loss_sampled=0.1,
                loss_committed=0.1,
                trained_percent=2.5,
                stored_percent=0.01 * task,
                carried_percent=10,
                density=0.15 if masks else None,
                overlap=0.3 if masks else None,
                overlaps=[share(0.15) for _ in range(task - 1)] if masks else [],
                seconds=10 + chance.random(),
                peak_mib=100,
                **labels,
            )
        )
        if task == 1 or task == concepts:
            tile = Image.new("RGB", (32, 32), (5 * task % 255, 90, 160))
            rows.append(
                PictureRow(
                    stage="learned", task=task, concept=f"face-{task:03d}", data=encode([tile]),
                    **labels,
                )
            )  # fmt: skip
        if task not in checkpoints:
            continue
        kept = [share(a - forgets * (task - k)) for k, a in enumerate(learned, 1)]
        confusion = []
        for k, a in enumerate(kept, 1):
            right = round(16 * a)
            confusion += [(k, k - 1, right), (k, task - 1 if k != task else 0, 16 - right)]
        f_mmd = forgets * task / 2
        rows.append(
            CheckpointRow(
                after=task,
                accuracy=kept,
                cosine=[0.8] * task,
                a_mmd=0.1 + f_mmd,
                a_mmd_each=[0.1 + f_mmd] * task,
                f_mmd=f_mmd if task > 1 else None,
                f_mmd_each=[f_mmd] * (task - 1),
                kid=0.002,
                confusion=confusion,
                seconds=3,
                **labels,
            )
        )
        rows.append(
            SummaryRow(
                concepts=task,
                a_mmd=0.1 + f_mmd,
                f_mmd=f_mmd if task > 1 else None,
                kid=0.002,
                accuracy_after_learning=sum(learned) / task,
                accuracy_final=sum(kept) / task,
                accuracy_ceiling=0.99,
                accuracy_family=0.05,
                chance=1 / max(concepts, 2),
                cosine_final=0.8,
                trained_percent=2.5,
                stored_percent=0.01 * task,
                carried_percent=10,
                density=0.15 if masks else None,
                seconds=10.5 * task,
                peak_mib=100,
                **labels,
            )
        )
    for task in {1, concepts}:
        tile = Image.new("RGB", (32, 32), (5 * task % 255, 120, 60))
        rows.append(
            PictureRow(
                stage="final", task=task, concept=f"face-{task:03d}", data=encode([tile]), **labels
            )
        )
    if concepts > 1:
        rows.append(
            PairRow(
                after=concepts, first=1, second=2, share_first=0.4, share_second=0.3,
                share_either=0.7, **labels,
            )
        )  # fmt: skip
    return rows


def write(folder, name, rows):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(map(to_line, rows)))


def report(*arguments):
    """The outcome of `stamina report` with these arguments."""
    return run("report", *arguments)
