# SPDX-License-Identifier: Apache-2.0
"""Time, memory and accuracy of the kernels beside real rivals, in one interleaved run.

cases.py     what is measured: the one registry of shapes
problem.py   random inputs of a case
noise.py     the masks that a stochastic rival drew, so that fp64 can use the same
rivals.py    the ways to compute a case; adding a rival is adding an entry here
measure.py   the accuracy check and the clock
suites/      linear, group, fold, memory, scale: which cases meet which rivals
peak.py      memory of one training step in a process of its own
summary.py   geometric means, refused beside a failed check
record.py    the result file
machine.py   what it was measured on
plots.py     pictures of a result file
"""
