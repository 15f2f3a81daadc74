"""Which engine executes the updates."""

from typing import Any, ClassVar, Protocol

from sb3_scratch_dqn.engines.eager import EagerEngine
from sb3_scratch_dqn.engines.fused_cpu import FusedEngine
from sb3_scratch_dqn.engines.update import LastUpdate
from sb3_scratch_dqn.policies import DQNPolicy
from sb3_scratch_dqn.replay import BatchSource
from sb3_scratch_dqn.td import Objective


class Engine(Protocol):
    """Takes gradient steps and chooses greedy actions; :class:`EagerEngine` says what the parameters mean."""

    name: ClassVar[str]
    policy: DQNPolicy
    last_update: LastUpdate | None

    def __init__(self, policy: DQNPolicy, objective: Objective) -> None:
        """Make one."""

    @staticmethod
    def why_not(policy: DQNPolicy, objective: Objective) -> str | None:
        """Why this engine cannot serve; ``None`` if it can."""

    def train(self, source: BatchSource, gradient_steps: int, max_grad_norm: float) -> list[float]:
        """Take ``gradient_steps`` gradient steps and return the mean loss of each."""

    def act(self, observation: Any) -> Any:
        """Greedy actions, with noise in noisy layers."""

    def move_target(self, tau: float) -> None:
        """Let the target network follow."""

    def outdated(self) -> bool:
        """Whether somebody changed the policy in a way that this engine must be made anew for."""


# In the order in which "auto" prefers them; the last one serves everything
ENGINES: dict[str, type[Engine]] = {"fused": FusedEngine, "eager": EagerEngine}
ENGINE_NAMES = ("auto", *ENGINES)


def choose_engine(name: str, policy: DQNPolicy, objective: Objective) -> tuple[Engine, str]:
    """Make the engine of this name.

    :param name: one of ``ENGINE_NAMES``; ``"auto"`` takes the fastest that serves the configuration
    :param policy: whose online network is to be trained
    :param objective: what it is to learn
    :return: the engine, and in a sentence why it was chosen
    :raises ValueError: if the engine cannot serve, with the reason
    """
    if name != "auto":
        reason = ENGINES[name].why_not(policy, objective)
        if reason is not None:
            raise ValueError(f"engine={name!r} cannot serve here: {reason}; engine='auto' takes one that can")
        return ENGINES[name](policy, objective), f"Using the {name} engine, as asked"
    reasons: list[str] = []
    for other, engine in ENGINES.items():
        reason = engine.why_not(policy, objective)
        if reason is None:
            slower = "; ".join(reasons) or "the fastest that there is for these settings"
            return engine(policy, objective), f"Using the {other} engine: {slower}"
        reasons.append(f"{other} cannot serve, as {reason}")
    raise AssertionError("the last engine serves everything")
