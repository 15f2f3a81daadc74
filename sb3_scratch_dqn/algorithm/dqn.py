"""ScratchDQN: its settings, what is made of them, and what happens at each step."""

import math
import os
import pathlib
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HumanOutputFormat, KVWriter, Logger
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import configure_logger, get_parameters_by_name

from sb3_scratch_dqn.algorithm import conversion, offline
from sb3_scratch_dqn.algorithm.acting import GreedyActor
from sb3_scratch_dqn.algorithm.replay_setup import (
    adapt_replay_buffer,
    buffer_for_environment,
    make_replay_buffer,
    warn_of_memory,
)
from sb3_scratch_dqn.algorithm.rollout import LeanRollouts
from sb3_scratch_dqn.algorithm.settings import (
    REFERENCE_DEFAULTS,
    check_exploration,
    check_learning,
    check_settings,
    enabled_extras,
    read_verbose,
    with_settings,
)
from sb3_scratch_dqn.algorithm.subprocesses import PIPE_ERRORS, find_dead_environment, unblock_on_death
from sb3_scratch_dqn.algorithm.target_sync import sync_is_due
from sb3_scratch_dqn.common import checks
from sb3_scratch_dqn.common.files import Path
from sb3_scratch_dqn.common.interrupts import Interrupts
from sb3_scratch_dqn.common.overriding import replaced
from sb3_scratch_dqn.engines import CaptureError, Engine, choose_engine, find_engine
from sb3_scratch_dqn.networks.policies import CnnPolicy, DQNPolicy, MlpPolicy, MultiInputPolicy
from sb3_scratch_dqn.networks.q_network import QNetwork
from sb3_scratch_dqn.replay import batch_source, check_sampling
from sb3_scratch_dqn.replay.prefill import read_transitions, store_transitions
from sb3_scratch_dqn.values.heads import LOSSES, CategoricalHead
from sb3_scratch_dqn.values.support import SupportMonitor
from sb3_scratch_dqn.values.td import MunchausenSettings, Objective

if TYPE_CHECKING:
    from minari import MinariDataset
    from stable_baselines3.dqn import DQN

# Callbacks write the log too, at times that nobody knows before; figures of an update must lie ready then
_UPDATES_BETWEEN_METRICS = 100

SelfScratchDQN = TypeVar("SelfScratchDQN", bound="ScratchDQN")


