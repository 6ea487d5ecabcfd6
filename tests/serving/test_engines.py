"""Other engines than vLLM: what each reads, in whose words, and the files that run it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import deploy_vllm
from quant.catalog import catalogue
from quant.data import load_json
from quant.engines import ENGINES, reading_problem
from quant.engines.base import UNQUANTIZED
from quant.errors import UsageError, VerificationFailed
from quant.hardware import named_gpu
from quant.schemes import PRESETS, SchemeRegistry
from quant.serving.artefacts import Placement, artefact
from quant.serving.deployment import DeploymentRequest
from quant.serving.engines import plan
from quant.serving.passed_on import named
from tests.gguf_files import write_gguf
from tests.helpers import ROOT
from tests.stand_ins import published_config, with_fewer_experts, write_stand_in

#: Ollama has other files: tests/serving/test_gguf_engines.py
OTHERS = [name for name in ENGINES if name not in ("vllm", "ollama")]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "examples/tinylm-4m", tmp_path / "a $model"))


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    file = tmp_path / "files" / "a model.gguf"
    file.parent.mkdir()
    return write_gguf(file)


def _after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_a_request_is_told_in_each_engines_words(source: Path, gguf: Path) -> None:
    asked = DeploymentRequest(max_model_len=128, max_num_seqs=4, port=9000)
    sglang = plan(source, asked, "sglang").command
    assert sglang[:5] == ["python3", "-m", "sglang.launch_server", "--model-path", str(source)]
    assert [_after(sglang, f) for f in ("--context-length", "--max-running-requests", "--port")] == [
        "128",
        "4",
        "9000",
    ]
    tgi = plan(source, asked, "tgi").command
    assert tgi[:3] == ["text-generation-launcher", "--model-id", str(source)]
    assert [_after(tgi, f) for f in ("--max-total-tokens", "--max-batch-size", "--hostname")] == [
        "128",
        "4",
        "127.0.0.1",
    ]
    trt = plan(source, asked, "tensorrt-llm").command
    assert trt[:2] == ["trtllm-serve", str(source)]
    assert [_after(trt, f) for f in ("--max_seq_len", "--max_batch_size")] == ["128", "4"]
    llama = plan(gguf, asked, "llama.cpp").command
    assert llama[:3] == ["llama-server", "--model", str(gguf)]
    # its context is of all requests together
    assert [_after(llama, f) for f in ("--ctx-size", "--parallel", "--alias")] == ["512", "4", "a model"]


def test_ranks_the_caches_dtype_and_a_share_of_memory_are_translated(source: Path) -> None:
    asked = DeploymentRequest(tensor_parallel=2, gpu_memory_utilization=0.7, kv_cache_dtype="fp8")
    sglang = plan(source, asked, "sglang")
    names = {a.name: a for a in sglang.arguments}
    assert names["tensor-parallel-size"].value == 2 and names["kv-cache-dtype"].value == "fp8_e4m3"
    assert names["mem-fraction-static"].value == 0.7 and "on top" in names["mem-fraction-static"].reason
    tgi = plan(source, asked, "tgi").command
    assert [_after(tgi, f) for f in ("--num-shard", "--cuda-memory-fraction", "--kv-cache-dtype")] == [
        "2",
        "0.7",
        "fp8_e4m3fn",
    ]
    ours = plan(source, asked).command
    assert _after(ours, "--kv-cache-dtype") == "fp8" and _after(ours, "--tensor-parallel-size") == "2"
    assert "tp_size" in " ".join(plan(source, DeploymentRequest(tensor_parallel=2), "tensorrt-llm").command)


def test_what_stands_beside_the_weights_for_vllm_is_translated_or_told_to_be_left_out(source: Path) -> None:
    own = json.loads((source / "config.json").read_text())["max_position_embeddings"]
    stated: dict[str, Any] = {
        "max-model-len": own,
        "max-num-seqs": 5,
        "kv-cache-dtype": "fp8",
        "swap-space": 4,
    }
    (source / "vllm_config.json").write_text(json.dumps(stated))
    sglang = plan(source, DeploymentRequest(), "sglang")
    assert _after(sglang.command, "--max-running-requests") == "5"
    assert _after(sglang.command, "--kv-cache-dtype") == "fp8_e4m3"
    assert "--context-length" not in sglang.command  # the model's own, which it finds itself
    assert any(w.startswith("swap-space is an argument of vLLM's alone") for w in sglang.warnings)
    trt = plan(source, DeploymentRequest(), "tensorrt-llm")
    assert "fp8" not in trt.command and any("kv_cache_config" in w for w in trt.warnings)
    # what is asked is not left out
    assert (
        _after(plan(source, DeploymentRequest(max_num_seqs=3), "sglang").command, "--max-running-requests")
        == "3"
    )


def test_ranks_and_dtype_beside_the_weights_hold_for_every_engine(source: Path) -> None:
    stated = {"tensor-parallel-size": 2, "dtype": "float16"}
    (source / "vllm_config.json").write_text(json.dumps(stated))
    made = plan(source, DeploymentRequest(), "sglang")
    assert made.tensor_parallel == 2
    names = {a.name: a for a in made.arguments}
    assert names["tensor-parallel-size"].value == 2 and names["dtype"].value == "float16"
    assert {names[n].reason for n in ("tensor-parallel-size", "dtype")} == {
        "vllm_config.json of the checkpoint says so"
    }
    # an option wins over the file, a number of GPUs too, and what is passed on over both
    assert plan(source, DeploymentRequest(tensor_parallel=1), "sglang").tensor_parallel == 1
    assert plan(source, DeploymentRequest(gpu="4xH100"), "sglang").tensor_parallel == 4
    passed = plan(source, DeploymentRequest(tensor_parallel=4, extra=("--tp", "1")), "sglang")
    assert passed.tensor_parallel == 1 and "--tensor-parallel-size" not in passed.command
    # TensorRT-LLM has no word for the dtype
    trt = plan(source, DeploymentRequest(), "tensorrt-llm")
    assert any(w.startswith("dtype float16 of vllm_config.json is left out") for w in trt.warnings)
    assert _after(trt.command, "--tp_size") == "2"
    (source / "vllm_config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    assert not any("dtype" in w for w in _warnings(source, "tensorrt-llm"))  # as config.json has it
    older = plan(source, DeploymentRequest(gpu="T4"), "sglang").command
    assert _after(older, "--dtype") == "float16"


def test_gpt_oss_as_it_comes_is_read_by_those_that_have_its_numbers(tmp_path: Path) -> None:
    """Its experts are no linears of a scheme; what does not read them says so of their layout."""
    config = with_fewer_experts(published_config(catalogue()["openai/gpt-oss-20b"]["config"]), 4)
    source = write_stand_in(config, tmp_path / "gpt-oss")
    for engine in ("vllm", "sglang", "tensorrt-llm"):
        assert str(source) in plan(source, DeploymentRequest("H100-80GB", read_values=False), engine).command
    with pytest.raises(VerificationFailed, match="TGI .* reads no mxfp4 weights: it reads unquantized"):
        plan(source, DeploymentRequest("H100-80GB", read_values=False), "tgi")
    with pytest.raises(VerificationFailed, match=r"--gpu is A100-80GB \(8.0\)"):
        plan(source, DeploymentRequest("A100-80GB", read_values=False), "tensorrt-llm")


def test_an_engine_that_takes_every_gpu_is_told_of_one(source: Path) -> None:
    assert _after(plan(source, DeploymentRequest(), "tgi").command, "--num-shard") == "1"
    assert "--tensor-parallel-size" not in plan(source, DeploymentRequest(), "sglang").command


@pytest.mark.parametrize(
    ("engine", "extra", "ranks"),
    [
        ("tgi", ("--num-shard", "2"), 2),
        ("sglang", ("--tp-size=2",), 2),
        ("sglang", ("--tp", "2"), 2),
        ("tensorrt-llm", ("--tp_size", "2"), 2),
        ("vllm", ("-tp", "2"), 2),
        ("tgi", ("--dtype", "float16", "--max-total-tokens=64", "--usage-stats", "on"), 1),
        ("llama.cpp", ("-c", "64", "-np", "2"), 1),
    ],
)
def test_what_is_passed_on_stands_in_the_command_once(
    engine: str, extra: tuple[str, ...], ranks: int, source: Path, gguf: Path
) -> None:
    asked = DeploymentRequest(max_model_len=128, max_num_seqs=4, extra=extra)
    made = plan(gguf if engine == "llama.cpp" else source, asked, engine)
    assert made.tensor_parallel == ranks
    assert made.command[-len(extra) :] == list(extra)
    said = {n for a in made.arguments for n in made.engine.names(a.name)}
    assert not said & named(extra).keys()


@pytest.mark.parametrize(
    ("engine", "asked", "said"),
    [
        ("llama.cpp", {"extra": ("-m", "x.gguf")}, "-m cannot be passed on.*use --model-path"),
        ("llama.cpp", {"extra": ("-a", "x")}, "use --name"),
        ("sglang", {"extra": ("--model", "x")}, "use --model-path"),
        ("sglang", {"extra": ("--tp", "two")}, "--tp is 'two'"),
        ("tgi", {"extra": ("--model-id=x",)}, "use --model-path"),
        ("tgi", {"extra": ("-p", "80")}, "use --port"),
        ("tensorrt-llm", {"kv_cache_dtype": "fp8"}, "kv_cache_config"),
        ("tensorrt-llm", {"gpu_memory_utilization": 0.5}, "--kv_cache_free_gpu_memory_fraction"),
        ("tensorrt-llm", {"api_key_env": "KEY"}, "checks no key"),
        ("tensorrt-llm", {"name": "other"}, "cannot be told a name"),
        ("tgi", {"name": "other"}, "cannot be told a name"),
        ("sglang", {"extra": ("--api-key", "k")}, "use --api-key-env"),
        ("sglang", {"extra": ("--served-model-name=x",)}, "use --name"),
        ("tgi", {"extra": ("--hostname", "::")}, "use --host"),
        ("tgi", {"extra": ("stray",)}, "unexpected argument"),
        ("nothing", {}, "--engine is 'nothing'"),
    ],
)
def test_what_an_engine_has_no_word_for_is_refused_with_the_next_step(
    engine: str, asked: dict[str, Any], said: str, source: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        plan(source, DeploymentRequest(**asked), engine)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"tensor_parallel": 2}, "--split-mode"),
        ({"kv_cache_dtype": "fp8"}, "--cache-type-k q8_0"),
        ({"gpu_memory_utilization": 0.5}, "--fit-target"),
    ],
)
def test_llama_cpp_refuses_what_it_does_otherwise(asked: dict[str, Any], said: str, gguf: Path) -> None:
    with pytest.raises(UsageError, match=said):
        plan(gguf, DeploymentRequest(**asked), "llama.cpp")


def test_llama_cpp_says_what_to_make_of_a_folder(source: Path, quantized: Callable[..., Path]) -> None:
    with pytest.raises(VerificationFailed) as refused:
        plan(source, DeploymentRequest(), "llama.cpp")
    # a source is named in the commands
    assert f"quant export-gguf -m {shlex.quote(str(source))} -o" in str(refused.value)
    with pytest.raises(VerificationFailed, match="quant export-gguf -m SOURCE"):
        plan(quantized(), DeploymentRequest(), "llama.cpp")


@pytest.mark.parametrize(
    ("engine", "format", "scheme", "gpu", "why"),
    [
        ("sglang", "compressed-tensors", "w4a16", "A100-40GB", None),
        ("sglang", "compressed-tensors", "w4a16", "T4", "from compute capability 8.0"),
        ("sglang", "compressed-tensors", "w4a16", "MI300X", "not on AMD's GPUs"),
        ("sglang", "compressed-tensors", "w8a8-fp8", "MI300X", None),
        ("sglang", "compressed-tensors", "w8a8-fp8", "MI210", "does not compute in FP8"),
        ("sglang", "compressed-tensors", "w8a8-int8", "H100", None),
        ("sglang", "compressed-tensors", "w8a8-int8", "B200", "below 10.0"),
        ("sglang", "compressed-tensors", "w8a16-asym", "H100", "reads no w8a16-asym"),
        ("sglang", "compressed-tensors", "mxfp4", "B200", "reads no mxfp4"),
        ("sglang", "gptq", "w4a16-asym", "H100", "reads no w4a16-asym in the gptq layout"),
        ("sglang", UNQUANTIZED, None, "cpu", "not on a CPU"),
        ("tgi", "compressed-tensors", "w8a8-fp8", "L40S-48GB", None),
        ("tgi", "compressed-tensors", "fp8-block", "H100", "reads no fp8-block"),
        ("tensorrt-llm", "fp8", "fp8-block", "H100", None),
        ("tensorrt-llm", "fp8", "fp8-block", "B200", None),
        ("tensorrt-llm", "fp8", "fp8-block", "RTX-5090", "below 12.0"),
        ("tensorrt-llm", "compressed-tensors", "w4a16", "H100", "--scheme fp8-block --format fp8"),
        ("tensorrt-llm", "modelopt", "nvfp4", "H100", "from compute capability 10.0"),
        ("llama.cpp", "compressed-tensors", "w4a16", "H100", "GGUF files alone"),
    ],
)
def test_what_an_engine_reads_on_a_gpu(
    engine: str, format: str, scheme: str | None, gpu: str, why: str | None
) -> None:
    schemes = [(PRESETS[scheme], False)] if scheme else []
    problem, _ = reading_problem(ENGINES[engine], format, schemes, named_gpu(gpu))
    assert (problem is None) if why is None else why in str(problem), problem


def test_groups_and_experts_without_kernels_and_what_is_not_known_are_told() -> None:
    odd = PRESETS["w4a16"].with_group_size(16)
    problem, _ = reading_problem(ENGINES["sglang"], "compressed-tensors", [(odd, False)], None)
    assert "in groups of -1, 32, 64, 128, not 16" in str(problem)
    int8 = PRESETS["w8a8-int8"]
    problem, _ = reading_problem(ENGINES["sglang"], "compressed-tensors", [(int8, False), (int8, True)], None)
    assert "routed experts" in str(problem)
    none, unknown = reading_problem(ENGINES["tgi"], "compressed-tensors", [(int8, False)], named_gpu("B200"))
    assert none is None and len(unknown) == 2 and all("is not known here" in u for u in unknown)


def test_the_tables_name_schemes_formats_and_architectures_that_there_are() -> None:
    from quant.formats import FormatRegistry

    formats = {UNQUANTIZED, "modelopt", *(f.name for f in FormatRegistry)}
    for engine in ENGINES.values():
        for row in engine.reads:
            assert row.format in formats
            assert row.format == UNQUANTIZED or all(s in SchemeRegistry for s in row.schemes)
        assert engine.published and all(
            engine.release in image.rpartition(":")[2] for image in engine.published.values()
        )
        assert not any(engine.release in image for image in engine.images.values())  # it stands once
        assert bool(engine.reads) is not bool(engine.otherwise)
    known = load_json("engines.json")
    assert set(known) < set(ENGINES)
    for name, value in known.items():  # of the row's release, or of the line of releases that it is of
        release = ENGINES[name].release
        assert re.search(
            rf" {re.escape(release)}\b| {re.escape(release.rpartition('.')[0])}['’]s", value["source"]
        )
        assert not {*value.get("architectures", ())} & {*value.get("later", ())}
    assert ENGINES["sglang"].serves({"architectures": ["LlamaForCausalLM"]}) is True
    assert ENGINES["tgi"].serves({"model_type": "apertus"}) is False
    assert ENGINES["llama.cpp"].serves({"architectures": ["LlamaForCausalLM"]}) is None


def test_an_architecture_that_an_engine_does_not_list_is_told(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["SmolLM3ForCausalLM"]}))
    assert any("is not among SGLang's own classes" in w for w in _warnings(source, "sglang"))
    with pytest.raises(VerificationFailed, match="not among the architectures that TensorRT-LLM lists"):
        plan(source, DeploymentRequest(), "tensorrt-llm")
    # listed by candidates of its next release alone
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["Cohere2ForCausalLM"]}))
    assert ENGINES["tensorrt-llm"].serves({"architectures": ["Cohere2ForCausalLM"]}) is None
    assert any("1.2.1 serves it is not known here" in w for w in _warnings(source, "tensorrt-llm"))


def _warnings(path: Path, engine: str) -> tuple[str, ...]:
    return plan(path, DeploymentRequest(), engine).warnings


def test_tensor_parallel_must_divide_for_every_engine(quantized: Callable[..., Path]) -> None:
    for engine in ("sglang", "tgi"):
        with pytest.raises(VerificationFailed, match="--tensor-parallel 7"):
            plan(quantized(), DeploymentRequest(tensor_parallel=7), engine)


@pytest.mark.parametrize("engine", OTHERS)
@pytest.mark.parametrize("kind", ["shell", "compose", "systemd", "kubernetes"])
def test_each_engine_has_files_that_run_it(engine: str, kind: str, source: Path, gguf: Path) -> None:
    row = ENGINES[engine]
    key = "KEY" if row.takes_key else None
    path = gguf if engine == "llama.cpp" else source
    made = plan(path, DeploymentRequest(gpu="L40S-48GB", api_key_env=key), engine)
    text = artefact(made, kind)
    assert f"{row.title} serving" in text and "VLLM" not in text
    if kind == "compose":
        (service,) = yaml.safe_load(text)["services"].values()
        assert service["image"] == row.published["cuda"]
        words, (volume,) = service["command"], service["volumes"]
        model = next(w for w in words if w.startswith("/models/"))
        assert model.startswith(volume["target"])
        # the file's folder is mounted, so that a model in several files is whole
        assert volume["source"] == str(path.parent if engine == "llama.cpp" else path).replace("$", "$$")
        if key and row.key_variable:
            assert service["environment"][row.key_variable].startswith("${KEY:?")
        if row.enters is False:  # its image starts a shell
            assert words[0] == row.program[0]
    if kind == "kubernetes":
        workload, service = yaml.safe_load_all(text)
        (container,) = workload["spec"]["template"]["spec"]["containers"]
        port = next(f.name for f in [row.flags["port"]]) if row.flags else "port"
        assert _after(container["args"], f"--{port}") == str(container["ports"][0]["containerPort"])
        if key:
            secret = next(e for e in container["env"] if "valueFrom" in e)
            assert secret["valueFrom"]["secretKeyRef"]["key"] == "api-key"
        if engine == "sglang":  # it has no variable for the key: the kubelet puts the secret's value there
            assert _after(container["args"], "--api-key") == "$(API_KEY)"
    if kind in ("shell", "systemd"):
        assert shlex.quote(row.program[0]) in text


def test_vllms_own_variables_go_to_vllm_alone(source: Path, gguf: Path) -> None:
    for kind in ("compose", "kubernetes"):
        assert "VLLM" not in artefact(plan(gguf, DeploymentRequest(gpu="cpu"), "llama.cpp"), kind)
        assert "VLLM_CPU_KVCACHE_SPACE" in artefact(plan(source, DeploymentRequest(gpu="cpu")), kind)


def test_what_an_engine_reads_is_listed_for_people_and_for_programs(cli: Callable[..., Any]) -> None:
    rows = {x["name"]: x for x in json.loads(cli("list", "engines", "--json").out)["items"]}
    (gguf,) = rows["llama.cpp"]["reads"]
    assert gguf["format"] == "GGUF files alone" and "cuda" in gguf["platforms"]
    assert [r["format"] for r in rows["vllm"]["reads"]] == ["all"]
    assert rows["sglang"]["images"]["cuda"].endswith(ENGINES["sglang"].release)
    assert "GGUF files alone" in cli("list", "engines").out


def test_a_container_is_asked_for_its_health_by_what_its_image_has(source: Path, gguf: Path) -> None:
    for engine, word in (("llama.cpp", "curl"), ("sglang", "python3")):
        made = plan(gguf if engine == "llama.cpp" else source, DeploymentRequest(), engine)
        (service,) = yaml.safe_load(artefact(made, "compose"))["services"].values()
        test = service["healthcheck"]["test"]
        assert test[:2] == ["CMD", word] and "/health" in test[-1] and "{" not in test[-1]


def test_an_engine_takes_the_files_that_are_its_own(source: Path) -> None:
    with pytest.raises(UsageError, match="of vLLM alone"):
        artefact(plan(source, DeploymentRequest(), "sglang"), "kserve", Placement(claim="models"))
    amd = plan(source, DeploymentRequest(gpu="MI300X"), "sglang")
    (service,) = yaml.safe_load(artefact(amd, "compose"))["services"].values()
    assert service["image"].endswith("-mi30x") and "/dev/kfd" in service["devices"]
    older = plan(source, DeploymentRequest(gpu="MI210"), "sglang")
    with pytest.raises(UsageError, match="publishes no image for MI210"):
        artefact(older, "compose")


def test_the_command_takes_an_engine(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*words: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            deploy_vllm.main(["plan", *map(str, words)])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    code, out, _ = call("-m", source, "--engine", "sglang", "--json")
    value = json.loads(out)
    assert code == 0 and value["engine"] == "sglang" and value["command"][2] == "sglang.launch_server"
    assert value["api_key_env"] is None and "--api-key" not in value["command"]
    code, out, _ = call("-m", source, "--engine", "sglang", "--api-key-env", "KEY", "--json")
    value = json.loads(out)  # it has no variable for the key
    assert value["api_key_env"] == "KEY" and value["command"][-2:] == ["--api-key", "$KEY"]
    code, out, _ = call("-m", source, "--engine", "tgi", "--api-key-env", "KEY", "--json")
    value = json.loads(out)
    assert value["environment"]["API_KEY"] == "$KEY" and "--api-key" not in value["command"]
    code, out, err = call("-m", source, "--engine", "llama.cpp")
    assert code == 4 and not out and "quant export-gguf" in err
    code, _, err = call("-m", source, "--engine", "mlc")
    assert code == 2 and "'mlc'" in err
    code, _, err = call("-m", source, "--kv-cache-dtype", "int4", "--max-num-seqs", "0")
    assert code == 2 and "--kv-cache-dtype is 'int4'" in err and "--max-num-seqs is 0" in err
    code, _, err = call("-m", source, "--nodes", "2")
    assert code == 2 and "--nodes has no use in --output shell" in err
