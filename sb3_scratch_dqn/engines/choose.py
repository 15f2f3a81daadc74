"""The interface of an engine, and the selection of one for a configuration."""

from typing import Any, ClassVar, Protocol

from sb3_scratch_dqn.engines.cuda.engine import CudaGraphEngine
from sb3_scratch_dqn.engines.eager import EagerEngine
from sb3_scratch_dqn.engines.fused.autograd import FusedAutogradEngine
from sb3_scratch_dqn.engines.fused.engine import FusedEngine
from sb3_scratch_dqn.engines.last_update import LastUpdate
from sb3_scratch_dqn.networks.policies import DQNPolicy
from sb3_scratch_dqn.replay import BatchSource
from sb3_scratch_dqn.values.td import Objective


class Engine(Protocol):
    """Takes gradient steps and selects greedy actions; :class:`EagerEngine` documents the parameters.

    :param name: value of ``engine=`` that selects it; if engines share a name, the fastest supported one is used
    :param title: name in messages
    :param device_type: type of the device that it computes on; ``None`` for any
    :param opt_in_reason: why ``"auto"`` never selects it, even if it supports the configuration; ``None`` if it may
    """

    name: ClassVar[str]
    title: ClassVar[str]
    device_type: ClassVar[str | None]
    opt_in_reason: ClassVar[str | None]
    policy: DQNPolicy
    objective: Objective
    last_update: LastUpdate | None

    def __init__(self, policy: DQNPolicy, objective: Objective) -> None:
        """Create the engine; it allocates nothing until :meth:`attach`."""

    @classmethod
    def unsupported_reason(cls, policy: DQNPolicy, objective: Objective) -> str | None:
        """Return why the engine does not support this policy, or ``None`` if it does."""

    def attach(self) -> None:
        """Allocate memory, and move parameters there if needed.

        Call it before code keeps views of parameters: moving a parameter makes earlier views stale. Further calls do
        nothing; :meth:`train`, :meth:`act` and :meth:`update_target` call it if needed.
        """

    def train(self, source: BatchSource, gradient_steps: int, max_grad_norm: float) -> list[float]:
        """Take ``gradient_steps`` gradient steps and return the mean loss of each."""

    def act(self, observation: Any, envs: Any = None) -> Any:
        """Return greedy actions for these rows of an observation, with noise in noisy layers."""

    def update_target(self, tau: float) -> None:
        """Update the target network."""

    def is_stale(self) -> bool:
        """Return True if the policy was modified such that a new engine must be created."""


# In the order in which "auto" prefers them; the last one supports everything
_ENGINES: tuple[type[Engine], ...] = (FusedEngine, FusedAutogradEngine, CudaGraphEngine, EagerEngine)
ENGINE_NAMES = ("auto", *dict.fromkeys(engine.name for engine in _ENGINES))


def choose_engine(name: str, policy: DQNPolicy, objective: Objective) -> tuple[Engine, str]:
    """Create the engine of this name.

    :param name: one of ``ENGINE_NAMES``; ``"auto"`` selects the fastest that supports the configuration
    :param policy: policy whose online network is trained
    :param objective: what the network learns
    :return: the engine, and a sentence that says why it was selected
    :raises ValueError: if an explicitly selected engine does not support the configuration, with the reason
    """
    engine_class, explanation = find_engine(name, policy, objective)
    return engine_class(policy, objective), explanation


def find_engine(name: str, policy: DQNPolicy, objective: Objective) -> tuple[type[Engine], str]:
    """Find the class of the engine; parameters, return value and errors as for :func:`choose_engine`."""
    reasons: list[str] = []
    for engine_class in _ENGINES:
        if name not in ("auto", engine_class.name):
            continue
        if name == "auto" and engine_class.device_type not in (None, policy.device.type):
            continue  # an engine for another device needs no explanation
        reason = engine_class.unsupported_reason(policy, objective)
        if reason is None and name == "auto" and engine_class.opt_in_reason is not None:
            reasons.append(f"{engine_class.title} {engine_class.opt_in_reason}")
            continue
        if reason is None:
            if reasons:
                explanation = f"because {' and '.join(reasons)}"
            else:
                explanation = "the fastest for these settings" if name == "auto" else "as selected"
            return engine_class, f"Using {engine_class.title}, {explanation}"
        reasons.append(f"{engine_class.title} does not support this configuration: {reason}")
    raise ValueError(f"engine={name!r} cannot be used here: {reasons[-1]}; engine='auto' selects one that does")
