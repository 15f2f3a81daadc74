"""``ScratchDQN``: the constructor, and the set-up that follows from its settings."""

import pathlib
import warnings
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import get_parameters_by_name

from sb3_scratch_dqn.algorithm import conversion
from sb3_scratch_dqn.algorithm.learning import LearningAlgorithm
from sb3_scratch_dqn.algorithm.replay_setup import make_replay_buffer
from sb3_scratch_dqn.algorithm.settings import (
    REFERENCE_DEFAULTS,
    check_exploration,
    check_learning,
    check_settings,
    parse_verbose,
    with_settings,
)
from sb3_scratch_dqn.common import check_spaces, check_training, checks
from sb3_scratch_dqn.networks.policies import CnnPolicy, DQNPolicy, MlpPolicy, MultiInputPolicy

if TYPE_CHECKING:
    from stable_baselines3.dqn import DQN

Self = TypeVar("Self", bound="ScratchDQN")


@with_settings
class ScratchDQN(LearningAlgorithm):
    """Deep Q-Network, from scratch (https://arxiv.org/abs/1312.5602, https://www.nature.com/articles/nature14236).

    The positional parameters and their defaults are those of SB3's ``DQN``; the keyword-only ones are additional. With
    their defaults it equals SB3's ``DQN`` up to rounding, and with ``engine="eager"`` and one environment bit for bit.
    With several environments, each decides independently whether to explore.

    :param policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"``, or a subclass of ``DQNPolicy``
    :param env: the environment to train in, or its name
    :param learning_rate: learning rate, or a function of the remaining progress (1 to 0)
    :param buffer_size: capacity of the replay buffer in transitions, at least ``batch_size``
    :param learning_starts: environment steps with random actions before the first gradient step
    :param batch_size: transitions per gradient step
    :param tau: step size of updates of the target network; 1 copies the online network
    :param gamma: discount of one step
    :param train_freq: calls of ``env.step()``, each a step of all environments, between calls of ``train()``; or
        ``(1, "episode")`` for episodes
    :param gradient_steps: gradient steps per call of ``train()``; -1 for as many as environment steps since the last
        call
    :param replay_buffer_class: a class other than :class:`ScratchReplayBuffer`, such as ``HerReplayBuffer``
    :param replay_buffer_kwargs: its arguments; for :class:`ScratchReplayBuffer` ``prioritized``, ``alpha``, ``beta``,
        ``beta_final``, ``epsilon``, and ``frames``: store each frame of stacked observations once; ``"auto"`` if the
        environment stacks frames, ``True`` or ``False``
    :param optimize_memory_usage: store each observation once;
        needs ``replay_buffer_kwargs=dict(handle_timeout_termination=False)``
    :param n_steps: steps per return; also with ``Dict`` observations and several environments
    :param target_update_interval: environment steps between updates of the target network,
        or ``(10, "episode")`` for episodes
    :param exploration_fraction: fraction of training over which a linear epsilon falls
    :param exploration_initial_eps: initial probability of a random action
    :param exploration_final_eps: final probability of a random action
    :param max_grad_norm: largest norm of the gradient, to which larger gradients are scaled down; may be infinite
    :param stats_window_size: episodes over which logged returns and lengths are averaged
    :param tensorboard_log: folder for TensorBoard
    :param policy_kwargs: arguments of the policy
    :param verbose: 0 for no output, 1 for information, 2 for debugging
    :param seed: seed of every random generator
    :param device: device to compute on; ``"auto"`` takes a GPU if there is one
    :param _init_setup_model: build the networks in the constructor
    :param loss: ``"huber"`` or ``"mse"``
    :param exploration_schedule: ``"linear"`` over ``exploration_fraction``; ``"exponential"``: multiplied by
        ``exploration_decay`` after each episode; or a function of the remaining progress (1 to 0)
    :param exploration_decay: factor of the exponential schedule
    :param exploration_steps: environment steps, over all calls of ``learn()``, in which a linear epsilon falls;
        replaces ``exploration_fraction``
    :param double_q: the online network selects the next action, the target network evaluates it
        (https://arxiv.org/abs/1509.06461)
    :param munchausen: soft-greedy targets with a bonus for the policy's log-probability of the action taken
        (https://arxiv.org/abs/2007.14430)
    :param munchausen_kwargs: ``tau`` (0.03), ``alpha`` (0.9) and ``clip`` (-1.0), as in
        :class:`sb3_scratch_dqn.values.td.MunchausenTarget`
    :param engine: how updates are executed: ``"fused"``, on the CPU in few calls; ``"cuda_graph"``, on a GPU in few
        launches; ``"eager"``, SB3's numbers to the last bit; ``"auto"``, the fastest supported one except
        ``"cuda_graph"``. The first two equal ``"eager"`` up to rounding. ``verbose=1`` prints the choice and its reason
    :param check_finite: raise an error for rewards and observations that are NaN or infinite; ``"auto"`` does so except
        with ``engine="eager"`` and all extras off, which trains on them as SB3 does
    :raises ValueError: for invalid settings, naming the first of them
    :raises AssertionError: for an environment whose actions are not ``Discrete``
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    own_settings = ("loss", "exploration_decay", "engine")  # not exploration_schedule, which SB3's DQN has too

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
            check_spaces.check_environment(env)
        if not isinstance(policy, str):
            policy = conversion.to_own_policy(policy)
            checks.check_subclass("policy", policy, DQNPolicy)
        check_training.check_device(device)
        verbose = parse_verbose("verbose", verbose)
        checks.check_bool("_init_setup_model", _init_setup_model)
        for name, kwargs in (("policy_kwargs", policy_kwargs), ("replay_buffer_kwargs", replay_buffer_kwargs)):
            if kwargs is not None:  # SB3 treats every false value as no arguments
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
        # Every argument is an attribute of the same name, and _setup_model() derives everything else from them:
        # load() and the Zoo write settings into the attributes, then call it.
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
        self._n_calls = self._env_steps = 0
        self._episodes_finished = self._episodes_ended_now = 0

        if _init_setup_model:
            check_settings(self)
            check_training.check_buffer_holds_batch(self.buffer_size, self.batch_size)
            self._setup_model()

    def _setup_model(self) -> None:
        check_settings(self)
        if self._env_steps == 0:  # older files do not have it
            self._env_steps = self._n_calls * self.n_envs
        self._mid_step = vars(self).pop("_in_step", self._mid_step)  # its name in older files

        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        if self.replay_buffer is None:
            self.replay_buffer = make_replay_buffer(self, self.env)
        policy = self.policy_class(self.observation_space, self.action_space, self.lr_schedule, **self.policy_kwargs)
        assert isinstance(policy, DQNPolicy)
        self.policy = policy.to(self.device)
        self._create_aliases()
        self._make_derived()

        interval = self.target_update_interval
        if isinstance(interval, int) and self.n_envs > 1 and self.n_envs > interval:
            warnings.warn(
                "The number of environments used is greater than the target network "
                f"update interval ({self.n_envs} > {interval}), "
                "therefore the target network will be updated after each call to env.step() "
                f"which corresponds to {self.n_envs} steps.",
                stacklevel=2,
            )

    def _make_derived(self) -> None:
        self._stats_window_size = self.stats_window_size
        self.batch_norm_stats = get_parameters_by_name(self.q_net, ["running_"])
        self.batch_norm_stats_target = get_parameters_by_name(self.q_net_target, ["running_"])
        self._make_epsilon_schedule()
        self._update_checks()
        self._choose_engine()

    def _setting_changed(self, name: str) -> None:
        if "policy" not in vars(self):  # _setup_model() will read the settings
            return
        if name in ("check_finite", "engine", *REFERENCE_DEFAULTS):
            self._update_checks()
        if name == "learning_rate":
            self._setup_lr_schedule()
        elif name.startswith("exploration_"):
            check_exploration(self)
            self._make_epsilon_schedule()
        elif name in ("loss", "double_q", "munchausen", "munchausen_kwargs"):
            check_learning(self, self.policy.head, self.policy.head_name)
        elif name == "batch_size":
            check_training.check_buffer_holds_batch(self.buffer_size, self.batch_size)

    def _create_aliases(self) -> None:
        """Hook for subclasses that name parts of the policy; ``q_net`` and ``q_net_target`` are properties."""

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        checks.check_choice("policy", policy_name, self.policy_aliases)
        return self.policy_aliases[policy_name]

    @classmethod
    def from_sb3(
        cls: type[Self],
        model: "DQN | str | pathlib.Path",
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        **settings: Any,
    ) -> Self:
        """Convert a DQN of SB3. The result predicts and continues training as the original would.

        With ``engine="eager"`` it does so to the last bit, with other engines up to rounding. Networks, optimiser,
        counters, settings and replay buffer are copied; the environment is shared.

        :param model: the model, or the file that it was saved to
        :param env: for a file, the environment to continue in
        :param device: for a file, the device to compute on
        :param settings: settings to change, such as ``loss="mse"``
        :raises ValueError: if the model is not a DQN of SB3, or its policy is of another class than SB3's
        """
        return conversion.from_sb3(cls, model, env, device, settings)

    def to_sb3(self) -> "DQN":
        """Convert to a DQN of SB3, which predicts and continues training as this model would.

        It warns of settings that SB3 does not have.

        :raises ValueError: if the policy class or the replay buffer has no counterpart in SB3
        """
        return conversion.to_sb3(self)


ScratchDQN._unextended_class = ScratchDQN
