"""Updates on a GPU as CUDA graphs.

- ``engine``: what is captured, and when it is replayed
- ``capture``: capture of a function in a graph
- ``feeds``: mini-batches for captured updates
- ``optimizer``: gradients, clipping and Adam without the host
- ``actors``: captured greedy actions
"""

from sb3_scratch_dqn.engines.cuda.capture import CaptureError
from sb3_scratch_dqn.engines.cuda.engine import CudaGraphEngine

__all__ = ["CaptureError", "CudaGraphEngine"]
