# SPDX-License-Identifier: Apache-2.0
"""Time, memory and accuracy of the kernels beside real rivals, in one interleaved run.

cases.py     what is measured: the one registry of shapes
problem.py   random inputs of a case
noise.py     the masks that a stochastic rival drew, so that fp64 can use the same
rivals.py    the ways to compute a case; adding a rival is adding an entry here
folders.py   the ways to fold
operations.py  single calls: compose, sample, products, copies
unet.py      a whole training step of a UNet of SDXL's shape
measure.py   the accuracy check and interleaved rounds
clock.py     wall time, time between a device's events, its kernels
suites/      linear, group, fold, memory, scale, gpu-*: which cases meet which rivals
gpu.sh       all there is to do on a GPU machine, in one call
peak.py      memory of one training step, in a process of its own where there is no device
summary.py   geometric means, refused beside a failed check
record.py    the result file
machine.py   what it was measured on
plots.py     pictures of a result file; canvas.py has what they share
"""
