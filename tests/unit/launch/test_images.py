"""Protects the images: pinned bases, hashed locks of the tested versions, no root, nothing copied that is missing."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
IMAGES = sorted((ROOT / "docker").glob("Dockerfile*"))
LOCKS = sorted((ROOT / "docker").glob("*.lock"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """Returns the instructions of a Dockerfile, continued lines joined and comments left out."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined)]


def pins(path: Path) -> dict[str, str]:
    """Returns name and version of each requirement of a lock file."""
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", path.read_text(), flags=re.MULTILINE))


def constraints() -> dict[str, str]:
    return pins(ROOT / "constraints.txt")


def test_there_is_an_image_for_gpus_and_one_without():
    assert [path.name for path in IMAGES] == ["Dockerfile", "Dockerfile.cpu"]


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_image(path: Path):
    steps = instructions(path)
    (base,) = [rest for name, rest in steps if name == "ARG" and rest.startswith("BASE=")]
    # An exact tag; a digest is the builder's to add, who has seen the image.
    assert re.fullmatch(r"BASE=[a-z/]+:\d+\.\d+\.\d+-[a-z0-9.-]+", base)
    assert steps[0] == ("ARG", base)
    assert [rest for name, rest in steps if name == "FROM"] == ["${BASE} AS build", "${BASE}"]
    last = steps[max(index for index, (name, _) in enumerate(steps) if name == "FROM") :]
    assert ("USER", "1000") in last
    assert ("ENTRYPOINT", '["theworld-train"]') in last
    assert not any("pip" in rest for name, rest in last if name == "RUN"), "the last stage installs nothing"
    assert any("--uid 1000" in rest for name, rest in last if name == "RUN")
    assert not any(re.search(r"(?i)token|password|secret|api_key", rest) for _, rest in steps)


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_what_is_copied_exists_and_is_not_ignored(path: Path):
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = [rest.split() for name, rest in instructions(path) if name == "COPY" and not rest.startswith("--from")]
    assert len(copies) > 0
    for *sources, _ in copies:
        for source in sources:
            assert (ROOT / source).exists(), source
            assert any(Path(source).match(pattern) for pattern in kept), f"{source} is ignored"
    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*", "nothing else goes into the build"


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_everything_is_installed_by_hash(path: Path):
    runs = " ; ".join(rest for name, rest in instructions(path) if name == "RUN")
    for command in re.findall(r"pip (?:--python \S+ )?(?:install|wheel) [^;&]*", runs):
        hashed = "--require-hashes" in command or "--no-index" in command
        # PyTorch's index for the CPU build cannot be locked from here; its hash is a build argument.
        assert hashed or "--requirement torch.txt" in command, command
    locks = {f"docker/{name}" for name in re.findall(r"[\w-]+\.lock", path.read_text())}
    assert locks == {"docker/build.lock", f"docker/requirements{'-cpu' if path.suffix else ''}.lock"}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_lock_pins_the_tested_versions_with_hashes(path: Path):
    text = path.read_text()
    locked = pins(path)
    assert len(locked) > 5
    for requirement in re.split(r"\n(?=[a-z])", text.partition("\n")[2]):
        if "==" in requirement:
            assert re.search(r"--hash=sha256:[0-9a-f]{64}", requirement), requirement
    tested = constraints()
    assert {name: version for name, version in locked.items() if tested.get(name, version) != version} == {}
    # What no test has run with is left to the build, or is a CUDA library of torch's.
    untested = {name for name in locked.keys() - tested.keys() if not name.startswith(("nvidia-", "cuda-"))}
    build = {"hatchling", "tomlkit", "trove-classifiers", "wheel"}
    assert untested <= ({"triton"} if path.stem != "build" else build)


def test_locks_hold_every_dependency_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    # The last two contradict the tested versions of what they depend on; Liger's takes 1 GB more without CUDA.
    others = ("dev", "all", "plot", "liger", "mlflow", "trackio")
    wanted = [
        *project["dependencies"],
        *(item for name in extras if name not in others for item in extras[name]),
    ]
    names = {re.match(r"[\w-]+", item)[0].lower().replace("_", "-") for item in wanted}  # type: ignore[index]
    cuda, cpu = pins(ROOT / "docker/requirements.lock"), pins(ROOT / "docker/requirements-cpu.lock")
    assert names <= cuda.keys()
    assert {name: cuda[name] for name in cpu} == cpu
    assert {name for name in cuda.keys() - cpu.keys() if not name.startswith(("nvidia-", "cuda-"))} == {
        "torch",
        "triton",
    }


def test_cpu_image_takes_the_tested_torch():
    (torch,) = [rest for name, rest in instructions(IMAGES[1]) if name == "ARG" and rest.startswith("TORCH=")]
    assert torch == f"TORCH=torch=={constraints()['torch']}+cpu"
