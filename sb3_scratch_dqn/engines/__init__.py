"""How an update is executed.

- ``choose``: which engine serves a configuration
- ``eager``: SB3's numbers, to the last bit; every other engine is compared with it
- ``fused``: on the CPU in few calls, by hand or around autograd
- ``cuda``: whole updates as single launches on a GPU
- ``update``: what the last update looked like
- ``watch``: changes to a policy that an engine does not see
"""

from sb3_scratch_dqn.engines.choose import ENGINE_NAMES, Engine, choose_engine, find_engine
from sb3_scratch_dqn.engines.cuda.recording import CaptureError

__all__ = ["ENGINE_NAMES", "CaptureError", "Engine", "choose_engine", "find_engine"]
