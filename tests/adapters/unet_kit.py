# SPDX-License-Identifier: Apache-2.0
"""One training step of a UNet, on whatever device it is."""

import torch


def train_step(unet, call=None):
    """Output and gradients of one step, on the CPU."""
    device = next(unet.parameters()).device
    torch.manual_seed(1)
    latents, text = (torch.randn(*shape).to(device) for shape in ((2, 4, 8, 8), (2, 7, 40)))
    latents.requires_grad_()
    text.requires_grad_()
    times = torch.tensor([3, 500]).to(device)
    output = (unet if call is None else call)(latents, times, text).sample
    output.float().square().mean().backward()
    named = {k: p for k, p in unet.named_parameters() if p.requires_grad and p.grad is not None}
    gradients = {k: p.grad.clone().cpu() for k, p in named.items()}
    unet.zero_grad(set_to_none=True)
    return output.detach().cpu(), gradients
