"""``requirements.py pyproject.toml EXTRA...`` prints what these extras need, a requirement a line.

So an image can install them before it has the code, and a change of the code does not install them again.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

_OURS = re.compile(r"preceptor\[([\w, -]+)\]")


def requirements(project: dict[str, Any], extras: list[str]) -> list[str]:
    """The base requirements and those of the extras, each once; an extra may name others of this project."""
    found = dict.fromkeys(project["dependencies"])
    waiting = list(extras)
    while waiting:
        for one in project["optional-dependencies"][waiting.pop(0)]:
            if ours := _OURS.fullmatch(one):
                waiting += [name.strip() for name in ours[1].split(",")]
            else:
                found[one] = None
    return list(found)


if __name__ == "__main__":
    with Path(sys.argv[1]).open("rb") as file:
        print("\n".join(requirements(tomllib.load(file)["project"], sys.argv[2:])))
