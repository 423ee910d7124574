"""What only the certificate can see in the files of a checkpoint, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tests.checkpoint.fabricate import SHAPES, save, save_as_ranks, state

from harness.checkpoint import certificate, shelf
from harness.checkpoint.verify import verify
from harness.cli.main import main
from harness.errors import Refused
from harness.formats.certificate import Certificate, Group, Probe
from harness.formats.manifest import Manifest, read_manifest, write_manifest
from harness.formats.tensor_file import TensorEntry, write_tensors

Tensors = dict[str, np.ndarray]
TWINS = {"q.weight": (4, 4), "k.weight": (4, 4), "bias": (3,)}


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of the first file and vouch for it anew, as a fault in the program would."""
    manifest = read_manifest(folder)
    entry = manifest.files[0]
    tensors = {name: values.copy() for name, values in load_file(folder / entry.file).items()}
    change(tensors)
    entries = [TensorEntry(name, "F32", values.shape) for name, values in tensors.items()]
    num_bytes, digest = write_tensors(folder / entry.file, entries, tensors.values())
    files = (entry.model_copy(update={"bytes": num_bytes, "digest": digest}), *manifest.files[1:])
    write_manifest(folder, manifest.model_copy(update={"files": files}))
    assert shelf.inspect(folder)[1] == []


def swap_moments(tensors: Tensors) -> None:
    first, second = "exp_avg/q.weight", "exp_avg/k.weight"
    tensors[first], tensors[second] = tensors[second], tensors[first]


def swap_elements(tensors: Tensors) -> None:
    values = tensors["exp_avg_sq/q.weight"]
    values[3], values[9] = values[9], values[3]


def flip_lowest_bit(tensors: Tensors) -> None:
    tensors["master/k.weight"].view(np.uint32)[5] ^= 1


def claim(folder: Path, **fields: object) -> None:
    write_manifest(folder, read_manifest(folder).model_copy(update=fields))


@pytest.fixture
def twins(tmp_path) -> Path:
    return save_as_ranks(tmp_path, state(TWINS), ranks=1, shapes=TWINS)


@pytest.mark.parametrize("fault, told", [
    (swap_moments, "exp_avg of 2 of 3 parameters has other bits: k.weight (norm"),
    (swap_elements, "exp_avg_sq of 1 of 3 parameters has other bits: q.weight (norm"),
    (flip_lowest_bit, "master of 1 of 3 parameters has other bits: k.weight (norm"),
])
def test_what_the_digests_cannot_see(twins, fault, told, tmp_path, capsys):
    rewrite(twins, fault)
    (problem,) = verify(tmp_path).problems
    assert told in problem
    assert main(["verify", str(tmp_path)]) == 4
    assert told in capsys.readouterr().err


def test_a_step_count_off_by_one(twins, tmp_path):
    claim(twins, adam_step=10)
    assert verify(tmp_path).problems == ["Adam's step count is 10 instead of 9"]


