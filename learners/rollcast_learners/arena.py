"""The weight arena: a policy version as safetensors files in shared memory, written once, mapped by readers.

Owns: writing a version from torch's tensors, what becomes of its pages later, and tensors as views of mapped files.
How files are laid out and held to their manifest is in `segments.py`, without torch. Does not know who announces a
version, who counts its readers, how bytes reach another node, or any engine.

Tied tensors are written once, under the name that comes first in the model's `state_dict`: of
`model.embed_tokens.weight` and `lm_head.weight` the first stays. That is what Hugging Face writes, and what
its loaders and vLLM's tie again.
"""

import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch

from rollcast_learners.segments import (
    DTYPES,
    HEADER_ALIGNMENT,
    MAX_THREADS,
    Bytes,
    InvalidWeights,
    Layout,
    NonFiniteWeights,
    TensorSpec,
    bytes_of,
    examine,
    layout,
    map_segments,
    segment_name,
    spec_of,
)
from rollcast_learners.types import TensorEntry, Weights

GIB = 1 << 30
_Pair = tuple[torch.Tensor, torch.Tensor]


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
        return sum(part.nbytes for part in self._layouts)

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
        for part in self._layouts[len(self._spare) :]:
            self._spare.append(_create(self._private(), part))
        return self._spare

    def _examine(self, segments: list[_Segment], digest: bool, scan: bool) -> dict[str, str]:
        parts = [
            (spec, segment.bytes[offset : offset + spec.nbytes])
            for segment, layout in zip(segments, self._layouts, strict=True)
            for spec, offset in zip(layout.specs, layout.offsets, strict=True)
        ]
        digests = {}
        examined = examine(parts, digest, scan, torch.get_num_threads())
        for (spec, _), (hexadecimal, finite) in zip(parts, examined, strict=True):
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


def open_tensors(weights: Weights, folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors as views of the mapped files, without a copy. Writing to one never reaches the file.

    Offsets and sizes are held to the files first; the values are not looked at (see `validate`).
    """
    mapped, problems = map_segments(weights, Path(folder))
    if problems:
        raise InvalidWeights(problems)
    return {entry.name: _view(spec_of(entry), bytes_of(entry, mapped)) for entry in weights.manifest}


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
    return torch.from_numpy(content).view(getattr(torch, spec.dtype)).view(spec.shape)