@with_settings
class ScratchDQN(LeanRollouts):
    """Deep Q-Network, from scratch (https://arxiv.org/abs/1312.5602, https://www.nature.com/articles/nature14236).

    The positional parameters are those of SB3's ``DQN``, with the same defaults; the keyword-only ones come on top.
    With these at their defaults it computes what SB3's ``DQN`` computes, up to rounding, and with ``engine="eager"`` to
    the last bit, in one environment; in several, each environment has an epsilon coin of its own.

    :param policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"``, or a subclass of ``DQNPolicy``
    :param env: the environment to learn from, or its name
    :param learning_rate: of the optimiser, or a function of the remaining progress (1 to 0)
    :param buffer_size: transitions that replay keeps, at least ``batch_size``
    :param learning_starts: environment steps taken at random before the first update
    :param batch_size: transitions in a gradient step
    :param tau: how far the target network moves at each of its updates; 1 copies the online network
    :param gamma: the discount of one step
    :param train_freq: environment steps between updates, or ``(1, "episode")`` for episodes
    :param gradient_steps: gradient steps in an update; -1 for as many as environment steps since the last one
    :param replay_buffer_class: another replay buffer than :class:`ScratchReplayBuffer`, such as ``HerReplayBuffer``
    :param replay_buffer_kwargs: its arguments; for :class:`ScratchReplayBuffer` ``prioritized``, ``alpha``, ``beta``,
        ``beta_final``, ``epsilon`` and ``frames``: keep each frame of stacked observations once, ``"auto"`` where the
        environment stacks them, ``True`` or ``False``
    :param optimize_memory_usage: keep each observation once;
        needs ``replay_buffer_kwargs=dict(handle_timeout_termination=False)``
    :param n_steps: learn from returns of this many steps; also with ``Dict`` observations and several environments
    :param target_update_interval: environment steps between updates of the target network,
        or ``(10, "episode")`` for episodes
    :param exploration_fraction: the part of the training over which a linear epsilon falls
    :param exploration_initial_eps: probability of a random action at the beginning
    :param exploration_final_eps: and at the end
    :param max_grad_norm: gradients are scaled down to this norm; infinity leaves them alone
    :param stats_window_size: episodes over which logged returns and lengths are averaged
    :param tensorboard_log: folder for TensorBoard
    :param policy_kwargs: arguments of the policy
    :param verbose: 0 for no output, 1 for information, 2 for debugging
    :param seed: of every random generator
    :param device: where to compute; ``"auto"`` takes a GPU if there is one
    :param _init_setup_model: build the networks right away
    :param loss: ``"huber"`` or ``"mse"``
    :param exploration_schedule: ``"linear"`` over ``exploration_fraction``; ``"exponential"``: multiplied by
        ``exploration_decay`` after each episode; or a function of the remaining progress (1 to 0)
    :param exploration_decay: the factor of an exponential schedule
    :param exploration_steps: environment steps over which a linear epsilon falls, instead of
        ``exploration_fraction`` of a training; they are counted over all calls of ``learn()``
    :param double_q: the online network chooses the next action, the target network values it
        (https://arxiv.org/abs/1509.06461)
    :param munchausen: learn from a soft-greedy policy, with a bonus for what it would have done
        (https://arxiv.org/abs/2007.14430)
    :param munchausen_kwargs: ``tau`` (0.03), ``alpha`` (0.9) and ``clip`` (-1.0), as in
        :class:`sb3_scratch_dqn.values.td.MunchausenTarget`
    :param engine: how updates are executed: ``"auto"``, the fastest that serves these settings, but for
        ``"cuda_graph"``; ``"fused"``, on the CPU in fewer calls, and ``"cuda_graph"``, on a GPU in fewer launches, the
        same up to rounding; ``"eager"``, the numbers of SB3's ``DQN`` to the last bit. With ``verbose=1`` it says which
        one is used, and why
    :param check_finite: refuse rewards and observations that are NaN or infinite; ``"auto"`` does so, except with
        ``engine="eager"`` and all extras off, which goes on as SB3 does
    :raises ValueError: for settings that cannot work, naming the first of them
    :raises AssertionError: for an environment whose actions are not ``Discrete``
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    own_settings = ("loss", "exploration_decay", "engine")  # exploration_schedule SB3 knows too, as something else

    policy: DQNPolicy

    def __init__(
        self,
        policy: str | type[DQNPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 32,
        tau: float = 1.0,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 4,
        gradient_steps: int = 1,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        target_update_interval: int | tuple[int, str] = 10_000,
        exploration_fraction: float = 0.1,
        exploration_initial_eps: float = 1.0,
        exploration_final_eps: float = 0.05,
        max_grad_norm: float = 10,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        loss: str = "huber",
        exploration_schedule: str | Schedule = "linear",
        exploration_decay: float = 0.995,
        exploration_steps: int | None = None,
        double_q: bool = False,
        munchausen: bool = False,
        munchausen_kwargs: dict[str, float] | None = None,
        engine: str = "auto",
        check_finite: bool | str = "auto",
    ) -> None:
        if env is None and _init_setup_model:
            raise ValueError("env=None must be an environment, or the name of one")
        if env is not None:
            checks.check_environment(env)
        if not isinstance(policy, str):
            policy = conversion.own_policy(policy)
            checks.check_subclass("policy", policy, DQNPolicy)
        checks.check_device(device)
        verbose = read_verbose("verbose", verbose)
        checks.check_flag("_init_setup_model", _init_setup_model)
        for name, kwargs in (("policy_kwargs", policy_kwargs), ("replay_buffer_kwargs", replay_buffer_kwargs)):
            if kwargs is not None:  # SB3 takes whatever is false for no arguments
                checks.check_dict(name, kwargs)
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            sde_support=False,
            support_multi_env=True,
        )
        # Every argument is an attribute of its name, and what follows from them is made in _setup_model:
        # loading a model writes new settings into the attributes, then calls it.
        self.stats_window_size = stats_window_size
        self.target_update_interval = target_update_interval
        self.exploration_fraction = exploration_fraction
        self.exploration_initial_eps = exploration_initial_eps
        self.exploration_final_eps = exploration_final_eps
        self.max_grad_norm = max_grad_norm
        self.loss = loss
        self.exploration_schedule = exploration_schedule
        self.exploration_decay = exploration_decay
        self.exploration_steps = exploration_steps
        self.double_q = double_q
        self.munchausen = munchausen
        self.munchausen_kwargs = munchausen_kwargs
        self.engine = engine
        self.check_finite = check_finite

        self.exploration_rate = 0.0  # until the first step, as in SB3
        self._n_calls = 0  # of env.step()
        self._env_steps = 0  # over all calls of learn()
        self._episodes_finished = 0  # since learn() last set the counters back
        self._episodes_ended_now = 0  # by the last call of env.step()

        if _init_setup_model:
            check_settings(self)
            checks.check_buffer_holds_batch(self.buffer_size, self.batch_size)
            self._setup_model()

    def _setup_model(self) -> None:
        check_settings(self)
        self._stats_window_size = self.stats_window_size
        if self._env_steps == 0:  # a model saved by a version that did not count them
            self._env_steps = self._n_calls * self.n_envs

        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        if self.replay_buffer is None:
            self.replay_buffer = make_replay_buffer(self, self.env)
        policy = self.policy_class(self.observation_space, self.action_space, self.lr_schedule, **self.policy_kwargs)
        assert isinstance(policy, DQNPolicy)
        self.policy = policy.to(self.device)
        self._create_aliases()
        self.batch_norm_stats = get_parameters_by_name(self.q_net, ["running_"])
        self.batch_norm_stats_target = get_parameters_by_name(self.q_net_target, ["running_"])

        self._make_epsilon_schedule()
        self._choose_engine()

        interval = self.target_update_interval
        if isinstance(interval, int) and self.n_envs > 1 and self.n_envs > interval:
            warnings.warn(
                "The number of environments used is greater than the target network "
                f"update interval ({self.n_envs} > {interval}), "
                "therefore the target network will be updated after each call to env.step() "
                f"which corresponds to {self.n_envs} steps.",
                stacklevel=2,
            )

    def _setting_changed(self, name: str) -> None:
        """Follow a setting that was assigned; those of a model that is not set up yet are read by the set-up."""
        if "policy" not in vars(self):
            return
        if name in ("check_finite", "engine", *REFERENCE_DEFAULTS):
            self._update_reference_mode()
        if name == "learning_rate":
            self._setup_lr_schedule()
        elif name.startswith("exploration_"):
            check_exploration(self)
            self._make_epsilon_schedule()
        elif name in ("loss", "double_q", "munchausen", "munchausen_kwargs"):
            check_learning(self, self.policy.head, self.policy.head_name)
        elif name == "batch_size":
            checks.check_buffer_holds_batch(self.buffer_size, self.batch_size)

    def _choose_engine(self) -> None:
        for name in ("q_net", "q_net_target", "head", "optimizer", "predict"):
            if not hasattr(self.policy, name):
                raise ValueError(
                    f"policy is a {type(self.policy).__name__}, which has no {name!r}: wrap policy.q_net instead"
                )
        check_learning(self, self.policy.head, self.policy.head_name)
        before = getattr(self, "_engine", None)
        self._engine, why = choose_engine(self.engine, self.policy, self._objective())
        self._engine_settings = self._current_engine_settings()
        self._act = None  # of the engine before, whose memory another may need
        if self.verbose >= 1 and (before is None or before.title != self._engine.title):
            print(why)

    def _current_engine_settings(self) -> tuple[Any, ...]:
        return self.engine, self.loss, self.double_q, self.munchausen, dict(self.munchausen_kwargs or {})

    def _current_engine(self) -> Engine:
        """The engine, made anew if somebody changed what it is made of."""
        engine = self._engine
        if (
            engine.policy is not self.policy
            or self._engine_settings != self._current_engine_settings()
            or engine.is_stale()
        ):
            self._choose_engine()
        return self._engine

    def _engine_for_training(self) -> Engine:
        """The engine that would be chosen now: what stood in the way of a faster one may be gone."""
        engine = self._current_engine()
        if find_engine(self.engine, self.policy, engine.objective)[0] is not type(engine):
            self._choose_engine()
        return self._engine

    def _greedy_actor(self) -> GreedyActor | None:
        if replaced(self.policy, DQNPolicy, "predict", "_predict", "obs_to_tensor"):
            return None
        return (self._engine if self._engine_checked else self._current_engine()).act

    def _objective(self) -> Objective:
        munchausen = self.munchausen_kwargs or {}
        settings = MunchausenSettings(*map(float, MunchausenSettings(**munchausen))) if self.munchausen else None
        return Objective(LOSSES[self.loss], self.double_q, settings)

    @property
    def q_net(self) -> QNetwork:
        """The online network, which is the policy's."""
        return self.policy.q_net

    @q_net.setter
    def q_net(self, network: QNetwork) -> None:
        self.policy.q_net = network

    @property
    def q_net_target(self) -> QNetwork:
        """The target network, which is the policy's."""
        return self.policy.q_net_target

    @q_net_target.setter
    def q_net_target(self, network: QNetwork) -> None:
        self.policy.q_net_target = network

    def _create_aliases(self) -> None:
        """Names of subclasses for parts of the policy may be made here; those of SB3 need no telling."""

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        checks.check_choice("policy", policy_name, self.policy_aliases)
        return self.policy_aliases[policy_name]

    # Training

    def learn(
        self: SelfScratchDQN,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "ScratchDQN",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfScratchDQN:
        """Train.

        :param total_timesteps: environment steps to take, at least
        :param callback: called at every step
        :param log_interval: episodes between logs; ``None`` for none
        :param tb_log_name: of the run, in TensorBoard
        :param reset_num_timesteps: begin the schedules anew
        :param progress_bar: show one
        :raises ValueError: for an argument that cannot work, and for rewards and observations that are not finite,
            unless ``check_finite`` is off
        :raises ChildProcessError: if the process of an environment in a ``SubprocVecEnv`` ended
        """
        self._check_learn_arguments(callback, log_interval, tb_log_name, progress_bar)
        checks.check_flag("reset_num_timesteps", reset_num_timesteps)
        try:
            with Interrupts() as self._interrupts, unblock_on_death(self.env):
                return super().learn(
                    total_timesteps=total_timesteps,
                    callback=callback,
                    log_interval=log_interval,
                    tb_log_name=tb_log_name,
                    reset_num_timesteps=reset_num_timesteps,
                    progress_bar=progress_bar,
                )
        except PIPE_ERRORS as error:
            death = find_dead_environment(self.env)
            if death is None:
                raise
            raise death from error
        finally:
            self._engine_checked = False
            vars(self).pop("_interrupts", None)

    @staticmethod
    def _check_learn_arguments(callback: Any, log_interval: Any, tb_log_name: Any, progress_bar: Any) -> None:
        checks.check_callback(callback)
        checks.check_flag("progress_bar", progress_bar)
        if log_interval is not None:
            checks.check_count("log_interval", log_interval)
        if not isinstance(tb_log_name, str):
            raise ValueError(f"tb_log_name={checks.brief(tb_log_name)} must be a string")

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
        # Again, because a model may have been loaded with a small buffer, which serves as long as it only predicts
        checks.check_buffer_holds_batch(self.buffer_size, self.batch_size)
        checks.check_duration(total_timesteps)
        self._engine_for_training().attach()
        self._update_reference_mode()
        self._update_support_monitor()
        if self._mid_step:  # a step was interrupted: what the environments did since the last observation is not known
            self._last_obs = None
        if reset_num_timesteps:
            self._episodes_finished = 0
        starts_anew = self._mid_step = reset_num_timesteps or self._last_obs is None
        if starts_anew:  # the environments will be reset
            self._end_trajectories()
        self._make_logger(tb_log_name, reset_num_timesteps)
        custom_logger, self._custom_logger = self._custom_logger, True  # SB3 makes a folder for one that needs none
        try:
            prepared = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        finally:
            self._custom_logger = custom_logger
        self._mid_step = False
        if starts_anew and self._checks_finite:
            self._check_first_observations()
        self._find_masks()  # of environments that are reset by now
        assert self.replay_buffer is not None
        check_sampling(self.replay_buffer, masked=self._masks is not None)
        warn_of_memory(self.replay_buffer, self.env)
        return prepared

    def _update_reference_mode(self) -> None:
        """Decide whether training is to be SB3's to the last bit, and so whether numbers are looked at."""
        self._is_reference = self.engine == "eager" and not enabled_extras(self)
        self._checks_finite = self.check_finite is True or (self.check_finite == "auto" and not self._is_reference)

    def _update_support_monitor(self) -> None:
        """Compare returns with the support of a C51 head, if there is one."""
        head = getattr(self.policy, "head", None)
        if not isinstance(head, CategoricalHead):
            self._support_monitor = None
        elif self._support_monitor is None or self._support_monitor.head is not head:
            self._support_monitor = SupportMonitor(head, self.n_envs)

    def _end_trajectories(self) -> None:
        """Let no return of several steps reach over a reset that replay knows nothing of."""
        end_trajectories = getattr(self.replay_buffer, "end_trajectories", None)  # of a buffer behind a proxy, too
        if end_trajectories is not None:
            end_trajectories()

    def _make_logger(self, tb_log_name: str, reset_num_timesteps: bool) -> None:
        """Make the logger that SB3 would make, without a folder for one that writes none."""
        if self._custom_logger:
            return
        if self.tensorboard_log is None and "SB3_LOGDIR" not in os.environ:
            formats: list[KVWriter] = [HumanOutputFormat(sys.stdout)] if self.verbose >= 1 else []
            self._logger = Logger(folder=None, output_formats=formats)
        else:
            log = None if self.tensorboard_log is None else os.fspath(self.tensorboard_log)
            self._logger = configure_logger(self.verbose, log, tb_log_name, reset_num_timesteps)

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # The last rollout may go past the end; SB3 then has negative learning rates
        if self._current_progress_remaining < 0 and not self._is_reference:
            self._current_progress_remaining = 0.0

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        progress = self._current_progress_remaining
        rate = float(self.lr_schedule(progress))
        if not 0 <= rate < math.inf and progress >= 0:
            raise ValueError(f"learning_rate({progress})={rate!r} must be a number of at least 0")
        self.logger.record("train/learning_rate", rate)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def _on_step(self) -> None:
        self._n_calls += 1
        self._env_steps += self.n_envs
        # Callbacks may have changed the interval
        interval = self.target_update_interval
        if sync_is_due(interval, self.n_envs, self._n_calls, self._episodes_finished, self._episodes_ended_now):
            self._current_engine().update_target(self.tau)
        self._update_exploration_rate()

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """Take some gradient steps.

        It may be called before :meth:`learn`, on a replay buffer that was filled by hand or by
        :meth:`load_transitions`; :meth:`learn_offline` does so with schedules, logs and callbacks.

        :param gradient_steps: how many
        :param batch_size: transitions in each
        :raises ValueError: for an argument that cannot work, or if the replay buffer is empty
        """
        assert self.replay_buffer is not None
        are_ints = type(batch_size) is type(gradient_steps) is int
        if not (are_ints and 0 < batch_size < 2**63 and 0 <= gradient_steps < 2**63):
            batch_size = checks.check_count("batch_size", batch_size)
            gradient_steps = checks.check_count("gradient_steps", gradient_steps, minimum=0)
        if not hasattr(self, "_logger"):
            self._logger = Logger(folder=None, output_formats=[])
        engine = self._current_engine()
        self._update_learning_rate(self.policy.optimizer)
        # Of a buffer behind a proxy, too
        set_progress = getattr(getattr(self.replay_buffer, "sampler", None), "set_progress", None)
        if set_progress is not None:
            set_progress(max(self._current_progress_remaining, 0.0))
        source = batch_source(self.replay_buffer, batch_size, self._vec_normalize_env, self.gamma)
        try:
            losses = engine.train(source, gradient_steps, self.max_grad_norm)
        except CaptureError:  # before anything happened
            self._choose_engine()
            losses = self._engine.train(source, gradient_steps, self.max_grad_norm)
        self._n_updates += gradient_steps
        if self._n_updates // _UPDATES_BETWEEN_METRICS > (self._n_updates - gradient_steps) // _UPDATES_BETWEEN_METRICS:
            self._log_metrics()
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        # The mean of one number takes NumPy several times as long as all else here
        self.logger.record("train/loss", losses[0] if len(losses) == 1 else np.mean(losses))
        # Unless somebody comes behind this, the next rollout finds the engine as it was here
        self._engine_checked = type(self) is ScratchDQN and "train" not in vars(self)

    def learn_offline(
        self: SelfScratchDQN,
        gradient_steps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1_000,
        tb_log_name: str = "ScratchDQN",
        progress_bar: bool = False,
        target_update_interval: int | None = None,
    ) -> SelfScratchDQN:
        """Train on what the replay buffer holds, without taking a step in the environment.

        Fill the buffer first, by :meth:`load_transitions`, :meth:`load_replay_buffer` or ``replay_buffer.add()``.
        Schedules of the learning rate and of ``beta`` run over these gradient steps. Callbacks are called after each
        gradient step; ``num_timesteps``, by which they name files and logs have their steps, counts all gradient steps
        of the model meanwhile.

        :param gradient_steps: how many
        :param callback: such as SB3's ``CheckpointCallback``
        :param log_interval: gradient steps between logs; ``None`` for none
        :param tb_log_name: of the run, in TensorBoard
        :param progress_bar: show one
        :param target_update_interval: gradient steps between updates of the target network; by default as many as there
            are in ``learn()``, with its ``target_update_interval``, ``train_freq`` and ``gradient_steps``
        :raises ValueError: for an argument that cannot work, or if the replay buffer is empty
        """
        self._check_learn_arguments(callback, log_interval, tb_log_name, progress_bar)
        steps = checks.check_count("gradient_steps", gradient_steps, minimum=0)
        interval = offline.target_interval(self, target_update_interval)
        assert self.replay_buffer is not None
        if self.replay_buffer.size() == 0:
            raise ValueError("the replay buffer is empty: fill it first, by load_transitions() or load_replay_buffer()")
        check_sampling(self.replay_buffer, masked=False)
        self._engine_for_training().attach()
        self._make_logger(tb_log_name, reset_num_timesteps=True)
        offline.learn(self, steps, callback, log_interval, progress_bar, interval)
        return self

    def dump_logs(self) -> None:
        """Write what was logged, and with it how the last update looked."""
        if self.logger.output_formats:  # somebody reads it
            self._log_metrics()
        super().dump_logs()

    def _log_metrics(self) -> None:
        if self._engine.last_update is not None:
            for name, value in self._engine.last_update.metrics().items():
                self.logger.record(name, value)
            self._engine.last_update = None

    # Environments, files and SB3's DQN

    def set_env(self, env: GymEnv | str, force_reset: bool = True) -> None:
        """Go on in another environment, of the same spaces.

        :param env: the environment, or its name
        :param force_reset: reset it before training goes on
        :raises ValueError: if its spaces differ from the model's, or it stacks no frames where ``frames=True``
        :raises AssertionError: if it is another number of environments
        """
        checks.check_environment(env)
        env = self._wrap_env(maybe_make_env(env, self.verbose), self.verbose)
        checks.check_same_spaces("env", env, self.observation_space, self.action_space)
        buffer = buffer_for_environment(self, env)
        super().set_env(env, force_reset)
        self.replay_buffer = buffer

    def load_replay_buffer(
        self, path: Path, truncate_last_traj: bool = True, *, allow_pickle: bool | None = None
    ) -> None:
        """Load a saved replay buffer; see :class:`CheckedOffPolicyAlgorithm`.

        How steps are folded and sampled are settings of the model, not part of what was stored. How observations are
        kept, each frame once or in full, stays as it was stored.
        """
        super().load_replay_buffer(path, truncate_last_traj, allow_pickle=allow_pickle)
        assert self.replay_buffer is not None
        self.replay_buffer = adapt_replay_buffer(self.replay_buffer, self)
        if truncate_last_traj:
            self._end_trajectories()

    def load_transitions(self, data: "Mapping[str, Any] | ReplayBuffer | MinariDataset | str") -> int:
        """Put transitions into the replay buffer that somebody else collected, such as demonstrations.

        They are not normalised, as the environment gives them. A transition that the next one does not continue counts
        as truncated. The environments are reset when training goes on.

        :param data: one of

            - a dict of arrays of ``N`` transitions in their order: ``observations``, ``actions``, ``rewards``,
              ``next_observations``, ``terminations``; and, where there are any, ``truncations``, ``action_masks`` and
              ``next_action_masks``, ``(N, A)`` each
            - a replay buffer of SB3 or this package
            - a data set of Minari, or the name of one that lies on this machine (``pip install
              'sb3-scratch-dqn[minari]'``)
        :return: how many were stored: with several environments, up to ``n_envs - 1`` are left out
        :raises ValueError: if they do not fit the spaces, or into the buffer; then none was stored
        :raises ImportError: for the name of a data set, if Minari is not installed
        """
        assert self.replay_buffer is not None
        assert isinstance(self.action_space, spaces.Discrete)
        transitions = read_transitions(data, self.observation_space, int(self.action_space.n))
        stored = store_transitions(self.replay_buffer, transitions)
        self._last_obs = None
        return stored

    def __getstate__(self) -> dict[str, Any]:
        """Pickle all but what is made of the rest."""
        made = ("_engine", "_engine_settings", "_act", "_interrupts", "_read_masks")
        return {name: value for name, value in vars(self).items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make again what was not pickled."""
        vars(self).update(state)
        if hasattr(self, "policy"):
            self._choose_engine()

    def _excluded_save_params(self) -> list[str]:
        made_by_setup = ["q_net", "q_net_target", "batch_norm_stats", "batch_norm_stats_target"]
        return [
            *super()._excluded_save_params(),
            *made_by_setup,
            "_epsilon_schedule",
            "_epsilon_schedule_source",
            "_engine",
            "_engine_settings",
            "_masks",
            "_read_masks",
            "_act",
            "_adds_directly",
            "_engine_checked",
            "_is_reference",
            "_checks_finite",
            "_interrupts",
            "_support_monitor",
        ]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []

    @classmethod
    def from_sb3(
        cls: type[SelfScratchDQN],
        model: "DQN | str | pathlib.Path",
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        **settings: Any,
    ) -> SelfScratchDQN:
        """Make a ScratchDQN of a DQN of SB3: it predicts and goes on learning as that would.

        With ``engine="eager"`` it does so to the last bit, with other engines up to rounding.

        Networks, optimiser, counters, settings and replay are copied; the environment is shared.

        :param model: the model, or the file that it was saved to
        :param env: for a file, the environment to go on in
        :param device: for a file, where to compute
        :param settings: settings to change, such as ``loss="mse"``
        :raises ValueError: if the model is no DQN of SB3, or has a policy class of its own
        """
        return conversion.from_sb3(cls, model, env, device, settings)

    def to_sb3(self) -> "DQN":
        """Make a DQN of SB3, which predicts and goes on learning as this one would; it warns of settings SB3 lacks.

        :raises ValueError: if the policy class or the replay buffer has no counterpart in SB3
        """
        return conversion.to_sb3(self)
