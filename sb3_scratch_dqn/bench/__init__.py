"""Comparing algorithms, and measuring speed: ``python -m sb3_scratch_dqn.bench``.

- ``run`` trains: ``plan`` (which runs, and are they possible) -> ``grid`` (hands them out, keeps their files) ->
  ``experiment`` (one run, a process of its own)
- ``results`` reads the files of runs
- ``report`` compares them: ``comparison`` with ``stats`` -> ``report`` with ``figures`` and ``document``
- ``speed`` measures: ``learning`` training, kept by ``results``; ``replay`` buffers, with ``timing``
- ``machine`` describes the machine
"""
