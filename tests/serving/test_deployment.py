"""Plans: the command, its reasons, and artefacts that other programs can read. Nothing here starts vLLM."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import deploy_vllm
from quant.errors import CheckpointError, Problems, UsageError, VerificationFailed
from quant.serving.artefacts import Placement, artefact
from quant.serving.deployment import DeploymentRequest, _in_its_words, plan
from quant.vllm.arguments import engine_arguments
from tests.helpers import ROOT, make_checkpoint, quantize, short_text


@pytest.fixture
def folder(quantized: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint at a path and with a name that every artefact has to quote."""
    return Path(shutil.copytree(quantized(), tmp_path / "a model's $HOME 100% (v1)"))


@pytest.fixture
def deploy(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            deploy_vllm.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


def _after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_the_command_has_a_reason_for_every_flag_and_no_quantization(folder: Path) -> None:
    value = plan(
        folder, DeploymentRequest(gpu_memory_utilization=0.8, extra=("--max-num-seqs", "8"))
    ).to_dict()
    command = value["command"]
    assert command[:3] == ["vllm", "serve", str(folder)]
    assert "--quantization" not in command  # read from config.json; naming it can only contradict
    named = {a["name"]: a for a in value["arguments"]}
    assert all(a["reason"] for a in named.values())
    assert {w.removeprefix("--") for w in command if w.startswith("--")} == {*named, "max-num-seqs"}
    assert named["dtype"]["value"] == "bfloat16" and named["gpu-memory-utilization"]["value"] == 0.8
    assert _after(command, "--host") == "127.0.0.1" and command[-2:] == ["--max-num-seqs", "8"]


def test_a_plan_reads_headers_alone_and_what_serves_every_value(
    folder: Path, deploy: Callable[..., tuple[int, str, str]]
) -> None:
    """A plan of a large checkpoint, or one in storage, takes no longer than one of a small one."""
    name = "model.norm.weight"
    file = next(f for f in folder.glob("*.safetensors") if name in load_file(f))
    tensors = load_file(file)
    tensors[name][0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    assert deploy("plan", "-m", folder)[0] == deploy("plan", "-m", folder, "--engine", "sglang")[0] == 0
    code, _, said = deploy("serve", "-m", folder, "--vllm-python", "/bin/false")
    assert code == 4 and f"{name} holds 1 NaN" in said


#: Scheme → why --dtype has its value: only weight-only integers have scales in it.
DTYPE_REASONS = {
    "w4a16": "scales are stored in it",
    "w8a8-int8": "the model's own",
    "w8a8-fp8": "the model's own",
    "w8a8-fp8-tensor": "the model's own",
    "fp8-block": "the model's own",
    "w8a16-fp8": "the model's own",
    "nvfp4": "the model's own",
    "mxfp4": "the model's own",
    "mxfp8": "the model's own",
}


@pytest.mark.parametrize("scheme", DTYPE_REASONS)
def test_every_scheme_is_served_by_the_same_plain_line(scheme: str, made_of: Callable[..., Path]) -> None:
    folder = made_of(scheme)
    made = plan(folder, DeploymentRequest())
    # vLLM reads the scheme, and whether the cache is FP8, from config.json: another word could only
    # contradict it
    line = [
        "vllm",
        "serve",
        str(folder),
        "--dtype",
        "bfloat16",
        "--max-model-len",
        "256",
        "--served-model-name",
        folder.name,
    ]
    assert made.command == [*line, "--host", "127.0.0.1", "--port", "8000"]
    dtype = next(a for a in made.arguments if a.name == "dtype")
    assert (
        dtype.reason == f"{DTYPE_REASONS[scheme]}; quant_method compressed-tensors is read from config.json"
    )


@pytest.mark.parametrize(
    ("scheme", "dtype", "reason"),
    [
        ("w4a16", "float16", "scales are stored in it"),
        ("nvfp4", "float16", "the model's own"),
        ("mxfp4", "bfloat16", "mxfp4-pack-quantized has kernels for it alone"),
        ("mxfp8", "bfloat16", "mxfp8-quantized has kernels for it alone"),
    ],
)
def test_microscaling_numbers_of_an_fp16_model_are_computed_in_bf16(
    scheme: str, dtype: str, reason: str, made_of: Callable[..., Path]
) -> None:
    made = plan(made_of(scheme, torch.float16), DeploymentRequest())
    assert _after(made.command, "--dtype") == dtype
    assert next(a.reason for a in made.arguments if a.name == "dtype").startswith(reason)


@pytest.fixture
def made_of(checkpoints: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A tiny Llama in a scheme; its sides hold whole blocks of 128."""

    def make(scheme: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        group = {"group_size": 32} if scheme == "w4a16" else {}
        text = {"samples": 2, "sequence_length": 32, "calibration_dataset": [short_text()]}
        source = checkpoints("llama", dtype=dtype, hidden_size=256, intermediate_size=256)
        quantize(source, tmp_path / "out", scheme=scheme, **group, **text)
        return tmp_path / "out"

    return make


def test_an_option_beats_vllm_config_beats_the_checkpoint(folder: Path) -> None:
    file = folder / "vllm_config.json"
    assert _after(plan(folder, DeploymentRequest()).command, "--max-model-len") == "256"
    file.write_text(json.dumps({"max-model-len": 128, "max-num-seqs": 4}))
    stated = plan(folder, DeploymentRequest())
    assert (
        _after(stated.command, "--max-model-len") == "128" and _after(stated.command, "--max-num-seqs") == "4"
    )
    assert {a.reason for a in stated.arguments if a.name == "max-num-seqs"} == {
        "vllm_config.json of the checkpoint says so"
    }
    assert _after(plan(folder, DeploymentRequest(max_model_len=64)).command, "--max-model-len") == "64"
    # passed on in its stead
    assert plan(folder, DeploymentRequest(extra=("--max-num-seqs=9",))).command.count("--max-num-seqs") == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "an object of engine arguments"),
        ('{"max-model-len": true}', "an object of engine arguments"),
        ('{"max-model-len": 0}', "max-model-len is 0"),
        ('{"--x; rm -rf": 1}', "is no engine argument"),
        ('{"api-key": "k"}', "api-key does not belong there"),
    ],
)
def test_a_broken_vllm_config_is_named(folder: Path, content: str, message: str) -> None:
    (folder / "vllm_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        plan(folder, DeploymentRequest())


def test_a_checkpoint_that_fails_verification_is_refused_with_status_4(
    folder: Path, deploy: Callable[..., tuple[int, str, str]]
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationFailed, match="activation order"):
        plan(folder, DeploymentRequest())
    for command in ("plan", "serve"):
        code, out, err = deploy(command, "-m", folder)
        assert code == 4 and not out and "activation order" in err


def test_tensor_parallel_is_checked_against_the_shapes(folder: Path) -> None:
    with pytest.raises(VerificationFailed, match="--tensor-parallel 7"):
        plan(folder, DeploymentRequest(tensor_parallel=7))


@pytest.mark.parametrize(
    "extra", [("--tensor-parallel-size", "3"), ("--tensor-parallel-size=3",), ("-tp", "3")]
)
def test_tensor_parallel_that_is_passed_on_is_checked_too(folder: Path, extra: tuple[str, ...]) -> None:
    with pytest.raises(VerificationFailed, match="4 attention heads over --tensor-parallel 3 do not divide"):
        plan(folder, DeploymentRequest(extra=extra))


@pytest.mark.parametrize(
    "extra", [("--port", "1"), ("--api-key=k",), ("--served_model_name", "x"), ("stray",)]
)
def test_extra_arguments_cannot_take_over_what_we_must_know(folder: Path, extra: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        plan(folder, DeploymentRequest(extra=extra))


def test_binding_elsewhere_without_a_key_warns(folder: Path) -> None:
    assert (
        not plan(folder, DeploymentRequest()).warnings
        and not plan(folder, DeploymentRequest(host="::1")).warnings
    )
    assert "without an API key" in plan(folder, DeploymentRequest(host="0.0.0.0")).warnings[0]
    assert not plan(folder, DeploymentRequest(host="0.0.0.0", api_key_env="KEY")).warnings
    with pytest.raises(Problems, match="never the key itself"):
        plan(folder, DeploymentRequest(api_key_env="sk-123"))


def test_the_shell_script_runs_exactly_the_command(folder: Path, tmp_path: Path) -> None:
    made = plan(
        folder,
        DeploymentRequest(
            api_key_env="KEY", extra=("--hf-overrides", '{"a": "$b \'c\'"}', "--enforce-eager")
        ),
    )
    fake = tmp_path / "bin" / "vllm"
    fake.parent.mkdir()
    fake.write_text(
        f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], "
        'os.environ["VLLM_API_KEY"]]))\n'
    )
    fake.chmod(0o755)
    environment = {"PATH": f"{fake.parent}:/usr/bin:/bin", "KEY": "k e y"}
    done = subprocess.run(
        ["sh", "-c", artefact(made, "shell")], capture_output=True, text=True, env=environment, check=True
    )
    assert json.loads(done.stdout) == [made.command[1:], "k e y"]
    unset = subprocess.run(
        ["sh", "-c", artefact(made, "shell")],
        capture_output=True,
        text=True,
        env={"PATH": environment["PATH"]},
    )
    assert unset.returncode != 0 and "set KEY to the API key first" in unset.stderr


def test_the_compose_file_publishes_on_the_wished_address_only(
    quantized: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(quantized(group_size=-1), tmp_path / "a $model"))
    made = plan(folder, DeploymentRequest(port=9000, api_key_env="KEY", tensor_parallel=2))
    (service,) = yaml.safe_load(artefact(made, "compose"))["services"].values()
    assert service["ports"] == ["127.0.0.1:9000:8000"]
    assert (
        service["volumes"][0]["source"] == str(folder).replace("$", "$$")
        and service["volumes"][0]["read_only"]
    )
    words = service["command"]
    assert words[0] == service["volumes"][0]["target"] and "--model" not in words  # vllm serve's own form
    assert (_after(words, "--host"), _after(words, "--port"), _after(words, "--tensor-parallel-size")) == (
        "0.0.0.0",
        "8000",
        "2",
    )
    assert _after(words, "--served-model-name") == folder.name.replace("$", "$$")
    assert all(isinstance(w, str) for w in words)
    assert service["environment"]["VLLM_API_KEY"].startswith("${KEY:?")
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 2


def test_the_kubernetes_objects_fit_together(folder: Path) -> None:
    made = plan(folder, DeploymentRequest(port=80, api_key_env="KEY"))
    workload, service = yaml.safe_load_all(artefact(made, "kubernetes"))
    assert (workload["kind"], service["kind"]) == ("Deployment", "Service")
    name = workload["metadata"]["name"]
    assert name == "vllm-a-model-s-home-100-v1"
    template = workload["spec"]["template"]
    assert (
        template["metadata"]["labels"]
        == workload["spec"]["selector"]["matchLabels"]
        == service["spec"]["selector"]
    )
    (container,) = template["spec"]["containers"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in template["spec"]["volumes"]}
    assert (
        service["spec"]["ports"][0]["targetPort"]
        == container["ports"][0]["name"]
        == container["startupProbe"]["httpGet"]["port"]
    )
    assert _after(container["args"], "--port") == str(container["ports"][0]["containerPort"])
    key = next(e for e in container["env"] if e["name"] == "VLLM_API_KEY")
    assert key["valueFrom"]["secretKeyRef"]["name"] == f"{name}-key"
    text = artefact(made, "kubernetes")
    assert (
        "&id" not in text
        and "--host 0.0.0.0: every address of the container" in text
        and "this machine only" not in text
    )


def test_the_systemd_unit_quotes_for_systemd(folder: Path) -> None:
    text = artefact(plan(folder, DeploymentRequest(api_key_env="KEY")), "systemd")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    start = next(line for line in lines if line.startswith("ExecStart="))
    words = shlex.split(start.removeprefix("ExecStart=").replace("$$", "$").replace("%%", "%"), posix=True)
    assert words[:4] == ["/usr/bin/env", "vllm", "serve", str(folder)]
    assert [line for line in lines if line.startswith("[")] == ["[Unit]", "[Service]", "[Install]"]
    assert "EnvironmentFile=/etc/vllm/vllm-a-model-s-home-100-v1.env" in lines
    if shutil.which("systemd-analyze"):
        unit = folder.parent / "vllm-test.service"
        unit.write_text(text)
        done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
        assert "vllm-test.service" not in done.stderr.replace("EnvironmentFile", ""), done.stderr


def _objects(deployment: Any, kind: str, **placement: Any) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(artefact(deployment, kind, Placement(**placement))))


@pytest.mark.parametrize(
    ("gpu", "image", "resource"),
    [
        ("L40S-48GB", "vllm/vllm-openai:v", "nvidia.com/gpu"),
        ("MI300X", "vllm/vllm-openai-rocm:v", "amd.com/gpu"),
        ("cpu", "vllm/vllm-openai-cpu:v", None),
    ],
)
def test_each_platform_gets_its_own_image_and_resources(
    gpu: str, image: str, resource: str | None, made_of: Callable[..., Path]
) -> None:
    made = plan(made_of("w8a8-int8"), DeploymentRequest(gpu=gpu))
    workload, _ = _objects(made, "kubernetes")
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    assert container["image"].startswith(image)
    assert container["resources"].get("limits", {}) == ({resource: 1} if resource else {})
    tolerated = [t["key"] for t in workload["spec"]["template"]["spec"].get("tolerations", [])]
    assert tolerated == ([resource] if resource else [])
    ((service,),) = [list(o["services"].values()) for o in _objects(made, "compose")]
    assert service["image"].startswith(image)
    assert ("deploy" in service) is (resource == "nvidia.com/gpu")
    assert ("/dev/kfd" in service.get("devices", [])) is (resource == "amd.com/gpu")


def test_a_part_without_the_kernel_is_refused_as_recommend_does(folder: Path) -> None:
    with pytest.raises(VerificationFailed, match="no kernel for w4a16.* there"):
        plan(folder, DeploymentRequest(gpu="V100-32GB"))


@pytest.mark.parametrize("claim", [None, "models"])
def test_kubernetes_own_schemas_accept_the_objects(folder: Path, claim: str | None) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    made = plan(folder, DeploymentRequest(api_key_env="KEY", gpu="L40S-48GB"))
    placement = {"claim": claim, "path": "llama"} if claim else {}
    objects = _objects(made, "kubernetes", **placement)
    objects += [o for o in _objects(made, "monitoring") if o["kind"] == "ConfigMap"]
    for value in objects:
        kubernetes_validate.validate(value, "1.31", strict=True)
    mount = objects[0]["spec"]["template"]["spec"]["containers"][0]["volumeMounts"][0]
    assert mount.get("subPath") == ("llama" if claim else None)
    # the pods of a LeaderWorkerSet are pods like any others
    made = plan(folder, DeploymentRequest(extra=("--pipeline-parallel-size", "2")))
    workload, service = _objects(made, "leaderworkerset", nodes=2)
    template = workload["spec"]["leaderWorkerTemplate"]
    for part in ("leaderTemplate", "workerTemplate"):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template[part]["spec"]}
        kubernetes_validate.validate(pod, "1.31", strict=True)
    kubernetes_validate.validate(service, "1.31", strict=True)
    leader, worker = (template[p]["spec"]["containers"][0] for p in ("leaderTemplate", "workerTemplate"))
    assert "--headless" in worker["args"] and "--headless" not in leader["args"] and "ports" not in worker
    assert _after(leader["args"], "--master-addr") == "$(LWS_LEADER_ADDRESS)"  # the kubelet replaces it
    assert service["spec"]["selector"].items() <= template["leaderTemplate"]["metadata"]["labels"].items()
    with pytest.raises(UsageError, match="--nodes is 3 for 2 GPUs"):
        artefact(made, "leaderworkerset", Placement(nodes=3))


def test_expressions_of_alerts_and_panels_are_promql(folder: Path) -> None:
    promql = pytest.importorskip("promql_parser")
    made = plan(folder, DeploymentRequest(name='odd"name'))
    (rules,) = _objects(made, "alerts")
    shown = json.loads(artefact(made, "dashboard", Placement(price=2.5)))
    expressions = [r["expr"] for g in rules["groups"] for r in g["rules"]]
    expressions += [t["expr"] for p in shown["panels"] for t in p["targets"]]
    for expression in expressions:
        promql.parse(expression)  # raises where it is none
    assert sum("2.5 / 3600" in e for e in expressions) == 1
    monitor, rule, config = _objects(made, "monitoring")
    workload = _objects(made, "kubernetes")[0]
    labels = workload["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert rule["spec"] == rules and json.loads(next(iter(config["data"].values())))["panels"]
    places = [tuple(p["gridPos"][k] for k in "xy") for p in shown["panels"]]
    assert len(set(places)) == len(places)


def test_other_stacks_get_the_same_arguments(folder: Path) -> None:
    made = plan(folder, DeploymentRequest(max_model_len=128, extra=("--max-num-seqs", "8")))
    (ray,) = _objects(made, "ray-serve")
    (config,) = ray["applications"][0]["args"]["llm_configs"]
    assert config["model_loading_config"] == {"model_id": made.name, "model_source": str(folder)}
    assert config["engine_kwargs"]["max_model_len"] == 128 and config["engine_kwargs"]["max_num_seqs"] == 8
    (values,) = _objects(made, "production-stack")
    (model,) = values["servingEngineSpec"]["modelSpec"]
    arguments = model["vllmConfig"]["extraArgs"]
    assert _after(arguments, "--max-model-len") == "128" and "--host" not in arguments
    assert f"{model['repository']}:{model['tag']}".startswith("vllm/vllm-openai:v")
    with pytest.raises(UsageError, match="--claim"):
        artefact(made, "kserve")
    (service,) = _objects(made, "kserve", claim="models", path="llama")
    assert service["spec"]["model"] == {"uri": "pvc://models/llama", "name": made.name}
    (main,) = service["spec"]["template"]["containers"]
    given = next(e["value"] for e in main["env"] if e["name"] == "VLLM_ADDITIONAL_ARGS")
    assert _after(shlex.split(given), "--max-model-len") == "128" and "--port" not in given


@pytest.mark.parametrize("kind", ["shell", "compose", "kubernetes", "systemd"])
def test_a_line_break_in_a_name_does_not_end_a_comment(folder: Path, kind: str, tmp_path: Path) -> None:
    made = plan(shutil.copytree(folder, tmp_path / "x\nrm -rf y"), DeploymentRequest())
    text = artefact(made, kind)
    assert "# vLLM serving x rm -rf y. " in text
    # there it stands inside quotes
    assert not any(line.startswith("rm -rf") for line in text.splitlines()) or kind == "shell"
    if kind == "shell":
        assert shlex.quote("x\nrm -rf y") in text


def test_plan_prints_the_artefact_alone_or_one_json_object(
    folder: Path, deploy: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = deploy("plan", "-m", folder, "--output", "compose", "--host", "0.0.0.0")
    assert code == 0 and "services" in yaml.safe_load(out)
    assert "warning: " in err
    code, out, _ = deploy("plan", "-m", folder, "--json", "--", "--max-num-seqs", "3")
    value = json.loads(out)
    assert (
        code == 0
        and value["command"][-2:] == ["--max-num-seqs", "3"]
        and value["artefact"].startswith("#!/bin/sh")
    )
    assert deploy("plan", "-m", folder, "--port", "0")[0] == 2
    assert deploy("plan", "-m", folder, "--gpu-memory-utilization", "1.5")[0] == 2
    assert deploy("plan", "-m", folder / "nothing")[0] == 1


def test_planning_imports_neither_torch_nor_transformers(folder: Path) -> None:
    code = (
        "import sys; import deploy_vllm\n"
        f"try: deploy_vllm.main(['plan', '-m', {str(folder)!r}, '--output', 'kubernetes'])\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), set(sys.modules) & {'torch', "
        "'transformers', 'rich'}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_an_address_a_name_and_a_share_that_are_none_are_refused_together(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import deploy_vllm

    with pytest.raises(SystemExit) as stop:
        deploy_vllm.main(
            ["plan", "-m", "none", "--host", "a b", "--name", "x\n", "--gpu-memory-utilization", "nan"]
        )
    error = capsys.readouterr().err
    assert stop.value.code == 2 and all(
        x in error for x in ("3 problems:", "--host is 'a b'", "--name is", "--gpu-memory-utilization is nan")
    )


def test_a_gpu_without_bfloat16_is_told_float16(folder: Path) -> None:
    for gpu, dtype in (("T4", "float16"), ("L40S-48GB", "bfloat16")):
        named = {a["name"]: a for a in plan(folder, DeploymentRequest(gpu=gpu)).to_dict()["arguments"]}
        assert named["dtype"]["value"] == dtype
        assert ("has no bfloat16" in named["dtype"]["reason"]) == (gpu == "T4")


def test_gemma_is_told_float32_there(tmp_path: Path) -> None:
    """In fp16 vLLM refuses it, and in fp32 what is quantized."""
    gemma = make_checkpoint(tmp_path / "gemma", "gemma3_text")
    quantize(gemma, tmp_path / "out", method="minmax", bits=4, group_size=32)
    for model, refused in ((gemma, False), (tmp_path / "out", True)):
        found = plan(model, DeploymentRequest(gpu="T4"))
        named = {a["name"]: a["value"] for a in found.to_dict()["arguments"]}
        assert named["dtype"] == "float32"
        assert any("do not take float32: vLLM is expected to refuse" in w for w in found.warnings) == refused


@pytest.mark.parametrize("extra", [(), ("--kv-cache-dtype", "fp8_e4m3")])
def test_an_fp8_cache_that_the_gpu_cannot_keep_is_told(folder: Path, extra: tuple[str, ...]) -> None:
    for gpu, said in (("T4", True), ("L40S-48GB", False)):
        asked = DeploymentRequest(gpu=gpu, kv_cache_dtype="auto" if extra else "fp8", extra=extra)
        assert any("from compute capability 8.9 on" in w for w in plan(folder, asked).warnings) == said


def test_a_context_that_nobody_asked_for_is_lowered_to_what_the_gpu_holds(tmp_path: Path) -> None:
    """One that was asked for is left, with the reason why vLLM will refuse it."""
    folder = Path(shutil.copytree(ROOT / "examples/tinylm-4m", tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1 << 25}))
    (folder / "vllm_config.json").write_text(json.dumps({"max-model-len": 1 << 25}))
    found = plan(folder, DeploymentRequest(gpu="T4"))
    (length,) = [a for a in found.arguments if a.name == "max-model-len"]
    assert (
        1 << 15 < int(length.value) < 1 << 25
        and int(length.value) % 256 == 0
        and "hold on T4" in length.reason
    )
    assert not found.warnings
    again = plan(folder, DeploymentRequest(gpu="T4", max_model_len=int(length.value)))
    assert not again.warnings  # it fits
    asked = plan(folder, DeploymentRequest(gpu="T4", max_model_len=1 << 25))
    assert _after(asked.command, "--max-model-len") == str(1 << 25)
    assert (
        "vLLM is expected to refuse this on" in asked.warnings[0]
        and "the longest that fits is" in asked.warnings[0]
    )
    offloaded = plan(
        folder, DeploymentRequest(gpu="T4", max_model_len=1 << 25, extra=("--cpu-offload-gb", "4"))
    )
    assert not offloaded.warnings  # under which the accounting does not hold
    unread = plan(folder, DeploymentRequest(gpu="T4", extra=("--max-num-seqs", "many")))
    assert "is not known" in unread.warnings[0]


def test_a_gpu_that_is_none_is_a_usage_error(folder: Path) -> None:
    with pytest.raises(UsageError, match="GTX-9999"):
        plan(folder, DeploymentRequest(gpu="GTX-9999"))


def test_a_start_that_the_plans_own_error_decides_is_told_with_what_to_lower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, asked = ROOT / "examples/tinylm-4m", DeploymentRequest(gpu="T4", max_model_len=256)
    assert not plan(folder, asked).warnings
    monkeypatch.setattr("quant.planning.memory.stated_error", lambda *_: 1 << 40)
    (warning,) = plan(folder, asked).warnings
    assert warning.startswith("T4 is tight: whether vLLM starts is within the plan's error of 1.00 TiB")
    assert "to be sure: " in warning


def test_a_remedy_names_the_contexts_option_as_vllm_does() -> None:
    assert _in_its_words("--context 512 (vLLM: --max-model-len 512)") == "--max-model-len 512"
    assert _in_its_words("--context 256 certainly starts") == "--max-model-len 256 certainly starts"


def test_a_gpu_that_shares_the_hosts_memory_is_asked_for_less_of_it() -> None:
    made = plan(ROOT / "examples/tinylm-4m", DeploymentRequest(gpu="DGX Spark"))
    (share,) = [a for a in made.arguments if a.name == "gpu-memory-utilization"]
    assert share.value == 0.85 and "shares its memory with the host" in share.reason
    asked = DeploymentRequest(gpu="DGX Spark", gpu_memory_utilization=0.9)
    assert _after(plan(ROOT / "examples/tinylm-4m", asked).command, "--gpu-memory-utilization") == "0.9"


def test_models_that_vllm_refuses_in_fp16_are_computed_in_bf16() -> None:
    """Those of its list, within a wrapper too; in the dtype of their weights otherwise."""
    for config, dtype, why in (
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "bfloat16", "gemma3"),
        ({"model_type": "glm4"}, "bfloat16", "instead of float16, in which vLLM does not compute glm4"),
        ({"model_type": "llama"}, "float16", "the weights' own"),
    ):
        (argument,) = (a for a in engine_arguments(config | {"dtype": "float16"}) if a.name == "dtype")
        assert argument.value == dtype and why in argument.reason
