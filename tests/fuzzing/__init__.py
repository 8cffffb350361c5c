"""Damaged inputs of every kind, and the rule that each ends in a right result or in one documented error.

A case is a folder: damaged files, and `case.json`, which says how they are read and, where they lie on top of sound
ones, on which (`base`, a folder in tests/corpus/bases). Cases that are kept for good lie in tests/corpus, with the
outcome that is expected of them; tests/test_corpus.py runs them. A case that was found elsewhere joins them as a folder
that is copied there, with `expected` added to its `case.json`.

    python -m fuzzing --minutes 10     make and run new cases until one breaks the rule (`make fuzz`)
    python -m fuzzing --repeat FOLDER  run one case again
    python -m fuzzing.corpus           write tests/corpus anew, but for cases that were added by hand
"""
