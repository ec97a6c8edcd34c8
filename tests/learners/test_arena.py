"""The weight arena: what is written comes back, and what is not whole is refused by name."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rollcast_learners.arena import Arena, open_tensors, policy_specs
from rollcast_learners.segments import DTYPES, InvalidWeights, NonFiniteWeights, TensorSpec, is_finite, validate
from rollcast_learners.types import TensorEntry, Weights
from tiny_model import write_tiny_model

SHARED_MEMORY = Path("/dev/shm")
Tamper = Callable[[Path, Weights], Weights]


@pytest.fixture
def folder() -> Iterator[Path]:
    path = SHARED_MEMORY / f"rollcast-test-arena-{os.getpid()}"
    yield path
    for left in path.glob("*") if path.exists() else ():
        left.unlink()
    if path.exists():
        path.rmdir()


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """A tiny Llama's tensors, with one of another width among them."""
    model = write_tiny_model(tmp_path_factory.mktemp("model"))
    tensors = load_file(model / "model.safetensors")
    return tensors | {"scale": torch.randn(3, 5), "offset": torch.tensor(7, dtype=torch.int64)}


def publish(
    arena: Arena,
    version: int,
    tensors: dict[str, torch.Tensor] | Iterator[tuple[str, torch.Tensor]],
    digest: bool = True,
) -> Weights:
    segments, manifest = arena.write(version, tensors, digest=digest)
    return Weights("full", version, manifest, segments, home="here", folder=str(arena.folder))


