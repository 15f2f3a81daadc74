"""Updates on a GPU as CUDA graphs.

- ``engine``: what is recorded, and when it is played
- ``recording``: recording a function
- ``feeds``: where batches come from
- ``steps``: gradients and Adam
- ``actors``: actions
"""
