"""A DQN family from scratch, as a plugin for Stable-Baselines3 and RL Baselines3 Zoo.

The public names are those in ``__all__``; the README describes each of them.
"""

from typing import TYPE_CHECKING, Any

from sb3_scratch_dqn.algorithm import ScratchDQN
from sb3_scratch_dqn.networks import (
    CnnPolicy,
    DQNPolicy,
    ImplicitQNetwork,
    MlpPolicy,
    MultiInputPolicy,
    QNetwork,
)
from sb3_scratch_dqn.replay import ScratchReplayBuffer
from sb3_scratch_dqn.values import MaskInInfo

if TYPE_CHECKING:
    from sb3_scratch_dqn.zoo import register

__version__ = "0.1.0"

__all__ = [
    "CnnPolicy",
    "DQNPolicy",
    "ImplicitQNetwork",
    "MaskInInfo",
    "MlpPolicy",
    "MultiInputPolicy",
    "QNetwork",
    "ScratchDQN",
    "ScratchReplayBuffer",
    "register",
]


def __getattr__(name: str) -> Any:
    if name == "register":  # imported when it is used, because it imports Optuna
        from sb3_scratch_dqn.zoo import register

        return register
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
