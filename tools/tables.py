"""The tables of docs/: one stands between `<!-- counts: NAME -->` and `<!-- end -->`."""

import difflib
import re
import sys
from collections.abc import Callable
from pathlib import Path

MARK = re.compile(r"<!-- counts: (.*?) -->\n(.*?)<!-- end -->", re.S)


def refresh(file: Path, made: dict[str, Callable[[], str]], check: bool) -> bool:
    """Rewrites the tables of a file that are among `made`, or only compares them and prints how
    they differ -> whether all are as they were."""
    text, same = file.read_text(), True
    for name, old in MARK.findall(text):
        if name not in made:
            continue
        new = made[name]() + "\n"
        print(f"{file.name}: {name}{' is as printed' * (old == new)}", file=sys.stderr)
        same = same and old == new
        if check and old != new:
            diff = difflib.unified_diff(old.splitlines(), new.splitlines(), "file", "counted")
            print("\n".join(diff))
        mark = f"<!-- counts: {name} -->\n"
        text = text.replace(mark + old, mark + new)
    if not check:
        file.write_text(text)
    return same
