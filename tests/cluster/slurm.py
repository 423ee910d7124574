"""A real Slurm over the hosts of this machine: h0 is the controller and the login node, h1, h2, ... are nodes.

Real: slurmctld, slurmd, munge, sbatch, srun, the scheduler, preemption, time limits, requeues. Not there: cgroups, GPUs, accounting.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import time
from functools import cache
from pathlib import Path

from tests.cluster.hosts import Cluster

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
# Nothing that a job could lean on: no RequeueExit, and requeues are off unless a job asks. linuxproc, task/none, switch/none: no cgroups, no devices.
# cred_expire: without it a job that is started again waits two minutes for the credential of its last start to expire.
_CONF = """ClusterName=test
SlurmctldHost=h0
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge/munge.socket.2,cred_expire=5
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=2,sched_min_interval=100000
SlurmctldTimeout=10
SlurmdTimeout=60
KillWait=30
ReturnToService=2
JobRequeue=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={nodes} CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=low  Nodes={nodes} Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes={nodes} MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""
_DAEMONS = """
install -d -o munge -g munge -m 755 /run/munge
install -d -o munge -g munge -m 700 /run/munge/private
install -o munge -g munge -m 400 "$DIR/munge.key" /run/munge/private/key
setpriv --reuid=munge --regid=munge --clear-groups munged --socket=/run/munge/munge.socket.2 --pid-file=/run/munge/pid \
  --key-file=/run/munge/private/key --seed-file=/run/munge/private/seed --log-file=/run/munge/private/log
mkdir -p "$DIR/spool/$HOST"
if [ "$HOST" = h0 ]; then slurmctld -c; else slurmd -N "$HOST"; fi
"""


@cache
def missing() -> str:
    """Why there can be no Slurm on this machine; empty when there can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if absent := [name for name in PROGRAMS if shutil.which(name, path=path) is None]:
        return f"Slurm needs {', '.join(absent)} (Debian: apt-get install slurm-wlm munge)"
    try:
        pwd.getpwnam("munge")
    except KeyError:
        return "Slurm needs the user munge (Debian: apt-get install munge)"
    return ""


class Slurm:
    """Slurm's daemons on the hosts of a cluster, which end with it. Two partitions over the same nodes: jobs in `high` preempt jobs in `low`.

    Args:
        cluster: three hosts or more.
        folder: an empty folder for configuration, state and logs.
    """

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder = cluster, folder
        for name in ("state", "spool", "log"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o600)
        self.conf = folder / "slurm.conf"
        self.conf.write_text(_CONF.format(dir=folder, nodes=f"h[1-{len(cluster.names) - 1}]"))
        self.env = os.environ | {"SLURM_CONF": str(self.conf), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        for number, name in enumerate(cluster.names):
            done = cluster.run(number, "bash", "-euc", _DAEMONS, env=self.env | {"DIR": str(folder), "HOST": name})
            assert done.returncode == 0, done.stderr
        self.until(lambda: self("sinfo", "-h", "-N", "-p", "low", "-t", "idle", "-o", "%n").split() == cluster.names[1:], timeout_s=30)

    def __call__(self, *words: object) -> str:
        """What a command says on the login node."""
        return self.cluster.run(0, *words, env=self.env).stdout

    def start(self, *words: object, told: Path, variables: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a command on the login node, with variables of its own; what it prints goes into a file."""
        with open(told, "ab") as stream:
            return self.cluster.start(0, *words, env=self.env | (variables or {}), stdout=stream, stderr=subprocess.STDOUT)

    def job(self) -> str:
        """The number of the only job in the partition `low`; empty when there is none."""
        return self("squeue", "-h", "-p", "low", "-o", "%i").strip()

    @staticmethod
    def until(there, *, timeout_s: float = 120.0) -> None:
        """Wait for a moment."""
        deadline = time.monotonic() + timeout_s
        while not there():
            assert time.monotonic() < deadline, f"the moment did not come in {timeout_s:g} s"
            time.sleep(0.2)
