# SPDX-License-Identifier: Apache-2.0
"""Objective, density hinges, latent cache and trainer."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from stamina_adapters.config import StaminaConfig
from stamina_adapters.training.config import ConceptSpec, TrainingConfig
from stamina_adapters.training.data import ConceptDataset, LatentCache
from stamina_adapters.training.errors import InputError
from stamina_adapters.training.methods import StaminaMethod
from stamina_adapters.training.objective import DenoisingObjective
from stamina_adapters.training.penalties import DensityHinge
from stamina_adapters.training.trainer import ContinualTrainer

ADAPTER = StaminaConfig(r=4, mask_rank=4)


def _dataset(seed=0, count=3):
    generator = torch.Generator().manual_seed(seed)
    arrays = torch.randint(0, 256, (count, 8, 8, 3), generator=generator, dtype=torch.uint8)
    return ConceptDataset([Image.fromarray(array.numpy()) for array in arrays])


def _concept(number=1):
    return ConceptSpec(instance_prompt=f"a photo of <v{number}>", instance_data_dir=".")


def _trainer(pipe, **settings):
    settings = {"max_train_steps": 12, "train_batch_size": 2, **settings}
    return ContinualTrainer(pipe, StaminaMethod(ADAPTER), TrainingConfig(**settings))


def _weights(pipe):
    modules = (pipe.unet, pipe.text_encoder)
    return [t for module in modules for t in module.state_dict().values()]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_is_the_declared_one(prediction, gamma):
    scheduler = DDIMScheduler(prediction_type=prediction)
    objective = DenoisingObjective(scheduler, gamma)
    clean = torch.randn(6, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    batch = objective.corrupt(clean, torch.Generator().manual_seed(2))
    a = scheduler.alphas_cumprod.double()[batch.timesteps].view(-1, 1, 1, 1)
    noise = (batch.latents.double() - a.sqrt() * clean.double()) / (1 - a).sqrt()
    if prediction == "epsilon":
        target = noise
    else:
        target = a.sqrt() * noise - (1 - a).sqrt() * clean.double()
    # noise is recovered by a division that is as small as sqrt(1 - a) = 1e-2
    torch.testing.assert_close(batch.target.double(), target, rtol=1e-4, atol=1e-4)
    snr = (a / (1 - a)).flatten()
    weight = torch.ones_like(snr)
    if gamma is not None:
        weight = snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)
    expected = (weight * batch.target.double().square().flatten(1).mean(1)).mean()
    found = objective.loss(torch.zeros_like(clean), batch)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_times_are_spread_over_the_batch():
    objective = DenoisingObjective(DDIMScheduler())
    for seed in range(20):
        batch = objective.corrupt(torch.zeros(8, 1, 1, 1), torch.Generator().manual_seed(seed))
        assert (batch.timesteps // 125).tolist() == list(range(8))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("linear", [1.0, 0.75, 0.5, 0.25]), ("constant", [1.0, 1.0, 1.0, 1.0])],
)
def test_rates_fall_linearly_or_stay(pipe, monkeypatch, schedule, expected):
    rates = []

    class Spy(torch.optim.AdamW):
        def step(self, *arguments):
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(*arguments)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    trainer = _trainer(pipe, lr_scheduler=schedule, max_train_steps=4, learning_rate=0.5)
    trainer.learn(_concept(), _dataset())
    assert [factors for factors, _, _ in rates] == pytest.approx([0.5 * e for e in expected])


def test_other_predictions_are_refused():
    with pytest.raises(InputError, match="prediction_type 'sample'.*cannot be trained"):
        DenoisingObjective(DDIMScheduler(prediction_type="sample"))


def _hinge(**settings):
    config = TrainingConfig(
        max_train_steps=100,
        sparse_weight=2.0,
        target_density=0.3,
        min_density=0.1,
        sparse_start=0.1,
        sparse_end=0.5,
        **settings,
    )
    return DensityHinge(config, total_weights=1000)


def test_the_hinge_waits_comes_down_and_stays():
    hinge = _hinge()
    assert hinge.weight(9, 0.8) == 0.0
    assert hinge.weight(10, 0.8) == 0.0
    assert hinge.target(10) == 0.8
    assert hinge.target(30) == pytest.approx(0.3 + 0.5 * 0.5**3)
    assert hinge.target(50) == hinge.target(99) == 0.3
    assert hinge.weight(60, 0.7) == pytest.approx(2.0 / 1000 * 0.4)
    assert hinge.weight(60, 0.2) == 0.0
    assert hinge.weight(60, 0.04) == pytest.approx(-2.0 / 1000 * 0.06)


def test_a_density_below_the_target_is_never_pulled_up_to_it():
    hinge = _hinge()
    assert hinge.weight(10, 0.2) == 0.0
    assert hinge.target(10) == 0.3


def test_latents_are_scaled_and_drawn_without_repeats(pipe):
    pixels = _dataset(count=5).pixels(8)
    cache = LatentCache(pipe.vae, pixels)
    with torch.no_grad():
        encoded = torch.cat([pipe.vae.encode(p[None]).latent_dist.mean for p in pixels])
    expected = encoded * pipe.vae.config.scaling_factor
    cache._std = None
    drawn = cache.sample(5, torch.Generator().manual_seed(0))
    order = [int((row - expected).abs().flatten(1).sum(1).argmin()) for row in drawn]
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert torch.equal(drawn, expected[order])
    assert len(cache.sample(12, torch.Generator().manual_seed(0))) == 12


def test_a_gaussian_autoencoder_gives_fresh_draws(pipe):
    cache = LatentCache(pipe.vae, _dataset(count=1).pixels(8))
    generator = torch.Generator().manual_seed(0)
    assert not torch.equal(cache.sample(1, generator), cache.sample(1, generator))


def test_equal_seeds_fold_equal_bits_and_others_do_not(stock_pipe, pipe):
    import copy

    pipes = [pipe] + [
        type(pipe)(**copy.deepcopy(pipe.components), requires_safety_checker=False)
        for _ in range(2)
    ]
    for seed, one in zip((0, 0, 1), pipes, strict=True):
        trainer = _trainer(one, seed=seed)
        for number in (1, 2):
            trainer.learn(_concept(number), _dataset(number))
    weights = [_weights(one) for one in pipes]
    assert all(torch.equal(x, y) for x, y in zip(weights[0], weights[1], strict=True))
    assert any(not torch.equal(x, y) for x, y in zip(weights[0], weights[2], strict=True))


def test_learning_changes_only_keys_values_and_the_tokens_row(stock_pipe, pipe):
    trainer = _trainer(pipe)
    trainer.learn(_concept(), _dataset())
    before, after = stock_pipe.unet.state_dict(), pipe.unet.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".attn2.to_k." in name or ".attn2.to_v." in name for name in changed)
    table, learned = (p.text_encoder.get_input_embeddings().weight for p in (stock_pipe, pipe))
    assert learned.shape[0] == table.shape[0] + 1
    assert torch.equal(learned[:-1], table)
    assert pipe.tokenizer.convert_tokens_to_ids("<v1>") == len(table)


def test_the_record_tells_what_happened(pipe):
    seen = []
    trainer = _trainer(pipe, hard_fraction=0.25, density_every=3)
    state, log = trainer.learn(_concept(), _dataset(), seen.append)
    assert log.token == "<v1>"
    assert log.images == 3
    assert [step.step for step in log.steps] == list(range(12))
    assert seen == log.steps
    assert all(math.isfinite(step.loss) for step in log.steps)
    assert [probe.step for probe in log.probes] == [9, 12]
    assert set(log.densities) == set(state.layers)
    assert all(0 < density < 1 for density in log.densities.values())


def test_masks_are_sampled_first_and_hard_at_the_end(pipe):
    trainer = _trainer(pipe, hard_fraction=0.25)
    modes = []

    def note(report):
        layers = trainer.method._layers.values()
        modes.append({layer.hard for layer in layers})

    trainer.learn(_concept(), _dataset(), note)
    assert modes == [{False}] * 9 + [{True}] * 3


def test_penalties_reach_the_layers_normalised(pipe):
    trainer = _trainer(pipe, forget_weight=3.0, sparse_weight=0.0, max_train_steps=1)
    seen = {}

    def note(report):
        for path, layer in trainer.method._layers.items():
            seen[path] = (layer.forget_weight.item(), layer.weight.numel())

    trainer.learn(_concept(), _dataset(), note)
    total = sum(count for _, count in seen.values())
    assert [weight for weight, _ in seen.values()] == pytest.approx([3.0 / total] * len(seen))


@pytest.mark.parametrize("target", [0.2, 0.5])
def test_density_follows_its_target(pipe, target):
    """Neither collapsed nor full: the band is the hinge's target and its floor, with the step
    that AdamW overshoots."""
    trainer = _trainer(
        pipe,
        max_train_steps=80,
        target_density=target,
        min_density=0.05,
        mask_learning_rate=5e-3,
        density_every=2,
    )
    _, log = trainer.learn(_concept(), _dataset())
    assert log.steps[0].density > 0.7
    densities = log.densities.values()
    assert sum(densities) / len(densities) == pytest.approx(target, abs=0.12)
    assert all(0.02 < density < 0.7 for density in densities)


def test_the_floor_holds_in_short_runs(pipe):
    _, log = _trainer(pipe, max_train_steps=20).learn(_concept(), _dataset())
    # a step of AdamW overshoots
    assert min(log.densities.values()) > TrainingConfig().min_density - 0.03


@pytest.mark.parametrize(
    ("steps", "every", "expected"), [(1, 5, 1), (20, 5, 1), (40, 5, 3), (60, 5, 5), (100, 2, 2)]
)
def test_density_is_measured_a_dozen_times_at_least(steps, every, expected):
    config = TrainingConfig(max_train_steps=steps, density_every=every)
    measured = [step for step in range(steps) if config.measures_density(step)]
    assert measured == list(range(0, steps, expected))


def test_the_forgetting_penalty_keeps_off_what_was_learned(stock_pipe, pipe):
    import copy

    other = type(pipe)(**copy.deepcopy(pipe.components), requires_safety_checker=False)
    overlap = []
    for one, weight in ((pipe, 0.0), (other, 1e12)):
        _trainer(one).learn(_concept(1), _dataset(1))
        changed = {
            name: (tensor - stock_pipe.unet.state_dict()[name]).clone()
            for name, tensor in one.unet.state_dict().items()
            if "attn2.to_v" in name
        }
        before = {name: one.unet.state_dict()[name].clone() for name in changed}
        _trainer(one, forget_weight=weight).learn(_concept(2), _dataset(2))
        after = one.unet.state_dict()
        overlap.append(
            sum(((after[n] - before[n]) * changed[n]).square().sum().item() for n in changed)
        )
    assert overlap[1] < 0.5 * overlap[0]


def test_a_resolution_that_does_not_fit_is_refused(pipe):
    pipe.vae_scale_factor = 8
    with pytest.raises(InputError, match="--resolution 12: must be a multiple of 8"):
        _trainer(pipe, resolution=12)


def test_a_loss_that_is_not_finite_stops_the_run(pipe):
    trainer = _trainer(pipe)
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("inf"))
    message = "^the loss of <v1> became .* at step 0; lower its method's rates$"
    for _ in range(2):
        with pytest.raises(InputError, match=message):
            trainer.learn(_concept(), _dataset())


def test_a_concept_that_diverges_in_its_last_step_is_not_folded(pipe):
    """The loss of a step is that of before it: what the last one did shows in the probe alone."""
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    trainer = _trainer(pipe, max_train_steps=1, learning_rate=1e30)
    with pytest.raises(InputError, match="loss of <v1> became nan in the last step; lower its"):
        trainer.learn(_concept(), _dataset())
    after = pipe.unet.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_targets_that_match_nothing_leave_no_word(pipe):
    words = len(pipe.tokenizer)
    adapter = ADAPTER.model_copy(update={"target_modules": ("nothing",)})
    trainer = ContinualTrainer(pipe, StaminaMethod(adapter), TrainingConfig(max_train_steps=1))
    with pytest.raises(ValueError, match="target_modules: no module"):
        trainer.learn(_concept(), _dataset())
    assert len(pipe.tokenizer) == words


def test_factors_that_cannot_be_folded_are_an_input_error(pipe, monkeypatch):
    trainer = _trainer(pipe, max_train_steps=1)

    def finish():
        raise OverflowError("a weight leaves the range")

    monkeypatch.setattr(trainer.method, "finish", finish)
    with pytest.raises(InputError, match="<v1>: a weight leaves the range; lower its method's"):
        trainer.learn(_concept(), _dataset())


def test_sixteen_bit_greys_are_scaled(tmp_path):
    ramp = torch.arange(0, 65536, 256, dtype=torch.int32).view(16, 16)
    Image.fromarray(ramp.numpy().astype("uint16")).save(tmp_path / "ramp.png")
    (image,) = ConceptDataset.from_folder(tmp_path).images
    assert image.mode == "RGB"
    assert [value[0] for value in image.getdata()] == list(range(256))
