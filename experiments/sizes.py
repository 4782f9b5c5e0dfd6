"""How long the model files are, and how much of each is not in clip.py: python tests/sizes.py prints README's figures.

The lesson of a file is what stands before its line "# --- reading published weights".
"""
import difflib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("clip.py", "liteclip.py", "prolip.py", "llip.py", "clips.py")


def lines(name, whole=False):
    text = (ROOT / name).read_text(encoding="utf-8")
    return (text if whole else text.split("\n# --- reading published weights")[0]).splitlines()


def sizes(name, base="clip.py"):
    """-> lines in all, lines of the lesson, and how many of these the lesson of `base` does not have."""
    lesson = lines(name)
    same = difflib.SequenceMatcher(None, lines(base), lesson, autojunk=False).get_matching_blocks()
    return len(lines(name, whole=True)), len(lesson), len(lesson) - sum(block.size for block in same)


if __name__ == "__main__":
    print(f"{'file':12} {'lines':>6} {'lesson':>7} {'of it not in clip.py':>21}")
    for name in FILES:
        print("{:12} {:6} {:7} {:21}".format(name, *sizes(name)))
