"""Updates on the CPU in few calls.

- ``engine``: gradients by hand, for networks of linear layers; ``support``: which policies that is possible for
- ``dense``: forward and backward pass of linear layers
- ``products``: the fastest matrix products
- ``learners``: targets, losses and their gradients at the outputs
- ``flat``: parameters, gradients and Adam's state as flat tensors
- ``autograd``: gradients by autograd, for all other networks
"""

from sb3_scratch_dqn.engines.fused.autograd import FusedAutogradEngine
from sb3_scratch_dqn.engines.fused.engine import FusedEngine

__all__ = ["FusedAutogradEngine", "FusedEngine"]
