"""Codebooks that live: random lives, asked in every way after every step, each answer the law's.

    law.py         the law and a codebook by row, in numpy and C; shares no code with the package
    background.py  the work behind the look-ups: in threads, step by step, or never finished
    drawing.py     keys, radii and questions where shortcuts go wrong
    operations.py  everything that changes what a look-up may remember
    asking.py      every way to ask
    living.py      one life: operations, background work and questions in a drawn order
    ranks.py       row shards whose ranks are threads
    edited.py      a durable codebook: an editor, a reader that follows it, versions, undo
    dropin.py      the references' adaptor, whose tensors a caller writes to
    mutants.py     faults of memory, put in one at a time, and how soon a life finds them

`python -m benchmarks.gate_life` runs them for long, `tests/lookup/test_life.py` for a minute.
"""
