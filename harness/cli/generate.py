"""`harness generate`: answer a prompt with an exported folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.errors import EXIT_DONE


def run(arguments: argparse.Namespace) -> int:
    """Print each answer; with several prompts, each after its prompt."""
    from harness.generation import Generator

    generator = Generator.load(Path(arguments.folder))
    for prompt in arguments.prompt:
        answer = generator.answer(
            prompt, chat=arguments.chat, raw=arguments.raw, max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature,
            seed=arguments.seed,
        )
        if len(arguments.prompt) > 1:
            print(f"> {prompt}")
        print(answer, flush=True)
    return EXIT_DONE
