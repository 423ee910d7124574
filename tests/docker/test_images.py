"""The Dockerfiles keep to hadolint and to the project's own rules; tests/docker/build.sh builds and runs one."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.launch import operators

DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")
SHARED_STAGES = re.compile(r"^(WORKDIR|COPY|USER|ENTRYPOINT|CMD)\b.*$", re.MULTILINE)


@pytest.fixture(params=DOCKERFILES)
def dockerfile(request, repository) -> Path:
    return repository / "docker" / request.param


def _steps(dockerfile: Path) -> list[str]:
    """The instructions, each as one line without its comments."""
    lines = [line for line in dockerfile.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    return [step for step in "\n".join(lines).replace("\\\n", " ").splitlines() if step.strip()]


def test_hadolint_finds_nothing(dockerfile):
    command = [str(Path(sys.prefix) / "bin" / "hadolint"), "--no-color", str(dockerfile)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_what_hadolint_may_not_say_has_a_reason(dockerfile):
    text = dockerfile.read_text(encoding="utf-8")
    ignored = set(re.findall(r"DL\d+", " ".join(re.findall(r"hadolint ignore=(.*)", text))))
    assert ignored == {rule for rule in ignored if f"{rule}: " in text}


def test_bases_are_named_by_an_argument_with_an_exact_version(dockerfile):
    steps = _steps(dockerfile)
    bases = {name: value for name, value in re.findall(r"^ARG (\w+)=(\S+)$", "\n".join(steps), re.MULTILINE) if name.endswith("IMAGE")}
    for step in steps:
        if step.startswith("FROM "):
            assert re.match(r"\$\{(\w+)\}", step.split()[1]).group(1) in bases, step
    assert bases and all(re.search(r":\d+\.\d+", value) for value in bases.values()), bases


def test_the_cuda_of_both_bases_is_the_same(repository):
    versions = set(re.findall(r"nvidia/cuda:([\d.]+)-", (repository / "docker/Dockerfile").read_text(encoding="utf-8")))
    assert len(versions) == 1


def test_it_ends_without_rights_and_in_the_harness(dockerfile):
    steps = _steps(dockerfile)
    assert steps[-4:] == ["USER 10001:10001", "WORKDIR /work", 'ENTRYPOINT ["harness"]', 'CMD ["--help"]']
    assert not any("sudo" in step or step.startswith("ADD ") for step in steps)


def test_every_version_comes_from_the_pins(dockerfile):
    installs = [step for step in _steps(dockerfile) if "pip install" in step]
    words = [word for step in installs for word in re.findall(r"pip install (.*?)(?: && |$)", step)]
    allowed = {"-r /tmp/tools.txt", "-r /tmp/torch.txt", "--no-build-isolation -r launch/pins.txt", "--no-build-isolation --no-deps -e ."}
    assert {word.strip() for word in words} == allowed
    made = [step for step in installs if "/tmp/tools.txt" in step]
    assert all(step.count("launch/pins.txt >/tmp/") == 2 for step in made)


def test_both_differ_only_where_they_must(repository):
    cuda, cpu = (SHARED_STAGES.findall((repository / "docker" / name).read_text(encoding="utf-8")) for name in DOCKERFILES)
    assert cuda == cpu


def test_every_operator_that_a_run_may_load_is_compiled_and_checked(dockerfile):
    gpu = dockerfile.name == "Dockerfile"
    needed = {name for offload in ("none", "cpu", "nvme") for name in operators.needed(optimizer_offload=offload, nvme=offload == "nvme", gpu=gpu)}
    text = "\n".join(_steps(dockerfile))
    checked = re.search(r"check_operators\.py((?: \w+Builder)+)", text).group(1).split()
    assert set(checked) == needed
    switches = {"ShareMemCommBuilder": "SHM_COMM", "CPUAdamBuilder": "CPU_ADAM", "AsyncIOBuilder": "AIO", "FusedAdamBuilder": "FUSED_ADAM"}
    assert set(re.findall(r"DS_BUILD_(\w+)=1", text)) == {switches[name] for name in needed}


def test_what_is_copied_exists_and_is_sent_to_the_builder(dockerfile, repository):
    ignore = dockerfile.with_name(f"{dockerfile.name}.dockerignore").read_text(encoding="utf-8").split("\n", 1)[1].split()
    sent = [line[1:] for line in ignore if line.startswith("!")]
    assert ignore[0] == "*"
    for step in _steps(dockerfile):
        if step.startswith("COPY ") and "--from" not in step:
            for source in step.split()[1:-1]:
                assert (repository / source).exists(), source
                assert any(fnmatch.fnmatch(source, entry) or source.startswith(f"{entry}/") for entry in sent), source


def test_the_portable_compiler_knows_no_processor_but_the_oldest(repository, tmp_path):
    portable = tmp_path / "g++"
    portable.write_text((repository / "docker/portable-compiler").read_text(encoding="utf-8"))
    portable.chmod(0o755)
    source = tmp_path / "vectors.cpp"
    source.write_text("#if defined(__AVX512F__) || defined(__AVX512__) || !defined(__AVX2__) || !defined(__AVX256__)\n#error\n#endif\n")
    for width in ("-D__AVX512__", "-D__SCALAR__", "-D__AVX256__"):
        subprocess.run([str(portable), "-march=native", width, "-fsyntax-only", str(source)], check=True)
