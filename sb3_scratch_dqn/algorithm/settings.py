"""The settings of ScratchDQN: which values each accepts, and which combinations are rejected."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit

from sb3_scratch_dqn.algorithm.base import DQNBase
from sb3_scratch_dqn.algorithm.exploration import EXPLORATION_SCHEDULES
from sb3_scratch_dqn.common import check_spaces, check_training, checks
from sb3_scratch_dqn.engines import ENGINE_NAMES
from sb3_scratch_dqn.networks.policies import DQNPolicy
from sb3_scratch_dqn.replay import ScratchReplayBuffer
from sb3_scratch_dqn.replay.samplers import SAMPLER_SETTINGS
from sb3_scratch_dqn.values.heads import ValueHead, make_head
from sb3_scratch_dqn.values.losses import LOSSES
from sb3_scratch_dqn.values.masks import has_masks
from sb3_scratch_dqn.values.td import MunchausenSettings

# Arguments that ScratchDQN passes itself, and that policy_kwargs and replay_buffer_kwargs therefore must not contain
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

# (name, value) -> the value in its stored form; raises ValueError for an invalid value
Parser = Callable[[str, Any], Any]

_MISSING = object()


def _checked(check: Callable[[str, Any], None]) -> Parser:
    def parse(name: str, value: Any) -> Any:
        check(name, value)
        return value

    return parse


def _one_of(*choices: str) -> Parser:
    return _checked(lambda name, value: checks.check_choice(name, value, choices))


def _optional(parse: Parser) -> Parser:
    return lambda name, value: None if value is None else parse(name, value)


def parse_verbose(name: str, value: Any) -> int:
    """Parse the verbosity: a whole number, or True or False."""
    return checks.check_count(name, int(value) if isinstance(value, bool) else value, minimum=0)


def _parse_seed(name: str, value: Any) -> int | None:
    check_training.check_seed(value)
    return None if value is None else int(value)


def _parse_train_freq(name: str, value: Any) -> TrainFreq:
    frequency, unit = check_training.parse_frequency(name, value)
    return TrainFreq(frequency, TrainFrequencyUnit(unit))


def _parse_target_update_interval(name: str, value: Any) -> int | tuple[int, str]:
    frequency, unit = check_training.parse_frequency(name, value)
    return frequency if unit == "step" else (frequency, unit)


def _parse_exploration_schedule(name: str, value: Any) -> Any:
    if callable(value):
        check_training.check_schedule(name, value, checks.check_fraction)
    else:
        checks.check_choice(name, value, EXPLORATION_SCHEDULES)
    return value


def _parse_check_finite(name: str, value: Any) -> Any:
    if not (isinstance(value, str) and value == "auto") and not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be 'auto', True or False")
    return value


_count, _fraction, _flag = checks.check_count, checks.check_fraction, _checked(checks.check_bool)

# Setting -> the check of its value alone; check_settings() checks combinations
PARSERS: dict[str, Parser] = {
    "learning_rate": check_training.check_learning_rate,
    "buffer_size": _count,
    "learning_starts": partial(_count, minimum=0),
    "batch_size": _count,
    "tau": _fraction,
    "gamma": _fraction,
    "train_freq": _parse_train_freq,
    "gradient_steps": partial(_count, minimum=-1),
    "optimize_memory_usage": _flag,
    "n_steps": _count,
    "target_update_interval": _parse_target_update_interval,
    "exploration_fraction": _fraction,
    "exploration_initial_eps": _fraction,
    "exploration_final_eps": _fraction,
    "max_grad_norm": checks.check_positive,
    "stats_window_size": _optional(_count),
    "tensorboard_log": _checked(checks.check_folder),
    "policy_kwargs": checks.check_dict,
    "replay_buffer_kwargs": checks.check_dict,
    "verbose": parse_verbose,
    "seed": _parse_seed,
    "loss": _one_of(*LOSSES),
    "exploration_schedule": _parse_exploration_schedule,
    "exploration_decay": _fraction,
    "exploration_steps": _optional(_count),
    "double_q": _flag,
    "munchausen": _flag,
    "munchausen_kwargs": _optional(checks.check_dict),
    "engine": _one_of(*ENGINE_NAMES),
    "check_finite": _parse_check_finite,
}


class Setting:
    """A descriptor that checks a value when it is assigned.

    It has no ``__get__``: reading the attribute reads the instance's ``__dict__``, at no additional cost.

    :param name: the name of the attribute
    :param parse: checks a value and returns its stored form
    """

    def __init__(self, name: str, parse: Parser) -> None:
        self._name, self._parse = name, parse

    def __set__(self, model: DQNBase, value: Any) -> None:
        """Check the value and assign it.

        :raises ValueError: if the value is invalid, or conflicts with other settings; the old value is kept
        """
        values, name = vars(model), self._name
        before = values.get(name, _MISSING)
        values[name] = self._parse(name, value)
        try:
            model._setting_changed(name)
        except ValueError:
            if before is not _MISSING:
                values[name] = before
            raise


Class = TypeVar("Class", bound=type)


def with_settings(cls: Class) -> Class:
    """Class decorator that makes each name in ``PARSERS`` a :class:`Setting`."""
    for name, parse in PARSERS.items():
        setattr(cls, name, Setting(name, parse))
    return cls


# Extras: settings that SB3's DQN does not have, with the values at which they have no effect
REFERENCE_DEFAULTS = {
    "loss": "huber",
    "exploration_schedule": "linear",
    "exploration_steps": None,
    "double_q": False,
    "munchausen": False,
}


def enabled_extras(model: DQNBase) -> list[str]:
    """Return the extras that a model uses and SB3's DQN does not have, as ``name=value``."""
    names = [name for name, plain in REFERENCE_DEFAULTS.items() if getattr(model, name) != plain]
    if isinstance(model.target_update_interval, tuple):
        names.append("target_update_interval")
    found = [f"{name}={getattr(model, name)!r}" for name in names]
    kwargs = model.policy_kwargs
    found += [f"{name}={kwargs[name]!r}" for name in ("dueling", "noisy") if kwargs.get(name)]
    if kwargs.get("head", "expected") != "expected":
        found.append(f"head={kwargs['head']!r}")
    if model.replay_buffer_kwargs.get("prioritized"):
        found.append("prioritized=True")
    return found


