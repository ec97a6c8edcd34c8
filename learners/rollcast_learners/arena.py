"""The weight arena: a policy version as safetensors files in shared memory, written once, mapped by readers.

Owns: the layout, the bytes, their digests and their finiteness, on both sides of a publish. Does not know who
announces a version, who counts its readers, how bytes reach another node, or any engine.

Tied tensors are written once, under the name that comes first in the model's `state_dict`: of
`model.embed_tokens.weight` and `lm_head.weight` the first stays. That is what Hugging Face writes, and what
its loaders and vLLM's tie again.
"""

import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray

from rollcast_learners.types import TensorEntry, Weights

GIB = 1 << 30
MAX_HEADER_BYTES = 100_000_000
"""The bound of the safetensors format."""
CHUNK_BYTES = 1 << 19
"""Digest and scan read memory once: a chunk stays in the processor's cache for both."""
HEADER_ALIGNMENT = 4096
MAX_THREADS = 8
"""Memory bandwidth ends here."""

Bytes = NDArray[np.uint8]
_Pair = tuple[torch.Tensor, torch.Tensor]
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
    """A dtype in the words of torch and of safetensors; `infinity` is the bit pattern of +inf of a float."""

    torch: torch.dtype
    code: str
    itemsize: int
    infinity: int | None = None


DTYPES: Mapping[str, DType] = {
    "float64": DType(torch.float64, "F64", 8, 0x7FF0_0000_0000_0000),
    "float32": DType(torch.float32, "F32", 4, 0x7F80_0000),
    "float16": DType(torch.float16, "F16", 2, 0x7C00),
    "bfloat16": DType(torch.bfloat16, "BF16", 2, 0x7F80),
    "int64": DType(torch.int64, "I64", 8),
    "int32": DType(torch.int32, "I32", 4),
    "uint8": DType(torch.uint8, "U8", 1),
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


def policy_specs(tensors: Mapping[str, torch.Tensor], dtype: str | None = None) -> tuple[TensorSpec, ...]:
    """The specs of `model.state_dict()`: tied aliases dropped, floats as `dtype` when one is given."""
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, tensor in tensors.items():
        seen.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name)
    return tuple(_spec(name, tensors[name], dtype) for name in seen.values())


def _spec(name: str, tensor: torch.Tensor, dtype: str | None) -> TensorSpec:
    own = str(tensor.dtype).removeprefix("torch.")
    return TensorSpec(name, dtype if dtype and tensor.is_floating_point() else own, tuple(tensor.shape))


@dataclass
class _Segment:
    """One file of a version, mapped for writing, with a view for each of its tensors."""

    path: Path
    bytes: Bytes
    views: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """Where the tensors of one segment lie; the same in every version: a recycled file keeps its header."""

    header: bytes
    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    nbytes: int


