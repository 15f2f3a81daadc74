import os
import shutil
import tempfile

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import shapes
import torch as th

shapes.install()


@pytest.fixture(scope="session", autouse=True)
def _temporary_folder(tmp_path_factory):
    """Remove the folders that SB3 creates in the temporary folder, one per training."""
    folder, previous = tmp_path_factory.mktemp("temporary"), os.environ.get("TMPDIR")
    os.environ["TMPDIR"], tempfile.tempdir = str(folder), None
    yield
    for left in folder.glob("SB3-*"):
        shutil.rmtree(left)
    tempfile.tempdir = None
    if previous is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = previous


@pytest.fixture(autouse=True)
def _one_thread():
    # The networks of the tests are small: more threads would only compete
    th.set_num_threads(1)


@pytest.fixture(autouse=True)
def _shapes():
    shapes.start_test()
