"""Benchmarks: compare algorithms over many seeds and measure speed, with ``python -m sb3_scratch_dqn.bench``.

- ``__main__``: the command line
- ``run``: train the runs of a comparison, one JSON file per run
- ``results``: read and check these files
- ``report``: statistics, verdicts and figures of the results
- ``speed``: speed of training, speed and memory of replay
- ``machine``: describe the machine, measure memory

Import names from the modules: this file and those of ``run``, ``report`` and ``speed`` import nothing, because imports
would add to the peak memory that is measured for each training process.
"""
