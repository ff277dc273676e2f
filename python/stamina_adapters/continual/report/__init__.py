# SPDX-License-Identifier: Apache-2.0
"""A result as a page: from its rows alone.

results.py    rows in files, sorted by benchmark, method and seed
agreement.py  which runs may stand in one table
stats.py      means and standard deviations over seeds
style.py      colours, dashes and the axes' look; safe for colour-blind readers
curves.py     what is learned and kept over the tasks
heat.py       accuracy of every concept at every checkpoint, and who is taken for whom
tables.py     figures in tables, for the page and in Markdown
page.py       the page and the Markdown file

F_mmd alone rewards a method that learns nothing: no table and no figure shows it without accuracy
right after learning beside it.
"""
