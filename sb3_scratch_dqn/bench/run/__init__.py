"""Train the runs of a comparison.

- ``plan``: list the runs and check that they are possible (``make_plan``)
- ``grid``: execute runs in parallel, on one machine or a cluster, and write their files (``run_all``)
- ``experiment``: one run in its own process
"""
