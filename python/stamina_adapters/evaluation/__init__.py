# SPDX-License-Identifier: Apache-2.0
"""Judging what was learned.

embedder.py    what the metrics need from an image encoder
metrics.py     A_mmd, F_mmd, identity by nearest centroid
sampling.py    pictures from a pipeline
grid.py        pictures side by side
cost.py        time and saved memory of the adapted projections, beside eager PyTorch
"""
