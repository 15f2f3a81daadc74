"""Training that changes its engine, and is saved and loaded, on the way."""

from helpers import assert_equal

from sb3_scratch_dqn import ScratchDQN


def learned_by_turns(make, make_env, engines, folder):
    """Train with the first engine, then with the second, save and load, and train with the third.

    :param make: creates a model with an engine
    :param make_env: creates the environment of the loaded model
    :param engines: names of three engines
    :param folder: for the files
    """
    model = make(engines[0]).learn(100)
    model.engine = engines[1]
    model.learn(60, reset_num_timesteps=False)
    assert model._engine.name == engines[1]
    model.save(folder / "model.zip")
    model.save_replay_buffer(folder / "replay")
    loaded = ScratchDQN.load(folder / "model.zip", env=make_env(), engine=engines[2])
    assert_equal(model.get_parameters(), loaded.get_parameters())
    loaded.load_replay_buffer(folder / "replay")
    loaded.learn(60, reset_num_timesteps=False)
    assert loaded._engine.name == engines[2]
    return loaded
