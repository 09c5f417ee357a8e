"""Protects `doctor`: each thing that goes wrong is found, graded and answered with what to do; secrets stay out."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from typer.testing import CliRunner

from theworld_train.cli.app import app
from theworld_train.config import RunConfig, parse_run_config
from theworld_train.doctor import known_bad, packages, surroundings
from theworld_train.doctor.examine import examine
from theworld_train.doctor.finding import Finding, worst
from theworld_train.doctor.known_bad import KNOWN_BAD, check_combinations
from theworld_train.doctor.machine import Gpu, Machine, look
from theworld_train.doctor.packages import check_packages, needed_extras

GIB = 2**30
H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, bf16=True)
RTX = Gpu("NVIDIA GeForce RTX 4090", 24 * GIB, 24 * GIB, bf16=True)
SERVER = Machine((H100,) * 8, driver="580.95.05", torch_cuda="13.0", cores=96, memory=1024 * GIB)
LAPTOP = Machine(cores=8, memory=16 * GIB)


def config(**keys: object) -> RunConfig:
    stated = {
        "name": "mine",
        "output_dir": "runs/mine",
        "trainable": {"world_projector": {}},
        "training": {"max_steps": 1},
        "data": {"train": {"source": "moving_digits", "split": "train", "samples": 8}},
    }
    return parse_run_config(stated | keys)


def only(findings: list[Finding], check: str) -> Finding:
    found = [finding for finding in findings if finding.check == check]
    assert len(found) == 1, findings
    return found[0]


# -- all of it ----------------------------------------------------------------------------------------------------


def test_this_machine_can_be_examined():
    findings = examine(look())
    checks = [finding.check for finding in findings]
    for expected in ("python", "torch", "host", "open files", "hub cache", "hub token", "network"):
        assert expected in checks
    assert all(finding.advice for finding in findings if finding.state != "ok")


def test_the_worst_state_is_that_of_the_examination():
    ok, warn, bad = (Finding("x", state, "") for state in ("ok", "warn", "bad"))
    assert [worst([]), worst([ok]), worst([warn, ok]), worst([ok, bad, warn])] == ["ok", "ok", "warn", "bad"]


# -- combinations -------------------------------------------------------------------------------------------------


def test_combinations_say_where_they_are_known_from_and_what_to_do():
    assert all(known.reason and known.source and known.advice for known in KNOWN_BAD)
    assert only(check_combinations(SERVER, ()), "known-bad combinations").state == "ok"


def test_several_rtx_40_with_an_old_driver():
    old = replace(SERVER, gpus=(RTX, RTX), driver="535.183.01")
    assert "P2P" in only(check_combinations(old, ()), "several GPUs of the RTX 40 series").text
    mended = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
    for machine in (
        replace(old, driver="580.95.05"),
        replace(old, gpus=(RTX,)),
        replace(old, gpus=(H100, H100)),
        replace(old, environment=mended),
    ):
        assert worst(check_combinations(machine, ())) == "ok"


def test_torch_for_cpu_beside_a_driver():
    assert worst(check_combinations(replace(LAPTOP, driver="580.95.05"), ())) == "bad"
    assert worst(check_combinations(LAPTOP, ())) == "ok"


def test_a_machine_without_a_driver_has_no_version_to_compare(monkeypatch: pytest.MonkeyPatch):
    class Strict(SpecifierSet):
        """As of packaging 24 and 25, which refuse what is no version."""

        def __contains__(self, version: str) -> bool:
            return super().__contains__(Version(version))

    monkeypatch.setattr(known_bad, "SpecifierSet", Strict)
    assert worst(check_combinations(LAPTOP, ())) == "ok"
    assert worst(check_combinations(replace(LAPTOP, driver="580.95.05"), ())) == "bad"


def test_a_deepspeed_without_the_mend_matters_to_zero3_alone(monkeypatch: pytest.MonkeyPatch):
    zero3, ddp, auto = (config(runtime={"strategy": name}) for name in ("zero3", "ddp", "auto"))
    assert worst(check_combinations(SERVER, [zero3])) == "ok", "the installed version has it"
    monkeypatch.setattr(known_bad, "_lacks", lambda *_: True)
    states = [worst(check_combinations(SERVER, configs)) for configs in ([zero3], [auto], [ddp], [])]
    assert states == ["bad", "bad", "ok", "bad"]


def test_a_sweep_is_told_what_to_name_instead(tmp_path: Path):
    path = tmp_path / "sweep.yaml"
    path.write_text("space: {seed: {values: [1]}}\n")
    result = CliRunner().invoke(app, ["doctor", str(path)])
    assert result.exit_code == 2
    assert "is a sweep, of which doctor takes none; name the run config or the pipeline that it varies" in result.stderr


# -- packages -----------------------------------------------------------------------------------------------------


def with_versions(monkeypatch: pytest.MonkeyPatch, **changed: str | None) -> None:
    known = packages.installed
    monkeypatch.setattr(packages, "installed", lambda name: changed.get(name, known(name)))


def test_a_version_out_of_its_range_is_bad_and_its_reason_said(monkeypatch: pytest.MonkeyPatch):
    with_versions(monkeypatch, transformers="4.40.0", numpy="1.26.0")
    findings = check_packages(LAPTOP, ())
    assert only(findings, "transformers").state == only(findings, "numpy").state == "bad"
    assert "4.40.0, expected" in only(findings, "transformers").text
    assert "code-execution" in only(findings, "transformers").text


def test_a_package_that_is_not_there_is_bad(monkeypatch: pytest.MonkeyPatch):
    with_versions(monkeypatch, accelerate=None)
    assert "not installed" in only(check_packages(LAPTOP, ()), "accelerate").text


def test_a_torch_that_cannot_be_imported_is_bad():
    found = only(check_packages(replace(LAPTOP, torch_error="OSError: libcudart.so.13"), ()), "torch")
    assert found.state == "bad"
    assert "libcudart" in found.text


def test_an_extra_is_bad_where_a_config_needs_it(monkeypatch: pytest.MonkeyPatch):
    with_versions(monkeypatch, deepspeed=None)
    assert only(check_packages(LAPTOP, ()), "extra deepspeed").state == "ok"
    found = only(check_packages(LAPTOP, [config(runtime={"strategy": "zero2"})]), "extra deepspeed")
    assert (found.state, found.advice) == ("bad", 'pip install "theworld-train[deepspeed]"')


@pytest.mark.parametrize(
    ("keys", "extras"),
    [
        ({}, set()),
        ({"tracking": {"trackers": ["wandb", "tensorboard"]}}, {"wandb", "tensorboard"}),
        ({"optimizer": {"name": "adamw_8bit"}}, {"adapters"}),
        ({"trainable": {"language_model": {"adapter": "lora"}}}, {"adapters"}),
        ({"runtime": {"strategy": "zero1"}}, {"deepspeed"}),
    ],
)
def test_extras_that_a_config_needs(keys: dict[str, object], extras: set[str]):
    assert needed_extras(config(**keys)).keys() == extras


def test_requirements_that_contradict_each_other_are_named(monkeypatch: pytest.MonkeyPatch):
    known = packages.requires
    monkeypatch.setattr(packages, "requires", lambda name: ["numpy<1"] if name == "datasets" else known(name))
    found = [finding for finding in check_packages(LAPTOP, ()) if finding.check == "requirements"]
    assert any("datasets asks for numpy<1, here is" in finding.text for finding in found)
    assert worst(found) == "warn"


# -- GPUs ---------------------------------------------------------------------------------------------------------


def gpu_check(machine: Machine, *configs: RunConfig) -> dict[str, Finding]:
    return {finding.check: finding for finding in surroundings.check_gpus(machine, configs)}


def test_gpus_that_are_ready():
    found = gpu_check(SERVER)
    assert len(found) == 8
    assert {finding.state for finding in found.values()} == {"ok"}
    assert found["GPU 0"].text == "NVIDIA H100 80GB HBM3, 80.0 GiB, 79.0 GiB free, bf16"


def test_a_gpu_without_bf16_is_bad_unless_nothing_needs_it():
    machine = replace(SERVER, gpus=(Gpu("Tesla V100", 32 * GIB, 32 * GIB, bf16=False),))
    assert gpu_check(machine)["GPU 0"].state == "bad"
    assert gpu_check(machine, config(precision="fp32"))["GPU 0"].state == "ok"


def test_a_gpu_that_another_process_uses_and_gpus_of_several_kinds():
    machine = replace(SERVER, gpus=(replace(H100, free=10 * GIB), RTX))
    found = gpu_check(machine)
    assert (found["GPU 0"].state, found["GPU 1"].state, found["GPUs"].state) == ("warn", "ok", "warn")


def test_gpus_that_torch_does_not_see():
    hidden = replace(SERVER, gpus=(), environment={"CUDA_VISIBLE_DEVICES": ""})
    assert "CUDA_VISIBLE_DEVICES is ''" in gpu_check(hidden)["GPU"].text
    assert gpu_check(replace(SERVER, gpus=()))["GPU"].state == "bad"


def test_no_gpu_is_no_fault_of_a_run_for_a_cpu():
    assert gpu_check(LAPTOP)["GPU"].state == "warn"
    assert gpu_check(LAPTOP, config(precision="fp32"))["GPU"].state == "ok"
    flex = config(precision="fp32", model={"attention": "flex"})
    assert gpu_check(LAPTOP, flex)["model.attention"].state == "bad"


# -- host, disks, port --------------------------------------------------------------------------------------------


def host_check(machine: Machine, *configs: RunConfig) -> dict[str, Finding]:
    return {finding.check: finding for finding in surroundings.check_host(machine, configs)}


def workers(number: int) -> RunConfig:
    source = {"source": "moving_digits", "split": "train", "samples": 8}
    return config(data={"train": source, "num_workers": number})


def test_more_workers_than_cores():
    found = host_check(replace(SERVER, cores=16), workers(8))["host"]
    assert (found.state, found.advice) == ("warn", "data.num_workers=1")
    assert host_check(SERVER, workers(8))["host"].state == "ok"


def test_what_a_launcher_has_left_in_the_shell():
    found = host_check(replace(LAPTOP, environment={"RANK": "0", "WORLD_SIZE": "2"}))["environment"]
    assert "RANK, WORLD_SIZE set" in found.text
    assert "environment" not in host_check(LAPTOP)


def test_few_open_files(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 8192))
    found = host_check(LAPTOP)["open files"]
    assert (found.state, found.advice) == ("warn", "ulimit -n 8192")


@pytest.mark.parametrize(("number", "state"), [(0, "warn"), (2, "bad")])
def test_little_shared_memory_matters_to_workers(monkeypatch: pytest.MonkeyPatch, number: int, state: str):
    monkeypatch.setattr(surroundings, "free_space", lambda path: (64 * 2**20, path))
    found = host_check(LAPTOP, workers(number))["/dev/shm"]
    assert found.state == state
    assert "--ipc=host" in str(found.advice)


def test_a_compiler_is_asked_for_by_those_who_need_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("theworld_train.model.kernels.find_compiler", lambda: None)
    assert host_check(LAPTOP)["C++ compiler"].state == "ok"
    assert host_check(LAPTOP, config(model={"kernels": "compiled"}))["C++ compiler"].state == "bad"
    offload = config(runtime={"strategy": "zero2", "offload": "optimizer"})
    assert "runtime.offload of mine" in host_check(LAPTOP, offload)["C++ compiler"].text


def test_disks_without_space_or_rights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    run = config(output_dir=str(tmp_path / "runs" / "mine"), expect_trainable=4_000_000_000)
    monkeypatch.setattr(surroundings, "free_space", lambda path: (100 * GIB, tmp_path))
    found = only(surroundings.check_disks([run]), "output_dir of mine")
    assert found.state == "warn"
    assert "134.1 GiB may be needed" in found.text  # 12 bytes x 4e9 x 3 checkpoints
    monkeypatch.setattr("os.access", lambda *_: False)
    assert only(surroundings.check_disks([run]), "output_dir of mine").state == "bad"


def test_a_port_that_is_taken_or_is_none():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        taken = str(other.getsockname()[1])
        found = surroundings.check_port(replace(LAPTOP, environment={"MASTER_PORT": taken}))
        assert (found.check, found.state) == (f"port {taken}", "warn")
    assert surroundings.check_port(replace(LAPTOP, environment={"MASTER_PORT": taken})).state == "ok"
    assert surroundings.check_port(replace(LAPTOP, environment={"MASTER_PORT": "x"})).state == "bad"


# -- the hub ------------------------------------------------------------------------------------------------------


def hub_check(machine: Machine, *configs: RunConfig, network: bool = False) -> dict[str, Finding]:
    return {finding.check: finding for finding in surroundings.check_hub(machine, configs, network=network)}


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_models_that_are_not_here_are_to_be_fetched(empty_cache: None):
    found = hub_check(LAPTOP, config(model={"base": "nowhere/gemma"}))["model.base"]
    assert found.state == "bad"
    assert "nowhere/gemma" in found.text
    assert "theworld-train fetch" in str(found.advice)


def test_models_in_directories_are_here(tiny, empty_cache: None):
    run = config(model={"base": str(tiny.gemma), "world": {"encoder": str(tiny.cosmos)}})
    assert hub_check(LAPTOP, run)["models and data"].state == "ok"


def test_wandb_online_wants_a_key(empty_cache: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    online = config(tracking={"trackers": ["wandb"], "wandb_mode": "online"})
    assert hub_check(LAPTOP, online)["wandb key"].state == "warn"
    assert "wandb key" not in hub_check(replace(LAPTOP, environment={"WANDB_API_KEY": "x"}), online)


@pytest.fixture
def server() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}"
    listening.shutdown()
    listening.server_close()


def test_the_hub_is_asked_only_if_wanted(server: str):
    machine = replace(LAPTOP, environment={"HF_ENDPOINT": server})
    assert hub_check(machine, network=True)["network"].text == f"{server} answers"
    assert "not asked" in hub_check(machine)["network"].text
    offline = replace(LAPTOP, environment={"HF_ENDPOINT": server, "HF_HUB_OFFLINE": "1"})
    assert "HF_HUB_OFFLINE" in hub_check(offline, network=True)["network"].text


def test_a_hub_that_does_not_answer_is_a_warning():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        machine = replace(LAPTOP, environment={"HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}"})
        assert hub_check(machine, network=True)["network"].state == "warn"


# -- the command --------------------------------------------------------------------------------------------------


def doctor(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result.exit_code, result.output


CONFIG = """\
name: mine
output_dir: runs/mine
trainable: {world_projector: {}}
model: {base: nowhere/gemma}
data: {train: {source: jsonl, path: rows.jsonl}}
training: {max_steps: 1}
"""


def test_the_command_ends_with_1_where_something_is_bad(empty_cache: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    Path("mine.yaml").write_text(CONFIG)
    Path("all.yaml").write_text("name: all\noutput_dir: runs\nstages: [{config: mine.yaml}]\n")
    for arguments in (("mine.yaml",), ("all.yaml",), ("mine.yaml", "training.max_steps=2")):
        code, out = doctor(*arguments)
        assert code == 1
        assert "bad   model.base" in out
        assert "-> run `theworld-train fetch CONFIG`" in out
        assert "a token is set" in out
        assert "secretsecret" not in out


def test_the_command_prints_json_for_programs(empty_cache: None):
    Path("mine.yaml").write_text(CONFIG)
    code, out = doctor("mine.yaml", "--json")
    found = json.loads(out)
    assert (code, found["state"]) == (1, "bad")
    assert {finding["check"] for finding in found["findings"]} >= {"python", "torch", "model.base"}


def test_the_command_writes_nothing(empty_cache: None, tmp_path: Path):
    doctor()
    assert list(tmp_path.iterdir()) == []
