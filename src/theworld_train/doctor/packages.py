"""Packages: versions against the ranges that this one states, extras, and requirements that contradict each other."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution, requires

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

from theworld_train.config.schema import RunConfig
from theworld_train.doctor.finding import Finding
from theworld_train.doctor.machine import Machine, installed

OURS = "theworld-train"
#: Packages that have a line of their own; the others share one.
MAIN = ("torch", "transformers", "accelerate", "diffusers", "datasets", "huggingface-hub")
#: Why a range ends where it does, where that is more than what was tested.
REASONS = {
    "torch": "earlier releases have published code-execution holes",
    "transformers": "earlier releases have published code-execution holes, and 6 may change what is trained",
}
#: Looked at besides what this package asks for: it is built for one version of torch.
BESIDE = ("torchvision",)
#: Extras that only developers or other extras need.
NO_FEATURE = ("all", "dev")


def check_packages(machine: Machine, configs: Sequence[RunConfig]) -> list[Finding]:
    """Looks at Python and at all packages that this one asks for.

    Args:
        machine: The machine.
        configs: The configs that it should run; none for the machine by itself.
    """
    try:
        stated = [Requirement(text) for text in requires(OURS) or ()]
        python = distribution(OURS).metadata["Requires-Python"]
    except PackageNotFoundError:
        advice = "pip install -e . in its directory"
        return [Finding(OURS, "warn", "is not installed, so that its ranges of versions are not known", advice)]
    core = [need for need in stated if need.marker is None]
    versions = [_check_version(need, machine) for need in core]
    own = [finding for finding in versions if finding.check in MAIN or finding.state != "ok"]
    others = len(versions) - len(own)
    rest = [Finding("other packages", "ok", f"{others} in their ranges")] if others else []
    names = dict.fromkeys([*(need.name for need in core), *(need.name for _, need in _optional(stated)), *BESIDE])
    return [_check_python(python), *own, *rest, *_extras(stated, configs), *_contradictions(list(names))]


def _check_python(stated: str) -> Finding:
    current = platform.python_version()
    if SpecifierSet(stated).contains(current, prereleases=True):
        return Finding("python", "ok", current)
    return Finding("python", "bad", f"{current}, expected {stated}", f"make install PYTHON=... of Python {stated}")


def _check_version(need: Requirement, machine: Machine) -> Finding:
    current = installed(need.name)
    advice = f"pip install '{need}', or make install for the tested versions"
    if current is None:
        return Finding(need.name, "bad", f"not installed, expected {need.specifier}", advice)
    if not need.specifier.contains(current, prereleases=True):
        reason = f": {REASONS[need.name]}" if need.name in REASONS else ""
        return Finding(need.name, "bad", f"{current}, expected {need.specifier}{reason}", advice)
    if need.name == "torch":
        if machine.torch_error is not None:
            return Finding("torch", "bad", f"{current} cannot be imported: {machine.torch_error}", "install it anew")
        build = f"CUDA {machine.torch_cuda}" if machine.torch_cuda else "CPU only"
        return Finding("torch", "ok", f"{current}, built for {build}")
    return Finding(need.name, "ok", current)


def _extras(stated: Sequence[Requirement], configs: Sequence[RunConfig]) -> list[Finding]:
    """Looks at the optional parts; one that a config needs is bad if it is missing."""
    by_extra: dict[str, list[Requirement]] = {}
    for extra, need in _optional(stated):
        by_extra.setdefault(extra, []).append(need)
    wanted = {extra: why for config in configs for extra, why in needed_extras(config).items()}
    findings = []
    for extra in sorted(by_extra):
        missing = [need.name for need in by_extra[extra] if (found := installed(need.name)) is None]
        old = [
            f"{need.name} {found}, expected {need.specifier}"
            for need in by_extra[extra]
            if (found := installed(need.name)) and not need.specifier.contains(found, prereleases=True)
        ]
        advice = f'pip install "{OURS}[{extra}]"'
        if missing and extra in wanted:
            findings.append(Finding(f"extra {extra}", "bad", f"not installed, needed by {wanted[extra]}", advice))
        elif missing:
            findings.append(Finding(f"extra {extra}", "ok", f"not installed; when needed: {advice}"))
        elif old:
            findings.append(Finding(f"extra {extra}", "warn", "; ".join(old), advice))
        else:
            named = ", ".join(f"{need.name} {installed(need.name)}" for need in by_extra[extra])
            findings.append(Finding(f"extra {extra}", "ok", named))
    return findings


def _optional(stated: Sequence[Requirement]) -> Iterator[tuple[str, Requirement]]:
    """Yields the extras that users take, with what each asks for."""
    for need in stated:
        text = str(need.marker or "")
        extra = text.rpartition("extra ==")[2].strip(" '\"")
        if "extra ==" in text and extra not in NO_FEATURE:
            yield extra, need


def needed_extras(config: RunConfig) -> dict[str, str]:
    """Returns the extras that a config needs, and the key for each that says so."""
    needed: dict[str, str] = dict.fromkeys(config.tracking.trackers, f"tracking.trackers of {config.name}")
    if config.runtime.strategy.startswith("zero"):
        needed["deepspeed"] = f"runtime.strategy {config.runtime.strategy} of {config.name}"
    if config.optimizer.name == "adamw_8bit":
        needed["adapters"] = f"optimizer.name adamw_8bit of {config.name}"
    if any(entry.adapter for entry in config.trainable.values()):
        needed["adapters"] = f"an adapter of {config.name}"
    return needed


def _contradictions(names: Sequence[str]) -> list[Finding]:
    """Looks for packages whose own requirements are not met by what is installed."""
    unmet: list[str] = []
    for name in names:
        if installed(name) is None:
            continue
        for text in requires(name) or ():
            try:
                need = Requirement(text)
            except InvalidRequirement:
                continue
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            found = installed(need.name)
            if found is None or not need.specifier.contains(found, prereleases=True):
                unmet.append(f"{name} asks for {need.name}{need.specifier}, here is {found or 'none'}")
    if unmet:
        return [Finding("requirements", "warn", text, "make install for versions that agree") for text in unmet]
    return [Finding("requirements", "ok", "those of all these packages are met")]
