"""Which mistakes the tests would notice: `python tests/mutations.py [WORD …]`

Each entry of MUTATIONS is a mistake that somebody could make, as a small patch, with the tests that
should fail. They are applied one at a time, each in a copy of the project, on all cores. What is
known is kept in out/mutations.json, so that a run that was stopped goes on where it was; an edit to
the code or to the tests makes it unknown again. With words only the entries that mention all of
them. It ends with the survivors, mistakes that nobody noticed, and exits with 1 if there are any.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider"]
RESULTS = ROOT / "out" / "mutations.json"
PATIENCE = 600  # seconds: a mistake that hangs is noticed, too
CAUGHT, SURVIVED, BROKEN = "caught", "SURVIVED", "BROKEN"


class Mutation(NamedTuple):
    file: str
    what: str  # the mistake, in words
    old: str  # occurs once in the file …
    new: str  # … and becomes this
    tests: str  # of which at least one should fail, as pytest names them, below tests/

    def applied(self) -> str:
        """The file's text with the mistake. Raises ValueError unless the patch fits."""
        text = (ROOT / self.file).read_text(encoding="utf-8")
        if text.count(self.old) != 1 or self.old == self.new:
            raise ValueError(
                f"{self.file}, {self.what}: the patch fits {text.count(self.old)} times"
            )
        return text.replace(self.old, self.new)


MUTATIONS = [
    Mutation(*entry)
    for entry in [
        # TABLE
    ]
]


def copy_project(to: Path) -> Path:
    for folder in ("extra", "experiments", "tests", "docs"):
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*ROOT.glob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("*.toml")):
        shutil.copy(file, to)
    return to


def run_tests(names: list[str], copy: Path) -> int:
    """pytest's exit status: 0 where all pass, 1 where one fails, else it could not be run."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [*PYTEST, *(f"tests/{name}" for name in names)]
    options = {"cwd": copy, "env": environment, "capture_output": True, "timeout": PATIENCE}
    try:
        return subprocess.run(command, check=False, **options).returncode
    except subprocess.TimeoutExpired:
        return 1


def judge(mutation: Mutation, copies: queue.Queue) -> str:
    """What the tests say of a mistake, in one of the copies, which is put back as it was."""
    copy = copies.get()
    try:
        original = (copy / mutation.file).read_text(encoding="utf-8")
        (copy / mutation.file).write_text(mutation.applied(), encoding="utf-8")
        status = run_tests(mutation.tests.split(), copy)
        (copy / mutation.file).write_text(original, encoding="utf-8")
    finally:
        copies.put(copy)
    return {0: SURVIVED, 1: CAUGHT}.get(status, BROKEN)


def digests(mutations: list[Mutation]) -> dict[Mutation, str]:
    """Of each mistake, and of all code and tests, which decide whether it is noticed."""
    folders = (ROOT, ROOT / "extra", ROOT / "experiments", ROOT / "tests")
    files = [file for folder in folders for file in sorted(folder.glob("*.py"))]
    code = hashlib.sha256()
    for file in files:
        if file != Path(__file__):
            code.update(file.read_bytes())
    state = code.hexdigest()
    return {m: hashlib.sha256(f"{state} {m}".encode()).hexdigest() for m in mutations}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="only the entries that mention all of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="default: all cores")
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if all(word in " ".join(m) for word in args.words)]
    RESULTS.parent.mkdir(exist_ok=True)
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    keys = digests(chosen)
    left = [mutation for mutation in chosen if keys[mutation] not in known]
    with tempfile.TemporaryDirectory() as directory:
        copies = queue.Queue()
        for n in range(args.jobs):
            copies.put(copy_project(Path(directory) / str(n)))
        names = sorted({name for mutation in left for name in mutation.tests.split()})
        if left and run_tests(names, copies.queue[0]):
            sys.exit("mutations.py: these tests must pass before anything is changed")
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            judged = {pool.submit(judge, mutation, copies): mutation for mutation in left}
            for done in concurrent.futures.as_completed(judged):
                mutation = judged[done]
                known[keys[mutation]] = done.result()
                RESULTS.write_text(json.dumps(known, indent=0), encoding="utf-8")
                print(f"{done.result():9} {mutation.file}: {mutation.what}", flush=True)
    survivors = [m for m in chosen if known[keys[m]] != CAUGHT]
    print(f"\n{len(chosen) - len(survivors)} of {len(chosen)} mistakes were caught")
    for mutation in survivors:
        print(f"{known[keys[mutation]]}: {mutation.file}: {mutation.what}")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
