"""The attributes of ``ScratchDQN`` that the modules of this package read and write.

:class:`DQNBase` declares them and does nothing else, so that functions that take a model need not import
``ScratchDQN``.
"""

from typing import ClassVar

from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import Schedule

from sb3_scratch_dqn.networks.policies import DQNPolicy


class DQNBase(OffPolicyAlgorithm):
    """SB3's off-policy algorithm with the settings and counters of ``ScratchDQN``; :mod:`state` groups them."""

    policy: DQNPolicy

    # Settings that OffPolicyAlgorithm does not have
    stats_window_size: int
    target_update_interval: int | tuple[int, str]  # environment steps, or (10, "episode")
    exploration_fraction: float
    exploration_initial_eps: float
    exploration_final_eps: float
    max_grad_norm: float
    loss: str
    exploration_schedule: str | Schedule
    exploration_decay: float
    exploration_steps: int | None
    double_q: bool
    munchausen: bool
    munchausen_kwargs: dict[str, float] | None
    engine: str
    check_finite: bool | str

    # ScratchDQN itself: instances of subclasses may run user code at any time
    _unextended_class: ClassVar[type | None] = None

    # Names of settings that only models of this algorithm have; a file without any of them was saved by another one
    own_settings: ClassVar[tuple[str, ...]] = ()

    # Progress
    exploration_rate: float
    _n_calls: int  # calls of env.step()
    _env_steps: int  # environment steps over all calls of learn()
    _episodes_finished: int  # since learn() last reset the counters
    _episodes_ended_now: int  # by the last call of env.step()
    _mid_step: bool = False  # the environments may be ahead of the last observation

    # Derived from the settings
    _matches_sb3: bool = False  # training equals SB3's DQN to the last bit
    _checks_finite: bool = True

    def _setting_changed(self, name: str) -> None:
        """Update what depends on a setting after it was assigned.

        :param name: of the setting
        :raises ValueError: if its value conflicts with other settings; the setting then keeps its old value
        """

    def _make_derived(self) -> None:
        """Build every attribute that is derived from settings and policy: ``state.DERIVED``."""

    def _end_trajectories(self) -> None:
        """End all trajectories in the replay buffer, so that no n-step return crosses a reset of the environments."""
        end_trajectories = getattr(self.replay_buffer, "end_trajectories", None)  # also behind a proxy
        if end_trajectories is not None:
            end_trajectories()
