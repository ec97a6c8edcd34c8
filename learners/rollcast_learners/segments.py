"""A policy version as safetensors files, read without torch: what lies where in them, and whether they are whole.

Owns: the names of the files, their layout and headers, the digests and the finiteness of their bytes, and holding files
to a manifest and a manifest to a model. Does not know who writes them (`arena.py`), who announces a version, or torch:
whoever only passes weights on loads in a second less, and 200 MB lighter.
"""

import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from rollcast_learners.types import TensorEntry, Weights

MAX_HEADER_BYTES = 100_000_000
"""The bound of the safetensors format."""
CHUNK_BYTES = 1 << 19
"""Digest and scan read memory once: a chunk stays in the processor's cache for both."""
HEADER_ALIGNMENT = 4096
MAX_THREADS = 8
"""Memory bandwidth ends here."""

Bytes = NDArray[np.uint8]
_Place = tuple[str, tuple[int, ...], int, int]


@dataclass(frozen=True)
class TensorSpec:
    """What a policy tensor is, without its bytes. `dtype` is torch's name for it, such as `bfloat16`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class DType:
    """A dtype in the words of safetensors; `infinity` is the bit pattern of +inf of a float."""

    code: str
    itemsize: int
    infinity: int | None = None


DTYPES: Mapping[str, DType] = {
    "float64": DType("F64", 8, 0x7FF0_0000_0000_0000),
    "float32": DType("F32", 4, 0x7F80_0000),
    "float16": DType("F16", 2, 0x7C00),
    "bfloat16": DType("BF16", 2, 0x7F80),
    "int64": DType("I64", 8),
    "int32": DType("I32", 4),
    "uint8": DType("U8", 1),
}
NAMES = {dtype.code: name for name, dtype in DTYPES.items()}


class NonFiniteWeights(ValueError):
    """A tensor holds NaN or infinity and must not be published."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"Tensor {name} holds NaN or infinity. A policy with it would sample garbage, so nothing was "
            "published. Go back to the last good checkpoint, and lower the learning rate if it happens again."
        )
        self.name = name

    def __reduce__(self) -> tuple[type["NonFiniteWeights"], tuple[str]]:
        """It is raised in the learner's process and told in the trainer's."""
        return type(self), (self.name,)


class InvalidWeights(ValueError):
    """Published weights are not what their manifest or the model says; `problems` names each tensor."""

    def __init__(self, problems: Sequence[str]) -> None:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        super().__init__(
            f"Weights refused: {'; '.join(problems[:5])}{more}. The engine was not touched and keeps its "
            "policy. Publish again; if it comes back, check the model's configuration and the node's memory."
        )
        self.problems = tuple(problems)


@dataclass(frozen=True)
class Layout:
    """Where the tensors of one segment lie; the same in every version: a recycled file keeps its header."""

    header: bytes
    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    nbytes: int


def layout(specs: Sequence[TensorSpec]) -> Layout:
    """The safetensors file that holds these tensors one after the other, without gaps."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    starts = []
    for spec in specs:
        starts.append(end)
        end += spec.nbytes
        table[spec.name] = {
            "dtype": DTYPES[spec.dtype].code,
            "shape": list(spec.shape),
            "data_offsets": [starts[-1], end],
        }
    header = _header(table)
    return Layout(header, tuple(specs), tuple(len(header) + start for start in starts), len(header) + end)


def _header(table: Mapping[str, Any]) -> bytes:
    """The length, the table, and spaces up to a page, so that the data begins on one."""
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    length = -(-(8 + len(text)) // HEADER_ALIGNMENT) * HEADER_ALIGNMENT - 8
    return length.to_bytes(8, "little") + text.ljust(length)


def segment_name(version: int, index: int) -> str:
    return f"v{version}-{index}.safetensors"


def segments_of(folder: Path, version: int) -> list[Path]:
    """The files of a version, whoever wrote it."""
    return list(folder.glob(f"v{version}-*.safetensors"))


def versions_in(folder: Path) -> set[int]:
    """All versions with files there."""
    return {int(path.name[1:].partition("-")[0]) for path in folder.glob("v*-*.safetensors")}


def private_files(folder: Path) -> list[Path]:
    """What arenas in this folder have not given a version yet."""
    return list(folder.glob(".*.writing"))


def validate(weights: Weights, folder: str | Path, expected: Sequence[TensorSpec]) -> None:
    """Holds the files in `folder` to the manifest and the manifest to the model; raises `InvalidWeights`.

    Checks names, shapes, dtypes, offsets, sizes, digests where there are any, and that every value is finite.
    """
    problems = _compare_specs(weights.manifest, expected)
    mapped, unreadable = map_segments(weights, Path(folder))
    problems += unreadable
    if problems:
        raise InvalidWeights(problems)
    parts = [(spec_of(entry), bytes_of(entry, mapped)) for entry in weights.manifest]
    digest = any(entry.digest for entry in weights.manifest)
    for entry, (hexadecimal, finite) in zip(weights.manifest, examine(parts, digest, scan=True), strict=True):
        if entry.digest and hexadecimal != entry.digest:
            problems.append(f"tensor {entry.name} has another digest than its manifest: its bytes changed")
        elif not finite:
            problems.append(f"tensor {entry.name} holds NaN or infinity")
    if problems:
        raise InvalidWeights(problems)


def examine(
    parts: Sequence[tuple[TensorSpec, Bytes]], digest: bool, scan: bool, threads: int | None = None
) -> Iterator[tuple[str, bool]]:
    """For each tensor its digest (empty without `digest`) and whether it is finite (true without `scan`).

    On as many `threads` as this process may use, unless told.
    """

    def one(part: tuple[TensorSpec, Bytes]) -> tuple[str, bool]:
        spec, content = part
        return _examine_bytes(content, DTYPES[spec.dtype] if scan else None, digest)

    with ThreadPoolExecutor(min(threads or _threads(), MAX_THREADS)) as pool:
        yield from pool.map(one, parts)


def _threads() -> int:
    """This process's share, which Ray tells it in OMP_NUM_THREADS, or every processor."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return (int(told) if told.isdecimal() else 0) or len(os.sched_getaffinity(0))


