"""One examination: all checks, in the order in which they matter."""

from __future__ import annotations

from collections.abc import Sequence

from theworld_train.config.schema import RunConfig
from theworld_train.doctor.finding import Finding
from theworld_train.doctor.known_bad import check_combinations
from theworld_train.doctor.machine import Machine
from theworld_train.doctor.packages import check_packages
from theworld_train.doctor.surroundings import check_disks, check_gpus, check_host, check_hub, check_port


def examine(machine: Machine, configs: Sequence[RunConfig] = (), *, network: bool = False) -> list[Finding]:
    """Examines a machine.

    Args:
        machine: What it has.
        configs: What it should run; without any, the machine is judged by itself.
        network: Whether to ask the hub for an answer, for ten seconds at most.

    Returns:
        A finding for everything that was looked at.
    """
    findings = [
        *check_packages(machine, configs),
        *check_gpus(machine, configs),
        *check_combinations(machine, configs),
        *check_host(machine, configs),
        *check_disks(configs),
        check_port(machine),
        *check_hub(machine, configs, network=network),
    ]
    return list(dict.fromkeys(findings))
