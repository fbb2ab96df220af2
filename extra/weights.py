"""Files of weights: in several with an index, in torch's format, and checked before they are read.

Nobody vouches for what a header or an index says. It is compared with the file's size, and what is
not right is one sentence, before any memory is taken for it.
"""

import math
import pickletools
import struct
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from extra.checkpoints import is_adapter, is_finite, read_json
from extra.reading import distinct, parse_json, short, size_of
from model import DTYPES, CheckpointError, read_safetensors

HEADER = 100_000_000  # bytes at most, as the package safetensors has it
PLAIN = {  # what the pickle of a file of plain weights names, beside the types of their storages
    *("collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor"),
    *("torch._utils _rebuild_parameter", "torch.nn.parameter Parameter"),
}
OTHER_KINDS = {"sparse": "sparse", "qtensor": "quantised", "meta": "meta", "nested": "nested"}


def weight_files(directory: Path) -> dict[Path, set[str]]:
    """Those with weights, and the names that an index promises of each: safetensors before .bin; of
    .bin those that an index names before the only one.

    Raises CheckpointError if there are none, or an index is not right.
    """
    single = directory / "model.safetensors"
    if single.exists():
        return {single: set()}
    formats = "model.safetensors", "pytorch_model.bin"
    for name in formats:
        index = directory / f"{name}.index.json"
        if index.exists():
            where = read_json(index).get("weight_map") or {}
            if not isinstance(where, dict) or not all(isinstance(f, str) for f in where.values()):
                raise CheckpointError(f"{index}: weight_map must name a file for each weight")
            files = {}
            for weight, file in where.items():
                is_name = file == Path(file).name and file.isprintable() and len(file) < 256
                if not is_name or not file.endswith(Path(name).suffix):
                    mend = f"it must be the name of a {Path(name).suffix} file beside it"
                    raise CheckpointError(f"{index}: weight_map names {short(file)}: {mend}")
                files.setdefault(directory / file, set()).add(weight)
            if where:
                return dict(sorted(files.items()))
        if (directory / name).exists():
            return {directory / name: set()}
    raise CheckpointError(f"{directory}: no {' or '.join(formats)} in it")


def read_files(directory: Path) -> dict[str, Tensor]:
    """The weights of all files by the names there, in their precision; mapped, not read.

    Raises CheckpointError naming a file that is missing or cannot be read.
    """
    if is_adapter(directory):
        from extra.adapters import read_merged

        return read_merged(directory)
    weights, names = {}, set()
    for file, promised in weight_files(directory).items():
        found = read_file(file)
        if missing := promised - found.keys():
            what = f"{short(min(missing))} is not in it, though the index says so"
            raise CheckpointError(f"{file}: cannot be read (weight {what})")
        for name in found:
            if name.removeprefix("model.") in names:
                raise CheckpointError(f"{file}: weight {name} is there twice, or in another file")
            names.add(name.removeprefix("model."))
        weights |= found
    return weights


