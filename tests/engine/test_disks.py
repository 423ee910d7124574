"""Hosts with disks of their own: each keeps what its ranks wrote, and the run goes on from the newest step that all of them together hold."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from harness.checkpoint import shelf
from harness.checkpoint.disks import find
from harness.checkpoint.verify import verify
from harness.errors import Refused
from harness.formats.manifest import read_manifest
from harness.testing.pool import RankFailure
from harness.world import World
from tests.engine.journey import STEPS, Leg, journey, prepare_data, travel
from tests.engine.test_topology import SAME

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disks")
    prepare_data(folder)
    return folder


@pytest.fixture(scope="module")
def whole(base, ranks2):
    """Losses of three legs on one disk."""
    return ranks2.run(travel, str(base), str(base / "whole"), Leg(2, "zero3"), 3 * STEPS, 0.1)[0].losses


@pytest.fixture
def places(tmp_path) -> tuple[str, str]:
    return str(tmp_path / "h0"), str(tmp_path / "h1")


def found_disks(places: list[str], hosts: list[str]) -> tuple[tuple[int, ...], tuple[str, ...], list[str]]:
    from harness import distributed

    rank = distributed.rank()
    place = Path(places[rank])
    place.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    disks = find(place, World(rank=rank, size=distributed.size(), host=hosts[rank]))
    distributed.barrier()
    return disks.leaders, disks.names, [str(path) for path in place.rglob("disks-*")]


@pytest.mark.parametrize("places, hosts, leaders, names", [
    ("a a a a", "h0 h0 h0 h0", (0, 0, 0, 0), ()),
    ("a a a a", "h0 h0 h1 h1", (0, 0, 0, 0), ()),
    ("a a b b", "h0 h0 h1 h1", (0, 0, 2, 2), ("h0", "h1")),
    ("a b a b", "h0 h1 h2 h1", (0, 1, 0, 1), ("h0, h2", "h1")),
    ("a b b a", "h0 h0 h0 h0", (0, 1, 1, 0), ("h0", "h0")),
])
def test_ranks_find_out_who_shares_a_disk(ranks4, tmp_path, places, hosts, leaders, names):
    answers = ranks4.run(found_disks, [str(tmp_path / place) for place in places.split()], hosts.split())
    assert answers == [(leaders, names, [])] * 4


def steps(place: str) -> list[int]:
    return [step for step, _ in shelf.committed(Path(place))]


def test_each_disk_keeps_its_part_and_nothing_is_brought_where_the_shape_stays(base, whole, ranks2, places, tmp_path):
    first, second = journey({2: ranks2}, base, tmp_path, [Leg(2, "zero3", 1, places)] * 2, dropout=0.1)
    assert first.losses + second.losses == whole[: 2 * STEPS] and any(text.startswith(SAME) for text in second.said)
    assert not any("brought" in text for text in second.said)
    folders = [Path(place) / "checkpoints" / "step-000008" for place in places]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names == [[f"disk-{n}", "manifest.json", f"rank-0000{n}-000.safetensors"] for n in (0, 1)]
    assert read_manifest(folders[0]) == read_manifest(folders[1]) and read_manifest(folders[0]).disks == ("h0", "h1")
    for folder, other in zip(folders, ("h1", "h0"), strict=True):
        assert shelf.inspect(folder)[1] == [], "a part holds"
        with pytest.raises(Refused, match=f"1 of the 2 files of this checkpoint are on the disks of other hosts: {other}.") as refused:
            verify(folder.parent.parent)
        assert "Copy their checkpoints/step-000008 folders together" in str(refused.value)
    with pytest.raises(RankFailure, match="h1, with a part of it, does not take part"):
        ranks2.run(travel, str(base), places[0], Leg(2, "zero3"), 3 * STEPS, 0.1)
    together = tmp_path / "together" / "checkpoints" / "step-000008"
    for folder in folders:
        shutil.copytree(folder, together, dirs_exist_ok=True)
    verdict = verify(together.parent.parent)
    assert verdict.problems == [] and verdict.found
    third = ranks2.run(travel, str(base), str(tmp_path / "together"), Leg(2, "zero3"), 3 * STEPS, 0.1)[0]
    assert third.losses == whole[2 * STEPS :]


@pytest.mark.slow
def test_a_disk_that_is_a_checkpoint_behind(base, whole, ranks2, places, tmp_path):
    """As after a crash between the commits of two hosts, and with a damaged file on the other one."""
    leg = Leg(2, "zero3", 1, places)
    journey({2: ranks2}, base, tmp_path, [leg, leg, leg], dropout=0.1)
    behind, ahead = Path(places[1]) / "checkpoints", Path(places[0]) / "checkpoints"
    (behind / "step-000012").rename(behind / "step-000012.tmp-1")  # killed before its rename, which makes no difference
    again = ranks2.run(travel, str(base), "", leg, 3 * STEPS, 0.1)[0]
    assert again.losses == [] and any(text.startswith(SAME) for text in again.said)
    assert steps(places[0]) == steps(places[1]) == [12, 8, 4]
    shutil.rmtree(behind / "step-000012")
    damaged = ahead / "step-000008" / "rank-00000-000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")
    again = ranks2.run(travel, str(base), "", leg, 3 * STEPS, 0.1)[0]
    assert again.first == STEPS + 1 and again.losses == whole[STEPS:]
    assert "step-000012 was not saved on all disks: h1 lacks it" in again.said
    assert any(text.startswith("on h0 step-000008 is damaged: rank-00000-000.safetensors was changed") for text in again.said), again.said
    assert "step-000008 was not saved on all disks: h0 lacks it" in again.said
    assert steps(places[0]) == steps(places[1]) == [12, 4]
    assert {path.name for path in ahead.iterdir()} == {"latest", "step-000004", "step-000012", "step-000008.damaged", "step-000012.incomplete"}
    assert {path.name for path in behind.iterdir()} == {"latest", "step-000004", "step-000012", "step-000008.incomplete"}
    for folder in (ahead, behind):
        shutil.rmtree(folder / "step-000004"), shutil.rmtree(folder / "step-000012")
    with pytest.raises(RankFailure, match="No checkpoint of this run holds on all disks; training would begin anew"):
        ranks2.run(travel, str(base), "", leg, 3 * STEPS, 0.1)


@pytest.mark.parametrize("legs", [
    pytest.param([(2, "zero3", 1, "h0 h1"), (4, "zero3", 1, "h0 h1 h2 h2")], marks=SLOW),
    pytest.param([(2, "zero3", 1, "h0 h1"), (2, "zero1", 2, "h0 h1"), (2, "zero3", 1, "h1 h0"), (1, "zero1", 1, "h1")], marks=SLOW),
    pytest.param([(1, "zero1", 1, "h0"), (4, "zero1", 4, "h0 h0 h1 h1"), (2, "zero2", 1, "h0 h1")], marks=SLOW),
])
def test_another_shape_on_separate_disks_has_the_files_brought(base, ranks1, ranks2, ranks4, tmp_path, legs):
    legs = [Leg(ranks, name, stages, tuple(str(tmp_path / host) for host in hosts.split())) for ranks, name, stages, hosts in legs]
    pools, last = {1: ranks1, 2: ranks2, 4: ranks4}, legs[-1].ranks == 1
    travelled = journey(pools, base, tmp_path, legs[:-1] if last else legs)
    whole = ranks1.run(travel, str(base), str(tmp_path / "whole"), Leg(1, "zero1"), len(legs) * STEPS, 0.0)[0].losses
    for leg in travelled[1:]:
        assert any(text.startswith(SAME) for text in leg.said) and any("are brought to h" in text for text in leg.said), leg.said
    assert [loss for leg in travelled for loss in leg.losses] == pytest.approx(whole[: len(travelled) * STEPS], rel=1e-5)
    assert not list(tmp_path.rglob("*.fetched"))
    if last:
        with pytest.raises(RankFailure, match="h0, with a part of it, does not take part"):
            ranks1.run(travel, str(base), "", legs[-1], len(legs) * STEPS, 0.0)
