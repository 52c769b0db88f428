"""Which sources need compiler options of their own, and whether a build gives them: CMake scopes such options to the folder
that sets them, so that a moved source loses them without a word."""

import json
from pathlib import Path

OWN_FLAGS = {"dropout.cpp": ("-fopenmp",), "random.cpp": ("-fopenmp",), "quantize.cpp": ("-fopenmp", "-ffp-contract=off")}


def wrong_flags(compile_commands):
    """A line for each source of OWN_FLAGS that compile_commands.json (its text) does not compile alone with its options."""
    commands = {Path(entry["file"]).name: entry["command"].split() for entry in json.loads(compile_commands)}
    wrong = []
    for name, flags in OWN_FLAGS.items():
        missing = [flag for flag in flags if flag not in commands.get(name, ())]
        if missing:
            wrong.append(f"compile flags: {name} is not compiled alone with {' '.join(missing)}")
    return wrong
