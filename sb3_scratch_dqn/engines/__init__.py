"""Engines: how one update is executed.

- ``choose``: which engine serves a configuration
- ``eager``: SB3's numbers, to the last bit; the yardstick of the others
- ``cuda_graph``: whole updates as single launches on a GPU. ``recording`` makes them, ``feeds`` has their batches,
  ``device_steps`` their gradients and Adam, ``actors`` actions
- ``fused_cpu``: gradients by hand, for networks of linear layers. ``dense`` has the mathematics of the layers,
  ``fused_learners`` that of the losses, ``products`` the fastest matrix products, ``flat`` all parameters in one piece;
  ``fused_support`` says which networks it can serve
- ``fused_autograd``: for all other networks
- ``update``: what the last update looked like
- ``watch``: what others change behind an engine's back
"""

from sb3_scratch_dqn.engines.choose import ENGINE_NAMES, Engine, choose_engine, find_engine
from sb3_scratch_dqn.engines.recording import CannotRecordError

__all__ = ["ENGINE_NAMES", "CannotRecordError", "Engine", "choose_engine", "find_engine"]