def assert_same(opened: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    assert opened.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert opened[name].dtype == tensor.dtype
        assert torch.equal(opened[name], tensor), name


@pytest.mark.parametrize("segment_bytes", [1 << 30, 64 << 10])
def test_what_was_written_comes_back(folder: Path, policy: dict[str, torch.Tensor], segment_bytes: int) -> None:
    arena = Arena(folder, policy_specs(policy), segment_bytes)
    weights = publish(arena, 3, policy)
    validate(weights, folder, arena.specs)
    assert_same(open_tensors(weights, folder), policy)
    assert weights.nbytes == sum(tensor.nbytes for tensor in policy.values())
    assert (len(weights.segments) > 3) == (segment_bytes < 1 << 30)
    for name in weights.segments:
        assert (folder / name).stat().st_size <= segment_bytes
        assert (folder / name).stat().st_mode & 0o777 == 0o600


def test_segments_are_plain_safetensors_files(folder: Path, policy: dict[str, torch.Tensor]) -> None:
    arena = Arena(folder, policy_specs(policy), 64 << 10)
    weights = publish(arena, 0, policy)
    loaded = {}
    for name in weights.segments:
        loaded |= load_file(folder / name)
    assert_same(loaded, policy)


def test_a_tensor_larger_than_a_segment_has_its_own(folder: Path) -> None:
    tensors = {"small": torch.ones(4), "large": torch.randn(9000), "last": torch.ones(4)}
    weights = publish(Arena(folder, policy_specs(tensors), 8192), 0, tensors)
    assert [entry.segment for entry in weights.manifest] == [0, 1, 2]
    assert_same(open_tensors(weights, folder), tensors)


def test_tied_tensors_are_written_once_and_cast(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_tiny_model(tmp_path, tied=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    specs = policy_specs(model.state_dict(), dtype="bfloat16")
    assert "lm_head.weight" not in {spec.name for spec in specs}
    weights = publish(Arena(folder, specs), 0, model.state_dict())
    shutil.copy(folder / weights.segments[0], tmp_path / "model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.bfloat16())


def test_untied_tensors_are_all_written(tmp_path: Path) -> None:
    tensors = load_file(write_tiny_model(tmp_path, tied=False) / "model.safetensors")
    assert "lm_head.weight" in {spec.name for spec in policy_specs(tensors)}


def test_pages_of_a_retired_version_are_reused(folder: Path, policy: dict[str, torch.Tensor]) -> None:
    arena = Arena(folder, policy_specs(policy))
    first = publish(arena, 0, policy)
    inode = (folder / first.segments[0]).stat().st_ino
    arena.retire(0)
    assert not (folder / first.segments[0]).exists(), "a retired version must not be found by a new reader"
    changed = {name: tensor + 1 for name, tensor in policy.items()}
    second = publish(arena, 1, changed)
    assert (folder / second.segments[0]).stat().st_ino == inode
    assert_same(open_tensors(second, folder), changed)
    third = publish(arena, 2, policy)
    assert (folder / third.segments[0]).stat().st_ino != inode
    assert_same(open_tensors(second, folder), changed)


def test_unlink_leaves_readers_their_memory_and_close_leaves_nothing(
    folder: Path, policy: dict[str, torch.Tensor]
) -> None:
    arena = Arena(folder, policy_specs(policy))
    weights = publish(arena, 0, policy)
    publish(arena, 1, policy)
    arena.retire(1)
    opened = open_tensors(weights, folder)
    arena.unlink(0)
    assert_same(opened, policy)
    arena.close()
    assert not folder.exists()


def test_tensors_may_come_one_by_one(folder: Path, policy: dict[str, torch.Tensor]) -> None:
    arena = Arena(folder, policy_specs(policy), 64 << 10)
    whole = publish(arena, 0, policy)
    one_by_one = publish(arena, 1, iter(policy.items()))
    assert one_by_one.manifest == whole.manifest
    assert_same(open_tensors(one_by_one, folder), policy)
    with pytest.raises(ValueError, match=r"scale has shape \(5, 3\)"):
        publish(arena, 2, iter((policy | {"scale": torch.zeros(5, 3)}).items()))
    with pytest.raises(ValueError, match=r"is missing"):
        publish(arena, 2, iter(list(policy.items())[1:]))
    assert_same(open_tensors(publish(arena, 2, iter(policy.items())), folder), policy)


def test_a_reader_cannot_change_what_others_read(folder: Path, policy: dict[str, torch.Tensor]) -> None:
    weights = publish(Arena(folder, policy_specs(policy)), 0, policy)
    open_tensors(weights, folder)["scale"].zero_()
    assert_same(open_tensors(weights, folder), policy)


def test_a_version_is_written_once(folder: Path, policy: dict[str, torch.Tensor]) -> None:
    arena = Arena(folder, policy_specs(policy))
    publish(arena, 0, policy)
    with pytest.raises(ValueError, match="Version 0 was written before"):
        publish(arena, 0, policy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -float("nan")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "scale"])
def test_non_finite_weights_are_not_published(
    folder: Path, policy: dict[str, torch.Tensor], name: str, value: float
) -> None:
    arena = Arena(folder, policy_specs(policy))
    sick = policy | {name: policy[name].clone()}
    sick[name].view(-1)[-1] = value
    with pytest.raises(NonFiniteWeights, match=name):
        publish(arena, 0, sick)
    assert not list(folder.glob("v*")), "nothing may appear under the version's name"
    assert_same(open_tensors(publish(arena, 1, policy), folder), policy)


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_the_scan_agrees_with_torch(name: str) -> None:
    dtype = DTYPES[name]
    bits = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 1 << 16, dtype=np.uint8))
    for value, content in zip(bits.view(getattr(torch, name)), bits.view(-1, dtype.itemsize), strict=True):
        assert is_finite(content.numpy(), dtype) == bool(torch.isfinite(value)), value
    limits = torch.finfo(getattr(torch, name))
    edges = torch.tensor([limits.max, limits.min, limits.tiny, -0.0, 0.0], dtype=getattr(torch, name))
    assert is_finite(edges.view(torch.uint8).numpy(), dtype)


def test_refused_before_anything_is_written(folder: Path, policy: dict[str, torch.Tensor]) -> None:
    arena = Arena(folder, policy_specs(policy))
    with pytest.raises(ValueError, match=r"model\.norm\.weight is missing"):
        publish(arena, 0, {name: tensor for name, tensor in policy.items() if name != "model.norm.weight"})
    with pytest.raises(ValueError, match=r"scale has shape \(5, 3\)"):
        publish(arena, 0, policy | {"scale": torch.zeros(5, 3)})
    with pytest.raises(ValueError, match="complex64"):
        Arena(folder, [TensorSpec("wave", "complex64", (2,))])
    assert not list(folder.iterdir())


def test_full_shared_memory_is_an_error_and_not_a_signal(folder: Path) -> None:
    arena = Arena(folder, [TensorSpec("huge", "float32", (1 << 44,))])
    with pytest.raises(OSError, match="No room for"):
        arena.write(0, {"huge": torch.zeros(1).expand(1 << 44)})
    assert not list(folder.iterdir())


def flip_a_bit(folder: Path, weights: Weights) -> Weights:
    entry = named(weights, "model.layers.0.mlp.up_proj.weight")
    patch(folder / weights.segments[entry.segment], entry.offset + 17, lambda byte: byte ^ 1)
    return weights


def plant_a_nan(folder: Path, weights: Weights) -> Weights:
    entry = named(weights, "model.layers.0.mlp.up_proj.weight")
    path = folder / weights.segments[entry.segment]
    patch(path, entry.offset, lambda _: 0xC0)
    patch(path, entry.offset + 1, lambda _: 0x7F)
    return without_digests(weights)


def drop_a_tensor(folder: Path, weights: Weights) -> Weights:
    name = "model.layers.0.mlp.up_proj.weight"
    return replace(weights, manifest=tuple(entry for entry in weights.manifest if entry.name != name))


def add_a_tensor(folder: Path, weights: Weights) -> Weights:
    extra = replace(weights.manifest[0], name="model.layers.0.mlp.up_proj.weight.extra")
    return replace(weights, manifest=(*weights.manifest, extra))


def repeat_a_tensor(folder: Path, weights: Weights) -> Weights:
    return replace(weights, manifest=(*weights.manifest, weights.manifest[0]))


def truncate(folder: Path, weights: Weights) -> Weights:
    last = folder / weights.segments[-1]
    os.truncate(last, last.stat().st_size - 2)
    return weights


def empty(folder: Path, weights: Weights) -> Weights:
    os.truncate(folder / weights.segments[0], 0)
    return weights


def remove(folder: Path, weights: Weights) -> Weights:
    (folder / weights.segments[0]).unlink()
    return weights


def escape(folder: Path, weights: Weights) -> Weights:
    return replace(weights, segments=("../" + folder.name + "/" + weights.segments[0], *weights.segments[1:]))


def change(**fields: object) -> Tamper:
    def tamper(folder: Path, weights: Weights) -> Weights:
        name = "model.layers.0.mlp.up_proj.weight"
        manifest = [replace(row, **fields) if row.name == name else row for row in weights.manifest]  # type: ignore[arg-type]
        return replace(weights, manifest=tuple(manifest))

    return tamper


def claim(**fields: object) -> Tamper:
    """Rewrites the header of the first segment in place, keeping its length."""

    def tamper(folder: Path, weights: Weights) -> Weights:
        path = folder / weights.segments[0]
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        table = json.loads(content[8 : 8 + length])
        table["model.layers.0.mlp.up_proj.weight"] |= fields
        path.write_bytes(content[:8] + json.dumps(table).encode().ljust(length) + content[8 + length :])
        return weights

    return tamper


def rewrite(header: bytes) -> Tamper:
    def tamper(folder: Path, weights: Weights) -> Weights:
        (folder / weights.segments[0]).write_bytes(header)
        return weights

    return tamper


def named(weights: Weights, name: str) -> TensorEntry:
    return next(entry for entry in weights.manifest if entry.name == name)


def without_digests(weights: Weights) -> Weights:
    return replace(weights, manifest=tuple(replace(entry, digest="") for entry in weights.manifest))


def patch(path: Path, offset: int, change: Callable[[int], int]) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([change(byte)]))


