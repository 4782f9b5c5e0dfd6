"""Kill a training run without warning, again and again, and see that nothing is lost.

    python experiments/kill.py                  # 30 kills, a third of them inside a save; 10 minutes
    python experiments/kill.py --processes 2    # the same with two processes, of which a random one is killed

Every time the run goes on from its last checkpoint. What must hold: each checkpoint that lies there can be read, and
the weights at the end are those of a run that nobody disturbed, to the bit.
"""
import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import shapes  # noqa: E402

# The run, with saves that take their time: half a second before the file is complete, and half a second before it gets
# its name. It writes down where it is.
CHILD = """
import os, sys, time
sys.path.insert(0, sys.argv.pop(1))
import train
fsync, replace = os.fsync, os.replace
def tell(what):
    with open("moment-" + os.environ.get("RANK", "0"), "w") as file:
        file.write(f"{os.getpid()} {what}")
def slow_fsync(number):
    tell("saving")
    time.sleep(0.5)
    fsync(number)
def slow_replace(a, b):
    time.sleep(0.5)
    replace(a, b)
    tell("training")
os.fsync, os.replace = slow_fsync, slow_replace
tell("training")
train.main(sys.argv[1:])
"""


def make_pictures(folder):
    rows = ["image,caption,split"]
    for i in range(40):
        scene = shapes.make_scene(f"test/{i}")
        Image.fromarray(shapes.draw(scene)).save(folder / f"{i}.png")
        split = ("train", "train", "train", "val", "test")[i % 5]
        rows += [f'{i}.png,"{caption}",{split}' for caption in shapes.captions(scene)]
    (folder / "captions.csv").write_text("\n".join(rows) + "\n")


def start(folder, processes, *flags):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
                    "--nproc_per_node", str(processes)]
    with open(folder / "errors.txt", "w") as errors:
        return subprocess.Popen([*command, "child.py", str(ROOT), *flags], cwd=folder, stdout=subprocess.DEVNULL,
                                stderr=errors, env={**os.environ, "OMP_NUM_THREADS": "1"})


def moment(folder, number):
    """-> (process, what it is doing) of a training process, or None while it is not there yet."""
    try:
        process, what = (folder / f"moment-{number}").read_text().split()
        return int(process), what
    except (FileNotFoundError, ValueError):
        return None


def kill_once(folder, processes, flags, rng, inside):
    """Start, wait until training or, for `inside`, a save has begun, and a random while more; then kill.

    -> whether the run had ended before.
    """
    for number in range(processes):
        (folder / f"moment-{number}").unlink(missing_ok=True)
    child = start(folder, processes, *flags)
    while child.poll() is None:
        now = moment(folder, 0)
        if now and (not inside or now[1] == "saving"):
            break
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 1.0 if inside else 8.0))
    victim = moment(folder, rng.randrange(processes))
    what = victim and victim[1]
    if child.poll() is None and victim:
        os.kill(victim[0], signal.SIGKILL)
    child.wait(timeout=300)
    errors = (folder / "errors.txt").read_text()
    ended = child.returncode == 0
    if not ended and child.returncode != -signal.SIGKILL and "SIGKILL" not in errors and "Signal 9" not in errors:
        sys.exit(f"ended by itself with {child.returncode}:\n{errors[-3000:]}")
    return ended, what


def main():
    parser = argparse.ArgumentParser(description="Kill a run again and again, and see that nothing is lost.")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "own").mkdir()
        make_pictures(folder / "own")
        (folder / "child.py").write_text(CHILD)
        flags = ["--model", "clip", "--data", "own", "--config", "tiny", "--batch", "6", "--precision", "fp32",
                 "--epochs", str(2 * options.rounds), "--resume"]  # which begins where there is no run yet
        whole = start(folder, options.processes, *flags, "whole")
        if whole.wait():
            sys.exit((folder / "errors.txt").read_text()[-3000:])
        kills = {"training": 0, "saving": 0}
        while sum(kills.values()) < options.rounds:
            inside = sum(kills.values()) % 3 == 2
            ended, what = kill_once(folder, options.processes, [*flags, "killed"], rng, inside)
            if ended:
                break
            kills[what] += 1
            steps = [data.read_checkpoint(path)["step"] for path in sorted((folder / "killed").glob("*.pt"))]
            print(f"kill {sum(kills.values())}, while {what}: checkpoints of steps {steps}", flush=True)
        else:
            last = start(folder, options.processes, *flags, "killed")
            if last.wait():
                sys.exit((folder / "errors.txt").read_text()[-3000:])
        one, two = (torch.load(folder / run / "last.pt", weights_only=True) for run in ("whole", "killed"))
        same = all(torch.equal(one["weights"][name], two["weights"][name]) for name in one["weights"])
        print(f"{kills['training']} kills in training, {kills['saving']} inside a save; step {two['step']} of "
              f"{one['step']}; weights {'equal to the bit' if same else 'DIFFER'}")
        sys.exit(not same)


if __name__ == "__main__":
    main()
