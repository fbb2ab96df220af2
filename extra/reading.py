"""Files that nobody vouches for: read within bounds, and quoted in a few words."""

import errno
import json
import math
import os
import stat
from pathlib import Path

LARGEST = 2**26  # bytes of a JSON file; the largest index and tokenizer_config.json have some 10 MB


def short(value, most: int = 80) -> str:
    """As `repr` has it; of what is longer the beginning and the end, and how long it is."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; a number of too many digits
        return f"a {type(value).__name__} that cannot be printed"
    if len(text) <= most:
        return text
    return f"{text[: most // 2]} … {text[-most // 4 :]} ({len(text):,} characters)"


def size_of(path: str | Path) -> int:
    """Bytes of a file. Raises OSError, also for what is no file: a pipe might never end."""
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "no path holds a NUL character")
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return status.st_size


def read_bytes(path: str | Path, most: int = LARGEST) -> bytes:
    """What is in a file. Raises OSError, also where it is larger than `most` bytes."""
    if (size := size_of(path)) > most:
        raise OSError(errno.EFBIG, f"it has {size:,} bytes, and at most {most:,} are read")
    return Path(path).read_bytes()


def parse_json(content: bytes, object_pairs_hook=None):
    """What a JSON text in UTF-8 says. Raises ValueError, also for numbers that are none."""
    numbers = {"parse_int": whole, "parse_float": finite, "parse_constant": finite}
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=object_pairs_hook, **numbers)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def distinct(pairs: list[tuple]) -> dict:
    """An object, for `parse_json`. Raises ValueError if it has a name twice: readers differ."""
    made = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"{short(name)} is there twice")
        made[name] = value
    return made


def whole(digits: str) -> int:
    if len(digits) > 100:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def finite(number: str) -> float:
    """Also of NaN and Infinity, which Python reads though JSON does not have them."""
    if not math.isfinite(float(number)):
        raise ValueError(f"{short(number)} is not a finite number")
    return float(number)
