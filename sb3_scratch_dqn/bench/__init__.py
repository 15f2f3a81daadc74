"""Benchmarks that anyone can run: ``python -m sb3_scratch_dqn.bench``.

A comparison of algorithms goes this way: ``plan`` (which runs, and are they possible) -> ``grid`` (hands them out and
keeps their files) -> ``experiment`` (one run, a process of its own) -> ``results`` (the files, read and looked at) ->
``comparison`` (what is compared, and the sentences) with ``stats`` -> ``report`` with ``figures`` and ``document``.

Speed goes its own: ``speed`` measures training, ``speed_results`` keeps what it measured; ``replay`` measures buffers,
with ``timing``. ``machine`` knows where all of it takes place.
"""