def test_a_good_one_is_told_in_a_table(twins, tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "step        1, 8 rows consumed, Adam's step 9" in out and "verdict     it holds" in out
    masters = torch.cat(list(state(TWINS)["master"].values())).double()
    assert f"master      {masters.norm().item():.9g} L2 norm" in out


def test_seals_do_not_depend_on_the_ranks(tmp_path):
    held = [read_manifest(save_as_ranks(tmp_path / str(ranks), state(), ranks=ranks)).certificate.tensors for ranks in (1, 2, 3, 7)]
    for name in SHAPES:
        for kind, seal in held[0][name].items():
            assert {other[name][kind].checksum for other in held} == {seal.checksum}
            assert [other[name][kind].norm for other in held] == pytest.approx([seal.norm] * 4, rel=1e-12)


def test_sums_of_parts_add_up_across_blocks():
    values = np.random.default_rng(0).standard_normal(3 * certificate._BLOCK + 17).astype(np.float32)
    whole = certificate.sums_of(values, 0)
    bits = sum(int(word) * (2 * index + 1) for index, word in enumerate(values.view(np.uint32))) % 2**64
    assert whole[1] == bits and whole[0] == pytest.approx(np.square(values.astype(np.float64)).sum(), rel=1e-12)
    cuts = [certificate.sums_of(values[begin : begin + 9001], begin) for begin in range(0, len(values), 9001)]
    assert sum(part[1] for part in cuts) % 2**64 == bits


def test_a_checkpoint_without_certificate_and_a_damaged_one(tmp_path, capsys):
    folder = save(tmp_path, 4)
    claim(folder, certificate=None)
    assert main(["verify", str(tmp_path)]) == 0
    assert "certificate none" in capsys.readouterr().out
    newer = save(tmp_path, 8)
    file = next(newer.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    assert main(["verify", str(tmp_path)]) == 4
    assert main(["verify", str(tmp_path), "--checkpoint", "step-000004"]) == 0
    assert newer.is_dir(), "verify sets nothing aside"


def test_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(Refused, match="no checkpoint here"):
        verify(tmp_path)
    save(tmp_path, 4)
    with pytest.raises(Refused, match="no checkpoint 'step-000005'"):
        verify(tmp_path, checkpoint="step-000005")


def test_a_manifest_keeps_its_certificate(tmp_path):
    said = Certificate(adam_step=9, tensors={}, groups=(Group(lr=0.1, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8, parameters=("a",)),))
    write_manifest(tmp_path, Manifest(step=1, rows_consumed=8, adam_step=9, data_fingerprint="f", parameters={}, certificate=said))
    assert read_manifest(tmp_path).certificate == said


def test_groups_are_named_by_parameter():
    parts = [{"w": hyper(0.1), "norm": hyper(0.0)}, {"w": hyper(0.1), "bias": hyper(0.0)}]
    groups = certificate.groups_of(parts)
    assert [group.parameters for group in groups] == [("bias", "norm"), ("w",)]
    moved = certificate.groups_of([{name: hyper(0.1) for name in ("w", "norm", "bias")}])
    (problem,) = certificate.group_problems(groups, moved, keys=("weight_decay", "betas"))
    assert problem == "weight_decay of 2 of 3 parameters is another: bias (0.1 instead of 0.0), norm (0.1 instead of 0.0)"
    split = certificate.groups_of([parts[0], {"w": hyper(0.0)}])
    assert "w (0.0 and 0.1 instead of 0.1)" in certificate.group_problems(groups, split, keys=("weight_decay",))[0]
    assert certificate.group_problems(groups, moved, keys=("eps",)) == []


def hyper(decay: float) -> dict[str, object]:
    return {"lr": 1e-3, "weight_decay": decay, "betas": (0.9, 0.999), "eps": 1e-8}


def test_rows_that_come_next_end_with_a_mixture():
    class Ending:
        total_rows = 10

        def rows(self, first: int, count: int) -> np.ndarray:
            assert first + count <= self.total_rows
            return np.arange(first, first + count)

    assert certificate.next_rows(Ending(), first=100, count=16, begin=96).count == 6
    assert certificate.next_rows(Ending(), first=110, count=16, begin=100).count == 0
    one, other = (certificate.next_rows(Ending(), first=4, count=4, begin=begin) for begin in (0, 1))
    assert certificate.row_problems(one, one) == [] and "are other rows" in certificate.row_problems(one, other)[0]


@pytest.mark.parametrize("precision, loss, device, holds", [
    ("fp32", 2.00001, "cpu", True), ("fp32", 2.0001, "cpu", False), ("fp32", 2.0001, "gpu", True),
    ("bf16", 2.005, "cpu", True), ("bf16", 2.05, "gpu", False), ("fp32", float("nan"), "cpu", False),
])
def test_the_probe_has_a_tolerance(precision, loss, device, holds):
    saved = Probe(data_fingerprint="v", rows=2, tokens=30, loss=2.0, device="cpu")
    found = saved.model_copy(update={"loss": loss, "device": device})
    assert (certificate.probe_problems(saved, found, precision=precision) == []) is holds
    other_rows = found.model_copy(update={"data_fingerprint": "w"})
    assert certificate.probe_problems(saved, other_rows, precision=precision) == []
