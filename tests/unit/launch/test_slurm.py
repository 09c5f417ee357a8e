"""Protects the Slurm scripts: each is run with a stand-in for Slurm, and what it starts is given to the real CLI."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPTS = sorted((ROOT / "launch/slurm").glob("*.sbatch"))
ARGUMENTS = {
    "single-node": ["configs/stages/projection.yaml", "optimizer.lr=3e-4"],
    "multi-node": ["configs/stages/full.yaml", "runtime.strategy=zero2"],
    "array": ["configs/stages/projection.yaml", "{overrides}"],
    "sweep": ["configs/sweeps/projection.yaml", "storage=journal", "trials=50"],
}
#: Options of sbatch that the scripts use, each with what its value looks like.
OPTIONS = {
    "job-name": r"[a-z-]+",
    "array": r"\d+-\d+",
    "nodes": r"\d+",
    "ntasks-per-node": "1",  # the launcher; it starts the ranks
    "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "mem": "0",
    "exclusive": "",
    "time": r"\d+:\d\d:\d\d",
    "requeue": "",
    "open-mode": "append",
    "output": r"slurm-%(j|A_%a)\.out",
    "signal": r"B:USR1@\d+",
}
VARIABLES = {
    "SLURM_JOB_ID": "42",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "node[0-1]",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_ARRAY_JOB_ID": "41",
    "SLURM_ARRAY_TASK_ID": "1",
}
SRUN = """\
#!/usr/bin/env bash
printf '%s\\n' "$@" > "$STUB/srun"
if [[ -n "${STUB_WAITS:-}" ]]; then
    trap 'touch "$STUB/notified"; exit "$STUB_CODE"' USR1
    touch "$STUB/waiting"
    while kill -0 "$PPID"; do sleep 0.05; done
fi
exit "$STUB_CODE"
"""
SCONTROL = """\
#!/usr/bin/env bash
if [[ "$1" == show ]]; then printf 'node0\\nnode1\\n'; else echo "$@" > "$STUB/scontrol"; fi
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Variables and commands of a Slurm job."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (tmp_path / "overrides").write_text("seed=1\nseed=2 optimizer.lr=1e-3\n")
    return {**os.environ, **VARIABLES, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "STUB": str(tmp_path)}


def command(script: Path, environment: dict[str, str]) -> list[str]:
    overrides = f"{environment['STUB']}/overrides"
    return ["bash", str(script), *(word.replace("{overrides}", overrides) for word in ARGUMENTS[script.stem])]


def test_every_script_is_tested():
    assert [script.stem for script in SCRIPTS] == sorted(ARGUMENTS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_directives_are_sbatch_options(script: Path):
    text = script.read_text()
    directives = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, flags=re.MULTILINE)
    assert len(directives) == text.count("#SBATCH"), "a directive that is written in another way"
    for name, value in directives:
        assert re.fullmatch(OPTIONS[name], value), f"--{name}={value}"
    assert {"requeue", "signal", "open-mode"} <= dict(directives).keys()
    body = re.search(r"^[^#\n]", text, flags=re.MULTILINE)
    assert body is not None
    assert "#SBATCH" not in text[body.start() :], "Slurm reads none after the first command"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_starts_a_command_that_the_cli_takes(script: Path, environment: dict[str, str], call, monkeypatch):
    subprocess.run(command(script, environment), env=environment | {"STUB_CODE": "0"}, cwd=ROOT, check=True, timeout=60)
    words = (Path(environment["STUB"]) / "srun").read_text().splitlines()
    start = words.index("theworld-train")
    assert all(word.startswith("--") for word in words[:start]), "options of srun itself"
    monkeypatch.chdir(ROOT)
    if script.stem == "sweep":
        begun: list[object] = []
        monkeypatch.setattr("theworld_train.cli.sweep._run", lambda *given, **options: begun.append((*given, options)))
        assert call(*words[start + 1 :])[0] == 0
        path, *overrides = ARGUMENTS["sweep"]
        assert begun == [(Path(path), overrides, {"resume": False, "worker": True})]
        return
    code, out, err = call(*words[start + 1 :], "--print")
    assert code == 0, err
    assert "--nproc-per-node=8" in out
    assert "resume=latest" in out, "a job that is put back has to go on"
    if script.stem == "multi-node":
        assert "--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=node0:29500" in out
    if script.stem == "array":
        assert "seed=2 optimizer.lr=1e-3 output_dir=runs/sweep-41/1" in out
    assert not (Path(environment["STUB"]) / "scontrol").exists(), "a run that is complete is not put back"


@pytest.mark.parametrize(
    ("code", "again"), [(0, False), (1, False), (2, False), (69, True), (75, True), (138, True), (143, False)]
)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_job_is_put_back_if_the_run_can_go_on(script: Path, code: int, again: bool, environment: dict[str, str]):
    result = subprocess.run(
        command(script, environment), env=environment | {"STUB_CODE": str(code)}, cwd=ROOT, timeout=60, check=False
    )
    assert result.returncode == code
    requeued = Path(environment["STUB"]) / "scontrol"
    assert requeued.exists() == again
    if again:
        assert requeued.read_text() == "requeue 42\n"


def test_run_that_is_stuck_again_and_again_is_not_put_back(environment: dict[str, str]):
    stuck = environment | {"STUB_CODE": "69", "SLURM_RESTART_COUNT": "3"}
    result = subprocess.run(command(SCRIPTS[0], environment), env=stuck, cwd=ROOT, timeout=60, check=False)
    assert result.returncode == 69
    assert not (Path(environment["STUB"]) / "scontrol").exists()


def test_notice_reaches_the_run(environment: dict[str, str]):
    stub = Path(environment["STUB"])
    script = next(script for script in SCRIPTS if script.stem == "multi-node")
    job = subprocess.Popen(
        command(script, environment), env=environment | {"STUB_CODE": "75", "STUB_WAITS": "yes"}, cwd=ROOT
    )
    try:
        deadline = time.monotonic() + 60
        while not (stub / "waiting").exists():
            assert time.monotonic() < deadline, "the run has not begun"
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(60) == 75
    finally:
        job.kill()
    assert (stub / "notified").exists()
    assert (stub / "scontrol").read_text() == "requeue 42\n"


def test_line_that_the_overrides_do_not_have(environment: dict[str, str]):
    script = next(script for script in SCRIPTS if script.stem == "array")
    result = subprocess.run(
        command(script, environment),
        env=environment | {"SLURM_ARRAY_TASK_ID": "2", "STUB_CODE": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert "has 2 lines, and this is run 2" in result.stderr
