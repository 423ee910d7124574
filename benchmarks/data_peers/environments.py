"""The Python environments of the peers that cannot live in the harness's: made once, with pip, and kept."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

READY = "harness-ready.json"
PINS = Path(__file__).resolve().parents[2] / "launch" / "pins.txt"


class NotMade(Exception):
    """An environment that could not be made, and why."""


@dataclass(frozen=True)
class Recipe:
    """What an environment holds besides torch.

    Attributes:
        name: of its folder.
        packages: installed with what they need.
        alone: installed without: what they ask for beyond `packages` is storage clients that local data does not need, and another torch.
        stubs: files for site-packages, with their text.
    """

    name: str
    packages: tuple[str, ...]
    alone: tuple[str, ...]
    stubs: tuple[tuple[str, str], ...] = ()


LITDATA = Recipe("litdata", ("numpy", "lightning-utilities", "filelock", "boto3", "requests", "tifffile", "obstore"), ("litdata==0.2.76",))
MOSAICML = Recipe(
    "mosaicml",
    ("numpy<2.2", "transformers<5", "tqdm<5", "xxhash<4", "zstd<2", "Brotli", "python-snappy<1", "catalogue<3", "requests", "filelock", "pillow"),
    ("mosaicml-streaming==0.13.0",),
    stubs=(  # imported with the package, for its image data sets only
        ("torchvision/__init__.py", ""),
        ("torchvision/datasets.py", "VisionDataset = CIFAR10 = object\n"),
        ("torchvision/transforms/__init__.py", ""),
        ("torchvision/transforms/functional.py", "to_tensor = None\n"),
    ),
)


def python_of(recipe: Recipe | None, folder: Path) -> Path:
    """The interpreter of a recipe's environment, made when there is none; without a recipe, this one.

    Raises:
        NotMade: with the end of what pip said.
    """
    if recipe is None:
        return Path(sys.executable)
    place = folder / recipe.name
    python, stamp, wanted = place / "bin" / "python", place / READY, json.dumps([_torch(), asdict(recipe)], indent=1)
    if not (stamp.is_file() and stamp.read_text() == wanted):
        _make(recipe, place, python)
        stamp.write_text(wanted)
    return python


def _make(recipe: Recipe, place: Path, python: Path) -> None:
    print(f"Making an environment for {recipe.name} in {place} ...", file=sys.stderr)
    place.parent.mkdir(parents=True, exist_ok=True)
    _run(sys.executable, "-m", "venv", "--clear", str(place))
    _install_torch(python)
    _run(str(python), "-m", "pip", "install", "-q", *recipe.packages)
    _run(str(python), "-m", "pip", "install", "-q", "--no-deps", *recipe.alone)
    packages = Path(_run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for name, text in recipe.stubs:
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text(text)


def _torch() -> str:
    """The version that launch/environment.sh installs."""
    found = re.search(r"^torch==\S+", PINS.read_text(), re.MULTILINE)
    if found is None:
        raise NotMade(f"{PINS} pins no torch")
    return found.group()


def _install_torch(python: Path) -> None:
    """The CPU build where pip's configuration offers one, as launch/environment.sh does it; the loaders use no GPU."""
    install = (str(python), "-m", "pip", "install", "-q")
    try:
        _run(*install, "--dry-run", "--no-deps", "--only-binary", ":all:", f"{_torch()}+cpu")
    except NotMade:
        _run(*install, _torch())
    else:
        _run(*install, f"{_torch()}+cpu")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise NotMade(f"{' '.join(command[1:5])}: {lines[-1] if lines else done.returncode}")
    return done.stdout
