"""Search space of RL Zoo's ``-optimize``, and the conversion of sampled values to settings.

A search samples from the default space below, or from the space that a hyperparameter file declares for an environment:

.. code-block:: yaml

    search_space:
      learning_rate: {low: 1.0e-5, high: 1.0e-1, log: true}   # a number from a range
      batch_size: [32, 64, 128]                               # one of these

A range yields whole numbers if both of its bounds are. Names are arguments of ``ScratchDQN``, or keys of ``DERIVED``
for settings that are searched in another form. A switch that cannot be combined with other sampled values is switched
off.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import optuna

NET_ARCHS = {"small": [64, 64], "medium": [256, 256], "big": [400, 300]}

# Setting -> list of choices, or bounds of a range
DEFAULT_SPACE: dict[str, Any] = {
    "learning_rate": {"low": 1e-5, "high": 5e-3, "log": True},
    "one_minus_gamma": {"low": 1e-4, "high": 0.03, "log": True},
    "batch_size_pow": {"low": 4, "high": 9},
    "buffer_size": [10_000, 50_000, 100_000, 500_000],
    "learning_starts": [0, 1_000, 5_000],
    "train_freq": [1, 2, 4, 8, 16, 64, 256],
    "subsample_steps": [1, 2, 4, 8],
    "target_update_interval": {"low": 10, "high": 20_000, "log": True},
    "exploration_fraction": {"low": 0.02, "high": 0.5},
    "exploration_final_eps": {"low": 0.01, "high": 0.2},
    "net_arch": list(NET_ARCHS),
    "head": ["expected", "c51", "quantile", "iqn"],
    "value_range": [10.0, 100.0, 500.0],
    "double_q": [False, True],
    "dueling": [False, True],
    "noisy": [False, True],
    "munchausen": [False, True],
    "n_steps": [1, 3, 5],
    "prioritized": [False, True],
}

# Searched as well with HerReplayBuffer
HER_SPACE: dict[str, Any] = {
    "n_sampled_goal": {"low": 1, "high": 5},
    "goal_selection_strategy": ["final", "episode", "future"],
}

# Settings that HerReplayBuffer does not support
_UNSUPPORTED_BY_HER = ("prioritized", "n_steps")

# Fewer fractions than in the papers, to shorten the search
_HEAD_KWARGS: dict[str, dict[str, Any]] = {
    "expected": {},
    "c51": {},
    "quantile": {"n_quantiles": 32},
    "iqn": {"n_tau": 8, "n_tau_prime": 8, "n_tau_act": 16},
}

# Name in the search space -> function from the sampled value to settings
DERIVED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "one_minus_gamma": lambda value: {"gamma": 1 - value},
    "batch_size_pow": lambda value: {"batch_size": 2**value},
    "net_arch": lambda value: {"policy_kwargs": {"net_arch": NET_ARCHS[value] if isinstance(value, str) else value}},
    "head": lambda value: {"policy_kwargs": {"head": value, "head_kwargs": dict(_HEAD_KWARGS.get(value, {}))}},
    "dueling": lambda value: {"policy_kwargs": {"dueling": value}},
    "noisy": lambda value: {"policy_kwargs": {"noisy": value}},
    # No settings for False, which keeps the replay_buffer_kwargs of a hyperparameter file
    "prioritized": lambda value: {"replay_buffer_kwargs": {"prioritized": True}} if value else {},
}

# Name -> name that must be in the space too, because the value is relative to it or only used with it
_DEPENDENT = {"subsample_steps": "train_freq", "value_range": "head"}

# Names in a space that are not settings
_EXTRA_NAMES = (*DERIVED, *_DEPENDENT, *HER_SPACE)


def check_search_space(space: Any, settings: Collection[str]) -> None:
    """Raise ValueError unless a search can sample from ``space``.

    :param space: the ``search_space`` of a hyperparameter file
    :param settings: the names of all settings that can be searched
    """
    if not isinstance(space, Mapping) or not space:
        raise ValueError(f"search_space={space!r} must map names of settings to choices or ranges")
    for name, choices in space.items():
        if name not in settings and name not in _EXTRA_NAMES:
            raise ValueError(
                f"search_space: {name!r} cannot be searched: it is not a setting of ScratchDQN, "
                f"nor one of {', '.join(_EXTRA_NAMES)}"
            )
        if not _is_choice(choices) and not _is_range(choices):
            raise ValueError(
                f"search_space: {name}={choices!r} must be a list of choices, or a range such as "
                "{low: 0.1, high: 1.0}, with optional log: true or step (in YAML, 1e-5 is a string and 1.0e-5 a number)"
            )
    for value in space.get("net_arch", []):
        if isinstance(value, str) and value not in NET_ARCHS:
            raise ValueError(
                f"search_space: net_arch={value!r} is unknown: choose from {', '.join(NET_ARCHS)}, or a list"
            )
    for name, other in _DEPENDENT.items():
        if name in space and other not in space:
            raise ValueError(f"search_space: {name} requires {other}, so search that too")


def _is_choice(choices: Any) -> bool:
    return isinstance(choices, list) and len(choices) > 0


def _is_range(choices: Any) -> bool:
    if not isinstance(choices, Mapping) or not {"low", "high"} <= set(choices) <= {"low", "high", "log", "step"}:
        return False
    numbers = [choices[key] for key in ("low", "high", "step") if key in choices]
    if any(isinstance(n, bool) or not isinstance(n, int | float) or not math.isfinite(n) for n in numbers):
        return False
    log = choices.get("log", False)
    if not isinstance(log, bool) or (log and ("step" in choices or choices["low"] <= 0)):
        return False
    return bool(choices["low"] <= choices["high"] and choices.get("step", 1) > 0)


def suggest(trial: optuna.Trial, space: Mapping[str, Any]) -> dict[str, Any]:
    """Sample one value for each name in a space."""
    return {name: _suggest_value(trial, name, choices) for name, choices in space.items()}


def _suggest_value(trial: optuna.Trial, name: str, choices: Any) -> Any:
    if _is_choice(choices):
        return trial.suggest_categorical(name, choices)
    if isinstance(choices["low"], int) and isinstance(choices["high"], int):
        return trial.suggest_int(name, **choices)
    return trial.suggest_float(name, **choices)


def sample_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """Sample the settings of one trial, for RL Zoo's ``HYPERPARAMS_SAMPLER``.

    :param trial: its user attribute ``search_space`` replaces the default space
    :param n_actions: not used
    :param n_envs: not used
    :param additional_args: ``using_her_replay_buffer``, and ``her_kwargs`` from the hyperparameter file
    :return: settings
    """
    space = dict(trial.user_attrs.get("search_space", DEFAULT_SPACE))
    if additional_args["using_her_replay_buffer"]:
        space = {**space, **HER_SPACE}
        for name in _UNSUPPORTED_BY_HER:
            space.pop(name, None)
    settings = convert_params(suggest(trial, space))
    for name in ("gamma", "batch_size"):
        if name in settings and name not in trial.params:
            trial.set_user_attr(name, settings[name])  # shown next to the searched form
    if "replay_buffer_kwargs" in settings:
        settings["replay_buffer_kwargs"] = {**additional_args["her_kwargs"], **settings["replay_buffer_kwargs"]}
    return settings


def convert_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the sampled values of a trial to settings; RL Zoo's ``HYPERPARAMS_CONVERTER`` for ``--trial-id``."""
    settings: dict[str, Any] = {}
    for name, value in params.items():
        if name in DERIVED:
            for setting, derived in DERIVED[name](value).items():
                settings[setting] = {**settings.get(setting, {}), **derived} if isinstance(derived, dict) else derived
        elif name in HER_SPACE:
            settings.setdefault("replay_buffer_kwargs", {})[name] = value
        elif name not in _DEPENDENT:
            settings[name] = value
    if "subsample_steps" in params:
        # One gradient step per subsample_steps environment steps
        settings["gradient_steps"] = max(params["train_freq"] // params["subsample_steps"], 1)
    if params.get("head") == "c51" and "value_range" in params:
        settings["policy_kwargs"]["head_kwargs"].update(v_min=-params["value_range"], v_max=params["value_range"])
    if settings.get("munchausen") and (params.get("head") == "c51" or settings.get("n_steps", 1) > 1):
        settings["munchausen"] = False
    return settings
