"""The reference runs on generated pictures: trains what is not there yet, prints the README's rows, keeps logs and curves.

    python tests/results.py                          # six models, three seeds: about two hours on two cores
    python tests/results.py --models clip --seeds 0  # one run

Runs go to runs/claims/, where tests/claims.py looks for them, too. docs/logs/ keeps each run's log.csv; docs/curves.png
shows the validation figures in all of them (pip install matplotlib).
"""
import argparse
import csv
import shutil
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import claims  # noqa: E402
import data  # noqa: E402
import train  # noqa: E402

HEADER = ("| | I2T R@1 / 5 / 10 | T2I R@1 / 5 / 10 | zero-shot seen / unseen / all |", "|---|---|---|---|")
GROUPS = [[f"{direction}_r{k}" for k in (1, 5, 10)] for direction in ("i2t", "t2i")] + [["zs_seen", "zs_unseen", "zs_all"]]


def source(name):
    """The pictures that a model's tiny size is trained on."""
    return "shapes-ko" if name == "koclip" else "shapes"


def evaluated(name, seed):
    """-> the test figures of a run, which is made if it is not there."""
    model, tokenizer = claims.trained(name, seed, flags=("--data", source(name)))
    size = model.config.image_size
    precision = train.pick_precision(model.logit_scale.device)
    return train.evaluate(model, tokenizer, data.load(source(name), "test", size),
                          data.load_zero_shot(source(name), size), precision)[0]


def row(title, scores):
    return " | ".join([f"| {title}", *(" / ".join(f"{scores[key]:.1f}" for key in group) for group in GROUPS)]) + " |"


def rows(name, runs):
    """A row for each seed, and one for their mean and standard deviation, of R@1 and zero-shot alone."""
    found = [row(f"`{name}`" if seed == 0 else f"`{name}`, `--seed {seed}`", scores) for seed, scores in runs.items()]
    if len(runs) > 1:
        def mean(key):
            values = [scores[key] for scores in runs.values()]
            return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
        shown = GROUPS[0][:1], GROUPS[1][:1], GROUPS[2]
        found.append(" | ".join(["| mean ± sd", *(" / ".join(map(mean, group)) for group in shown)]) + " |")
    return found


def read_log(path):
    """The rows of a log.csv with validation figures, as numbers."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in line.items() if value} for line in csv.DictReader(file)
                if line["i2t_r1"]]


def draw_curves(path, logs):
    """Validation figures after each epoch: a line for each run, a colour for each model. logs: "clip-0" -> its rows."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.6), layout="constrained")
    for run, log in logs.items():
        name, seed = run.split("-")
        for axis, key in zip(axes, ("i2t_r1", "t2i_r1", "zs_all")):
            axis.plot([line["samples"] / 1000 for line in log], [line[key] for line in log], linewidth=1.2, alpha=0.8,
                      color=f"C{list(train.MODELS).index(name)}", label=name if seed == "0" else None)
    for axis, title in zip(axes, ("image to text, R@1 (%)", "text to image, R@1 (%)", "zero-shot (%)")):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("thousands of pictures seen", fontsize=9)
        axis.set_ylim(0, None)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    print(f"picture: {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The reference runs on generated pictures.")
    parser.add_argument("--models", nargs="+", choices=train.MODELS, default=list(train.MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    try:
        import matplotlib  # noqa: F401, to fail before two hours of training, not after
    except ModuleNotFoundError:
        sys.exit("results.py draws its curves with matplotlib: pip install matplotlib")
    table, logs = list(HEADER), ROOT / "docs/logs"
    logs.mkdir(exist_ok=True)
    for name in options.models:
        table += rows(name, {seed: evaluated(name, seed) for seed in options.seeds})
        for seed in options.seeds:
            shutil.copy(f"runs/claims/{name}-{seed}/log.csv", logs / f"{name}-{seed}.csv")
    print("\n" + "\n".join(table))
    draw_curves(ROOT / "docs/curves.png", {path.stem: read_log(path) for path in sorted(logs.glob("*.csv"))})
