"""Files that are no JSON lines: gzipped ones and arrays are read, of others one sentence says how
they become such. No file is read whole: at most LONGEST of it is in memory.

data.read_jsonl comes here with every file.
"""

import functools
import gzip
import io
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path

from data import DataError

CONVERTED = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}  # suffix: loader's name
MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow"}  # how such files begin, whatever their suffix
PACKED = {  # how others begin, and what makes JSON lines of them
    b"\x1f\x8b": "is gzipped: give it a name that ends in .gz",
    b"PK\x03\x04": "is a zip archive: unpack it with unzip",
    b"BZh": "is packed: unpack it with bunzip2",
    b"\xfd7zXZ": "is packed: unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "is packed: unpack it with unzstd",
    b"\xff\xfe": "is UTF-16: write it as UTF-8, with iconv -f utf-16 -t utf-8",
    b"\xfe\xff": "is UTF-16: write it as UTF-8, with iconv -f utf-16 -t utf-8",
}
HUB = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")  # what a data set may be called there
LONGEST = 2**27  # bytes of a line, characters of an element: a small .gz may hold one of any length
PIECE = 2**16  # characters of an array that are read at a time
WRONG = (OSError, EOFError, zlib.error, ValueError, RecursionError)  # what reading may end in


def read_lines(path: str) -> Iterator[tuple[str, bytes | object]]:
    """Yield ("file:line", line), no blank ones; or of a file that is one JSON array ("file, element
    N", element). Both are counted from 1. Raises DataError, for a file of another kind, too."""
    begin = first_bytes(path).lstrip(b"\xef\xbb\xbf \t\r\n")
    if begin.startswith(b"["):
        yield from read_array(path)
        return
    if advice := "" if begin.startswith(b"{") else how_to_convert(path, begin):
        raise DataError(f"{path}:1: cannot be read as JSON lines{advice}")
    where, found = path, False
    try:
        with unpacked(path) as file:
            lines = iter(functools.partial(file.readline, LONGEST), b"")
            for number, line in enumerate(lines, 1):
                where = f"{path}:{number}"
                if len(line) == LONGEST:
                    raise ValueError(f"over {LONGEST // 2**20} MiB: break it into several")
                if line.strip():
                    found = True
                    yield where, line
        if not found:
            raise ValueError("the file is empty")
    except WRONG as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{where}: cannot be read as JSON lines ({reason})") from None


def read_array(path: str) -> Iterator[tuple[str, object]]:
    """Yield ("file, element N", element) of a file that is one JSON array, a piece at a time."""
    number = 0
    try:
        with unpacked(path) as file:
            for element in elements(io.TextIOWrapper(file, encoding="utf-8-sig")):
                number += 1
                yield f"{path}, element {number}", element
    except WRONG as wrong:
        reason = getattr(wrong, "strerror", None) or getattr(wrong, "msg", wrong)
        where = f"{path}, element {number + 1}"
        raise DataError(f"{where}: cannot be read as a JSON array ({reason})") from None
    if not number:
        raise DataError(f"{path}: the array is empty")


def elements(file: io.TextIOBase) -> Iterator[object]:
    """Those of the JSON array that a file of text is. Raises ValueError, RecursionError."""
    decode, text, before = json.JSONDecoder().raw_decode, file.read(PIECE), "["

    def next_mark(text: str) -> str:
        """The text from where it is not blank, and more of it if nothing is left."""
        while not (text := text.lstrip(" \t\r\n")) and (more := file.read(PIECE)):
            text = more
        return text

    while (text := next_mark(text)).startswith(before):
        text = next_mark(text[1:])
        if before == "[" and text.startswith("]"):
            break
        while True:  # until it is whole
            try:
                element, end = decode(text)
                if end < len(text) or not (more := file.read(PIECE)):
                    break
            except json.JSONDecodeError:
                if len(text) > LONGEST:
                    raise ValueError(f"over {LONGEST // 2**20} MiB of no JSON") from None
                if not (more := file.read(max(PIECE, len(text)))):  # as much again: a few attempts
                    raise
            text += more
        yield element
        text, before = text[end:], ","
    if not text.startswith("]"):
        raise ValueError(f"expected '{before}' or ']', found {text[:1]!r}")
    if next_mark(text[1:]):
        raise ValueError("something follows the array")


def unpacked(path: str):
    return (gzip.open if path.endswith(".gz") else open)(path, "rb")


def first_bytes(path: str) -> bytes:
    """As many as say what a file is. Raises DataError unless there is a file that can be read."""
    named = path if path.isprintable() and len(path) < 300 else f"{path[:100]!r}…"
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            raise ValueError("a pipe or a device: it is read several times, so write it to a file")
        with unpacked(path) as file:
            return file.read(4096)
    except IsADirectoryError:
        reason = what_directory(path)
    except OSError as error:
        reason = f"({error.strerror or error})"
        reason += how_to_convert(path, b"") if isinstance(error, FileNotFoundError) else ""
    except (EOFError, zlib.error, ValueError) as error:
        reason = f"({error})"
    raise DataError(f"{named}: cannot be read as JSON lines {reason}")


def what_directory(path: str) -> str:
    """Why a directory cannot be read, and what to do."""
    has = lambda *names: any((Path(path) / name).exists() for name in names)
    if has("config.json", "adapter_config.json"):
        return "(it is a directory with a checkpoint, which belongs to --init_from)"
    if has("dataset_dict.json", "state.json"):
        program = f"load_from_disk('{path}').to_json('{Path(path).name}.jsonl')"
        command = f'python -c "from datasets import load_from_disk; {program}"'
        return f"(it is a directory): if it has no splits it becomes JSON lines by {command}"
    return "(it is a directory): name the files in it, comma-separated"


def how_to_convert(path: str, begin: bytes) -> str:
    """The command that makes JSON lines of a file in another format, or of a name on the hub; ""
    where there is none."""
    suffix, exists = Path(path).suffix.lower(), os.path.exists(path)
    kind = CONVERTED.get(suffix, "") if exists else ""
    for magic, name in MAGIC.items():
        if begin.startswith(magic):
            kind = name
    for magic, advice in PACKED.items():
        if begin.startswith(magic):
            return f": it {advice}"
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
