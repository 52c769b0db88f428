"""Runs the parts of launch/test one after the other and adds up their cases."""

import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from pathlib import Path

from compile_flags import OWN_FLAGS, wrong_flags
from count_tests import MethodCounts

ROOT = Path(__file__).resolve().parent.parent
PRESET = os.environ["CORANK_PRESET"]
BUILD = ROOT / "build" / PRESET
PYTHON = Path(os.environ["CORANK_CACHE"]) / "tools" / "bin" / "python"


class Count:
    """Cases passed and failed, by part."""

    def __init__(self):
        self.passed = self.failed = 0

    def add(self, part, passed, failed, seconds):
        self.passed += passed
        self.failed += failed
        print(f"{part}: {passed} passed, {failed} failed ({seconds:.0f} s)", flush=True)


def run(command, **options):
    return subprocess.run(command, cwd=ROOT, text=True, **options)


def sources():
    listed = run(["git", "ls-files", "*.cpp", "*.h", "*.cu", "*.cuh"], capture_output=True).stdout.split()
    return [name for name in listed if (ROOT / name).exists()]


def format_check():
    """Each C++ file as clang-format 14 (Debian 12's) lays it out; other versions differ in details. Without it the
    check has failed."""
    tool = shutil.which("clang-format-14") or shutil.which("clang-format")
    version = run([tool, "--version"], capture_output=True).stdout if tool else ""
    if " 14." not in version:
        print(f"format: not checked, clang-format 14 is needed, here is {version.strip() or 'none'}", flush=True)
        return 0, 1
    bad = [name for name in sources() if run([tool, "--dry-run", "-Werror", name], capture_output=True).returncode]
    for name in bad:
        print(f"format: {name} is not as .clang-format says; run clang-format -i {name}")
    return len(sources()) - len(bad), len(bad)


def flags_check():
    """The sources whose bits or threads depend on options of their own are compiled alone, with these."""
    wrong = wrong_flags((BUILD / "compile_commands.json").read_text())
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return len(OWN_FLAGS) - len(wrong), len(wrong)


def ctest(by_method):
    """Every GoogleTest case counts once a number of ranks; a test that left no report counts as one."""
    reports = BUILD / "test-reports"
    for old in reports.glob("*.xml"):
        old.unlink()
    output = run(["ctest", "--preset", PRESET, "-j2", "--timeout", "600"], capture_output=True)
    lines = re.findall(r"Test +#\d+: (\S+) \.+.*?(Passed|Failed|\*\*\*\S+)", output.stdout)
    if not lines or "***" in output.stdout or output.returncode:
        print(output.stdout[-20000:], output.stderr[-2000:])
    passed = failed = 0
    for name, verdict in lines:
        report = next((p for p in (reports / f"{name}.xml", reports / f"{name}-1.xml") if p.exists()), None)
        cases = bad = 0
        if report:
            text = report.read_text()
            by_method.add(re.sub(r"-\d+$", "", name), text)
            suite = xml.fromstring(text)
            cases, bad = int(suite.get("tests")), int(suite.get("failures")) + int(suite.get("errors"))
        if verdict != "Passed":
            bad = max(bad, 1)
        passed += max(cases, 1) - bad if cases or not bad else 0
        failed += bad
    return passed, max(failed, 0 if lines else 1)


def python_tests(script, shows=None):
    """`shows`: how lines of its output begin that are to be seen."""
    environment = {**os.environ, "CORANK_BIN": str(BUILD / "corank")}
    output = run([str(PYTHON), script], capture_output=True, env=environment)
    ran = int((re.findall(r"^Ran (\d+) test", output.stderr, re.M) or ["0"])[0])
    bad = sum(int(n) for n in re.findall(r"(?:failures|errors)=(\d+)", output.stderr))
    print(*(line + "\n" for line in output.stdout.splitlines() if shows and line.startswith(shows)), sep="", end="", flush=True)
    if output.returncode or not ran:
        print(output.stdout[-5000:], output.stderr[-20000:])
        bad = max(bad, 1)
    return ran - bad if ran else 0, bad


def lab_tests():
    """Hosts in namespaces, where this machine can have them; what ranks count beside what interfaces carried."""
    check = run(["launch/lab", "--check"], capture_output=True)
    if check.returncode:
        print(f"hosts: left out, {check.stderr.strip()}", flush=True)
        return 0, 0
    counts = [python_tests("tests/lab_test.py", shows="2 hosts"), python_tests("tests/hosts_test.py")]
    return tuple(map(sum, zip(*counts)))


def cuda_build():
    """The program and the GPU's tests must compile and link wherever the CUDA compiler is; to run they need a GPU."""
    if PRESET == "gpu" or not shutil.which("nvcc"):
        return 0, 0
    configure = run(["cmake", "--preset", "gpu"], capture_output=True)
    if configure.returncode:
        print(configure.stdout[-3000:], configure.stderr[-5000:])
        return 0, 1
    build = run(["cmake", "--build", "--preset", "gpu", "--target", "corank", "gpu_tests"], capture_output=True)
    if build.returncode:
        print(build.stdout[-10000:], build.stderr[-5000:])
    return (1, 0) if build.returncode == 0 else (0, 1)


def main():
    count, by_method = Count(), MethodCounts()
    for part, work in (
        ("format", format_check),
        ("compile flags", flags_check),
        ("rooms", lambda: python_tests("tests/rooms_test.py")),
        ("C++", lambda: ctest(by_method)),
        ("commands", lambda: python_tests("tests/cli_test.py")),
        ("runs", lambda: python_tests("tests/cli_runs_test.py")),
        ("plans", lambda: python_tests("tests/cli_plan_test.py")),
        ("commands on model folders", lambda: python_tests("tests/cli_model_test.py")),
        ("adapter commands", lambda: python_tests("tests/cli_adapters_test.py")),
        ("Python tools", lambda: python_tests("tests/data_tools_test.py")),
        ("samples", lambda: python_tests("tests/samples_test.py")),
        ("start scripts", lambda: python_tests("tests/start_scripts_test.py")),
        ("hosts", lab_tests),
        ("CUDA build", cuda_build),
    ):
        start = time.monotonic()
        count.add(part, *work(), time.monotonic() - start)
    print("GoogleTest cases by method:", *by_method.lines(), sep="\n")
    print(f"{count.passed} passed, {count.failed} failed")
    sys.exit(1 if count.failed or not count.passed else 0)


main()
