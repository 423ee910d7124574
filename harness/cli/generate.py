"""`harness generate`: answer a prompt with an exported folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from harness.errors import EXIT_DONE, Refused


def run(arguments: argparse.Namespace) -> int:
    """Print each answer; with several prompts, each after its prompt."""
    from harness.generation import Generator

    if arguments.top_p is not None and not (0 < arguments.top_p <= 1 and arguments.temperature > 0):
        raise Refused(f"--top-p {arguments.top_p} leaves nothing to draw from.", where="--top-p", remedy="Give a number in (0, 1], and --temperature above 0.")
    generator = Generator.load(Path(arguments.folder))
    if arguments.chat:
        generator.refuse_chat()
    for prompt in _prompts(arguments.prompt):
        answer = generator.answer(
            prompt, chat=arguments.chat, raw=arguments.raw, max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature,
            top_p=arguments.top_p, seed=arguments.seed,
        )
        if len(arguments.prompt) > 1 or arguments.prompt == ["-"]:
            print(f"> {prompt}")
        print(answer or "(empty)", flush=True)
    return EXIT_DONE


def _prompts(given: list[str]) -> Iterator[str]:
    """The prompts as they were given; `-` stands for the lines of standard input that are not blank."""
    for prompt in given:
        yield from (line.rstrip("\r\n") for line in sys.stdin if line.strip()) if prompt == "-" else [prompt]
