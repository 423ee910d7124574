"""Operators that came compiled with DeepSpeed are used without compiling, and refused where they cannot run."""

from __future__ import annotations

import pytest

from harness.errors import Refused
from harness.launch import operators, prebuilt

FACTS = "version='0.19.8'\ninstalled_ops={'cpu_adam': 1, 'pin_memory': 1, 'async_io': 1, 'deepspeed_shm_comm': False}\naccelerator_name='cpu'\n"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A deepspeed on the path whose set-up compiled some operators."""
    package = tmp_path / "deepspeed"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it is not to be loaded')\n")
    (package / "git_version_info_installed.py").write_text(FACTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "deepspeed", raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "operators"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv(prebuilt.NEED, raising=False)
    return package


def test_what_came_compiled_is_not_compiled(installed):
    operators.build(["CPUAdamBuilder", "AsyncIOBuilder"], speak=False)
    assert not operators.folder().exists()


def test_what_did_not_come_is_compiled(installed, monkeypatch):
    compiled = []
    monkeypatch.setattr(operators, "_compile", lambda name, held, tell: compiled.append(name))
    operators.build(["ShareMemCommBuilder", "CPUAdamBuilder"], speak=False)
    assert compiled == ["ShareMemCommBuilder"]


def test_those_of_another_accelerator_do_not_count(installed):
    assert prebuilt.holds(("cpu_adam",), accelerator="cpu")
    assert not prebuilt.holds(("cpu_adam",), accelerator="cuda")


def test_an_installation_that_says_nothing_came_without(installed):
    (installed / "git_version_info_installed.py").unlink()
    assert not prebuilt.holds(("cpu_adam",), accelerator="cpu")


def test_a_processor_that_lacks_something_is_refused_by_name(installed, monkeypatch):
    monkeypatch.setenv(prebuilt.NEED, "avx2 fma")
    monkeypatch.setattr(prebuilt, "processor_flags", lambda: {"sse2", "fma"})
    with pytest.raises(Refused, match="this processor lacks: avx2"):
        operators.build(["CPUAdamBuilder"], speak=False)
    monkeypatch.setattr(prebuilt, "processor_flags", lambda: {"avx2", "fma"})
    operators.build(["CPUAdamBuilder"], speak=False)


def test_this_processor_has_flags():
    assert prebuilt.processor_flags()


def test_the_doctor_says_where_they_came_from_and_what_the_processor_lacks(installed, monkeypatch):
    from harness.preflight import software

    assert software.compiled(["CPUAdamBuilder"], build=True).what == "came compiled with DeepSpeed"
    monkeypatch.setenv(prebuilt.NEED, "not_an_instruction_set")
    finding = software.compiled(["CPUAdamBuilder"], build=False)
    assert finding.state == "fail" and "not_an_instruction_set" in finding.what
