"""Files that are no JSON lines: arrays are read, of others one sentence says how they become such.

data.read_jsonl comes here when a file, or a line of it, cannot be read as JSON lines.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from data import DataError

CONVERTED = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}  # suffix: loader's name
MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow"}  # how such files begin, whatever their suffix
HUB = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")  # what a data set may be called there


def read_array(path: str, sentence: str) -> Iterator[tuple[str, dict]]:
    """Yield ("file, element N", object) of a file that is one JSON array, counted from 1.

    sentence: what was wrong with it as JSON lines, and at which line; that is said of all other
    files. Raises DataError.
    """
    begin = first_bytes(path)
    if not begin.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        raise DataError(sentence + how_to_convert(path, begin)) from None
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            rows = json.loads(file.read().decode("utf-8-sig"))
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as wrong:
        reason = getattr(wrong, "strerror", None) or wrong
        raise DataError(f"{path}: cannot be read as a JSON array ({reason})") from None
    if not rows:
        raise DataError(f"{path}: the array is empty")
    for number, row in enumerate(rows, 1):
        where = f"{path}, element {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
        yield where, row


def first_bytes(path: str) -> bytes:
    """As many as say what a file is; none of one that cannot be read."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            return file.read(4096)
    except (OSError, EOFError, zlib.error):
        return b""


def how_to_convert(path: str, begin: bytes) -> str:
    """The command that makes JSON lines of a file in another format, or of a name on the hub; ""
    where there is none."""
    suffix, exists = Path(path).suffix.lower(), Path(path).exists()
    kind = CONVERTED.get(suffix, "") if exists else ""
    for magic, name in MAGIC.items():
        if begin.startswith(magic):
            kind = name
    if kind:
        advice, source = "it becomes JSON lines by", f"'{kind}', data_files='{path}'"
    elif (
        not exists and suffix not in {".jsonl", ".json", ".gz", *CONVERTED} and HUB.fullmatch(path)
    ):
        advice, source = "a data set of that name on the hub becomes JSON lines by", f"'{path}'"
    else:
        return ""
    name = Path(path).stem if kind else Path(path).name
    program = f"load_dataset({source}, split='train').to_json('{name}.jsonl')"
    return f'; {advice}: python -c "from datasets import load_dataset; {program}"'
