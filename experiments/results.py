"""The reference runs of the tiny sizes: trains what is not there yet, prints the README's rows, keeps logs and curves.

    python experiments/results.py                          # six models, three seeds: about two hours on two cores
    python experiments/results.py --models clip --seeds 0  # one run
    python experiments/results.py --data flickr8k          # photographs: the five, 24 epochs; --root as of train.py

Runs go to runs/claims/, where experiments/claims.py looks for them, too. docs/logs/ keeps each run's log.csv;
docs/curves.png and docs/curves-flickr8k.png show the validation figures in all of them (pip install matplotlib);
docs/retrieval.png is what liteCLIP's first run left.
"""
import argparse
import csv
import shutil
import statistics
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import claims  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402

NAMES = ("clip", "liteclip", "prolip", "llip", "clips", "koclip")
GROUPS = {"I2T R@1 / 5 / 10": [f"i2t_r{k}" for k in (1, 5, 10)], "T2I R@1 / 5 / 10": [f"t2i_r{k}" for k in (1, 5, 10)],
          "zero-shot seen / unseen / all": ["zs_seen", "zs_unseen", "zs_all"]}
EPOCHS = 24  # of Flickr8k: 144,000 pictures, about as many as eight epochs of generated ones


def evaluated(name, seed, root=None, photographs=False):
    """-> the test figures of a run, which is made if it is not there, and its folder."""
    source, variant, flags = "shapes-ko" if name == "koclip" else "shapes", "", []
    if photographs:
        source, variant, flags = "flickr8k", "-flickr8k", ["--epochs", str(EPOCHS), *(["--root", root] if root else [])]
    model, tokenizer = claims.trained(name, seed, variant, flags=["--data", source, *flags])
    size = model.config.image_size
    split = data.load(source, "test", size, root, getattr(model.config, "fit", "crop"))
    scores, _ = evaluate.evaluate(model, tokenizer, split, data.load_zero_shot(source, size),
                                  evaluate.pick_precision(model.logit_scale.device))
    return scores, Path(f"runs/claims/{name}{variant}-{seed}")


def table(titles):
    return [" | ".join(["| ", *titles]) + " |", "|---" * (len(titles) + 1) + "|"]


def row(title, cells):
    return " | ".join([f"| {title}", *cells]) + " |"


def rows(name, runs):
    """A row for each seed, and one for their mean and standard deviation, only of R@1 and zero-shot."""
    groups = [group for group in GROUPS.values() if group[0] in runs[min(runs)]]
    found = [row(f"`{name}`" if seed == 0 else f"`{name}`, `--seed {seed}`",
                 [" / ".join(f"{scores[key]:.1f}" for key in group) for group in groups])
             for seed, scores in runs.items()]
    if len(runs) > 1:
        def mean(key):
            values = [scores[key] for scores in runs.values()]
            return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
        found.append(row("mean ± sd", [" / ".join(map(mean, group if group[0] == "zs_seen" else group[:1]))
                                       for group in groups]))
    return found


def read_log(path):
    """The rows of a log.csv with validation figures, as numbers."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in line.items() if value} for line in csv.DictReader(file)
                if line["i2t_r1"]]


def draw_curves(path, logs):
    """Validation figures after each epoch: each model's mean, and from worst to best. logs: "clip-0" -> its rows."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    titles = {"i2t_r1": "image to text, R@1 (%)", "t2i_r1": "text to image, R@1 (%)", "zs_all": "zero-shot (%)"}
    shown = [key for key in titles if all(key in log[0] for log in logs.values())]
    figure, axes = plt.subplots(1, len(shown), figsize=(3.5 * len(shown), 3.6), layout="constrained")
    for axis, key in zip(axes, shown):
        for number, name in enumerate(NAMES):
            runs = [log for run, log in logs.items() if run.split("-")[0] == name]
            if runs:
                seen = [line["samples"] / 1000 for line in runs[0]]
                values = list(zip(*([line[key] for line in log] for log in runs), strict=True))
                axis.plot(seen, list(map(statistics.mean, values)), linewidth=1.5, color=f"C{number}", label=name)
                axis.fill_between(seen, list(map(min, values)), list(map(max, values)), color=f"C{number}", alpha=0.15)
        axis.set_title(titles[key], fontsize=10)
        axis.set_xlabel("thousands of pictures seen", fontsize=9)
        axis.set_ylim(0, None)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    print(f"picture: {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The reference runs of the tiny sizes.")
    parser.add_argument("--data", choices=("shapes", "flickr8k"), default="shapes")
    parser.add_argument("--root", help="where Flickr8k's files lie (default: download to data/flickr8k)")
    parser.add_argument("--models", nargs="+", choices=NAMES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    try:
        import matplotlib  # noqa: F401, to fail before two hours of training, not after
    except ModuleNotFoundError:
        sys.exit("results.py draws its curves with matplotlib: pip install matplotlib")
    photographs, docs = options.data == "flickr8k", ROOT / "docs"
    names = options.models or (NAMES[:-1] if photographs else NAMES)
    lines = table(list(GROUPS)[:2 if photographs else 3])
    for name in names:
        runs = {seed: evaluated(name, seed, options.root, photographs) for seed in options.seeds}
        lines += rows(name, {seed: scores for seed, (scores, _) in runs.items()})
        for _, folder in runs.values():
            shutil.copy(folder / "log.csv", docs / "logs" / f"{folder.name}.csv")
            if folder.name == "liteclip-0":
                Image.open(folder / "retrieval.png").quantize(256).save(docs / "retrieval.png", optimize=True)
    print("\n" + "\n".join(lines))
    logs = {path.stem: read_log(path) for path in sorted((docs / "logs").glob("*.csv"))
            if ("-flickr8k-" in path.stem) == photographs}
    draw_curves(docs / ("curves-flickr8k.png" if photographs else "curves.png"), logs)
