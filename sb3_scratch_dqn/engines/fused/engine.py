"""The fused CPU engine: updates without autograd, for networks of linear layers.

Most of the time of an update in PyTorch is overhead of calls. This engine computes the same numbers, up to rounding, in
as few calls as possible:

- hand-derived gradients: of the layers (:mod:`sb3_scratch_dqn.engines.fused.dense`), and of the loss
  (:mod:`sb3_scratch_dqn.engines.fused.loss_gradients`);
- parameters, gradients and Adam's state in one flat tensor each (:mod:`sb3_scratch_dqn.engines.fused.flat`);
- mini-batches and targets of several gradient steps in one call, since the target network does not change in between.
"""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch as th

from sb3_scratch_dqn.engines.fused.dense import DenseNetwork
from sb3_scratch_dqn.engines.fused.flat import FlatParameters
from sb3_scratch_dqn.engines.fused.loss_gradients import LossGradient, make_loss_gradient, make_preprocessor
from sb3_scratch_dqn.engines.fused.requirements import dense_unsupported_reason
from sb3_scratch_dqn.engines.last_update import LastUpdate
from sb3_scratch_dqn.engines.modifications import torch_mode_reason
from sb3_scratch_dqn.networks.policies import DQNPolicy
from sb3_scratch_dqn.replay import ArrayBatch, BatchSource
from sb3_scratch_dqn.values.td import Objective

# Transitions whose targets are computed in one pass: enough rows to make the overhead of calls small, few enough for
# the activations of a layer to fit the caches. Measured for 8 inputs and 256 x 256: 3.8 us per row in passes of 128
# rows, 2.0 in passes of 1,024, 2.7 in passes of 8,192
_MAX_TARGET_ROWS = 1024
# Bytes of their observations as float32, for the same reason. Measured for 1,024 inputs: 12.4 us per row with 0.5 MiB,
# 9.5 with 4 MiB, 10.6 with 32 MiB
_MAX_TARGET_BYTES = 2**22


class FusedEngine:
    """Gradient steps without autograd.

    :param policy: policy whose online network is trained
    :param objective: what the network learns
    """

    name: ClassVar[str] = "fused"
    title: ClassVar[str] = "the fused engine"
    device_type: ClassVar[str | None] = "cpu"
    opt_in_reason: ClassVar[str | None] = None

    def __init__(self, policy: DQNPolicy, objective: Objective) -> None:
        self.policy = policy
        self.objective = objective
        self.last_update: LastUpdate | None = None
        self._flat: FlatParameters | None = None

    @staticmethod
    def unsupported_reason(policy: DQNPolicy, objective: Objective) -> str | None:
        """Return why the engine does not support this policy, or ``None`` if it does."""
        return dense_unsupported_reason(policy)

    def attach(self) -> None:
        """Move parameters into flat storage, once.

        Call it before code keeps views of parameters: moving a parameter makes earlier views stale.
        """
        if self._flat is not None:
            return
        policy = self.policy
        flat = FlatParameters(policy)
        self._online = DenseNetwork(list(policy.q_net.q_net), trains=True)
        self._target = DenseNetwork(list(policy.q_net_target.q_net), trains=False)
        self._preprocess = make_preprocessor(policy)
        self._loss_gradient: LossGradient = make_loss_gradient(
            self._online, self._target, self._preprocess, policy.head, self.objective
        )
        self._flat = flat

    def is_stale(self) -> bool:
        """Return True if the policy was modified such that a new engine must be created."""
        if self._flat is None:
            return dense_unsupported_reason(self.policy) is not None
        return self._flat.is_stale() or torch_mode_reason("cpu") is not None

    def train(self, source: BatchSource, gradient_steps: int, max_grad_norm: float) -> list[float]:
        """Take gradient steps.

        :param source: returns the mini-batch of each step, and gets the priorities of its transitions
        :param gradient_steps: number of gradient steps
        :param max_grad_norm: maximum norm of the gradient of a step
        :return: the mean loss of each step
        """
        self.attach()
        assert self._flat is not None
        self._flat.prepare_steps()
        batch_size = source.batch_size
        # Noise differs in each step, and with it the target network
        can_prefetch = source.can_prefetch and not self._online.noisy
        max_rows = min(_MAX_TARGET_ROWS, _MAX_TARGET_BYTES // (4 * self._online.n_inputs))
        n_prefetched = max(1, max_rows // batch_size) if can_prefetch else 1
        losses: list[float] = []
        for begin in range(0, gradient_steps, n_prefetched):
            n_batches = min(n_prefetched, gradient_steps - begin)
            batches = source.sample_arrays(n_batches)  # outside of errstate: a user's buffer keeps its own settings
            with np.errstate(all="ignore"):  # diverging training is silent, as in PyTorch
                for loss, priorities in self._updates(batches, n_batches, max_grad_norm):
                    losses.append(loss)
                    if not can_prefetch:
                        source.update_priorities(batches, priorities)
        if losses:
            self.last_update = LastUpdate(self.policy.head, *self._loss_gradient.last_prediction(), self._grad_norm)
        return losses

    def _updates(self, batches: ArrayBatch, n_batches: int, max_grad_norm: float) -> Iterator[tuple[float, th.Tensor]]:
        """Take a step for each mini-batch; yield its loss, and the priorities of its transitions."""
        flat, loss_gradient, rows = self._flat, self._loss_gradient, len(batches.actions)
        assert flat is not None
        self._online.draw_noise(rows, trains=True)
        self._target.draw_noise(rows, trains=False)
        loss_gradient.prepare(batches, n_batches)
        for index in range(n_batches):
            loss_and_priorities = loss_gradient.backward(index)
            self._grad_norm = self._clip_gradient(max_grad_norm)
            flat.adam_step()
            yield loss_and_priorities

    def _clip_gradient(self, max_norm: float) -> float:
        """Clip the gradient as ``clip_grad_norm_`` does; return the norm before."""
        assert self._flat is not None
        gradient = self._flat.gradient.array
        norm = math.sqrt(np.dot(gradient, gradient))
        coefficient = max_norm / (norm + 1e-6)
        if not coefficient >= 1:  # also if it is NaN
            np.multiply(gradient, np.float32(coefficient), gradient)
        return norm

    def act(self, observation: Any, envs: Any = None) -> Any:
        """Return greedy actions, with noise in noisy layers.

        :param observation: ``(B, ...)``, or a dict of such arrays
        :param envs: indices of the rows to act for, ``(N,)``; ``None`` for all
        :return: ``(N,)``
        """
        self.attach()
        online, inputs = self._online, self._preprocess(observation)
        with np.errstate(all="ignore"):
            if online.noisy:
                online.draw_noise(len(inputs), trains=False)
            # All rows: allocating a pass for another number of rows takes longer than computing the few extra rows
            actions = self._loss_gradient.greedy_actions(online.pass_for(len(inputs), online.noisy).forward(inputs))
        return actions if envs is None else actions[envs]

    def update_target(self, tau: float) -> None:
        """Update the target network.

        :param tau: interpolation factor of the Polyak update; 1 copies the online network
        """
        self.attach()
        assert self._flat is not None
        self._flat.update_target(tau)
