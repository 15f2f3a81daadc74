"""Which engine executes the updates."""

from collections.abc import Callable
from typing import Protocol

from sb3_scratch_dqn.engines.eager import EagerEngine
from sb3_scratch_dqn.engines.update import LastUpdate
from sb3_scratch_dqn.policies import DQNPolicy
from sb3_scratch_dqn.replay import BatchSource
from sb3_scratch_dqn.td import Objective


class Engine(Protocol):
    """Takes gradient steps; :class:`EagerEngine` says what the parameters of ``train`` mean."""

    name: str
    policy: DQNPolicy
    objective: Objective
    last_update: LastUpdate | None

    def train(self, source: BatchSource, gradient_steps: int, max_grad_norm: float) -> list[float]:
        """Take ``gradient_steps`` gradient steps and return the mean loss of each."""


# In the order in which "auto" prefers them
ENGINES: dict[str, Callable[[DQNPolicy, Objective], Engine]] = {EagerEngine.name: EagerEngine}
ENGINE_NAMES = ("auto", *ENGINES)


def choose_engine(name: str, policy: DQNPolicy, objective: Objective) -> Engine:
    """Make the engine of this name.

    :param name: one of ``ENGINE_NAMES``; ``"auto"`` takes the fastest that serves the configuration
    :param policy: whose online network is to be trained
    :param objective: what it is to learn
    """
    if name == "auto":
        name = next(iter(ENGINES))
    return ENGINES[name](policy, objective)
