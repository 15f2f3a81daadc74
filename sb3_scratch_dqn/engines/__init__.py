"""Engines: how one update is executed.

- ``choose``: which engine serves a configuration
- ``eager``: SB3's numbers, to the last bit; the yardstick of the others
- ``fused_cpu``: gradients by hand, for networks of linear layers. ``dense`` has the mathematics, ``products`` the
  fastest matrix products, ``flat`` all parameters in one piece
- ``fused_autograd``: for all other networks
- ``update``: what the last update looked like
"""

from sb3_scratch_dqn.engines.choose import ENGINE_NAMES, Engine, choose_engine

__all__ = ["ENGINE_NAMES", "Engine", "choose_engine"]
