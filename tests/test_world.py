"""Which rank a process is, under every launcher; what starts ranks inside a Slurm task goes before Slurm."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from harness import world
from harness.world import World

SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "3", "SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_STEP_TASKS_PER_NODE": "8,4", "SLURM_STEP_NODELIST": "gpu-[03-04]",
}
TASK = World(11, 12, 3, 4)
BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "12"}
STARTER = {
    "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "gpu-03", "MASTER_PORT": "20000",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_RANK": "2",
}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}


@pytest.fixture
def under(monkeypatch):
    """Sets the variables of a launcher alone."""
    for name in os.environ:
        if name.startswith(("SLURM_", "PMI", "OMPI_", "MPI_")) or name in (*STARTER, "CROSS_RANK"):
            monkeypatch.delenv(name)
    return lambda values: [monkeypatch.setenv(name, value) for name, value in values.items()]


@pytest.mark.parametrize(("values", "found"), [
    ({}, World()),
    (BATCH, World()),
    (SLURM, TASK),
    (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x3)"}, TASK),
    (SLURM | {"PMIX_RANK": "11"}, TASK),
    (SLURM | {"PMI_RANK": "11", "PMI_SIZE": "12"}, TASK),
    (SLURM | {"SLURM_PTY_PORT": "45001"}, World()),
    *[(around | values, World(2, 4, 0, 2)) for values in (STARTER, OPENMPI, HYDRA) for around in ({}, SLURM)],
    ({"RANK": "2", "WORLD_SIZE": "4"}, World(2, 4, 0, 4, is_placed=False)),
    ({"PMI_RANK": "2", "PMI_SIZE": "4"}, World(2, 4, 0, 4, is_placed=False)),
])
def test_the_place_of_a_rank(under, values, found):
    under(values)
    assert world.current() == replace(found, host=world.current().host)


@pytest.mark.parametrize(("nodes", "first"), [
    ("gpu-[03-04]", "gpu-03"), ("gpu-[7,9-12],login", "gpu-7"), ("h1", "h1"), ("h1,h2", "h1"), ("r[1-2]n[05-06].cluster", "r1n05.cluster"),
])
def test_tasks_of_a_step_meet_on_its_first_node(under, nodes, first):
    under(SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert world.meeting_place() == {"MASTER_ADDR": first, "MASTER_PORT": "20143"}


@pytest.mark.parametrize("values", [BATCH, SLURM | STARTER, SLURM | OPENMPI, SLURM | HYDRA, SLURM | {"SLURM_STEP_NUM_TASKS": "1"}])
def test_launchers_that_know_better_say_where(under, values):
    under(values)
    assert world.meeting_place() == {}
