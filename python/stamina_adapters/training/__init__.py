# SPDX-License-Identifier: Apache-2.0
"""Learning concepts.

config.py      settings of a run, the list of concepts
data.py        folders of pictures, cached latents
objective.py   the denoising loss
penalties.py   weights of the regularisers over a run
methods.py     how a concept is put into a model and folded: what differs between methods
ablations.py   STAMINA with one part changed
rivals/        the other methods
registry.py    all of them by name
trainer.py     the loop
"""
