import os

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch as th


@pytest.fixture(autouse=True)
def _one_thread():
    # The networks here are small: threads would only fight each other
    th.set_num_threads(1)
