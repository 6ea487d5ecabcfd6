"""Files we write are files that the official package reads, with the size that was predicted; a full disk
leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quant.checkpoint.dtypes import HEADER, TORCH
from quant.checkpoint.header import read_header
from quant.checkpoint.writer import ShardWriter, TensorSpec, file_bytes, file_digest, write_text
from quant.errors import DiskFull


def spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, HEADER[tensor.dtype], tuple(tensor.shape))


@pytest.mark.parametrize("dtype", sorted(TORCH.values(), key=str), ids=str)
def test_the_official_package_loads_what_was_written_in_any_order(dtype: torch.dtype, tmp_path: Path) -> None:
    item = torch.empty(0, dtype=dtype).element_size()
    tensors = {f"t{i}": torch.randint(0, 2, (3, i * item), dtype=torch.uint8).view(dtype) for i in (1, 2, 5)}
    tensors["empty"] = torch.empty(0, 4, dtype=dtype)
    specs = [spec(n, t) for n, t in tensors.items()]
    with ShardWriter(tmp_path / "m.safetensors", specs) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    loaded = load_file(tmp_path / "m.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (dtype, tensor.shape)
        assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8))
    assert (tmp_path / "m.safetensors").stat().st_size == file_bytes(specs)
    assert read_header(tmp_path / "m.safetensors")[1] == {"format": "pt"}


def test_the_digest_is_that_of_the_file_whatever_order_and_pieces_it_was_written_in(tmp_path: Path) -> None:
    data = torch.randint(0, 256, (3 << 20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    specs = [
        TensorSpec("large", "U8", (3 << 20,)),
        TensorSpec("none", "F32", (0, 2)),
        TensorSpec("small", "U8", (5,)),
    ]
    raw, digests = data.numpy().tobytes(), set()
    for size, order in ((1 << 20, 1), (7, -1), (3 << 20, 1), (300_001, -1)):
        reused = bytearray(size)

        def pieces(size: int = size, reused: bytearray = reused) -> Iterator[memoryview]:
            for start in range(0, len(raw), size):  # one buffer for all pieces, as a reader has it
                part = raw[start : start + size]
                reused[: len(part)] = part
                yield memoryview(reused)[: len(part)]

        with ShardWriter(tmp_path / "m.safetensors", specs) as writer:
            for name in ["large", "none", "small"][::order]:
                writer.write_pieces(name, {"large": pieces(), "none": [], "small": [b"abcde"]}[name])
        digests |= {writer.digest, file_digest(tmp_path / "m.safetensors")}
    assert len(digests) == 1 and len(digests.pop()) == 64
    before = file_digest(tmp_path / "m.safetensors")
    for position in (10, -1, -6, -(1 << 20)):
        changed = bytearray((tmp_path / "m.safetensors").read_bytes())
        if position > 0:  # in the header, where it stays valid: another name of the same length
            changed = bytearray(bytes(changed).replace(b'"small"', b'"smell"'))
        else:
            changed[position] ^= 1
        (tmp_path / "x.safetensors").write_bytes(changed)
        assert file_digest(tmp_path / "x.safetensors") != before


def test_transposed_and_strided_tensors_are_written_by_value(tmp_path: Path) -> None:
    tensor = torch.arange(24.0).view(4, 6).t()[::2]
    with ShardWriter(tmp_path / "m.safetensors", [spec("x", tensor)]) as writer:
        writer.write("x", tensor)
    assert torch.equal(load_file(tmp_path / "m.safetensors")["x"], tensor)


@pytest.mark.parametrize("pieces", [[b"ab", b"cd"], [b"abcd"], [bytearray(b"abc"), memoryview(b"d")]])
def test_raw_bytes_are_written_piece_by_piece(pieces: list[bytes], tmp_path: Path) -> None:
    with ShardWriter(
        tmp_path / "m.safetensors", [TensorSpec("x", "U8", (4,)), TensorSpec("y", "U8", (0,))]
    ) as writer:
        writer.write_pieces("x", pieces)
        writer.write_pieces("y", [])
    assert bytes(load_file(tmp_path / "m.safetensors")["x"].tolist()) == b"abcd"


def test_a_tensor_of_another_dtype_or_shape_than_planned_stops_the_job_and_removes_the_file(
    tmp_path: Path,
) -> None:
    for tensor in (torch.ones(2, 3, dtype=torch.float16), torch.ones(3, 2)):
        with pytest.raises(AssertionError, match="x: made as .*planned as F32"):
            with ShardWriter(tmp_path / "m.safetensors", [TensorSpec("x", "F32", (2, 3))]) as writer:
                writer.write("x", tensor)
        assert not (tmp_path / "m.safetensors").exists()


def test_a_planned_tensor_that_was_never_written_is_noticed_when_the_file_is_closed(tmp_path: Path) -> None:
    writer = ShardWriter(
        tmp_path / "m.safetensors", [TensorSpec("x", "F32", (2,)), TensorSpec("y", "F32", (2,))]
    )
    writer.write("x", torch.ones(2))
    with pytest.raises(AssertionError, match=r"never written: \['y'\]"):
        writer.close()


def test_too_few_bytes_for_a_planned_tensor_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="x: 3 bytes written, 4 planned"):
        with ShardWriter(tmp_path / "m.safetensors", [TensorSpec("x", "U8", (4,))]) as writer:
            writer.write_pieces("x", [b"abc"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
        if os.geteuid() == 0
        else None
    )
    if mount is None or mount.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_noticed_when_the_file_is_opened_and_nothing_is_left(small_disk: Path) -> None:
    with pytest.raises(
        DiskFull, match=r"m.safetensors: the disk is full: 1.00 MiB are needed, 256 KiB are free"
    ):
        ShardWriter(small_disk / "m.safetensors", [TensorSpec("x", "U8", (1 << 20,))])
    assert list(small_disk.iterdir()) == []


def test_a_small_text_on_a_full_disk_is_an_error_with_the_next_step(small_disk: Path) -> None:
    with pytest.raises(DiskFull, match="Free some room and run the same command again"):
        write_text(small_disk / "x.json", "x" * (1 << 20))


def test_a_job_on_a_full_disk_says_so_and_the_same_command_finishes_it_once_there_is_room(
    small_disk: Path, llama: Path
) -> None:
    from quant.errors import QuantError
    from tests.helpers import quantize

    output = small_disk / "out"
    with pytest.raises(QuantError, match=r"are needed for the output, 256 KiB are free"):
        quantize(llama, output, group_size=32)
    assert list(small_disk.iterdir()) == []
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert quantize(llama, output, group_size=32)["verify"]["passed"]


def test_a_disk_that_fills_up_while_a_job_writes_keeps_finished_units(
    small_disk: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quant.pipeline import plan
    from tests.helpers import quantize, weight_files

    # room that another process takes after the check
    monkeypatch.setattr(plan, "check_disk", lambda *a: None)
    subprocess.run(["mount", "-o", "remount,size=1040k", str(small_disk)], check=True)
    with pytest.raises(DiskFull, match="the disk is full: .* are needed"):
        quantize(llama, small_disk / "out", group_size=32)
    assert not (small_disk / "out").exists()
    kept = [f.name for f in (small_disk / "out.work").glob("*.safetensors")]
    assert kept == ["model-00001-of-00003.safetensors"]
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    quantize(llama, small_disk / "out", group_size=32)
    quantize(llama, tmp_path / "undisturbed", group_size=32)
    assert weight_files(small_disk / "out") == weight_files(tmp_path / "undisturbed")
