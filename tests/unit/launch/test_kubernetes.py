"""Protects the Kubernetes manifests: their structure, what they refer to, and the commands that they run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from theworld_train.config import load_run_config
from theworld_train.launch import shutdown_grace_s
from theworld_train.train.stopping import SAVED_AND_STOPPED

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "launch/kubernetes").rglob("*.yaml"))
#: Where the images hold what the repository has in its root.
IN_IMAGE = "/opt/theworld-train/"
#: Variables that the controllers give to each machine, as their documentation says.
GIVEN = {
    "JOB_COMPLETION_INDEX": "1",
    "PET_NPROC_PER_NODE": "8",
    "PET_NNODES": "2",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "theworld-train-node-0-0.theworld-train",
    "PET_MASTER_PORT": "29400",
}
#: Fields of each kind, by path: those that it needs, and those that it may have.
FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "JobSet.spec": ({"replicatedJobs"}, {"network", "failurePolicy", "successPolicy", "suspend", "coordinator"}),
    "JobSet.spec.failurePolicy": (set(), {"maxRestarts", "rules", "restartStrategy"}),
    "TrainingRuntime.spec": ({"template"}, {"mlPolicy", "podGroupPolicy"}),
    "TrainingRuntime.spec.mlPolicy": (set(), {"numNodes", "torch", "mpi"}),
    "TrainingRuntime.spec.template": ({"spec"}, {"metadata"}),
    "TrainJob.spec": ({"runtimeRef"}, {"initializer", "trainer", "labels", "annotations", "suspend", "managedBy"}),
    "TrainJob.spec.runtimeRef": ({"name"}, {"apiGroup", "kind"}),
    "TrainJob.spec.trainer": (
        set(),
        {"image", "command", "args", "env", "numNodes", "numProcPerNode", "resourcesPerNode"},
    ),
    "replicatedJob": ({"name", "template"}, {"replicas", "groupName", "dependsOn"}),
    "job": ({"template"}, {"completionMode", "completions", "parallelism", "backoffLimit", "podFailurePolicy"}),
    "pod": (
        {"containers", "securityContext", "terminationGracePeriodSeconds"},
        {"restartPolicy", "volumes", "initContainers", "nodeSelector", "tolerations"},
    ),
    "container": ({"name", "image"}, {"command", "args", "env", "ports", "resources", "volumeMounts"}),
}
VERSIONS = {
    "JobSet": "jobset.x-k8s.io/v1alpha2",
    "TrainJob": "trainer.kubeflow.org/v1alpha1",
    "TrainingRuntime": "trainer.kubeflow.org/v1alpha1",
}


def documents(path: Path) -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(path.read_text())}


def job_set_specs() -> list[Any]:
    """Returns the spec of every JobSet, on its own or inside a runtime."""
    kinds = {kind: document for path in FILES for kind, document in documents(path).items()}
    return [kinds["JobSet"]["spec"], kinds["TrainingRuntime"]["spec"]["template"]["spec"]]


def check(name: str, value: dict[str, Any]) -> None:
    needed, allowed = FIELDS[name]
    assert needed <= value.keys() <= needed | allowed, f"{name}: {sorted(value)}"


def at(document: dict[str, Any], path: str) -> Any:
    for key in path.split(".")[1:]:
        document = document[key]
    return document


def test_both_kinds_of_job_are_there():
    assert {kind for path in FILES for kind in documents(path)} == VERSIONS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_documents_have_the_fields_of_their_kinds(path: Path):
    for kind, document in documents(path).items():
        assert document.keys() == {"apiVersion", "kind", "metadata", "spec"}
        assert document["apiVersion"] == VERSIONS[kind]
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", document["metadata"]["name"])
        for name in FIELDS:
            if name.startswith(f"{kind}."):
                check(name, at(document, name))


@pytest.mark.parametrize("spec", job_set_specs(), ids=["jobset", "runtime"])
def test_jobs_have_the_fields_of_theirs(spec: dict[str, Any]):
    (job,) = spec["replicatedJobs"]
    check("replicatedJob", job)
    check("job", job["template"]["spec"])
    pod = job["template"]["spec"]["template"]["spec"]
    check("pod", pod)
    (container,) = pod["containers"]
    check("container", container)
    assert pod["securityContext"]["runAsNonRoot"] is True
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    largest = load_run_config(ROOT / "configs/stages/full.yaml")
    assert pod["terminationGracePeriodSeconds"] > shutdown_grace_s(largest)


def test_job_set_starts_again_unless_the_input_is_wrong():
    spec = job_set_specs()[0]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["values"] == [2]
    assert rule["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    assert SAVED_AND_STOPPED not in rule["onExitCodes"]["values"]
    assert spec["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert spec["failurePolicy"]["maxRestarts"] > 0


def test_train_job_uses_its_runtime():
    trained = documents(ROOT / "launch/kubernetes/trainjob.yaml")
    runtime, job = trained["TrainingRuntime"], trained["TrainJob"]["spec"]
    assert job["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org",
        "kind": "TrainingRuntime",
        "name": runtime["metadata"]["name"],
    }
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    assert replicated["name"] == container["name"] == "node", "the names by which Trainer finds them"


def commands() -> dict[str, tuple[list[str], int, int]]:
    """Returns the arguments of each job, its machines, and the GPUs on each."""
    spec = job_set_specs()[0]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    assert "command" not in container, "the image's entrypoint is the CLI"
    trained = documents(ROOT / "launch/kubernetes/trainjob.yaml")["TrainJob"]["spec"]["trainer"]
    assert trained["command"] == ["theworld-train"]
    return {
        "jobset": (container["args"], job["completions"], container["resources"]["limits"]["nvidia.com/gpu"]),
        "trainjob": (trained["args"], trained["numNodes"], trained["resourcesPerNode"]["limits"]["nvidia.com/gpu"]),
    }


@pytest.mark.parametrize("kind", ["jobset", "trainjob"])
def test_command_is_one_that_the_cli_takes(kind: str, call):
    arguments, machines, gpus = commands()[kind]
    assert all(isinstance(word, str) for word in arguments), "Kubernetes takes strings alone"
    words = [re.sub(r"\$\((\w+)\)", lambda match: GIVEN[match[1]], word) for word in arguments]
    words = [f"{ROOT}/{word.removeprefix(IN_IMAGE)}" if word.startswith(IN_IMAGE) else word for word in words]
    code, out, err = call(*words, "--print")
    assert code == 0, err
    assert f"--nnodes={machines} --node-rank=1 --master-addr=theworld-train-node-0-0.theworld-train" in out
    assert f"--nproc-per-node={gpus}" in out
    assert "resume=latest" in out, "a job that starts again has to go on"
    assert f"COPY configs {IN_IMAGE}configs" in (ROOT / "docker/Dockerfile").read_text()
