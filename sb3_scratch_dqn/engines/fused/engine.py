"""The fused CPU engine: updates without autograd, for networks of linear layers.

What an update costs in PyTorch is mostly overhead. This engine computes the same numbers, up to rounding, with as few
calls as possible:

- forwards and backwards by hand (:mod:`sb3_scratch_dqn.engines.fused.dense`), and the gradient of the loss
  (:mod:`sb3_scratch_dqn.engines.fused.learners`);
- parameters, gradients and Adam's state each in one piece (:mod:`sb3_scratch_dqn.engines.fused.flat`);
- batches and targets of many gradient steps in one go, since the target network does not change in between.
"""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch as th

from sb3_scratch_dqn.engines.fused.dense import DenseNetwork
from sb3_scratch_dqn.engines.fused.flat import FlatParameters
from sb3_scratch_dqn.engines.fused.learners import Learner, make_inputs, make_learner
from sb3_scratch_dqn.engines.fused.support import dense_unsupported_reason
from sb3_scratch_dqn.engines.update import LastUpdate
from sb3_scratch_dqn.engines.watch import torch_mode_reason
from sb3_scratch_dqn.networks.policies import DQNPolicy
from sb3_scratch_dqn.replay import ArrayBatch, BatchSource
from sb3_scratch_dqn.values.td import Objective

# Transitions whose targets are computed in one go: many enough to hide what calls cost, few enough for the caches, and
# bytes of observations that they may have
_ROWS_AT_ONCE = 1024
_BYTES_AT_ONCE = 2**22


class FusedEngine:
    """Gradient steps by hand.

    :param policy: whose online network is trained
    :param objective: what it is to learn
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
        """Why this engine cannot serve; ``None`` if it can."""
        return dense_unsupported_reason(policy)

    def _attach(self) -> None:
        """Rearrange the parameters, once somebody trains or acts."""
        policy = self.policy
        flat = FlatParameters(policy)
        self._online = DenseNetwork(list(policy.q_net.q_net), trains=True)
        self._target = DenseNetwork(list(policy.q_net_target.q_net), trains=False)
        self._inputs = make_inputs(policy)
        self._learner: Learner = make_learner(self._online, self._target, self._inputs, policy.head, self.objective)
        self._flat = flat

    def attach(self) -> None:
        """Rearrange the parameters, before somebody takes views of them that are to last."""
        if self._flat is None:
            self._attach()

    def is_stale(self) -> bool:
        """Whether somebody changed the policy in a way that this engine must be made anew for."""
        if self._flat is None:
            return dense_unsupported_reason(self.policy) is not None
        return self._flat.is_stale() or torch_mode_reason("cpu") is not None

    def train(self, source: BatchSource, gradient_steps: int, max_grad_norm: float) -> list[float]:
        """Take some gradient steps.

        :param source: gives the batch of each step, and takes the priorities of its transitions
        :param gradient_steps: how many
        :param max_grad_norm: the gradient of a step is scaled down to this norm
        :return: the mean loss of each step
        """
        self.attach()
        assert self._flat is not None
        self._flat.begin_steps()
        batch_size = source.batch_size
        # With noise, the target network is another one in each step
        can_prefetch = source.can_prefetch and not self._online.noisy
        rows_at_once = min(_ROWS_AT_ONCE, _BYTES_AT_ONCE // (4 * self._online.n_inputs))
        at_once = max(1, rows_at_once // batch_size) if can_prefetch else 1
        losses: list[float] = []
        for begin in range(0, gradient_steps, at_once):
            n_batches = min(at_once, gradient_steps - begin)
            batches = source.sample_arrays(n_batches)  # perhaps by code of users, which may be as loud as it likes
            with np.errstate(all="ignore"):  # training that diverges is as silent as in PyTorch
                for loss, priorities in self._updates(batches, n_batches, max_grad_norm):
                    losses.append(loss)
                    if not can_prefetch:
                        source.update_priorities(batches, priorities)
        if losses:
            self.last_update = LastUpdate(self.policy.head, *self._learner.last(), self._norm)
        return losses

    def _updates(self, batches: ArrayBatch, n_batches: int, max_grad_norm: float) -> Iterator[tuple[float, th.Tensor]]:
        """Take a step for each batch; give its loss, and the priorities of its transitions."""
        flat, learner, rows = self._flat, self._learner, len(batches.actions)
        assert flat is not None
        self._online.draw_noise(rows, trains=True)
        self._target.draw_noise(rows, trains=False)
        learner.prepare(batches, n_batches)
        for number in range(n_batches):
            found = learner.backward(number)
            self._norm = self._clip(max_grad_norm)
            flat.adam_step()
            yield found

    def _clip(self, max_norm: float) -> float:
        assert self._flat is not None
        gradient = self._flat.gradient.array
        norm = math.sqrt(np.dot(gradient, gradient))
        coefficient = max_norm / (norm + 1e-6)
        if not coefficient >= 1:  # also if it is no number
            np.multiply(gradient, np.float32(coefficient), gradient)
        return norm

    def act(self, observation: Any, envs: Any = None) -> Any:
        """Greedy actions, with noise in noisy layers.

        :param observation: ``(B, ...)``, or a dict of such arrays
        :param envs: the rows that are wanted, ``(N,)``; ``None`` for all
        :return: ``(N,)``
        """
        self.attach()
        online, inputs = self._online, self._inputs(observation)
        with np.errstate(all="ignore"):
            if online.noisy:
                online.draw_noise(len(inputs), trains=False)
            # Of all rows: memory for another size takes longer to find than the few rows to compute
            actions = self._learner.greedy(online.passing(len(inputs), online.noisy).forward(inputs))
        return actions if envs is None else actions[envs]

    def update_target(self, tau: float) -> None:
        """Let the target network follow.

        :param tau: how far; 1 copies the online network
        """
        self.attach()
        assert self._flat is not None
        self._flat.update_target(tau)
