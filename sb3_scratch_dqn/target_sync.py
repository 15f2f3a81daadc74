"""When the target network follows the online one."""

from dataclasses import dataclass
from typing import Protocol


class TargetSync(Protocol):
    """Asked after each call of ``env.step()``."""

    def due(self, calls: int, episodes: int, ended: int) -> bool:
        """Whether the target network is to be updated now.

        :param calls: calls of ``env.step()`` so far, this one included
        :param episodes: episodes finished so far, those that this call ended included
        :param ended: episodes that this call ended
        """


@dataclass
class EverySteps:
    """Every ``steps`` environment steps, counted over all environments, as in SB3."""

    steps: int
    n_envs: int

    def due(self, calls: int, episodes: int, ended: int) -> bool:
        """True each time that as many calls as make up ``steps`` steps have passed."""
        return calls % max(self.steps // self.n_envs, 1) == 0


@dataclass
class EveryEpisodes:
    """After every ``episodes_between`` episodes."""

    episodes_between: int

    def due(self, calls: int, episodes: int, ended: int) -> bool:
        """True when this call made the number of episodes reach or pass a multiple of ``episodes_between``."""
        return episodes // self.episodes_between > (episodes - ended) // self.episodes_between


def make_target_sync(interval: tuple[int, str], n_envs: int) -> TargetSync:
    """Turn ``(frequency, "step" or "episode")`` into the object that keeps it."""
    frequency, unit = interval
    return EverySteps(frequency, n_envs) if unit == "step" else EveryEpisodes(frequency)
