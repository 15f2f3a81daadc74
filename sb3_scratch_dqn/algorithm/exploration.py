"""Epsilon schedules, and epsilon-greedy action selection.

Schedules are called after each call of ``env.step()``. ``progress_remaining`` goes from 1 to 0 over ``total_timesteps``
of ``learn()``; ``episodes`` counts the episodes finished since ``learn()`` last reset the counters; ``steps`` counts
environment steps, ``n_envs`` per call, over all calls of ``learn()``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import LinearSchedule

Actions = npt.NDArray[np.generic]
Envs = npt.NDArray[np.intp]  # indices

EXPLORATION_SCHEDULES = ("linear", "exponential")


class EpsilonSchedule(Protocol):
    """The probability of a random action."""

    def __call__(self, progress_remaining: float, episodes: int, steps: int) -> float:
        """Return epsilon, in [0, 1]."""


@dataclass
class ProgressEpsilon:
    """Epsilon as a function of the remaining progress alone."""

    schedule: Schedule

    def __call__(self, progress_remaining: float, episodes: int, steps: int) -> float:
        """Return epsilon at this progress.

        :raises ValueError: if the user's function does not return a probability
        """
        epsilon = self.schedule(progress_remaining)
        if not 0 <= epsilon <= 1:
            raise ValueError(f"exploration_schedule({progress_remaining})={epsilon!r} must be a number between 0 and 1")
        return epsilon


@dataclass
class StepsEpsilon:
    """Linear from ``initial`` to ``final`` over ``duration`` environment steps, across calls of ``learn()``."""

    initial: float
    final: float
    duration: int

    def __call__(self, progress_remaining: float, episodes: int, steps: int) -> float:
        """Return epsilon after this many steps."""
        return self.initial + min(steps / self.duration, 1.0) * (self.final - self.initial)


@dataclass
class ExponentialEpsilon:
    """Multiplied by ``decay`` after each episode, down to ``final``."""

    initial: float
    final: float
    decay: float

    def __call__(self, progress_remaining: float, episodes: int, steps: int) -> float:
        """Return epsilon after this many episodes."""
        return max(self.final, self.initial * self.decay**episodes)


def make_epsilon_schedule(
    schedule: str | Schedule, initial: float, final: float, fraction: float, decay: float, steps: int | None = None
) -> EpsilonSchedule:
    """Build the schedule that the settings describe.

    :param schedule: ``"linear"``, ``"exponential"`` or a function of the remaining progress
    :param initial: epsilon at the beginning
    :param final: epsilon at the end
    :param fraction: the fraction of training over which a linear schedule falls
    :param decay: the factor per episode of an exponential schedule
    :param steps: environment steps over which a linear schedule falls instead of ``fraction``
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
    """Choose an action for each environment, with one random number per environment.

    With one environment it draws the same random numbers as SB3's DQN, from NumPy's global generator and by
    ``random_action``.

    :param epsilon: probability of a random action
    :param n_envs: number of environments
    :param random_action: returns a random action for the environment with this index
    :param greedy_actions: returns the greedy actions of the environments with these indices, ``None`` for all; not
        called if all actions are random
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
