"""Are the ranks of a started job fit to train together, under any launcher: they meet, are compared, and measure their links."""

from __future__ import annotations

import os
import statistics
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config.load import Loaded
from harness.errors import EXIT_CHECK_FAILED
from harness.launch import operators
from harness.preflight import cluster
from harness.preflight.findings import Finding, failed, passed, skipped, warned
from harness.preflight.machine import examine as examine_machine
from harness.units import format_bytes
from harness.world import World

if TYPE_CHECKING:
    import torch

MEET_MINUTES, BUILD_MINUTES = 3.0, 30.0
"""How long ranks wait for the one that examines their machine, and for each other."""
REDUCED_BYTES, SENT_BYTES, REPEATS = 64 << 20, 16 << 20, 3
MOST_PLACES = 32
"""Beyond so many places each is tried with its neighbours alone: pairs grow with the square."""


def examine(world: World, *, loaded: Loaded | None, build: bool) -> cluster.Diagnosis:
    """Examine the machines on which the ranks of this job are; the same answer on every rank.

    Args:
        world: the place of this rank.
        loaded: the run file that says what they shall be fit for.
        build: compile the operators that are missing.
    """
    from harness import distributed

    os.environ.update(operators.environment())
    purpose = cluster.purpose(loaded, hosts=max(1, world.size // world.local_size), ranks=world.local_size)
    report = examine_machine(purpose, build=build) if world.local_rank == 0 else None
    use_gpu = operators.num_gpus() > 0 and not purpose.cpu
    try:
        operators.build([] if use_gpu else ["ShareMemCommBuilder"], speak=world.is_main)
        device = distributed.init(world, use_gpu=use_gpu, timeout_minutes=BUILD_MINUTES if build else MEET_MINUTES)
        gathered = distributed.gather_objects((world.host, report))
        reports = [one for _, one in gathered if one is not None]
        together = [passed("meeting", f"{world.size} ranks on {len(reports)} hosts")]
        if len(reports) > 1:
            together += [*cluster.compare(reports), cluster.clocks(_clocks(world)), _share_folder(world, Path(purpose.run_dir))]
        together += _links([host for host, _ in gathered], device)
        distributed.shutdown()
    except Exception as error:  # whatever it is, it is the finding
        distributed.abandon(EXIT_CHECK_FAILED)
        return cluster.Diagnosis([world.host], [report] if report else [], [_apart(world, error)])
    return cluster.Diagnosis([report.host for report in reports], reports, together)


def _apart(world: World, error: Exception) -> Finding:
    last = str(error).strip().splitlines() or [type(error).__name__]
    return failed(
        "meeting",
        f"The {world.size} ranks did not come together, as rank {world.rank} on {world.host} saw it: {last[0]}",
        "export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0   (the interface of the cluster); harness doctor --hosts FILE   tries names and ports.",
    )


def _clocks(world: World) -> dict[str, float]:
    """The clock of each host at one moment, right after all have met."""
    from harness import distributed

    distributed.barrier()
    now = time.time()
    return dict(distributed.gather_objects((world.host, now)))


def _share_folder(world: World, folder: Path) -> Finding:
    """Whether all hosts see one folder: rank 0 leaves a file in it, and the others look."""
    from harness import distributed
    from harness.preflight.agent import Agent

    agent, token = Agent(), distributed.broadcast_object(f".harness-doctor-{uuid.uuid4().hex}")
    placed = distributed.broadcast_object(agent.place_token(str(folder), token) if world.is_main else "")
    if placed != "yes":
        return cluster.folder_shared(folder, {world.host: placed})
    seen = dict(distributed.gather_objects((world.host, agent.see_token(str(folder), token))))
    if world.is_main:
        agent.take_token(str(folder), token)
    return cluster.folder_shared(folder, seen)


def _links(hosts: list[str], device: torch.device) -> list[Finding]:
    """How fast all ranks reduce together, and whose links are slower than those of the others."""
    first = {host: rank for rank, host in reversed(list(enumerate(hosts)))}
    places = sorted(first.values()) if len(first) > 1 else list(range(len(hosts)))
    labels = {rank: hosts[rank] if len(first) > 1 else f"rank {rank}" for rank in places}
    speeds = _pairs(places, device)
    return [_all_reduce(len(hosts), device), judge_links({(labels[a], labels[b]): value for (a, b), value in speeds.items()})]


def _all_reduce(ranks: int, device: torch.device) -> Finding:
    import torch

    from harness import distributed

    def seconds(num_bytes: int) -> float:
        tensor = torch.zeros(num_bytes // 4, device=device)
        return min(_timed(lambda: distributed.all_reduce_sum(tensor), device) for _ in range(REPEATS))

    seconds(4)  # connections are made at the first use
    latency_s, spent_s = seconds(4), seconds(REDUCED_BYTES)
    # What one link carries: nccl-tests, doc/PERFORMANCE.md, "bus bandwidth".
    bus = 2 * (ranks - 1) / ranks * REDUCED_BYTES / spent_s
    return passed(
        "all-reduce",
        f"{ranks} ranks, {format_bytes(REDUCED_BYTES)} in {spent_s * 1e3:.0f} ms: {format_bytes(bus)}/s a link; 4 bytes in {latency_s * 1e3:.2f} ms",
    )


def _timed(work: Any, device: torch.device) -> float:
    """Seconds of `work` on the slowest rank."""
    import torch

    from harness import distributed

    distributed.barrier()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(distributed.gather_objects(time.perf_counter() - started))


def _pairs(places: list[int], device: torch.device) -> dict[tuple[int, int], float]:
    """Bytes a second there and back between two ranks, by pair; each rank is in one pair at a time."""
    import torch

    from harness import distributed

    me, tensor, mine = distributed.rank(), torch.zeros(SENT_BYTES // 4, device=device), {}
    for pairs in rounds(places):
        distributed.barrier()
        for pair in (pair for pair in pairs if me in pair):
            spent = [_exchange(tensor, pair, me, device) for _ in range(REPEATS)]
            mine[pair] = 2 * SENT_BYTES / min(spent)
    found: dict[tuple[int, int], float] = {}
    for theirs in distributed.gather_objects(mine):
        for pair, value in theirs.items():
            found[pair] = min(value, found.get(pair, value))
    return found


def _exchange(tensor: torch.Tensor, pair: tuple[int, int], me: int, device: torch.device) -> float:
    import torch

    from harness import distributed

    started = time.perf_counter()
    if me == pair[0]:
        distributed.send(tensor, pair[1])
        distributed.receive(tensor, pair[1])
    else:
        distributed.receive(tensor, pair[0])
        distributed.send(tensor, pair[0])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def rounds(places: list[int]) -> Iterator[list[tuple[int, int]]]:
    """Every pair once, in rounds in which nobody is in two pairs (the circle method); of many places the neighbours alone.

    Args:
        places: ranks.
    """
    if len(places) > MOST_PLACES:
        ring = [*zip(places, places[1:], strict=False)]
        yield from (ring[0::2], ring[1::2])
        return
    circle: list[int | None] = [*places, *([None] if len(places) % 2 else [])]
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        ends = zip(circle[:half], reversed(circle[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in ends if a is not None and b is not None]
        circle = [circle[0], circle[-1], *circle[1:-1]]


def judge_links(speeds: dict[tuple[str, str], float]) -> Finding:
    """Who is slow with everybody, and which pair is slow although neither of its ends is.

    Args:
        speeds: bytes a second by pair of names.
    """
    name = "links"
    if not speeds:
        return skipped(name, "one rank")
    best = {who: max(value for pair, value in speeds.items() if who in pair) for pair in speeds for who in pair}
    usual = statistics.median(best.values())
    slow = [who for who, value in best.items() if value < cluster.SLOW_SHARE * usual]
    weak = [pair for pair, value in speeds.items() if not set(pair) & set(slow) and value < cluster.SLOW_SHARE * min(best[pair[0]], best[pair[1]])]
    told = [f"{who} at best {format_bytes(best[who])}/s" for who in slow] + [f"{a} <-> {b} {format_bytes(speeds[a, b])}/s" for a, b in weak]
    if told:
        return warned(
            name,
            f"Slow: {', '.join(told)}, where {format_bytes(usual)}/s is usual; every all-reduce waits for the slowest.",
            f"ethtool eth0 (speed, errors) on {', '.join(slow or weak[0])}; a cable, a port of the switch, or other traffic; or leave it out of the hostfile.",
        )
    return passed(name, f"{format_bytes(min(speeds.values()))}/s to {format_bytes(max(speeds.values()))}/s between two")
