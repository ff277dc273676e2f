# SPDX-License-Identifier: Apache-2.0
"""The pretraining command: the same bits after an interruption, and clear errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stamina_adapters.embedded import autoencoder, diffusion, encoder
from stamina_adapters.embedded.pretrain import STAGES, OtherSeedError, Plan, pretrain
from stamina_adapters.embedded.training import FlatTrainer, Schedule, fit
from torch import nn

TINY = Plan(
    picture_chunks=2,
    latent_chunks=4,
    pair_chunks=2,
    chunk=8,
    autoencoder=replace(autoencoder.SCHEDULE, steps=2),
    decoder=replace(autoencoder.DECODER_SCHEDULE, steps=1),
    encoder=replace(encoder.SCHEDULE, steps=2),
    diffusion=replace(diffusion.SCHEDULE, steps=3),
    batch=(2, 2, 4),
    compile_model=False,
)


def _toy(folder: Path, steps: int, stop_after: int | None = None, save_every: int = 2) -> Path:
    torch.manual_seed(0)
    plan = Schedule(steps=steps, rate=1e-2, warmup=2, save_every=save_every)
    trainer = FlatTrainer(nn.Linear(5, 3), plan, torch.bfloat16)
    path = folder / "toy.safetensors"

    def loss_at(step: int) -> torch.Tensor:
        if step == stop_after:
            raise KeyboardInterrupt
        x = torch.randn(7, 5, generator=torch.Generator().manual_seed(step)).bfloat16()
        return trainer.work(x).float().square().mean()

    fit(trainer, loss_at, path, "toy")
    return path


def test_killed_run_continues_with_the_same_bits(tmp_path: Path) -> None:
    whole = load_file(_toy(tmp_path / "whole", 9))
    # Killed between two checkpoints: the steps since the last one are done again.
    with pytest.raises(KeyboardInterrupt):
        _toy(tmp_path / "killed", 9, stop_after=5)
    resumed = load_file(_toy(tmp_path / "killed", 9))
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    assert not list((tmp_path / "killed").glob("*.part"))
    # training must not leave the thread's arithmetic flushing subnormals to zero
    assert torch.tensor(1e-40) * 1.0 > 0


def test_pretrain_runs_all_stages_and_resumes_with_the_same_bits(tmp_path: Path) -> None:
    whole, halted = tmp_path / "whole", tmp_path / "halted"
    assets = pretrain(whole, plan=TINY)
    shorter = replace(TINY, diffusion=replace(TINY.diffusion, save_every=1))
    # minutes=0 leaves each stage after one step.
    pretrain(halted, plan=shorter, minutes=0.0, stages=("autoencoder",))
    pretrain(halted, plan=shorter, stages=("autoencoder", "encoder"))
    pretrain(halted, plan=shorter, minutes=0.0, stages=("diffusion",))
    again = pretrain(halted, plan=shorter, stages=("diffusion", "decoder", "export"))
    files = sorted(p.relative_to(assets) for p in assets.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert Path("unet/diffusion_pytorch_model.safetensors") in files
    for file in files:
        assert (assets / file).read_bytes() == (again / file).read_bytes(), file


def test_errors_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stages holds \['unet'\]; known are"):
        pretrain(tmp_path, stages=("unet",))
    assert "export" in STAGES
    with pytest.raises(FileNotFoundError, match="run its stage first"):
        pretrain(tmp_path, plan=TINY, stages=("export",))


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    plan = Schedule(steps=1, rate=1e-3)
    FlatTrainer(nn.Linear(2, 2), plan).save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds 6 parameters, the model has 12"):
        FlatTrainer(nn.Linear(3, 3), plan).load(tmp_path / "a.safetensors")


def test_a_folder_of_another_seed_is_refused(tmp_path: Path) -> None:
    pretrain(tmp_path, seed=1, plan=TINY, stages=())
    pretrain(tmp_path, seed=1, plan=TINY, stages=())
    with pytest.raises(OtherSeedError, match="holds a run of seed 1, not of 2"):
        pretrain(tmp_path, seed=2, plan=TINY, stages=())
