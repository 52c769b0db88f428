"""What the Python tools share: finding their packages, and ending with the exit codes of the project."""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

USAGE, BAD_DATA, MISSING_INPUT, STORAGE, INTERRUPTED = 64, 65, 66, 74, 130
LONGEST_MESSAGE = 2000
OLDEST = {"transformers": (5, 17)}  # earlier ones load and render in another way

# transformers reads them when it is imported: nothing is fetched, and its own notes stay away.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", RUST_BACKTRACE="0")


def printable(text, longest=LONGEST_MESSAGE):
    """Text that may come from a file, for the terminal: control characters escaped, and no longer than a message."""
    text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text[:longest + 1])
    return text if len(text) <= longest else f"{text[:longest]} ..."


def shown(value):
    """A value from a file for a message: escaped and short."""
    return ascii(value)[:80]


def fail(code, message):
    """Ends the program with one paragraph on standard error."""
    print(f"{Path(sys.argv[0]).name}: error: {printable(message)}", file=sys.stderr)
    raise SystemExit(code)


def note(message):
    """One line on standard error that is no error."""
    print(f"{Path(sys.argv[0]).name}: {printable(message)}", file=sys.stderr)


def run(main):
    """Calls the tool's main function; what the system refuses is reported like any other error."""
    try:
        main()
    except OSError as problem:
        fail(STORAGE, f"{problem}. Check the path, its permissions and the space left.")
    except KeyboardInterrupt:
        fail(INTERRUPTED, "stopped from the keyboard.")


class Arguments(argparse.ArgumentParser):
    """argparse with the project's exit code for usage errors and no guessed abbreviations."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        fail(USAGE, f"{message}. {self.format_usage().strip()}")


def at_least(minimum):
    """An argparse type: a whole number not below the minimum."""

    def parse(text):
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is below {minimum}")
        return value

    parse.__name__ = "whole number"
    return parse


def tools_folder():
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("CORANK_CACHE") or Path(cache) / "corank") / "tools"


def require(*modules):
    """Makes sure the modules can be imported, restarting under the Python that launch/setup prepared if need be."""
    missing = [name for name in modules if not importable(name)]
    if not missing:
        return
    tools = tools_folder()
    python = tools / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != tools.resolve():
        sys.stdout.flush()
        os.execv(python, [str(python), os.path.abspath(sys.argv[0]), *sys.argv[1:]])
    fail(MISSING_INPUT, f"Python packages not found, or too old: {', '.join(missing)}. Run launch/setup.")


def importable(name):
    try:
        version = getattr(importlib.import_module(name), "__version__", "")
    except ImportError:
        return False
    return name not in OLDEST or tuple(map(int, version.split(".")[:2])) >= OLDEST[name]


def read_json(path, largest):
    """The object that a JSON file of a model folder holds."""
    try:
        size = path.stat().st_size
        if not path.is_file() or size > largest:
            fail(BAD_DATA, f"{path} is no file of at most {largest >> 20} MiB. Fetch the model folder again.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        fail(MISSING_INPUT, f"{path} does not exist. A Hugging Face model folder is needed: see data/import_gguf.")
    except (OSError, ValueError, RecursionError) as problem:
        fail(BAD_DATA, f"{path} cannot be read as JSON: {problem}. Fetch the model folder again.")
    if not isinstance(value, dict):
        fail(BAD_DATA, f"{path} holds no JSON object. Fetch the model folder again.")
    return value


def sync(path):
    """Flushes a file or folder to storage."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(aside, target):
    """Puts a finished file or folder in its place, so that a crash leaves the old one or the new one."""
    sync(aside)
    os.replace(aside, target)
    sync(Path(target).resolve().parent)
