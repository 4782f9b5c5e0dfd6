"""The tests import the files beside this folder, run on the CPU, offline, and write into temporary folders only."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # test processes share the cores: waiting threads should not spin
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
