"""How an update is executed: engines take gradient steps and select greedy actions.

- ``choose``: the interface of an engine, and the selection of one for a configuration
- ``eager``: plain PyTorch; SB3's numbers to the last bit, the reference for every other engine
- ``fused``: few calls per update on the CPU, with hand-derived gradients, or autograd with fused Adam
- ``cuda``: whole updates as CUDA graphs
- ``last_update``: outputs, target and gradient norm of the last update
- ``modifications``: detection of modifications, hooks and patches that an engine would bypass
"""

from sb3_scratch_dqn.engines.choose import ENGINE_NAMES, Engine, choose_engine, find_engine
from sb3_scratch_dqn.engines.cuda.capture import CaptureError

__all__ = ["ENGINE_NAMES", "CaptureError", "Engine", "choose_engine", "find_engine"]
