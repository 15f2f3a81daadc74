"""Greedy actions that can be captured: observations and actions are in memory that is never reallocated."""

from typing import Any

import numpy as np
import torch as th

from sb3_scratch_dqn.engines.cuda.capture import Function
from sb3_scratch_dqn.networks.policies import DQNPolicy
from sb3_scratch_dqn.replay.device.ring import StagingBuffer
from sb3_scratch_dqn.replay.observations import Array


class Actor:
    """Greedy actions for observations of one shape.

    :param policy: the policy
    :param parts: parts of such an observation, by key; the key is empty if the observation is not a dict
    :param device: device of the policy
    """

    replay: Function  # does what :meth:`choose` does

    def __init__(self, policy: DQNPolicy, parts: dict[str, Array], device: th.device) -> None:
        self._policy = policy
        self._staging, self._inputs = {}, {}
        for key, part in parts.items():
            self._inputs[key] = th.zeros_like(th.from_numpy(np.zeros_like(part)), device=device)
            self._staging[key] = StagingBuffer(part.shape, self._inputs[key].dtype, device)
        rows = len(next(iter(parts.values())))
        self._actions = th.zeros(rows, dtype=th.int64, device=device)

    def choose(self) -> None:
        """Choose actions, with new noise in noisy layers; can be captured."""
        # Copies, because networks may modify their input
        inputs = {key: tensor.clone() for key, tensor in self._inputs.items()}
        with th.no_grad(), self._policy.q_net.noise():
            self._actions.copy_(self._policy.q_net._predict(inputs.get("", inputs)))

    def __call__(self, parts: dict[str, Any]) -> Array:
        """Return greedy actions, ``(B,)``."""
        for key, part in parts.items():
            self._staging[key].acquire()[...] = part
            self._staging[key].copy_to(self._inputs[key])
        self.replay()
        actions: Array = self._actions.cpu().numpy().copy()
        return actions
