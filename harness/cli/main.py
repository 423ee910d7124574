"""The verbs and their flags: parsed without torch, then handed to one thin module each."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from harness import __version__, collector
from harness.errors import EXIT_INTERRUPTED, EXIT_REFUSED, HarnessError

VERBS = {
    "prepare": "raw text or conversations -> token shards with an index",
    "plan": "dry run: the merged configuration, the batch equation, memory, every refusal",
    "doctor": "is this machine, is this cluster, fit to train",
    "launch": "start the ranks of a run and wait for its outcome",
    "train": "one rank of a run: what launchers end in",
    "verify": "does a run's newest checkpoint hold, and is it what was saved",
    "export": "a Hugging Face folder from a checkpoint",
    "generate": "answer a prompt with an exported folder",
    "review": "what a run learned, how fast it was, and what its time and memory went to; several runs side by side",
    "data": "which documents a step trained on; when a row was trained",
}


def build_parser() -> argparse.ArgumentParser:
    """All verbs and flags."""
    parser = argparse.ArgumentParser(prog="harness", description="Fine-tune GPTs with DeepSpeed, from raw data to an answer.")
    parser.add_argument("--version", action="version", version=f"harness {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    added = {name: verbs.add_parser(name, help=text, description=text) for name, text in VERBS.items()}
    for name in ("prepare", "plan", "launch", "train"):
        added[name].add_argument("run_file", metavar="RUN.yaml")
    for name in ("prepare", "plan", "launch", "train", "doctor"):
        added[name].add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace those of the run file")
    added["plan"].add_argument("--ranks", type=int, help="ranks to plan for; by default launch.ranks or the GPUs of this machine")
    added["launch"].add_argument("--on", choices=["local", "hosts", "mpi", "slurm", "kubernetes"], default="local", help="where the ranks run")
    added["launch"].add_argument("--print", action="store_true", dest="print_only", help="show the command, script or manifest instead of running it")
    added["launch"].add_argument("--follow", action="store_true", help="show the log of a Slurm or Kubernetes job as it grows")
    added["doctor"].add_argument("--run", metavar="RUN.yaml", help="what it shall be fit for: ranks, folders, offload")
    added["doctor"].add_argument("--hosts", metavar="FILE", help="also these machines, over ssh: lines `NAME slots=N`, as DeepSpeed reads them")
    added["doctor"].add_argument("--build", action="store_true", help="compile DeepSpeed's operators that are missing")
    added["doctor"].add_argument("--json", action="store_true", help="for programs")
    added["verify"].add_argument("run_dir", metavar="RUN_DIR")
    added["verify"].add_argument("--checkpoint", metavar="NAME", help="such as step-000400; by default the newest")
    added["review"].add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="folder of a run; the others are compared with the first")
    added["review"].add_argument("--html", metavar="FILE", help="also write a page with pictures, which opens without a network")
    added["review"].add_argument("--fail-if", action="append", default=[], metavar="CONDITION",
                                 help="end with code 4 if it holds of a run: 'tokens_per_second < 1000', 'eval_loss > 1.02x' (times the first run's)")
    added["review"].add_argument("--json", action="store_true", help="as one JSON object; its names are those of the conditions")
    added["export"].add_argument("run_dir", metavar="RUN_DIR")
    added["export"].add_argument("--to", required=True, metavar="FOLDER", help="folder to write")
    added["export"].add_argument("--checkpoint", metavar="NAME", help="such as step-000400, or best; by default the newest")
    added["export"].add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default=None, help="by default that of training")
    added["generate"].add_argument("folder", metavar="FOLDER")
    added["generate"].add_argument("--prompt", action="append", required=True, metavar="TEXT", help="may be given several times; - stands for the lines of standard input")
    added["generate"].add_argument("--chat", action="store_true", help="treat the prompt as a user's turn of a conversation")
    added["generate"].add_argument("--raw", action="store_true", help="do not apply the template of training")
    added["generate"].add_argument("--max-new-tokens", type=int, default=128)
    added["generate"].add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    added["generate"].add_argument("--top-p", type=float, help="sample from the likeliest tokens that together have this probability")
    added["generate"].add_argument("--seed", type=int, default=0, help="of sampling")
    actions = added["data"].add_subparsers(dest="action", required=True, metavar="show|where")
    for name, text in (("show", "the documents that a step trained on"), ("where", "when a row was or will be trained")):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("set", metavar="SET", help="folder of the prepared training set")
        if name == "where":
            action.add_argument("row", type=int, metavar="ROW")
        else:
            action.add_argument("--step", type=int, required=True)
        action.add_argument("--run", required=True, metavar="RUN_DIR", help="the run that trained on it")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse a command line; overrides may stand before, between and after the flags."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    strangers = [word for word in rest if word.startswith("-") or not hasattr(arguments, "overrides")]
    if strangers:
        parser.error(f"unrecognized arguments: {' '.join(strangers)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run a verb and answer with its exit code."""
    arguments = parse(argv)
    collector.seldom()
    try:
        return importlib.import_module(f"harness.cli.{arguments.verb}").run(arguments)
    except HarnessError as error:
        _speak(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("harness: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_REFUSED
    finally:
        collector.leave()


def _speak(error: HarnessError) -> None:
    try:
        print(f"harness: {error}", file=sys.stderr, flush=True)
    except OSError:
        pass
