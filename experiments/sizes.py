"""How long the ten files are, and how much of each model's lesson is not in that of clip.py.

    python experiments/sizes.py                       # the figures of the README's tables
    python experiments/sizes.py --diff clip llip      # what changes from one lesson to the other

The lesson of a model's file is what stands before its line "# --- published weights".
"""
import argparse
import ast
import difflib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("clip.py", "liteclip.py", "prolip.py", "llip.py", "clips.py")
FILES = ("clip.py", "liteclip.py", "train.py", "evaluate.py", *MODELS[2:], "data.py", "shapes.py", "tokens.py")


def lines(name):
    return (ROOT / name).read_text(encoding="utf-8").splitlines()


def lesson(name):
    whole = lines(name)
    return whole[:next(i for i, line in enumerate(whole) if "# --- published weights" in line)]


def new(name, base="clip.py"):
    """How many lines of a lesson that of `base` does not have."""
    matcher = difflib.SequenceMatcher(None, lesson(base), lesson(name), autojunk=False)
    return len(lesson(name)) - sum(block.size for block in matcher.get_matching_blocks())


def statements(name):
    """-> the numbers of `raise` and of `except` in a file, and its longest function: (lines, name)."""
    nodes = [*ast.walk(ast.parse("\n".join(lines(name))))]
    functions = [(node.end_lineno - node.lineno + 1, node.name) for node in nodes if isinstance(node, ast.FunctionDef)]
    return (sum(isinstance(node, ast.Raise) for node in nodes),
            sum(isinstance(node, ast.ExceptHandler) for node in nodes), max(functions))


def main():
    parser = argparse.ArgumentParser(description="How long the ten files are.")
    parser.add_argument("--diff", nargs=2, metavar=("MODEL", "OTHER"), help="print the difference of two lessons")
    options = parser.parse_args()
    if options.diff:
        first, second = (f"{name.removesuffix('.py')}.py" for name in options.diff)
        print(*difflib.unified_diff(lesson(first), lesson(second), first, second, n=1, lineterm=""), sep="\n")
        return
    print(f"{'file':12} {'lines':>6} {'lesson':>7} {'of it not in clip.py':>21} {'raise':>6} {'except':>7}"
          "  longest function")
    total = [0, 0, 0]
    for name in FILES:
        raised, caught, (length, function) = statements(name)
        of_lesson = (len(lesson(name)), new(name)) if name in MODELS else ("", "")
        print("{:12} {:6} {:>7} {:>21} {:6} {:7}  {} ({})".format(
            name, len(lines(name)), *of_lesson, raised, caught, function, length))
        total = [a + b for a, b in zip(total, (len(lines(name)), raised, caught))]
    print("{:12} {:6} {:>7} {:>21} {:6} {:7}".format("all ten", total[0], "", "", *total[1:]))


if __name__ == "__main__":
    main()
