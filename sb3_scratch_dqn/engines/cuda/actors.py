"""Greedy actions that can be recorded: observations lie where they always lie, and so do the actions."""

from typing import Any

import numpy as np
import torch as th

from sb3_scratch_dqn.engines.cuda.recording import Function
from sb3_scratch_dqn.networks.policies import DQNPolicy
from sb3_scratch_dqn.replay.device.ring import Outbox
from sb3_scratch_dqn.replay.observations import Array


class Actor:
    """Greedy actions for observations of one shape.

    :param policy: that chooses
    :param parts: of such an observation, by key; the key is empty if it is no dict
    :param device: where it chooses
    """

    play: Function  # does what :meth:`choose` does

    def __init__(self, policy: DQNPolicy, parts: dict[str, Array], device: th.device) -> None:
        self._policy = policy
        self._outboxes, self._inputs = {}, {}
        for key, part in parts.items():
            self._inputs[key] = th.zeros_like(th.from_numpy(np.zeros_like(part)), device=device)
            self._outboxes[key] = Outbox(part.shape, self._inputs[key].dtype, device)
        rows = len(next(iter(parts.values())))
        self._actions = th.zeros(rows, dtype=th.int64, device=device)

    def choose(self) -> None:
        """Choose, with fresh noise in noisy layers; to be recorded."""
        # Copies, because networks may write to what they get
        inputs = {key: tensor.clone() for key, tensor in self._inputs.items()}
        with th.no_grad(), self._policy.q_net.noise():
            self._actions.copy_(self._policy.q_net._predict(inputs.get("", inputs)))

    def __call__(self, parts: dict[str, Any]) -> Array:
        """Greedy actions, ``(B,)``."""
        for key, part in parts.items():
            self._outboxes[key].open()[...] = part
            self._outboxes[key].send(self._inputs[key])
        self.play()
        actions: Array = self._actions.cpu().numpy().copy()
        return actions
