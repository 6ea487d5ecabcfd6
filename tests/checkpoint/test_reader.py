"""Directories of safetensors: single, sharded, hub caches; incomplete, hostile and pickled ones are refused
by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.checkpoint.reader import INDEX, open_checkpoint
from quant.errors import CheckpointError
from tests.helpers import copy_model, load_all, raw_safetensors

TENSORS = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "b.weight": torch.ones(5, dtype=torch.bfloat16),
    "c": torch.zeros(0, 3),
}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({k: TENSORS[k] for k in ("a.weight", "c")}, folder / "one.safetensors")
    save_file({"b.weight": TENSORS["b.weight"]}, folder / "two.safetensors")
    index(folder, {"a.weight": "one.safetensors", "c": "one.safetensors", "b.weight": "two.safetensors"})
    return folder


def index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("shard", ["5GB", "50KB"], ids=["single file", "sharded"])
def test_every_tensor_reads_as_the_official_package_reads_it(
    shard: str, checkpoints: Callable[..., Path]
) -> None:
    folder = checkpoints("llama", shard=shard)
    checkpoint, wanted = open_checkpoint(folder), load_all(folder)
    assert (len(checkpoint.weight_files) > 1) == (shard == "50KB") == (folder / INDEX).exists()
    assert set(checkpoint.tensors) == set(wanted)
    for name, tensor in wanted.items():
        assert checkpoint.read(name).dtype == tensor.dtype
        assert torch.equal(checkpoint.read(name), tensor)
        assert b"".join(checkpoint.read_bytes(name, 1000)) == bytes(checkpoint.buffer(name))
        assert torch.equal(torch.cat([piece.clone() for piece in checkpoint.read_rows(name, 7)]), tensor)
    assert checkpoint.nbytes == sum(t.numel() * t.element_size() for t in wanted.values())
    assert checkpoint.dtype == "BF16"


def test_an_empty_tensor_and_a_sharded_model_are_read(sharded: Path) -> None:
    checkpoint = open_checkpoint(str(sharded))
    assert {n: checkpoint.read(n).shape for n in checkpoint.tensors} == {
        n: t.shape for n, t in TENSORS.items()
    }


def test_a_tensor_read_is_memory_of_its_own(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    checkpoint.read("a.weight").zero_()
    assert torch.equal(checkpoint.read("a.weight"), TENSORS["a.weight"])


def test_a_hub_cache_with_linked_shards_is_read_through_its_main_reference(
    sharded: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "abc123"
    (cache / "blobs").mkdir(parents=True)
    (cache / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc123\n")
    for number, file in enumerate(sorted(sharded.iterdir())):
        shutil.copy(file, cache / "blobs" / f"blob{number}")
        os.symlink(f"../../blobs/blob{number}", snapshot / file.name)
    for path in (cache, snapshot):
        checkpoint = open_checkpoint(path)
        assert checkpoint.path == snapshot
        assert torch.equal(checkpoint.read("a.weight"), TENSORS["a.weight"])
        assert [f.name for f in checkpoint.weight_files] == ["one.safetensors", "two.safetensors"]


def test_a_reference_that_leaves_the_cache_is_not_followed(sharded: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    (cache / "refs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    (cache / "refs" / "main").write_text(f"../../{sharded.name}")
    with pytest.raises(CheckpointError, match="has no config.json"):
        open_checkpoint(cache)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "sub/one.safetensors",
        "..\\one.safetensors",
        "..",
        "",
        "one\0.safetensors",
        None,
        3,
        ["x"],
    ],
)
def test_an_index_that_names_a_file_outside_its_folder_is_refused(name: Any, sharded: Path) -> None:
    save_file(TENSORS, sharded.parent / "secret.safetensors")
    index(sharded, {"a.weight": name})
    with pytest.raises(
        CheckpointError,
        match="tensor 'a.weight' is said to be in .*: a file name inside the model's folder is needed",
    ):
        open_checkpoint(sharded)


def test_an_index_that_names_a_missing_file_is_refused(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    with pytest.raises(
        CheckpointError,
        match="names 'two.safetensors', which is not in .*: the download is incomplete, fetch that file",
    ):
        open_checkpoint(sharded)


def test_a_link_to_nowhere_is_a_missing_file(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    os.symlink("nowhere", sharded / "two.safetensors")
    with pytest.raises(CheckpointError, match="names 'two.safetensors'"):
        open_checkpoint(sharded)


def test_a_tensor_that_is_not_in_the_file_its_index_says_is_refused(sharded: Path) -> None:
    index(
        sharded,
        {
            "a.weight": "one.safetensors",
            "c": "one.safetensors",
            "b.weight": "two.safetensors",
            "d": "two.safetensors",
        },
    )
    with pytest.raises(
        CheckpointError, match="says tensor 'd' is in two.safetensors, which does not hold it"
    ):
        open_checkpoint(sharded)


def test_a_tensor_that_the_index_does_not_name_is_refused(sharded: Path) -> None:
    index(sharded, {"a.weight": "one.safetensors", "b.weight": "two.safetensors"})
    with pytest.raises(CheckpointError, match="one.safetensors: holds tensor 'c', which .* does not name"):
        open_checkpoint(sharded)


def test_of_two_copies_of_a_tensor_the_one_the_index_names_counts(sharded: Path) -> None:
    save_file(
        {"b.weight": TENSORS["b.weight"], "a.weight": torch.full((3, 4), 7.0)}, sharded / "two.safetensors"
    )
    assert torch.equal(open_checkpoint(sharded).read("a.weight"), TENSORS["a.weight"])


def test_a_tensor_in_two_files_without_an_index_is_refused(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    save_file(TENSORS, sharded / "two.safetensors")
    with pytest.raises(
        CheckpointError, match="tensor 'a.weight' is also in one.safetensors: an index must say which counts"
    ):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"weight_map": []}', '{"weight_map": {}}', "{}", "\udcff"]
)
def test_a_broken_index_is_refused(content: str, sharded: Path) -> None:
    (sharded / INDEX).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"index.json: (the index is not|has no weight_map)"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"{", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_a_broken_config_is_refused(content: bytes, sharded: Path) -> None:
    (sharded / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config.json: the config is not"):
        open_checkpoint(sharded)


def test_pickled_weights_alone_are_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(
        CheckpointError, match=r"only pickled weights, .*run code .* \(pytorch_model.bin\): .*save_pretrained"
    ):
        open_checkpoint(tmp_path)


def test_folders_that_are_no_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such directory"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match="has no config.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a file: give the folder"):
        open_checkpoint(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="has no .safetensors file"):
        open_checkpoint(tmp_path)


def test_a_file_truncated_after_it_was_opened_is_an_error_not_zeros(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    os.truncate(sharded / "one.safetensors", checkpoint.info("a.weight").start + 4)
    with pytest.raises(CheckpointError, match="ends inside tensor 'a.weight'"):
        checkpoint.read("a.weight")
    with pytest.raises(CheckpointError, match="ends inside tensor 'a.weight'"):
        list(checkpoint.read_bytes("a.weight"))
    with pytest.raises(CheckpointError, match="ends inside tensor 'a.weight'"):
        list(checkpoint.read_rows("a.weight", 1))
    (sharded / "one.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read at tensor 'a.weight': No such file"):
        checkpoint.read("a.weight")


def test_a_name_that_is_not_there_is_an_error(sharded: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tensor 'x'"):
        open_checkpoint(sharded).read("x")


def test_side_files_are_listed_sorted_and_other_weights_are_left_out_with_a_reason(
    llama: Path, tmp_path: Path
) -> None:
    folder = copy_model(llama, tmp_path / "m")
    for name in (
        "chat_template.jinja",
        "modeling_x.py",
        "original/params.json",
        ".git/config",
        "pytorch_model.bin",
        "a.gguf",
        "extra.safetensors",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    outside = tmp_path / "outside"
    outside.mkdir()
    (folder / "linked").symlink_to(outside)
    found = {f.relative: f.dropped for f in open_checkpoint(folder).side_files()}
    assert [n for n, reason in found.items() if not reason] == [
        "chat_template.jinja", "generation_config.json", "modeling_x.py", "tokenizer.json",
        "tokenizer_config.json", "original/params.json",
    ]  # fmt: skip
    assert {n for n, reason in found.items() if reason} == {
        "a.gguf",
        "extra.safetensors",
        "linked",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    }


def test_consolidated_copies_do_not_count_as_shards(llama: Path, tmp_path: Path) -> None:
    folder = copy_model(llama, tmp_path / "m")
    os.rename(folder / "model.safetensors", folder / "weights.safetensors")
    shutil.copy(folder / "weights.safetensors", folder / "consolidated.safetensors")
    assert [f.name for f in open_checkpoint(folder).weight_files] == ["weights.safetensors"]


def test_the_dtype_of_a_checkpoint_is_that_of_most_elements(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file(
        {"a": torch.ones(3, dtype=torch.float16), "b": torch.ones(2), "c": torch.ones(9, dtype=torch.int64)},
        tmp_path / "model.safetensors",
    )
    assert open_checkpoint(tmp_path).dtype == "F16"
    raw_safetensors(
        tmp_path / "model.safetensors",
        {"q": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}},
        b"\x38\x40",
    )
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.dtype, checkpoint.read("q").float().tolist()) == ("F8_E4M3", [1.0, 2.0])
    assert torch.equal(load_file(tmp_path / "model.safetensors")["q"].float(), checkpoint.read("q").float())


def test_shards_without_an_index_are_all_there_or_refused(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    (sharded / "one.safetensors").rename(sharded / "model-00001-of-00003.safetensors")
    (sharded / "two.safetensors").rename(sharded / "model-00003-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="model-00002-of-00003.safetensors is missing"):
        open_checkpoint(sharded)
    save_file({"d": torch.ones(1)}, sharded / "model-00002-of-00003.safetensors")
    assert set(open_checkpoint(sharded).tensors) == {*TENSORS, "d"}