TENSOR = r"model\.layers\.0\.mlp\.up_proj\.weight"
DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    ("tamper", "named_problem"),
    [
        pytest.param(flip_a_bit, f"{TENSOR} has another digest", id="bit flip"),
        pytest.param(plant_a_nan, f"{TENSOR} holds NaN", id="nan"),
        pytest.param(drop_a_tensor, f"{TENSOR} is missing", id="missing tensor"),
        pytest.param(add_a_tensor, rf"{TENSOR}\.extra is not one of the model's", id="extra tensor"),
        pytest.param(repeat_a_tensor, "names a tensor twice", id="repeated tensor"),
        pytest.param(truncate, r"tensor .* claims bytes", id="truncated"),
        pytest.param(empty, "has 0 bytes", id="empty"),
        pytest.param(remove, "not readable", id="removed"),
        pytest.param(escape, "not a plain file name", id="path escape"),
        pytest.param(change(shape=(64, 128)), f"{TENSOR} has shape", id="wrong shape"),
        pytest.param(change(dtype="float16"), f"{TENSOR} is float16", id="wrong dtype"),
        pytest.param(change(nbytes=1 << 40), f"tensor {TENSOR} is", id="wrong size"),
        pytest.param(change(offset=1 << 40), f"tensor {TENSOR} is", id="offset past the end"),
        pytest.param(change(offset=-8), f"tensor {TENSOR} is", id="negative offset"),
        pytest.param(change(segment=9), f"{TENSOR} .*in segment 9", id="no such segment"),
        pytest.param(change(segment=-1), f"{TENSOR} .*in segment -1", id="negative segment"),
        pytest.param(claim(data_offsets=[0, 1 << 60]), f"{TENSOR} claims bytes", id="header past the end"),
        pytest.param(claim(data_offsets=[-16384, 0]), f"{TENSOR} claims bytes", id="header before the start"),
        pytest.param(claim(data_offsets=[16384, 0]), f"{TENSOR} claims bytes", id="header backwards"),
        pytest.param(claim(data_offsets=[0.0, 16384.0]), f"{TENSOR} has no dtype", id="header of floats"),
        pytest.param(claim(shape=[-128, -64]), f"{TENSOR} has the shape", id="header of negative shape"),
        pytest.param(claim(shape=[True, 8192]), f"{TENSOR} has the shape", id="header of odd shape"),
        pytest.param(claim(dtype="F7"), f"{TENSOR} has no dtype", id="header of unknown dtype"),
        pytest.param(claim(dtype=["BF16"]), f"{TENSOR} has no dtype", id="header of odd dtype"),
        pytest.param(rewrite(b"\xff" * 4096), "header claims", id="header length too large"),
        pytest.param(rewrite((4).to_bytes(8, "little") + b"nope"), "not readable", id="header no json"),
        pytest.param(rewrite((2).to_bytes(8, "little") + b"[]"), "no JSON object", id="header no table"),
        pytest.param(rewrite(len(DEEP).to_bytes(8, "little") + DEEP), "nested too deeply", id="header too deep"),
        pytest.param(rewrite((2).to_bytes(8, "little") + b"\xff\xfe"), "not readable", id="header no utf-8"),
    ],
)
def test_tampered_weights_are_refused_by_name(
    folder: Path, policy: dict[str, torch.Tensor], tamper: Tamper, named_problem: str
) -> None:
    arena = Arena(folder, policy_specs(policy))
    weights = tamper(folder, publish(arena, 0, policy))
    with pytest.raises(InvalidWeights, match=named_problem):
        validate(weights, folder, arena.specs)


@pytest.mark.parametrize("tamper", [change(nbytes=1 << 40), change(offset=1 << 40), truncate, change(segment=9)])
def test_bytes_outside_the_file_are_never_mapped(folder: Path, policy: dict[str, torch.Tensor], tamper: Tamper) -> None:
    weights = tamper(folder, publish(Arena(folder, policy_specs(policy)), 0, policy))
    with pytest.raises(InvalidWeights):
        open_tensors(weights, folder)


def test_without_digests_the_rest_is_still_checked(folder: Path, policy: dict[str, torch.Tensor]) -> None:
    arena = Arena(folder, policy_specs(policy))
    weights = publish(arena, 0, policy, digest=False)
    assert {entry.digest for entry in weights.manifest} == {""}
    validate(weights, folder, arena.specs)
    with pytest.raises(InvalidWeights, match="holds NaN"):
        validate(plant_a_nan(folder, weights), folder, arena.specs)
