"""Which engine executes the updates."""

from typing import Any, ClassVar, Protocol

from sb3_scratch_dqn.engines.cuda.engine import CudaGraphEngine
from sb3_scratch_dqn.engines.eager import EagerEngine
from sb3_scratch_dqn.engines.fused.autograd import FusedAutogradEngine
from sb3_scratch_dqn.engines.fused.engine import FusedEngine
from sb3_scratch_dqn.engines.update import LastUpdate
from sb3_scratch_dqn.networks.policies import DQNPolicy
from sb3_scratch_dqn.replay import BatchSource
from sb3_scratch_dqn.values.td import Objective


class Engine(Protocol):
    """Takes gradient steps and chooses greedy actions; :class:`EagerEngine` says what the parameters mean.

    :param name: that users ask for it by; several may share one, the fastest of which is taken
    :param title: for people
    :param device_type: of the device that it computes on; ``None`` for any
    :param not_by_itself: why ``"auto"`` leaves it alone even where it can serve; ``None`` if it does not
    """

    name: ClassVar[str]
    title: ClassVar[str]
    device_type: ClassVar[str | None]
    opt_in_reason: ClassVar[str | None]
    policy: DQNPolicy
    objective: Objective
    last_update: LastUpdate | None

    def __init__(self, policy: DQNPolicy, objective: Objective) -> None:
        """Make one."""

    @classmethod
    def unsupported_reason(cls, policy: DQNPolicy, objective: Objective) -> str | None:
        """Why this engine cannot serve; ``None`` if it can."""

    def attach(self) -> None:
        """Rearrange what it wants to have elsewhere, before somebody takes views of it that are to last."""

    def train(self, source: BatchSource, gradient_steps: int, max_grad_norm: float) -> list[float]:
        """Take ``gradient_steps`` gradient steps and return the mean loss of each."""

    def act(self, observation: Any, envs: Any = None) -> Any:
        """Greedy actions in these rows of an observation, with noise in noisy layers."""

    def update_target(self, tau: float) -> None:
        """Let the target network follow."""

    def is_stale(self) -> bool:
        """Whether somebody changed the policy in a way that this engine must be made anew for."""


# In the order in which "auto" prefers them; the last one serves everything
_ENGINES: tuple[type[Engine], ...] = (FusedEngine, FusedAutogradEngine, CudaGraphEngine, EagerEngine)
ENGINE_NAMES = ("auto", *dict.fromkeys(engine.name for engine in _ENGINES))


def choose_engine(name: str, policy: DQNPolicy, objective: Objective) -> tuple[Engine, str]:
    """Make the engine of this name.

    :param name: one of ``ENGINE_NAMES``; ``"auto"`` takes the fastest that serves the configuration
    :param policy: whose online network is to be trained
    :param objective: what it is to learn
    :return: the engine, and in a sentence why it was chosen
    :raises ValueError: if the engine cannot serve, with the reason
    """
    engine, why = find_engine(name, policy, objective)
    return engine(policy, objective), why


def find_engine(name: str, policy: DQNPolicy, objective: Objective) -> tuple[type[Engine], str]:
    """Find the class of engine; parameters and errors as for :func:`choose_engine`."""
    reasons: list[str] = []
    for engine in _ENGINES:
        if name not in ("auto", engine.name):
            continue
        if name == "auto" and engine.device_type not in (None, policy.device.type):
            continue  # nobody expects it
        reason = engine.unsupported_reason(policy, objective)
        if reason is None and name == "auto" and engine.opt_in_reason is not None:
            reasons.append(f"{engine.title} {engine.opt_in_reason}")
            continue
        if reason is None:
            why = f"as {' and '.join(reasons)}" if reasons else "the fastest for these settings"
            return engine, f"Using {engine.title}, {'as asked' if name == 'eager' else why}"
        reasons.append(f"{engine.title} cannot serve: {reason}")
    raise ValueError(f"engine={name!r} cannot be used here: {reasons[-1]}; engine='auto' takes one that can serve")
