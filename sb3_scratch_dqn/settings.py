"""Which settings of ScratchDQN can work."""

from typing import TYPE_CHECKING

from stable_baselines3.common.buffers import ReplayBuffer

from sb3_scratch_dqn import checks
from sb3_scratch_dqn.engines import ENGINE_NAMES
from sb3_scratch_dqn.exploration import EXPLORATION_SCHEDULES
from sb3_scratch_dqn.heads import LOSSES, ValueHead, make_head
from sb3_scratch_dqn.masks import has_masks
from sb3_scratch_dqn.policies import DQNPolicy
from sb3_scratch_dqn.replay import ScratchReplayBuffer
from sb3_scratch_dqn.td import MunchausenSettings

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
_GIVEN_TO_OWN_BUFFERS = {"n_steps", "gamma", "stacking"}


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
    more = ("frames",) if own_buffer else ()
    checks.check_arguments("replay_buffer_kwargs", model.replay_buffer_kwargs, buffer_class, refused=given, more=more)
    if model.env is not None and not own_buffer and has_masks(model.env):
        raise ValueError(
            f"replay_buffer_class={buffer_class.__name__} keeps no action masks, but env has them: "
            "leave replay_buffer_class out, or hide action_masks() of env"
        )
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
    head_name = model.policy_kwargs.get("head", "expected")
    check_learning(model, make_head(head_name, model.policy_kwargs.get("head_kwargs")), head_name)
    if callable(model.exploration_schedule):
        for progress in (1.0, 0.0):
            checks.check_fraction(f"exploration_schedule({progress})", model.exploration_schedule(progress))
    else:
        checks.check_choice("exploration_schedule", model.exploration_schedule, EXPLORATION_SCHEDULES)
    if model.exploration_steps is not None:
        checks.check_count("exploration_steps", model.exploration_steps)
        if model.exploration_schedule != "linear":
            raise ValueError(
                f"exploration_steps={model.exploration_steps!r} is the length of a linear schedule, "
                f"but exploration_schedule={model.exploration_schedule!r}"
            )
    unit = checks.parse_frequency("train_freq", model.train_freq)[1]
    if unit == "episode" and model.n_envs > 1:
        raise ValueError(
            f"train_freq={model.train_freq!r} counts episodes, which needs one environment, "
            f"but env has {model.n_envs}: count steps instead"
        )


def check_learning(model: "ScratchDQN", head: ValueHead, head_name: str) -> None:
    """Refuse the first setting that cannot work of those that say what is learned, and by which engine.

    :param model: whose settings are its attributes
    :param head: of its policy
    :param head_name: for the message
    :raises ValueError: naming the setting, its value and what would be right
    """
    checks.check_choice("loss", model.loss, LOSSES)
    checks.check_flag("double_q", model.double_q)
    _check_munchausen(model)
    _check_combination(model, head, head_name)
    checks.check_choice("engine", model.engine, ENGINE_NAMES)


def _check_munchausen(model: "ScratchDQN") -> None:
    checks.check_flag("munchausen", model.munchausen)
    kwargs = {} if model.munchausen_kwargs is None else model.munchausen_kwargs
    checks.check_arguments("munchausen_kwargs", kwargs, MunchausenSettings)
    tau, alpha, clip = MunchausenSettings(**kwargs)
    checks.check_number("munchausen_kwargs: tau", tau)
    checks.check_positive("munchausen_kwargs: tau", tau)
    checks.check_fraction("munchausen_kwargs: alpha", alpha)
    checks.check_number("munchausen_kwargs: clip", clip)
    if clip > 0:
        raise ValueError(f"munchausen_kwargs: clip={clip!r} must be at most 0: logarithms of probabilities are")


def _check_combination(model: "ScratchDQN", head: ValueHead, head_name: str) -> None:
    """Refuse settings that have no meaning beside each other."""
    n_steps = max(model.n_steps, model.replay_buffer_kwargs.get("n_steps", 1))
    if model.munchausen and n_steps > 1:
        raise ValueError(
            f"munchausen=True can not be combined with n_steps={n_steps}: "
            "the bonus and the entropy of the steps in between would be missing from their return"
        )
    if model.munchausen and not head.outputs_are_returns:
        raise ValueError(
            f"munchausen=True can not be combined with head={head_name!r}: it shifts and averages returns, "
            "and the outputs of this head are no returns but logits of probabilities"
        )
    if model.loss not in head.losses_taken:
        raise ValueError(
            f"loss={model.loss!r} can not be combined with head={head_name!r}, "
            "which learns probabilities by their cross-entropy: leave loss out"
        )
