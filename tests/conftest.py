import os
import shutil
import tempfile

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch as th


@pytest.fixture(scope="session", autouse=True)
def _temporary_folder(tmp_path_factory):
    """Remove the folders that SB3 leaves in the temporary one, one at each training."""
    folder, before = tmp_path_factory.mktemp("temporary"), os.environ.get("TMPDIR")
    os.environ["TMPDIR"], tempfile.tempdir = str(folder), None
    yield
    for left in folder.glob("SB3-*"):
        shutil.rmtree(left)
    tempfile.tempdir = None
    if before is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before


@pytest.fixture(autouse=True)
def _one_thread():
    # The networks here are small: threads would only fight each other
    th.set_num_threads(1)
