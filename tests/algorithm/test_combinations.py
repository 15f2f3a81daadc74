"""Every two parts work together in training, prediction, and a saved file; meaningless combinations are refused."""

import warnings
from itertools import combinations

import numpy as np
import pytest
import torch as th
from helpers import DictEnv, ImageEnv, MaskedEnv, TimeoutEnv, assert_equal
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_scratch_dqn import DQNPolicy, ScratchDQN
from sb3_scratch_dqn.values.heads import HEADS

SMALL_HEADS = {
    "expected": {},
    "c51": {"n_atoms": 11},
    "quantile": {"n_quantiles": 7},
    "iqn": {"n_tau": 3, "n_tau_prime": 5, "n_tau_act": 4, "n_cos": 6},
}

# Switch -> settings; the keys of policies and buffers go where they belong
SWITCHES = {
    **{
        name: {"policy_kwargs": {"head": name, "head_kwargs": kwargs}}
        for name, kwargs in SMALL_HEADS.items()
        if name != "expected"
    },
    "double": {"double_q": True},
    "dueling": {"policy_kwargs": {"dueling": True}},
    "noisy": {"policy_kwargs": {"noisy": True}},
    "munchausen": {"munchausen": True, "munchausen_kwargs": {"tau": 0.1}},
    "n_steps": {"n_steps": 3},
    "prioritized": {"replay_buffer_kwargs": {"prioritized": True}},
    "mse": {"loss": "mse"},
    "several environments": {"n_envs": 3},
    "steps": {"exploration_steps": 50},
    "images": {"policy": "CnnPolicy", "env": ImageEnv},
    "dict": {"policy": "MultiInputPolicy", "env": DictEnv},
    "masks": {"env": MaskedEnv},
    "normalized": {"normalize": True},
    "observations once": {
        "optimize_memory_usage": True,
        "replay_buffer_kwargs": {"handle_timeout_termination": False},
    },
    "soft targets": {"tau": 0.1, "target_update_interval": 3},
}

# Two of a kind, of which one can only have one
EXCLUSIVE = [{"c51", "quantile", "iqn"}, {"images", "dict", "masks"}, {"images", "normalized"}]

MEANINGLESS = {
    frozenset({"munchausen", "c51"}): r"munchausen=True cannot be combined with head='c51': it shifts",
    frozenset({"munchausen", "n_steps"}): r"munchausen=True cannot be combined with n_steps=3: the bonus",
    frozenset({"mse", "c51"}): r"loss='mse' cannot be combined with head='c51', which supports 'huber': leave loss out",
}

PAIRS = [
    pair
    for pair in combinations(SWITCHES, 2)
    if frozenset(pair) not in MEANINGLESS and not any(set(pair) <= kind for kind in EXCLUSIVE)
]


def merged(switches):
    settings = {
        "learning_starts": 20, "batch_size": 8, "train_freq": 4, "target_update_interval": 20, "buffer_size": 60,
        "seed": 0,
    }  # fmt: skip
    for switch in switches:
        for key, value in SWITCHES[switch].items():
            settings[key] = {**settings.get(key, {}), **value} if isinstance(value, dict) else value
    small = {} if settings.get("policy") else {"net_arch": [12, 10]}
    settings["policy_kwargs"] = {**small, **settings.get("policy_kwargs", {})}
    return settings


def make(switches):
    settings = merged(switches)
    env = make_vec_env(settings.pop("env", TimeoutEnv), n_envs=settings.pop("n_envs", 1), seed=0)
    if settings.pop("normalize", False):
        keys = ["vector"] if "dict" in switches else None
        env = VecNormalize(env, norm_obs="masks" not in switches, norm_obs_keys=keys)
    return ScratchDQN(settings.pop("policy", "MlpPolicy"), env, **settings)


def try_out(switches, path):
    model = make(switches)
    before = [p.clone() for p in model.q_net.parameters()]
    model.learn(72)
    assert model._n_updates >= 4
    assert any(not th.equal(a, b) for a, b in zip(before, model.q_net.parameters(), strict=True))
    assert all(p.isfinite().all() for p in model.policy.parameters())

    observation = model.env.reset()
    values = model.q_values(observation)
    assert values.shape == (model.n_envs, 3)
    actions, _ = model.predict(observation, deterministic=True)
    np.testing.assert_array_equal(actions, values.argmax(axis=1))

    model.save(path / "model.zip")
    model.policy.save(path / "policy.pth")
    loaded = ScratchDQN.load(path / "model.zip", env=model.env)
    assert_equal(model.get_parameters(), loaded.get_parameters())
    assert_equal(values, loaded.q_values(observation))
    assert_equal(values, type(model.policy).load(path / "policy.pth").q_values(observation))
    loaded.learn(24)
    assert loaded._n_updates > model._n_updates


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_every_two_train_predict_save_and_load(pair, tmp_path):
    try_out(pair, tmp_path)


