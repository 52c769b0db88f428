"""The sources: their #includes against the table of rooms in docs/design.md; names that stay in the files they belong to; that
one file alone writes."""

import re
import subprocess
import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "launch"))
from count_tests import table

METHODS = table("methods/methods.cpp", r"&(\w+)_method\(\)")
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


def sources():
    """(name, text) of every tracked C++ and CUDA source outside tests."""
    listed = subprocess.run(["git", "ls-files", "*.cpp", "*.h", "*.cu", "*.cuh"], cwd=ROOT, text=True, capture_output=True,
                            check=True).stdout.split()
    for name in listed:
        if Path(name).parts[0] not in OUTSIDE and (ROOT / name).exists():
            yield name, (ROOT / name).read_text()


def includes():
    """(file, included file) of every source."""
    for name, text in sources():
        for included in re.findall(r'^#include "([^"]+)"', text, re.M):
            yield name, included


def module_names():
    """The last parts of the names that families give to modules."""
    texts = [(ROOT / "trainer/models" / name).read_text() for name in ("decoder.h", "gpt2.cpp", "phi3.cpp", "qwen.cpp")]
    lines = re.findall(r"^.*(?:std::string|std::vector<std::string>|names)[ .].*$", "\n".join(texts), re.M)
    names = {literal.rpartition(".")[2] for line in lines for literal in re.findall(r'"([\w.]+)"', line)}
    return names - {"bias", "h", "layers", "norm"}  # words for other things too


def misplaced(named, modules):
    """Comparisons with a method's name outside its own file, and modules' names outside the families, a line each."""
    found = []
    compared = r'[!=]= *"(?:%s)"|method *[!=]= *"' % "|".join(set(METHODS) - {"full"})  # checkpointing is full too
    ends = r'"(?:[\w.]+\.)?(?:%s)(?:\.weight)?"' % "|".join(sorted(modules))
    for name, text in named:
        if name not in {f"trainer/methods/{method}.cpp" for method in METHODS}:
            found += [f"{name}: {line.strip()}" for line in text.splitlines() if re.search(compared, line)]
        if not name.startswith("trainer/models/"):
            found += [f"{name}: {line.strip()}" for line in text.splitlines() if re.search(ends, line)]
    return found


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


WRITING = re.compile(
    r"\bstd::(?:basic_)?(?:fstream|filebuf)\b|ofstream\b|\bf(?:d|re)?open\(|\bO_(?:WRONLY|RDWR|CREAT|TRUNC|APPEND)\b"
    r"|\b(?:fs|filesystem)::(?:rename|remove|remove_all|resize_file|permissions|last_write_time|copy\w*|create_\w+)\b"
    r"|(?<![\w>])(?:::|\bstd::)(?:p?write|writev|(?:un)?link(?:at)?|symlink|mk(?:dir|fifo|stemp|dtemp)|rmdir|remove|rename(?:at)?|f?truncate"
    r"|creat)\((?!\w+\.begin)|\btorch::save\b|\bH5Pset_fapl_(?!core)\w+\b")


def writers(texts):
    """Files that write past the storage object, with what they write by."""
    for name, text in texts:
        found = WRITING.search(text)
        if found and name != "data/storage.cpp":
            yield f"{name}: {found[0]}"


class Writers(unittest.TestCase):
    def test_one_file_writes(self):
        self.assertEqual(list(writers(sources())), [])
        self.assertTrue(WRITING.search((ROOT / "data/storage.cpp").read_text()))

    def test_every_way_to_write_is_found(self):
        for text in ("std::ofstream out(path);", "std::fstream f;", "std::basic_ofstream<char> f;", 'std::FILE* f = std::fopen(path, "w");',
                     "fs::rename(a, b);", "std::filesystem::create_directories(p);", "fs::remove_all(p);", "  ::write(fd, p, n);",
                     "if (::rename(a, b) != 0)", "std::remove(p);", "std::rename(a, b);", "open(p, O_RDWR)", "torch::save(t, p);",
                     "fs::copy_file(a, b);", "H5Pset_fapl_sec2(list)"):
            self.assertEqual(len(list(writers([("trainer/run/x.cpp", text)]))), 1, text)

    def test_reading_and_algorithms_are_not(self):
        for text in ("std::remove(v.begin(), v.end(), 1);", "Writer::write(name, tensor);", "open(p, O_RDONLY)", "fs::exists(p)",
                     "storage.rename(a, b);", "file->write(bytes);", "std::ifstream f; // #include <fstream>"):
            self.assertEqual(list(writers([("trainer/run/x.cpp", text)])), [], text)


MOST_LINES = 60
NO_CODE = re.compile(r'R"\((?:.|\n)*?\)"|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'|//[^\n]*')


def functions(text):
    """(head, lines) of each function body: a block behind a parenthesis that no control statement opened."""
    code = NO_CODE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    open_blocks, start = [], 0
    for place in re.finditer(r"[;{}]", code):
        head = code[start:place.start()]
        if place[0] == "{":
            words = re.sub(r"^\s*#.*$", "", head, flags=re.M).strip()
            is_body = ")" in words and not re.match(r"(if|for|while|switch|else|do|catch|namespace|struct|class|enum)\b", words)
            open_blocks.append((words, start + len(head) - len(head.lstrip()), is_body))
        elif place[0] == "}" and open_blocks:
            words, begin, is_body = open_blocks.pop()
            if is_body:
                yield words, code.count("\n", begin, place.start()) + 1
        start = place.end()


def long_functions(texts):
    return [f"{name}: {lines} lines: {' '.join(head.split())[:80]}" for name, text in texts for head, lines in functions(text)
            if lines > MOST_LINES]


class Functions(unittest.TestCase):
    def test_none_is_longer_than_a_screen(self):
        self.assertEqual(long_functions(sources()), [])
        self.assertGreater(sum(1 for _, text in sources() for _ in functions(text)), 1000)

    def test_a_long_one_is_found(self):
        body = "  if (x) {\n    g();\n  }\n" * 20
        self.assertEqual(long_functions([("a.cpp", "int f(int x) {\n" + body[:-1] + "\n}\n")])[0][:16], "a.cpp: 62 lines:")
        self.assertEqual(long_functions([("a.cpp", "int f(int x) {\n" + body[:-30] + "\n}\n")]), [])


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

    def test_names_of_methods_and_of_modules_stay_where_they_belong(self):
        modules = module_names()
        self.assertLessEqual({"q_proj", "lm_head", "wte", "c_attn", "qkv_proj", "q_norm", "ln_f"}, modules)
        self.assertEqual(misplaced(sources(), modules), [])
        for name, line in (("trainer/run/step.cpp", 'if (config.method == "x") {'), ("trainer/files/merge.cpp", 'return m != "dora";'),
                           ("launch/bench.cpp", 'name.ends_with("q_proj")'), ("trainer/methods/lora.cpp", '"lm_head.weight"')):
            self.assertEqual(len(misplaced([(name, line)], modules)), 1, line)

    def test_a_circle_in_the_table_is_refused(self):
        with self.assertRaises(ValueError):
            rooms("| `a` | x | `b` |\n| `b` | y | `a` |\n")


if __name__ == "__main__":
    unittest.main()
