# SPDX-License-Identifier: Apache-2.0
"""Rival methods of continual customisation, on the same trainer, data, budget and seeds.

delta.py              W + D, the mechanism that all of them share
base.py               token, deltas, fold, and what is carried from concept to concept
textual_inversion.py  only the word
lora.py               one low-rank delta after the other; merged afterwards
custom_diffusion.py   full keys and values
ewc.py                full keys and values, held by a diagonal Fisher penalty
c_lora.py             low-rank deltas kept off what earlier ones changed
orthogonal.py         low-rank deltas in orthogonal input subspaces, merged afterwards
sd_lora.py            earlier directions fixed, their magnitudes still trained
masked.py             STAMINA's own formula in eager PyTorch, with one part replaced: ablations
"""
