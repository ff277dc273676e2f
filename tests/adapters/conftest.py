# SPDX-License-Identifier: Apache-2.0
"""A tiny Stable Diffusion 1.5 pipeline, built from local files in well under a second."""

import copy
import json

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import (  # noqa: E402
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

GUARDED = {"save_pretrained", "fuse_qkv_projections"}


def _byte_alphabet() -> list[str]:
    printable = [*range(ord("!"), ord("~") + 1), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + k) for k in range(len(rest))]


def _tokenizer(folder) -> CLIPTokenizer:
    alphabet = _byte_alphabet()
    words = alphabet + [c + "</w>" for c in alphabet] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def _build(folder) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    tokenizer = _tokenizer(folder)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=40,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(16,), norm_num_groups=4, sample_size=16, latent_channels=4
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=40,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def stock_pipe(tmp_path_factory) -> StableDiffusionPipeline:
    """The untouched pipeline: never change it, take `pipe`."""
    return _build(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def model(stock_pipe, tmp_path_factory):
    """The folder of the untouched pipeline: never write there."""
    folder = tmp_path_factory.mktemp("model") / "sd"
    stock_pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def pipe_of():
    """A function from a pipeline to one of its own with the same weights."""

    def copied(other) -> StableDiffusionPipeline:
        components = {
            k: copy.deepcopy(v) for k, v in other.components.items() if k != "image_encoder"
        }
        pipe = StableDiffusionPipeline(**components, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return copied


@pytest.fixture
def pipe(stock_pipe, pipe_of) -> StableDiffusionPipeline:
    """A pipeline of its own for every test, with the same weights."""
    return pipe_of(stock_pipe)


@pytest.fixture
def render():
    """Pixels of a two-step generation, the same noise every time."""

    def run(pipe, prompt="a photo of a face", **kwargs) -> torch.Tensor:
        return pipe(
            prompt,
            num_inference_steps=2,
            height=8,
            width=8,
            generator=torch.Generator().manual_seed(1),
            output_type="pt",
            **kwargs,
        ).images

    return run


@pytest.fixture
def learn():
    """Attach an adapter and give its A random values, as if it had been trained."""
    from stamina_adapters import StaminaConfig, apply_stamina, stamina_parameters

    def attach(target, name="c0", *, std=0.5, **settings) -> list[str]:
        config = StaminaConfig(**{"r": 3, "mask_rank": 5, **settings})
        paths = apply_stamina(target, config, name)
        generator = torch.Generator().manual_seed(sum(name.encode()))
        with torch.no_grad():
            for A in stamina_parameters(target)["factors"][::2]:
                A.copy_(torch.randn(A.shape, generator=generator) * std)
        return paths

    return attach


@pytest.fixture
def unet(pipe, learn):
    """A UNet in training: second concept, both penalties on, two launches a block."""
    from stamina_adapters import (
        fold_stamina,
        set_stamina_attn_processor,
        set_stamina_penalties,
        set_stamina_step,
    )

    learn(pipe)
    fold_stamina(pipe)
    learn(pipe, "c1")
    set_stamina_attn_processor(pipe)
    set_stamina_step(pipe, 3)
    set_stamina_penalties(pipe, forget=0.5, sparse=0.01)
    return pipe.unet.train()


@pytest.fixture
def sizes(monkeypatch):
    """How many layers every launch serves, in order."""
    from stamina_adapters import linear

    sizes = []
    original = linear.masked_linear

    def counting(x, projections, **rest):
        sizes.append(len(projections))
        return original(x, projections, **rest)

    monkeypatch.setattr(linear, "masked_linear", counting)
    return sizes


@pytest.fixture
def snapshot():
    """Everything of a pipeline that this library may change: tensors, types, flags, vocabulary."""

    def take(pipe) -> dict:
        taken = {"vocabulary": pipe.tokenizer.get_vocab(), "guards": vars(pipe).keys() & GUARDED}
        for name in ("unet", "text_encoder"):
            model = getattr(pipe, name)
            taken[name] = {
                "types": {path: type(module) for path, module in model.named_modules()},
                "attributes": {path: sorted(vars(m)) for path, m in model.named_modules()},
                "flags": {path: p.requires_grad for path, p in model.named_parameters()},
                "identity": {path: id(p) for path, p in model.named_parameters()},
                "buffers": [path for path, _ in model.named_buffers()],
                "hooks": (len(model._forward_pre_hooks), len(model._forward_hooks)),
                "vocab_size": getattr(model.config, "vocab_size", None),
            }
            taken[name + " bits"] = {k: v.clone() for k, v in model.state_dict().items()}
        return taken

    return take


@pytest.fixture
def assert_same():
    """Compare two snapshots, tensors bit for bit."""

    def compare(before: dict, after: dict) -> None:
        for key, value in before.items():
            if key.endswith(" bits"):
                assert value.keys() == after[key].keys()
                for path, tensor in value.items():
                    assert torch.equal(tensor, after[key][path]), path
            else:
                assert value == after[key], key

    return compare
