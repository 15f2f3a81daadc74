"""Which engine executes the updates."""

from collections.abc import Callable
from typing import Protocol

from sb3_scratch_dqn.engines.eager import EagerEngine
from sb3_scratch_dqn.heads import Loss
from sb3_scratch_dqn.policies import DQNPolicy
from sb3_scratch_dqn.replay.batch import Batch


class Engine(Protocol):
    """Takes gradient steps; :class:`EagerEngine` says what the parameters of ``train`` mean."""

    name: str
    policy: DQNPolicy

    def train(self, draw: Callable[[], Batch], gradient_steps: int, max_grad_norm: float) -> list[float]:
        """Take ``gradient_steps`` gradient steps and return the mean loss of each."""


# In the order in which "auto" prefers them
ENGINES: dict[str, Callable[[DQNPolicy, Loss], Engine]] = {EagerEngine.name: EagerEngine}
ENGINE_NAMES = ("auto", *ENGINES)


def choose_engine(name: str, policy: DQNPolicy, loss: Loss) -> Engine:
    """Make the engine of this name.

    :param name: one of ``ENGINE_NAMES``; ``"auto"`` takes the fastest that serves the configuration
    :param policy: whose online network is to be trained
    :param loss: the elementwise error
    """
    if name == "auto":
        name = next(iter(ENGINES))
    return ENGINES[name](policy, loss)
