"""Which settings of ScratchDQN can work."""

from typing import TYPE_CHECKING

from stable_baselines3.common.buffers import ReplayBuffer

from sb3_scratch_dqn import checks
from sb3_scratch_dqn.engines import ENGINE_NAMES
from sb3_scratch_dqn.exploration import EXPLORATION_SCHEDULES
from sb3_scratch_dqn.heads import LOSSES
from sb3_scratch_dqn.policies import DQNPolicy
from sb3_scratch_dqn.replay import ScratchReplayBuffer

if TYPE_CHECKING:
    from sb3_scratch_dqn.dqn import ScratchDQN

# What comes from ScratchDQN's own arguments and environment, and so not from policy_kwargs or replay_buffer_kwargs
_GIVEN_TO_POLICIES = {"observation_space", "action_space", "lr_schedule"}
_GIVEN_TO_BUFFERS = {
    "buffer_size",
    "observation_space",
    "action_space",
    "device",
    "n_envs",
    "optimize_memory_usage",
    "env",
}
_GIVEN_TO_OWN_BUFFERS = {"n_steps", "gamma"}


def check_settings(model: "ScratchDQN") -> None:
    """Refuse the first setting of a model that cannot work.

    :param model: whose settings are its attributes
    :raises ValueError: naming the setting, its value and what would be right
    :raises AssertionError: for an environment whose actions are not ``Discrete``
    """
    if model.env is not None:
        checks.check_action_space(model.action_space)
    checks.check_subclass("policy", model.policy_class, DQNPolicy)
    checks.check_arguments("policy_kwargs", model.policy_kwargs, model.policy_class, refused=_GIVEN_TO_POLICIES)
    if model.replay_buffer_class is not None:
        checks.check_subclass("replay_buffer_class", model.replay_buffer_class, ReplayBuffer)
    buffer_class = model.replay_buffer_class or ScratchReplayBuffer
    own_buffer = issubclass(buffer_class, ScratchReplayBuffer)
    given = _GIVEN_TO_BUFFERS | _GIVEN_TO_OWN_BUFFERS if own_buffer else _GIVEN_TO_BUFFERS
    checks.check_arguments("replay_buffer_kwargs", model.replay_buffer_kwargs, buffer_class, refused=given)
    checks.check_flag("optimize_memory_usage", model.optimize_memory_usage)
    checks.check_seed(model.seed)
    for name in ("buffer_size", "batch_size", "n_steps", "stats_window_size"):
        checks.check_count(name, getattr(model, name))
    checks.check_count("learning_starts", model.learning_starts, minimum=0)
    checks.check_count("gradient_steps", model.gradient_steps, minimum=-1)
    for name in ("tau", "gamma"):
        checks.check_fraction(name, getattr(model, name))
    for name in ("initial_eps", "final_eps", "fraction", "decay"):
        checks.check_fraction(f"exploration_{name}", getattr(model, f"exploration_{name}"))
    checks.check_positive("max_grad_norm", model.max_grad_norm)
    checks.check_learning_rate(model.learning_rate)
    checks.check_choice("loss", model.loss, LOSSES)
    checks.check_choice("engine", model.engine, ENGINE_NAMES)
    if callable(model.exploration_schedule):
        for progress in (1.0, 0.0):
            checks.check_fraction(f"exploration_schedule({progress})", model.exploration_schedule(progress))
    else:
        checks.check_choice("exploration_schedule", model.exploration_schedule, EXPLORATION_SCHEDULES)
    unit = checks.parse_frequency("train_freq", model.train_freq)[1]
    if unit == "episode" and model.n_envs > 1:
        raise ValueError(
            f"train_freq={model.train_freq!r} counts episodes, which needs one environment, "
            f"but env has {model.n_envs}: count steps instead"
        )
