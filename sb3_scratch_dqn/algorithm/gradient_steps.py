"""Gradient steps: which engine takes them, with which learning rate, and what is logged of them."""

import math

import numpy as np
import torch as th
from stable_baselines3.common.logger import Logger

from sb3_scratch_dqn.algorithm.acting import GreedyActor
from sb3_scratch_dqn.algorithm.rollout import RolloutAlgorithm
from sb3_scratch_dqn.algorithm.settings import check_learning
from sb3_scratch_dqn.common import checks
from sb3_scratch_dqn.common.overrides import is_overridden
from sb3_scratch_dqn.engines import CaptureError, Engine, choose_engine, find_engine
from sb3_scratch_dqn.networks.policies import DQNPolicy
from sb3_scratch_dqn.networks.q_network import QNetwork
from sb3_scratch_dqn.replay import batch_source
from sb3_scratch_dqn.values.losses import LOSSES
from sb3_scratch_dqn.values.td import MunchausenSettings, Objective

# Callbacks may write the log at any time, so the metrics of an update must be recorded before
_UPDATES_BETWEEN_METRICS = 100

# The settings that an engine is built from
EngineSettings = tuple[str, str, bool, bool, dict[str, float]]


class GradientStepAlgorithm(RolloutAlgorithm):
    """The part of ``ScratchDQN`` that takes gradient steps."""

    _engine: Engine
    _engine_settings: EngineSettings

    # The engine

    def _choose_engine(self) -> None:
        for name in ("q_net", "q_net_target", "head", "optimizer", "predict"):
            if not hasattr(self.policy, name):
                raise ValueError(
                    f"policy is a {type(self.policy).__name__}, which has no {name!r}: wrap policy.q_net instead"
                )
        check_learning(self, self.policy.head, self.policy.head_name)
        before = getattr(self, "_engine", None)
        self._engine, reason = choose_engine(self.engine, self.policy, self._objective())
        self._engine_settings = self._current_engine_settings()
        self._fast_actor = None  # it belongs to the old engine, and holds its memory
        if self.verbose >= 1 and (before is None or before.title != self._engine.title):
            print(reason)

    def _current_engine_settings(self) -> EngineSettings:
        return self.engine, self.loss, self.double_q, self.munchausen, dict(self.munchausen_kwargs or {})

    def _objective(self) -> Objective:
        munchausen = self.munchausen_kwargs or {}
        settings = MunchausenSettings(*map(float, MunchausenSettings(**munchausen))) if self.munchausen else None
        return Objective(LOSSES[self.loss], self.double_q, settings)

    def _current_engine(self) -> Engine:
        """Return the engine; build a new one if the old one is stale."""
        engine = self._engine
        if (
            engine.policy is not self.policy
            or self._engine_settings != self._current_engine_settings()
            or engine.is_stale()
        ):
            self._choose_engine()
        return self._engine

    def _engine_for_training(self) -> Engine:
        """Return the engine that would be chosen now; a faster one may have become possible."""
        engine = self._current_engine()
        if find_engine(self.engine, self.policy, engine.objective)[0] is not type(engine):
            self._choose_engine()
        return self._engine

    def _find_fast_actor(self) -> GreedyActor | None:
        if is_overridden(self.policy, DQNPolicy, "predict", "_predict", "obs_to_tensor"):
            return None
        return (self._engine if self._engine_checked else self._current_engine()).act

    @property
    def q_net(self) -> QNetwork:
        """The policy's online network."""
        return self.policy.q_net

    @q_net.setter
    def q_net(self, network: QNetwork) -> None:
        self.policy.q_net = network

    @property
    def q_net_target(self) -> QNetwork:
        """The policy's target network."""
        return self.policy.q_net_target

    @q_net_target.setter
    def q_net_target(self, network: QNetwork) -> None:
        self.policy.q_net_target = network

    # Updates

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """Take gradient steps.

        It can be called before :meth:`learn`, with a replay buffer that was filled by hand or by
        :meth:`load_transitions`; :meth:`learn_offline` adds schedules, logs and callbacks to that.

        :param gradient_steps: number of gradient steps
        :param batch_size: transitions per gradient step
        :raises ValueError: for an invalid argument, or if the replay buffer is empty
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
        # The sampler of a proxy of a buffer, too
        set_progress = getattr(getattr(self.replay_buffer, "sampler", None), "set_progress", None)
        if set_progress is not None:
            set_progress(max(self._current_progress_remaining, 0.0))
        source = batch_source(self.replay_buffer, batch_size, self._vec_normalize_env, self.gamma)
        try:
            losses = engine.train(source, gradient_steps, self.max_grad_norm)
        except CaptureError:  # raised before anything changed
            self._choose_engine()
            losses = self._engine.train(source, gradient_steps, self.max_grad_norm)
        self._n_updates += gradient_steps
        if self._n_updates // _UPDATES_BETWEEN_METRICS > (self._n_updates - gradient_steps) // _UPDATES_BETWEEN_METRICS:
            self._log_metrics()
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        # np.mean() of one number takes several times as long as everything else here
        self.logger.record("train/loss", losses[0] if len(losses) == 1 else np.mean(losses))
        # A subclass or a patched method may run user code before the next rollout, and modify the policy there
        self._engine_checked = type(self) is self._unextended_class and "train" not in vars(self)

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        progress = self._current_progress_remaining
        rate = float(self.lr_schedule(progress))
        if not 0 <= rate < math.inf and progress >= 0:
            raise ValueError(f"learning_rate({progress})={rate!r} must be a number of at least 0")
        self.logger.record("train/learning_rate", rate)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def dump_logs(self) -> None:
        """Write the log, including metrics of the last update."""
        if self.logger.output_formats:  # otherwise the metrics are not read
            self._log_metrics()
        super().dump_logs()

    def _log_metrics(self) -> None:
        if self._engine.last_update is not None:
            for name, value in self._engine.last_update.metrics().items():
                self.logger.record(name, value)
            self._engine.last_update = None
