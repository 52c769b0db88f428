"""The #includes of the tree against the table of rooms in docs/design.md."""

import re
import subprocess
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {"tests", "cmake"}


def rooms(page):
    """Of each room those that the table lets it include, in turn; a room must stand above those that know it."""
    known = {}
    for line in page.splitlines():
        row = re.match(r"\| `([\w/]+)` \|.*\|([^|]*)\|$", line)
        if not row:
            continue
        named = re.findall(r"`([\w/]+)`", row[2])
        missing = [room for room in named if room not in known]
        if missing:
            raise ValueError(f"{row[1]} knows {missing[0]}, which does not stand above it")
        known[row[1]] = set(named).union(*(known[room] for room in named))
    return known


def includes():
    """(file, included file) of every tracked C++ and CUDA source outside tests."""
    listed = subprocess.run(["git", "ls-files", "*.cpp", "*.h", "*.cu", "*.cuh"], cwd=ROOT, text=True, capture_output=True,
                            check=True).stdout.split()
    for name in listed:
        if Path(name).parts[0] in OUTSIDE or not (ROOT / name).exists():
            continue
        for included in re.findall(r'^#include "([^"]+)"', (ROOT / name).read_text(), re.M):
            yield name, included


def offences(known, pairs):
    """What the table does not allow, a line each."""
    found = []
    for name, included in pairs:
        room, other = str(Path(name).parent), str(Path(included).parent)
        if room not in known:
            found.append(f"{name}: {room} is no room")
        elif other != room and other not in known[room]:
            found.append(f"{name}: {room} does not know {other} ({included})")
    return found


class Rooms(unittest.TestCase):
    def setUp(self):
        self.known = rooms((ROOT / "docs/design.md").read_text())

    def test_the_tree_keeps_to_the_table(self):
        pairs = list(includes())
        self.assertGreater(len(pairs), 300)
        self.assertEqual(offences(self.known, pairs), [])

    def test_an_include_upwards_or_of_no_room_is_found(self):
        for name, included in (("trainer/ops/gram.cpp", "trainer/run/step.h"), ("trainer/models/qwen.cpp", "trainer/methods/config.h"),
                               ("trainer/new/x.cpp", "trainer/ops/gram.h")):
            self.assertEqual(len(offences(self.known, [(name, included)])), 1, name)

    def test_a_circle_in_the_table_is_refused(self):
        with self.assertRaises(ValueError):
            rooms("| `a` | x | `b` |\n| `b` | y | `a` |\n")


if __name__ == "__main__":
    unittest.main()
