# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of long sequences: task after task, what is learned, what is kept, at what cost.

spec.py       the typed file that says what a benchmark is
rows.py       what a result holds, one JSON line each
store.py      a run on disk: killed at any moment, it resumes and writes every row once
run.py        the loop over tasks; knows nothing of models
score.py      rows from embeddings; knows nothing of models either
materials.py  the concepts of a specification, with their pictures
snapshot.py   a pipeline's changed weights and vocabulary, taken and put back
customise.py  tasks that are concepts of a diffusion model
levels.py     what every method is compared with: the family's word alone, and the ceiling
tune.py       the same number of trials for every method, on the tuning concepts
report/       figures, tables and the page, from rows alone
"""