@pytest.mark.parametrize("inputs", ["steps", "images", "dict"])
@pytest.mark.parametrize("head", HEADS)
def test_all_at_once(head, inputs, tmp_path):
    heads = [] if head == "expected" else [head]
    try_out([*heads, "dueling", "double", "noisy", "n_steps", "prioritized", "several environments", inputs], tmp_path)


@pytest.mark.parametrize("pair", MEANINGLESS, ids=lambda pair: " and ".join(sorted(pair)))
def test_what_has_no_meaning_is_refused_with_the_reason(pair):
    with pytest.raises(ValueError, match=MEANINGLESS[pair]):
        make(sorted(pair))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"double_q": "yes"}, "double_q='yes' must be True or False"),
        ({"munchausen": 2}, "munchausen=2 must be True or False"),
        ({"munchausen_kwargs": {"temperature": 1}}, "has the unknown name 'temperature'"),
        ({"munchausen_kwargs": {"tau": 0}}, "tau=0 must be a number above 0"),
        ({"munchausen_kwargs": {"tau": float("inf")}}, "tau=inf must be a finite number"),
        ({"munchausen_kwargs": {"alpha": 2}}, "alpha=2 must be a number between 0 and 1"),
        ({"munchausen_kwargs": {"clip": 1}}, "clip=1 must be at most 0"),
        ({"munchausen_kwargs": [1]}, r"munchausen_kwargs=\[1\] must be a dict"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ScratchDQN("MlpPolicy", TimeoutEnv(), **settings)


@pytest.mark.parametrize("switch", ["c51", "dueling", "noisy"])
def test_sb3_has_no_counterpart_for_other_networks(switch):
    with pytest.raises(ValueError, match=r"policy_kwargs=.* no counterpart in SB3's DQN"):
        make([switch]).to_sb3()


@pytest.mark.parametrize("switch", ["double", "munchausen", "prioritized", "steps"])
def test_the_conversion_says_what_sb3_cannot_go_on_with(switch):
    model = make([switch]).learn(40)
    with pytest.warns(UserWarning, match="SB3's DQN has no"):
        converted = model.to_sb3()
    observation = model.env.reset()
    np.testing.assert_array_equal(
        model.predict(observation, deterministic=True)[0], converted.predict(observation, deterministic=True)[0]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted.learn(40, reset_num_timesteps=False)


def test_networks_that_are_plain_by_name_convert():
    plain = {"dueling": False, "noisy": False, "head": "expected", "head_kwargs": {}, "net_arch": [8]}
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), policy_kwargs=plain, replay_buffer_kwargs={"prioritized": False})
    converted = model.learn(40).to_sb3()
    assert converted.policy_kwargs == {"net_arch": [8]}
    converted.learn(40)


def test_what_has_no_meaning_is_refused_wherever_it_comes_from():
    class C51Policy(DQNPolicy):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, head="c51")

    with pytest.raises(ValueError, match="munchausen=True cannot be combined with head='c51'"):
        ScratchDQN(C51Policy, TimeoutEnv(), munchausen=True)
    model = make(["c51"]).learn(40)
    with pytest.raises(ValueError, match="munchausen=True cannot be combined with head='c51'"):
        model.munchausen = True
    vars(model)["munchausen"] = True  # past the check, as loading a model writes it
    with pytest.raises(ValueError, match="munchausen=True cannot be combined with head='c51'"):
        model.learn(40)
    with pytest.raises(ValueError, match="munchausen=True cannot be combined with n_steps=3"):
        ScratchDQN(
            "MlpPolicy",
            TimeoutEnv(),
            munchausen=True,
            replay_buffer_class=NStepReplayBuffer,
            replay_buffer_kwargs={"n_steps": 3, "gamma": 0.99},
        )


def test_the_conversion_says_that_masks_are_lost():
    with pytest.warns(UserWarning, match="SB3's DQN has no action masks"):
        make(["masks"]).learn(40).to_sb3()


def test_the_conversion_leaves_arguments_of_other_buffers_alone():
    class Own(ReplayBuffer):
        def __init__(self, *args, alpha=0.5, **kwargs):
            super().__init__(*args, **kwargs)

    model = ScratchDQN(
        "MlpPolicy", TimeoutEnv(), replay_buffer_class=Own, replay_buffer_kwargs={"alpha": 0.9}, buffer_size=50
    )
    assert model.to_sb3().replay_buffer_kwargs == {"alpha": 0.9}


def test_what_is_switched_in_a_live_model_counts():
    def train(switch):
        model = make([])
        model.learn(40)
        if switch:
            model.double_q = True
        return model.learn(80, reset_num_timesteps=False).q_net.q_net[0].weight

    assert not th.equal(train(False), train(True))


def test_double_q_learning_converts_from_sb3_by_a_setting():
    from stable_baselines3 import DQN

    reference = DQN("MlpPolicy", TimeoutEnv(), seed=0).learn(40)
    model = ScratchDQN.from_sb3(reference, double_q=True, exploration_steps=100)
    assert model._engine.objective.double_q
    assert model._env_steps == 40
    assert isinstance(model.policy, DQNPolicy)