def _examine_bytes(content: Bytes, dtype: DType | None, digest: bool) -> tuple[str, bool]:
    hasher = blake3()
    finite = True
    for start in range(0, content.size, CHUNK_BYTES):
        chunk = content[start : start + CHUNK_BYTES]
        if digest:
            hasher.update(chunk.data)
        if dtype is not None:
            finite = finite and is_finite(chunk, dtype)
    return hasher.hexdigest() if digest else "", finite


def is_finite(content: Bytes, dtype: DType) -> bool:
    """Whether no float here is NaN or infinite.

    Positive floats sort like signed integers and negative ones like unsigned integers, so that two maxima
    find an exponent of all ones, at one vector instruction each: 30 times as fast as `torch.isfinite`.
    """
    if dtype.infinity is None or content.size == 0:
        return True
    signed = content.view(f"i{dtype.itemsize}")
    unsigned = content.view(f"u{dtype.itemsize}")
    negative_infinity = dtype.infinity | (1 << (8 * dtype.itemsize - 1))
    return bool(signed.max() < dtype.infinity) and bool(unsigned.max() < negative_infinity)


def _compare_specs(manifest: Sequence[TensorEntry], expected: Sequence[TensorSpec]) -> list[str]:
    wanted = {spec.name: spec for spec in expected}
    given = {entry.name: entry for entry in manifest}
    problems = [f"tensor {name} is missing" for name in wanted if name not in given]
    problems += [f"tensor {name} is not one of the model's" for name in given if name not in wanted]
    if len(given) != len(manifest):
        problems.append("the manifest names a tensor twice")
    for name in wanted.keys() & given.keys():
        if given[name].dtype != wanted[name].dtype:
            problems.append(f"tensor {name} is {given[name].dtype}, and the model's is {wanted[name].dtype}")
        if tuple(given[name].shape) != wanted[name].shape:
            problems.append(f"tensor {name} has shape {given[name].shape}, and the model's {wanted[name].shape}")
    return problems


def map_segments(weights: Weights, folder: Path) -> tuple[list[Bytes], list[str]]:
    """The segments' bytes, and where the manifest does not agree with them."""
    mapped = []
    found: dict[tuple[int, str], _Place] = {}
    for index, name in enumerate(weights.segments):
        try:
            content = _map_file(folder, name)
            found |= {(index, tensor): place for tensor, place in _read_header(content).items()}
        except (OSError, ValueError) as error:
            return [], [f"segment {name} is not readable: {error}"]
        mapped.append(content)
    return mapped, _compare_places(weights.manifest, found)


def _compare_places(manifest: Sequence[TensorEntry], found: Mapping[tuple[int, str], _Place]) -> list[str]:
    told = {
        (entry.segment, entry.name): (entry.dtype, tuple(entry.shape), entry.offset, entry.nbytes) for entry in manifest
    }
    problems = [f"tensor {name} lies in segment {index} without a manifest" for index, name in found.keys() - told]
    for (index, name), place in told.items():
        if (index, name) not in found:
            problems.append(f"tensor {name} is not in segment {index}")
        elif found[index, name] != place:
            problems.append(f"tensor {name} is {found[index, name]} in its file, and {place} in the manifest")
    return problems


def _map_file(folder: Path, name: str) -> Bytes:
    if not name or Path(name).name != name:
        raise ValueError("its name is not a plain file name")
    with open(folder / name, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise ValueError(f"it has {size} bytes, which is no safetensors file")
        # Private and writable: torch warns of read-only memory, and what a reader writes stays its own.
        return np.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY), dtype=np.uint8)


def _read_header(content: Bytes) -> dict[str, _Place]:
    """What the file says of itself, with every number held to the size of the file."""
    length = int.from_bytes(content[:8].tobytes(), "little")
    if length > min(MAX_HEADER_BYTES, content.size - 8):
        raise ValueError(f"its header claims {length} bytes, and the file has {content.size}")
    try:
        table = json.loads(content[8 : 8 + length].tobytes())
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(table, dict):
        raise ValueError("its header is no JSON object")
    table.pop("__metadata__", None)
    return {name: _read_place(name, entry, 8 + length, content.size) for name, entry in table.items()}


def _read_place(name: str, entry: Any, start: int, size: int) -> _Place:
    match entry:
        case {"dtype": str(code), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if code in NAMES:
            pass
        case _:
            raise ValueError(f"tensor {name} has no dtype, shape and offsets that we know")
    if not all(type(extent) is int and extent >= 0 for extent in shape):
        raise ValueError(f"tensor {name} has the shape {shape}")
    nbytes = prod(shape) * DTYPES[NAMES[code]].itemsize
    if not 0 <= begin <= end <= size - start or end - begin != nbytes:
        raise ValueError(
            f"tensor {name} claims bytes {begin} to {end}, needs {nbytes}, and the file has {size - start}"
        )
    return NAMES[code], tuple(shape), start + begin, nbytes


def spec_of(entry: TensorEntry) -> TensorSpec:
    return TensorSpec(entry.name, entry.dtype, tuple(entry.shape))


def bytes_of(entry: TensorEntry, mapped: Sequence[Bytes]) -> Bytes:
    return mapped[entry.segment][entry.offset : entry.offset + entry.nbytes]
