"""Updates on the CPU in few calls.

- ``engine``: hand-derived gradients, for networks of linear layers; ``requirements``: for which policies
- ``dense``: forward and backward pass of linear layers
- ``products``: the fastest matrix products
- ``loss_gradients``: targets, losses and their gradients at the outputs
- ``flat``: parameters, gradients and Adam's state as flat tensors
- ``autograd``: autograd with fused Adam, for all other networks
"""

from sb3_scratch_dqn.engines.fused.autograd import FusedAutogradEngine
from sb3_scratch_dqn.engines.fused.engine import FusedEngine

__all__ = ["FusedAutogradEngine", "FusedEngine"]