@torch.no_grad()
def read_file(path: Path) -> dict[str, Tensor]:
    """The weights of one file, mapped. Raises CheckpointError naming it, also for a weight with a
    NaN in it: to look for one takes some 5 % of the time of loading."""
    try:
        if path.suffix == ".safetensors":
            check_safetensors(path)
        weights = (read_safetensors if path.suffix == ".safetensors" else read_bin)(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: cannot be read (there is no such file)") from None
    except Exception as error:  # each format has its own exceptions
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        reason = reason if len(reason) <= 300 else f"{reason[:200]} …"
        raise CheckpointError(f"{path}: cannot be read ({reason})") from None
    for name, weight in weights.items():
        if not is_finite(weight):
            raise CheckpointError(f"{path}: weight {name}: not finite")
    return weights


def check_name(name):
    """Raises ValueError for what is no name of a weight: messages quote it."""
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 200:
        raise ValueError(f"a weight is called {short(name)}")


def check_safetensors(path: Path):
    """Is all that a header says true of the file? Raises OSError and ValueError."""
    size = size_of(path)
    if size < 8:
        raise ValueError(f"it has {size} bytes, and a header's length takes 8")
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        if length > min(size - 8, HEADER):
            raise ValueError(f"its header would be {length:,} bytes long, of a file of {size:,}")
        content = file.read(length)
    try:
        header = parse_json(content, distinct)
    except ValueError as error:
        raise ValueError(f"its header is not right: {error}") from None
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    about = header.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise ValueError("__metadata__ must be an object of texts")
    if not header:
        raise ValueError("no weights in it")
    places = []
    for name, entry in header.items():
        check_name(name)
        places.append((*check_entry(name, entry), name))
    end = 0
    for begin, stop, name in sorted(places):
        if begin != end:
            which = "overlaps another" if begin < end else "leaves a hole before it"
            raise ValueError(f"weight {name} {which}: it begins at byte {begin}, not at {end}")
        end = stop
    if 8 + length + end != size:
        raise ValueError(f"it has {size:,} bytes, and by its header {8 + length + end:,}")


def check_entry(name: str, entry) -> tuple[int, int]:
    """Where a weight's bytes begin and end. Raises ValueError for an entry that is not right."""
    if not isinstance(entry, dict):
        raise ValueError(f"weight {name} must be an object, found {short(entry)}")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        kinds = f"of the types {', '.join(DTYPES)} are read"
        raise ValueError(f"weight {name}: dtype {short(dtype)}, and only weights {kinds}")
    for key, value, count in (("shape", shape, 8), ("data_offsets", offsets, 2)):
        numbers = value if isinstance(value, list) and len(value) <= count else [None]
        if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"weight {name}: {key} {short(value)} must be a few whole numbers")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        what = f"data_offsets {offsets} do not fit shape {shape} of {dtype}"
        raise ValueError(f"weight {name}: {what}")
    if offsets[0] == offsets[1]:
        raise ValueError(f"weight {name} is empty")
    return tuple(offsets)


def read_bin(path: Path) -> dict[str, Tensor]:
    """A file of torch.save, mapped; code that it may hold is not run.

    Raises OSError, ValueError and torch's own exceptions.
    """
    check_bin(path)
    with warnings.catch_warnings(action="ignore"):  # of what is refused below
        weights = torch.load(path, "cpu", weights_only=True, mmap=True)
    if not isinstance(weights, dict):
        raise ValueError(f"not weights by their names, but a {type(weights).__name__}")
    if not weights:
        raise ValueError("no weights in it")
    for name, weight in weights.items():
        check_name(name)
        if not isinstance(weight, Tensor):
            raise ValueError(f"not all of it is weights: {name} is a {type(weight).__name__}")
        if weight.dtype not in DTYPES.values():
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())
            raise ValueError(f"weight {name} is {weight.dtype}, and only {kinds} are read")
        if not weight.numel():
            raise ValueError(f"weight {name} is empty")
    return dict(weights)


def check_bin(path: Path):
    """A zip archive, as torch writes it, of plain weights? Raises OSError and ValueError.

    What `weights_only` lets a pickle do is more than that: it may ask for any memory.
    """
    size = size_of(path)
    with open(path, "rb") as file:
        begin = file.read(4)
    if begin[:1] == b"\x80":
        program = f"f = {str(path)!r}; torch.save(torch.load(f, weights_only=True), f)"
        mend = f'it becomes today\'s by: python -c "import torch; {program}"'
        raise ValueError(f"the format of torch before 1.6; {mend}")
    if begin != b"PK\3\4":
        raise ValueError("not a file of torch.save")
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError("a part of it is compressed, which torch.save does not do")
        if sum(part.file_size for part in parts) > size:
            raise ValueError("its parts are larger than the file")
        pickles = [part for part in parts if part.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError("not a file of torch.save")
        operations = pickletools.genops(archive.read(pickles[0]))
        named = [argument for operation, argument, _ in operations if operation.name == "GLOBAL"]
    for name in named:
        if name not in PLAIN and not (name.startswith("torch ") and name.endswith("Storage")):
            kinds = [word for part, word in OTHER_KINDS.items() if f"_rebuild_{part}" in name]
            what = f"a {kinds[0]} tensor" if kinds else f"{short(name.replace(' ', '.'))}"
            raise ValueError(f"{what} is in it, and only plain weights are read")
