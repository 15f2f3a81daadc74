"""Training: ``learn()`` in the environments, ``learn_offline()`` on the replay buffer alone."""

import os
import sys
from typing import Any, TypeVar

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HumanOutputFormat, KVWriter, Logger
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import configure_logger

from sb3_scratch_dqn.algorithm import offline
from sb3_scratch_dqn.algorithm.gradient_steps import GradientStepAlgorithm
from sb3_scratch_dqn.algorithm.replay_setup import warn_of_memory
from sb3_scratch_dqn.algorithm.settings import enabled_extras
from sb3_scratch_dqn.algorithm.subprocesses import PIPE_ERRORS, close_pipes_of_ended_processes, find_ended_process
from sb3_scratch_dqn.algorithm.target_sync import sync_is_due
from sb3_scratch_dqn.common import check_training, checks
from sb3_scratch_dqn.common.interrupts import Interrupts
from sb3_scratch_dqn.replay import check_sampling
from sb3_scratch_dqn.values.heads import CategoricalHead
from sb3_scratch_dqn.values.support_monitor import SupportMonitor

Self = TypeVar("Self", bound="LearningAlgorithm")


class LearningAlgorithm(GradientStepAlgorithm):
    """The part of ``ScratchDQN`` that trains: it prepares ``learn()``, and acts after each step of the environments."""

    def learn(
        self: Self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "ScratchDQN",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Train in the environments.

        :param total_timesteps: minimum number of environment steps to take
        :param callback: called at every step
        :param log_interval: episodes between logs; ``None`` for no logs
        :param tb_log_name: name of the run in TensorBoard
        :param reset_num_timesteps: restart the schedules and the counter of steps
        :param progress_bar: show a progress bar
        :return: the model
        :raises ValueError: for an invalid argument, and for rewards and observations that are not finite, unless
            ``check_finite`` is off
        :raises ChildProcessError: if the process of an environment in a ``SubprocVecEnv`` ended
        """
        _check_learn_arguments(callback, log_interval, tb_log_name, progress_bar)
        checks.check_bool("reset_num_timesteps", reset_num_timesteps)
        try:
            with Interrupts() as self._interrupts, close_pipes_of_ended_processes(self.env):
                return super().learn(
                    total_timesteps=total_timesteps,
                    callback=callback,
                    log_interval=log_interval,
                    tb_log_name=tb_log_name,
                    reset_num_timesteps=reset_num_timesteps,
                    progress_bar=progress_bar,
                )
        except PIPE_ERRORS as error:
            ended_error = find_ended_process(self.env)
            if ended_error is None:
                raise
            raise ended_error from error
        finally:
            self._engine_checked = False
            vars(self).pop("_interrupts", None)

    def learn_offline(
        self: Self,
        gradient_steps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1_000,
        tb_log_name: str = "ScratchDQN",
        progress_bar: bool = False,
        target_update_interval: int | None = None,
    ) -> Self:
        """Train on the transitions in the replay buffer, without steps in the environment.

        Fill the buffer first, by :meth:`load_transitions`, :meth:`load_replay_buffer` or ``replay_buffer.add()``.
        Schedules of the learning rate and of ``beta`` run over these gradient steps. Callbacks are called after each
        gradient step. Meanwhile ``num_timesteps``, which numbers logs and checkpoints, counts all gradient steps of the
        model.

        :param gradient_steps: number of gradient steps
        :param callback: for example SB3's ``CheckpointCallback``
        :param log_interval: gradient steps between logs; ``None`` for no logs
        :param tb_log_name: name of the run in TensorBoard
        :param progress_bar: show a progress bar
        :param target_update_interval: gradient steps between updates of the target network; by default the number that
            ``learn()`` takes between them, given ``target_update_interval``, ``train_freq`` and ``gradient_steps``; if
            ``train_freq`` counts episodes, one gradient step per environment step is assumed
        :raises ValueError: for an invalid argument, or if the replay buffer is empty
        """
        _check_learn_arguments(callback, log_interval, tb_log_name, progress_bar)
        steps = checks.check_count("gradient_steps", gradient_steps, minimum=0)
        interval = offline.target_interval(self, target_update_interval)
        assert self.replay_buffer is not None
        if self.replay_buffer.size() == 0:
            raise ValueError("the replay buffer is empty: call load_transitions() or load_replay_buffer() first")
        check_sampling(self.replay_buffer, masked=False)
        self._engine_for_training().attach()
        self._create_logger(tb_log_name, reset_num_timesteps=True)
        offline.learn(self, steps, callback, log_interval, progress_bar, interval)
        return self

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        if "policy" not in vars(self):
            raise ValueError("_init_setup_model=False left the model without a policy: call _setup_model() first")
        # Again, because a loaded model may have a small buffer, which suffices as long as it only predicts
        check_training.check_buffer_holds_batch(self.buffer_size, self.batch_size)
        check_training.check_total_timesteps(total_timesteps)
        self._engine_for_training().attach()
        self._update_checks()
        self._update_support_monitor()
        if self._mid_step:  # a step was interrupted: the last observation may not be the environments' current one
            self._last_obs = None
        if reset_num_timesteps:
            self._episodes_finished = 0
        resets_environments = self._mid_step = reset_num_timesteps or self._last_obs is None
        if resets_environments:
            self._end_trajectories()
        self._create_logger(tb_log_name, reset_num_timesteps)
        custom_logger, self._custom_logger = self._custom_logger, True  # or SB3 creates a logger with a folder
        try:
            prepared = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        finally:
            self._custom_logger = custom_logger
        self._mid_step = False
        if resets_environments and self._checks_finite:
            self._check_first_observations()
        self._find_masks()
        assert self.replay_buffer is not None
        check_sampling(self.replay_buffer, masked=self._masks is not None)
        warn_of_memory(self.replay_buffer, self.env)
        return prepared

    def _create_logger(self, tb_log_name: str, reset_num_timesteps: bool) -> None:
        """Create SB3's logger, without a folder if nothing is logged to files."""
        if self._custom_logger:
            return
        if self.tensorboard_log is None and "SB3_LOGDIR" not in os.environ:
            formats: list[KVWriter] = [HumanOutputFormat(sys.stdout)] if self.verbose >= 1 else []
            self._logger = Logger(folder=None, output_formats=formats)
        else:
            log = None if self.tensorboard_log is None else os.fspath(self.tensorboard_log)
            self._logger = configure_logger(self.verbose, log, tb_log_name, reset_num_timesteps)

    def _update_checks(self) -> None:
        """Decide whether training must equal SB3's to the last bit, and whether numbers are checked for NaN."""
        self._matches_sb3 = self.engine == "eager" and not enabled_extras(self)
        self._checks_finite = self.check_finite is True or (self.check_finite == "auto" and not self._matches_sb3)

    def _update_support_monitor(self) -> None:
        """Compare returns with the support of the head if that is C51."""
        head = getattr(self.policy, "head", None)
        if not isinstance(head, CategoricalHead):
            self._support_monitor = None
        elif self._support_monitor is None or self._support_monitor.head is not head:
            self._support_monitor = SupportMonitor(head, self.n_envs)

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # The last rollout may exceed total_timesteps; SB3's learning rates become negative then
        if self._current_progress_remaining < 0 and not self._matches_sb3:
            self._current_progress_remaining = 0.0

    def _on_step(self) -> None:
        self._n_calls += 1
        self._env_steps += self.n_envs
        interval = self.target_update_interval  # callbacks may change it
        if sync_is_due(interval, self.n_envs, self._n_calls, self._episodes_finished, self._episodes_ended_now):
            self._current_engine().update_target(self.tau)
        self._update_exploration_rate()


def _check_learn_arguments(callback: Any, log_interval: Any, tb_log_name: Any, progress_bar: Any) -> None:
    check_training.check_callback(callback)
    checks.check_bool("progress_bar", progress_bar)
    if log_interval is not None:
        checks.check_count("log_interval", log_interval)
    if not isinstance(tb_log_name, str):
        raise ValueError(f"tb_log_name={checks.short_repr(tb_log_name)} must be a string")
