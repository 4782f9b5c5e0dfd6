"""The tests import the files beside this folder, run on the CPU, offline, and write into temporary folders only."""
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models of these tests are tiny: a second thread only costs time
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # test processes share the cores: waiting threads should not spin
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402, found by the line above


@pytest.fixture(autouse=True)
def nothing_said_yet():
    data.say_once.cache_clear()
