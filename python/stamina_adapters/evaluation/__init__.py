# SPDX-License-Identifier: Apache-2.0
"""Judging what was learned.

embedder.py    what the metrics need from an image encoder
clip.py        CLIP from a local folder as such an encoder
judge.py       whom pictures show, among learned concepts and distractors
metrics.py     A_mmd, F_mmd, identity by nearest centroid
kid.py         kernel inception distance, by torchmetrics
sampling.py    pictures from a pipeline
grid.py        pictures side by side
html.py        parts of self-contained pages
cost.py        time and saved memory of the adapted projections, beside eager PyTorch
"""
