"""Which method a GoogleTest case is about, and what of it: by the words of its name."""

import re
import xml.etree.ElementTree as xml
from pathlib import Path

TRAINER = Path(__file__).resolve().parent.parent / "trainer"


def table(file, line):
    """The names in a table of the program's sources."""
    names = re.findall(line, (TRAINER / file).read_text())
    if not names:
        raise SystemExit(f"{file}: no line is like {line}")
    return names


METHODS = (*table("methods/methods.cpp", r"&(\w+)_method\(\)"), "rslora")  # LoRA with a key that makes another of it
OTHER = "other"  # what is about none of them
FORMATS = tuple(name for name in table("weights/formats.cpp", r'\{"(\w+)", make_\w+_weight\}') if name != "none")
COLUMNS = ("parity", "conformance", *(f"on {name}" for name in FORMATS), "mutants", "layouts", "resume")
PROGRAMS = {"golden_test": "parity", "parity_test": "parity", "merge_test": "parity",
            "conformance_mpi_test": "conformance", "mutants_mpi_test": "mutants"}
SUITES = {"Topology": "layouts", "Resume": "resume"}  # of topology_cases.h: LoRA where a case names no method


def words(name):
    """CamelCase and snake_case taken apart, small letters."""
    apart = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name)
    return re.sub(r"[^a-z0-9]+", " ", apart.lower()).replace("ada lora", "adalora").split()


def method_of(suite, case):
    """The method that the case's parameter names, or else its suite or test; None: none of them."""
    for name in (case.partition("/")[2], suite, case):
        found = [method for method in METHODS if method in words(name)]
        if found:
            return max(found, key=len)  # AdaLoRA to LoRA is about AdaLoRA
    return "lora" if suite.rpartition("/")[2] in SUITES else None


def column_of(program, suite, case):
    """None: in no column."""
    column = PROGRAMS.get(program) or SUITES.get(suite.rpartition("/")[2])
    if column != "conformance":
        return column
    return next((f"on {name}" for name in FORMATS if name in words(case)), column)


class MethodCounts:
    """Cases passed and failed, by method and column."""

    def __init__(self):
        self.counts = {}

    def add(self, program, report):
        """The cases of `program`'s GoogleTest report (XML text); what was skipped does not count."""
        for case in xml.fromstring(report).iter("testcase"):
            suite, name = case.get("classname"), case.get("name")
            method, column = method_of(suite, name) or OTHER, column_of(program, suite, name)
            if column and case.find("skipped") is None:
                self.counts.setdefault((method, column), [0, 0])[case.find("failure") is not None] += 1

    def lines(self):
        """The table: a method a line; what failed is said beside what passed."""
        def cell(method, column):
            passed, failed = self.counts.get((method, column), (0, 0))
            return f"{passed} ({failed} failed)" if failed else str(passed or "-")

        rows = [("method", *COLUMNS)] + [(method, *(cell(method, column) for column in COLUMNS))
                                         for method in (*METHODS, OTHER)]
        widths = [max(map(len, column)) for column in zip(*rows)]
        return ["  ".join(text.rjust(width) if i else text.ljust(width) for i, (text, width) in enumerate(zip(row, widths)))
                for row in rows]