class Arena:
    """The publisher's side: lays the policy out once, then writes version after version, one at a time.

    A segment holds at most `segment_bytes`, and a tensor larger than that has one of its own, since
    safetensors cannot split it.
    """

    def __init__(self, folder: str | Path, specs: Sequence[TensorSpec], segment_bytes: int = GIB) -> None:
        _check_specs(specs)
        self.folder = Path(folder)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.specs = tuple(specs)
        self._layouts = tuple(layout(part) for part in _partition(specs, segment_bytes))
        self._versions: dict[int, list[_Segment]] = {}
        self._spare: list[_Segment] = []
        self._serial = count()

    @property
    def nbytes(self) -> int:
        """Bytes of shared memory that one version takes."""
        return sum(layout.nbytes for layout in self._layouts)

    def write(
        self,
        version: int,
        tensors: Mapping[str, torch.Tensor] | Iterator[tuple[str, torch.Tensor]],
        *,
        digest: bool = True,
        scan: bool = True,
    ) -> tuple[tuple[str, ...], tuple[TensorEntry, ...]]:
        """Writes `version` and returns the names of its segments and its manifest.

        Tensors that are never in memory all at once come as an iterator, and are copied one by one. A tensor of
        another dtype than its spec is cast while it is copied. Nothing appears under the version's name unless all of
        it is there and, with `scan`, finite.
        """
        if version in self._versions:
            raise ValueError(f"Version {version} was written before: versions only grow, so publish a higher one.")
        if isinstance(tensors, Mapping):
            self._check_tensors(tensors)
            segments = self._take()
            _fill(segments, tensors)
        else:
            segments = self._take()
            self._fill_one_by_one(segments, tensors)
        digests = self._examine(segments, digest, scan) if digest or scan else {}
        self._spare = []
        self._versions[version] = self._name(version, segments)
        return self._describe(version, digests)

    def retire(self, version: int) -> None:
        """The owner says that no reader holds `version`: its warm pages carry a later version."""
        segments = self._versions.pop(version)
        self._discard(self._spare)
        self._spare = [self._rename(segment, self._private()) for segment in segments]

    def unlink(self, version: int) -> None:
        """Removes the files of `version`; memory that a reader still maps lives until the reader lets go."""
        self._discard(self._versions.pop(version))

    def close(self) -> None:
        """Removes every file, and the folder when nothing else lies in it."""
        for version in list(self._versions):
            self.unlink(version)
        self._discard(self._spare)
        self._spare = []
        with suppress(OSError):
            self.folder.rmdir()

    def _check_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for spec in self.specs:
            tensor = tensors.get(spec.name)
            if tensor is None:
                raise ValueError(f"Tensor {spec.name} is missing. Give every tensor that the arena was laid out for.")
            if tuple(tensor.shape) != spec.shape:
                raise ValueError(
                    f"Tensor {spec.name} has shape {tuple(tensor.shape)}, and the arena was laid out for "
                    f"{spec.shape}. Make a new arena when the model changes."
                )

    def _fill_one_by_one(self, segments: list[_Segment], tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        views = {name: view for part in segments for name, view in part.views.items()}
        given: dict[str, torch.Tensor] = {}
        for name, tensor in tensors:
            given[name] = tensor.to("meta")  # Its shape, without its bytes.
            if name in views and tensor.shape == views[name].shape:
                views[name].copy_(tensor)
        self._check_tensors(given)

    def _take(self) -> list[_Segment]:
        """Private files to write into: spare until the version is whole, so a failed write keeps them."""
        for layout in self._layouts[len(self._spare) :]:
            self._spare.append(_create(self._private(), layout))
        return self._spare

    def _examine(self, segments: list[_Segment], digest: bool, scan: bool) -> dict[str, str]:
        parts = [
            (spec, segment.bytes[offset : offset + spec.nbytes])
            for segment, layout in zip(segments, self._layouts, strict=True)
            for spec, offset in zip(layout.specs, layout.offsets, strict=True)
        ]
        digests = {}
        for (spec, _), (hexadecimal, finite) in zip(parts, examine(parts, digest, scan), strict=True):
            if not finite:
                raise NonFiniteWeights(spec.name)
            digests[spec.name] = hexadecimal
        return digests

    def _name(self, version: int, segments: list[_Segment]) -> list[_Segment]:
        return [self._rename(part, self.folder / segment_name(version, index)) for index, part in enumerate(segments)]

    def _describe(self, version: int, digests: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[TensorEntry, ...]]:
        manifest = tuple(
            TensorEntry(spec.name, spec.dtype, spec.shape, index, offset, spec.nbytes, digests.get(spec.name, ""))
            for index, layout in enumerate(self._layouts)
            for spec, offset in zip(layout.specs, layout.offsets, strict=True)
        )
        return tuple(segment.path.name for segment in self._versions[version]), manifest

    def _private(self) -> Path:
        return self.folder / f".{os.getpid()}-{next(self._serial)}.writing"

    def _rename(self, segment: _Segment, target: Path) -> _Segment:
        segment.path.rename(target)
        segment.path = target
        return segment

    def _discard(self, segments: Iterable[_Segment]) -> None:
        for segment in segments:
            segment.path.unlink(missing_ok=True)


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
    mapped, unreadable = _map_segments(weights, Path(folder))
    problems += unreadable
    if problems:
        raise InvalidWeights(problems)
    parts = [(_spec_of(entry), _bytes_of(entry, mapped)) for entry in weights.manifest]
    digest = any(entry.digest for entry in weights.manifest)
    for entry, (hexadecimal, finite) in zip(weights.manifest, examine(parts, digest, scan=True), strict=True):
        if entry.digest and hexadecimal != entry.digest:
            problems.append(f"tensor {entry.name} has another digest than its manifest: its bytes changed")
        elif not finite:
            problems.append(f"tensor {entry.name} holds NaN or infinity")
    if problems:
        raise InvalidWeights(problems)


def open_tensors(weights: Weights, folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors as views of the mapped files, without a copy. Writing to one never reaches the file.

    Offsets and sizes are held to the files first; the values are not looked at (see `validate`).
    """
    mapped, problems = _map_segments(weights, Path(folder))
    if problems:
        raise InvalidWeights(problems)
    return {entry.name: _view(_spec_of(entry), _bytes_of(entry, mapped)) for entry in weights.manifest}


@contextmanager
def one_thread_each() -> Iterator[int]:
    """Lets torch work on one thread inside an operation, and says how many threads may share the operations.

    A policy is hundreds of small tensors, and at each one the threads of a parallel loop wait for the last of
    them: beside other work on two cores that made a publish 66 times as slow as a copy. vLLM replaces
    `torch.set_num_threads` in its CPU workers, so this calls what lies below it.
    """
    set_threads: Callable[[int], None] = torch._C.set_num_threads
    before = torch.get_num_threads()
    set_threads(1)
    try:
        yield min(before, MAX_THREADS)
    finally:
        set_threads(before)


def examine(parts: Sequence[tuple[TensorSpec, Bytes]], digest: bool, scan: bool) -> Iterator[tuple[str, bool]]:
    """For each tensor its digest (empty without `digest`) and whether it is finite (true without `scan`)."""

    def one(part: tuple[TensorSpec, Bytes]) -> tuple[str, bool]:
        spec, content = part
        return _examine_bytes(content, DTYPES[spec.dtype] if scan else None, digest)

    with ThreadPoolExecutor(min(torch.get_num_threads(), MAX_THREADS)) as pool:
        yield from pool.map(one, parts)


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


def _check_specs(specs: Sequence[TensorSpec]) -> None:
    names = [spec.name for spec in specs]
    if not names or len(set(names)) != len(names):
        raise ValueError("An arena needs at least one tensor, and a name of its own for each.")
    for spec in specs:
        if spec.dtype not in DTYPES:
            raise ValueError(
                f"Tensor {spec.name} has dtype {spec.dtype}, which the arena cannot publish. Use one of "
                f"{', '.join(DTYPES)}."
            )


def _partition(specs: Sequence[TensorSpec], segment_bytes: int) -> list[list[TensorSpec]]:
    """Fills segments in the order given; wide elements first, so that without padding all stay aligned."""
    parts: list[list[TensorSpec]] = [[]]
    used = 0
    for spec in sorted(specs, key=lambda spec: -DTYPES[spec.dtype].itemsize):
        if parts[-1] and used + spec.nbytes > segment_bytes - HEADER_ALIGNMENT:
            parts.append([])
            used = 0
        parts[-1].append(spec)
        used += spec.nbytes
    return parts


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


def _create(path: Path, layout: Layout) -> _Segment:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        _allocate(descriptor, layout.nbytes, path)
        mapped = mmap.mmap(descriptor, layout.nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    finally:
        os.close(descriptor)
    content = np.frombuffer(mapped, dtype=np.uint8)
    content[: len(layout.header)] = np.frombuffer(layout.header, dtype=np.uint8)
    views = {
        spec.name: _view(spec, content[offset : offset + spec.nbytes])
        for spec, offset in zip(layout.specs, layout.offsets, strict=True)
    }
    return _Segment(path, content, views)


def _allocate(descriptor: int, nbytes: int, path: Path) -> None:
    """Takes the pages now: writing to a mapped page when memory is full would end the process by SIGBUS."""
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"No room for {nbytes / 1e6:.0f} MB of weights in {path.parent} ({error.strerror}): the node's "
            "shared memory is full. Remove what other runs left there, or give the container more of it "
            "(docker: --shm-size)",
        ) from error


def _fill(segments: Sequence[_Segment], tensors: Mapping[str, torch.Tensor]) -> None:
    pairs = [(view, tensors[name].detach()) for part in segments for name, view in part.views.items()]
    with one_thread_each() as threads, ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(_copy_all, _share_out(pairs, threads)):
            pass


def _share_out(pairs: Sequence[_Pair], shares: int) -> list[list[_Pair]]:
    """Lists of about the same bytes, so that threads meet once, at the end."""
    lists: list[list[_Pair]] = [[] for _ in range(shares)]
    filled = [0] * shares
    for pair in sorted(pairs, key=lambda pair: -pair[0].nbytes):
        emptiest = filled.index(min(filled))
        lists[emptiest].append(pair)
        filled[emptiest] += pair[0].nbytes
    return lists


def _copy_all(pairs: Sequence[_Pair]) -> None:
    for target, source in pairs:
        target.copy_(source)


def _view(spec: TensorSpec, content: Bytes) -> torch.Tensor:
    return torch.from_numpy(content).view(DTYPES[spec.dtype].torch).view(spec.shape)


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


def _map_segments(weights: Weights, folder: Path) -> tuple[list[Bytes], list[str]]:
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


def _spec_of(entry: TensorEntry) -> TensorSpec:
    return TensorSpec(entry.name, entry.dtype, tuple(entry.shape))


def _bytes_of(entry: TensorEntry, mapped: Sequence[Bytes]) -> Bytes:
    return mapped[entry.segment][entry.offset : entry.offset + entry.nbytes]
