"""`--skip_bad_rows=N`: a run goes on past up to N bad rows of each of its sets.

Bad is a row that would stop it with a sentence of its own: a line that is not JSON, fields of no
format, contents that cannot be used, a conversation that the chat template refuses. A file that
cannot be read to its end stops it all the same.
"""

from collections.abc import Callable, Iterator

import data
from extra.files import read_lines

SKIPPED = "bad rows skipped"
SHOWN = set()  # rows, each once: SFT and DPO may read the same files


class Examples:
    """data.read_examples, but for up to `most` bad rows; `skipped` of them so far."""

    def __init__(self, paths: str, kind: str, most: int):
        self.paths, self.kind, self.most, self.skipped = paths, kind, most, 0

    def __iter__(self) -> Iterator[data.Example]:
        found = False
        for path in filter(None, self.paths.split(",")):
            for where, line in read_lines(path):
                if example := self.attempt(self.read, where, line):
                    found = True
                    yield example
        if not found:
            raise data.DataError(f"{self.paths}: all {self.skipped:,} rows are bad ones")

    def read(self, where: str, line) -> data.Example:
        return data.read_example(where, data.read_row(where, line), self.kind)

    def attempt(self, function: Callable, *inputs):
        """What a function makes of a row, or None if it is skipped. Raises the DataError of the
        first that is one too many."""
        try:
            return function(*inputs)
        except data.DataError as error:
            if self.skipped == self.most:
                raise data.DataError(f"{error}; {self.most:,} {SKIPPED} before it") from None
            self.skipped += 1
            where = str(error).split(": ")[0]
            if self.skipped <= 3 and where not in SHOWN:
                SHOWN.add(where)
                print(f"skipped: {error}", flush=True)
            return None
