"""How often to act at random, and acting so.

Schedules are asked once an environment step. ``progress_remaining`` goes from 1 to 0 over the steps that ``learn()``
was given; ``episodes`` counts the finished ones since it began; ``steps`` counts the environment steps of the model's
whole life, over all calls of ``learn()``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import LinearSchedule

Actions = npt.NDArray[np.generic]
Envs = npt.NDArray[np.intp]  # their numbers

EXPLORATION_SCHEDULES = ("linear", "exponential")


class EpsilonSchedule(Protocol):
    """The probability of a random action."""

    def __call__(self, progress_remaining: float, episodes: int, steps: int) -> float:
        """Epsilon, in [0, 1]."""


@dataclass
class ProgressEpsilon:
    """Epsilon as a function of the remaining progress alone."""

    schedule: Schedule

    def __call__(self, progress_remaining: float, episodes: int, steps: int) -> float:
        """Epsilon at this progress.

        :raises ValueError: if a function of the user's gives something else than a probability
        """
        epsilon = self.schedule(progress_remaining)
        if not 0 <= epsilon <= 1:
            raise ValueError(f"exploration_schedule({progress_remaining})={epsilon!r} must be a number between 0 and 1")
        return epsilon


@dataclass
class StepsEpsilon:
    """Epsilon in a line from ``initial`` to ``final`` over ``duration`` environment steps, however learning is cut."""

    initial: float
    final: float
    duration: int

    def __call__(self, progress_remaining: float, episodes: int, steps: int) -> float:
        """Epsilon after this many steps."""
        return self.initial + min(steps / self.duration, 1.0) * (self.final - self.initial)


@dataclass
class ExponentialEpsilon:
    """Epsilon multiplied by ``decay`` after each episode, down to ``final``."""

    initial: float
    final: float
    decay: float

    def __call__(self, progress_remaining: float, episodes: int, steps: int) -> float:
        """Epsilon after this many episodes."""
        return max(self.final, self.initial * self.decay**episodes)


def make_epsilon_schedule(
    schedule: str | Schedule, initial: float, final: float, fraction: float, decay: float, steps: int | None = None
) -> EpsilonSchedule:
    """Turn the settings of an algorithm into a schedule.

    :param schedule: ``"linear"``, ``"exponential"`` or a function of the remaining progress
    :param initial: epsilon at the beginning
    :param final: epsilon at the end
    :param fraction: the part of the training over which a linear schedule falls
    :param decay: the factor per episode of an exponential one
    :param steps: environment steps over which a linear schedule falls instead, whatever the training's length
    """
    if schedule == "linear" and steps is not None:
        return StepsEpsilon(initial, final, steps)
    if schedule == "linear":
        return ProgressEpsilon(LinearSchedule(initial, final, fraction))
    if schedule == "exponential":
        return ExponentialEpsilon(initial, final, decay)
    assert callable(schedule)
    return ProgressEpsilon(schedule)


def epsilon_greedy(
    epsilon: float,
    n_envs: int,
    random_action: Callable[[int], np.generic],
    greedy_actions: Callable[[Envs | None], Actions],
) -> Actions:
    """Choose an action for each environment, each with a coin of its own.

    With one environment it draws from NumPy's global generator and from ``random_action`` what SB3's DQN draws.

    :param epsilon: probability that a coin says "random"
    :param n_envs: number of environments
    :param random_action: gives a random action for the environment of this number
    :param greedy_actions: gives the greedy actions of the environments of these numbers, all for ``None``; not asked if
        nobody wants one
    :return: ``(n_envs,)``
    """
    explores = np.random.rand(n_envs) < epsilon
    if not explores.any():
        return greedy_actions(None)
    if explores.all():
        return np.array([random_action(env) for env in range(n_envs)])
    greedy = np.flatnonzero(~explores)
    chosen = greedy_actions(greedy)
    actions = np.empty(n_envs, dtype=chosen.dtype)
    actions[greedy] = chosen
    for env in np.flatnonzero(explores).tolist():
        actions[env] = random_action(env)
    return actions