def check_settings(model: DQNBase) -> None:
    """Check all settings of a model, and replace each by its stored form.

    :raises ValueError: for the first invalid setting, with its value and what would be right
    :raises AssertionError: for an environment whose actions are not ``Discrete``
    """
    if model.env is not None:
        check_spaces.check_action_space(model.action_space)
    values = vars(model)
    for name, parse in PARSERS.items():  # load() writes into __dict__, which bypasses Setting
        values[name] = parse(name, values[name])
    checks.check_subclass("policy", model.policy_class, DQNPolicy)
    checks.check_kwargs("policy_kwargs", model.policy_kwargs, model.policy_class, excluded=_GIVEN_TO_POLICIES)
    if model.replay_buffer_class is not None:
        checks.check_subclass("replay_buffer_class", model.replay_buffer_class, ReplayBuffer)
    buffer_class = model.replay_buffer_class or ScratchReplayBuffer
    own_buffer = issubclass(buffer_class, ScratchReplayBuffer)
    given = _GIVEN_TO_BUFFERS | _GIVEN_TO_OWN_BUFFERS if own_buffer else _GIVEN_TO_BUFFERS
    more = ("frames",) if own_buffer else ()
    checks.check_kwargs("replay_buffer_kwargs", model.replay_buffer_kwargs, buffer_class, excluded=given, extra=more)
    if model.env is not None and not own_buffer and has_masks(model.env):
        raise ValueError(
            f"replay_buffer_class={buffer_class.__name__} does not support action masks, but env has them: "
            "leave replay_buffer_class out, or hide action_masks() of env"
        )
    for name in ("prioritized", "handle_timeout_termination"):
        if name in model.replay_buffer_kwargs:
            checks.check_bool(f"replay_buffer_kwargs: {name}", model.replay_buffer_kwargs[name])
    if buffer_class is ScratchReplayBuffer and not model.replay_buffer_kwargs.get("prioritized"):
        for name in SAMPLER_SETTINGS[1:]:
            if name in model.replay_buffer_kwargs:
                raise ValueError(
                    f"replay_buffer_kwargs={model.replay_buffer_kwargs!r} has {name!r}, which needs prioritized=True"
                )
    head_name = model.policy_kwargs.get("head", "expected")
    check_learning(model, make_head(head_name, model.policy_kwargs.get("head_kwargs")), head_name)
    check_exploration(model)
    frequency, unit = check_training.parse_frequency("train_freq", model.train_freq)
    if unit == "episode" and model.n_envs > 1:
        raise ValueError(
            f"train_freq={(frequency, unit)!r} counts episodes, which needs one environment, "
            f"but env has {model.n_envs}: count steps instead"
        )


def check_exploration(model: DQNBase) -> None:
    """Check the settings of exploration against each other.

    :raises ValueError: if they conflict
    """
    if model.exploration_steps is not None and model.exploration_schedule != "linear":
        raise ValueError(
            f"exploration_steps={model.exploration_steps!r} needs exploration_schedule='linear', "
            f"but that is {model.exploration_schedule!r}"
        )


def check_learning(model: DQNBase, head: ValueHead, head_name: str) -> None:
    """Check the settings of the loss and the target against each other and against the policy's head.

    :param model: the model
    :param head: the head of its policy
    :param head_name: the head's name, for messages
    :raises ValueError: for the first setting that conflicts, with its value and what would be right
    """
    for name in ("loss", "double_q", "munchausen", "engine"):
        PARSERS[name](name, getattr(model, name))
    _check_munchausen(model)
    _check_combination(model, head, head_name)


def _check_munchausen(model: DQNBase) -> None:
    kwargs = {} if model.munchausen_kwargs is None else model.munchausen_kwargs
    checks.check_kwargs("munchausen_kwargs", kwargs, MunchausenSettings)
    tau, alpha, clip = MunchausenSettings(**kwargs)
    checks.check_number("munchausen_kwargs: tau", tau)
    checks.check_positive("munchausen_kwargs: tau", tau)
    checks.check_fraction("munchausen_kwargs: alpha", alpha)
    checks.check_number("munchausen_kwargs: clip", clip)
    if clip > 0:
        raise ValueError(f"munchausen_kwargs: clip={clip!r} must be at most 0, because log-probabilities are")


def _check_combination(model: DQNBase, head: ValueHead, head_name: str) -> None:
    """Raise ValueError for settings that cannot be combined."""
    n_steps = max(model.n_steps, checks.check_count("n_steps", model.replay_buffer_kwargs.get("n_steps", 1)))
    if model.munchausen and n_steps > 1:
        raise ValueError(
            f"munchausen=True cannot be combined with n_steps={n_steps}: "
            "the bonus and the entropy of the steps in between would be missing from their return"
        )
    if model.munchausen and not head.outputs_are_returns:
        raise ValueError(
            f"munchausen=True cannot be combined with head={head_name!r}: it shifts and averages returns, "
            "but the outputs of this head are not returns"
        )
    if model.loss not in head.supported_losses:
        raise ValueError(
            f"loss={model.loss!r} cannot be combined with head={head_name!r}, "
            f"which supports {', '.join(map(repr, head.supported_losses))}: leave loss out"
        )
