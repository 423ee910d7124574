"""Answers from a model: the fixed prompts of an evaluation, and an exported folder."""

from __future__ import annotations

import copy
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import files
from harness.data.template import Template
from harness.errors import Refused
from harness.model.configure import max_positions
from harness.resilience.hearing import Hearing, Interrupted

if TYPE_CHECKING:
    from harness.engine.common import CommonEngine

TEMPLATE_FILE = "harness.json"
GENERATION_FILE = "generation_config.json"


def write_description(folder: Path, config: Any, tokenizer: Any, template: Template, *, base: str | None = None) -> None:
    """Write all that an export needs besides weights: configuration, tokenizer, template, and how the `base` model likes to be sampled.

    Args:
        folder: to write.
        config: of the model.
        tokenizer: of the data.
        template: how examples became text.
        base: the model that is fine-tuned: a folder, or a name on the hub.
    """
    described = copy.deepcopy(config)
    described.use_cache = True
    stops = template.stop_ids(tokenizer)
    described.eos_token_id, described.bos_token_id = stops if len(stops) > 1 else stops[0], tokenizer.bos_token_id
    described.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    files.write_json(folder / TEMPLATE_FILE, {"version": 1, "template": template.to_dict()})
    if base is not None and (sampling := _sampling_of(base)):
        more = sampling.get("eos_token_id") or []
        ends = list(dict.fromkeys([*stops, *(more if isinstance(more, list) else [more])]))
        files.write_json(folder / GENERATION_FILE, sampling | {"eos_token_id": ends if len(ends) > 1 else ends[0]})


def _sampling_of(base: str) -> dict[str, Any] | None:
    """The generation settings of a model, as it has them; None when it has none that can be read."""
    from transformers.utils import cached_file

    try:
        settings = files.read_json(cached_file(base, GENERATION_FILE))
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None


def answer_prompts(engine: CommonEngine, tokenizer: Any, template: Template, prompts: list[str], *, max_new_tokens: int, hearing: Hearing) -> list[tuple[str, str]]:
    """Answer fixed prompts with the model in training, on all ranks together.

    Args:
        engine: the engine.
        tokenizer: of the data.
        template: how prompts were written in training.
        prompts: as a user would type them.
        max_new_tokens: bound of each answer, besides the positions that the model has left.
        hearing: of requests to stop, which end it between two answers.

    Returns:
        (prompt, answer) pairs.

    Raises:
        Interrupted: on all ranks, when one of them was asked to stop.
    """
    answered, positions = [], max_positions(engine.config.get_text_config())
    for prompt in prompts:
        ids = template.prompt_ids(prompt, tokenizer)
        room = max_new_tokens if positions is None else min(max_new_tokens, positions - len(ids))
        (answer,) = engine.generate([ids], stop_ids=template.stop_ids(tokenizer), max_new_tokens=room)
        answered.append((prompt, tokenizer.decode(answer, skip_special_tokens=True).strip()))
        if hearing.now():
            raise Interrupted
    return answered


class Generator:
    """A Hugging Face folder that answers, with the template that it was trained with.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        template: the template of training, or None for plain text.
    """

    def __init__(self, model: Any, tokenizer: Any, template: Template | None):
        self.model, self.tokenizer, self.template = model, tokenizer, template

    @classmethod
    def load(cls, folder: Path) -> Generator:
        """Load an exported folder, or any Hugging Face folder.

        Raises:
            Refused: when it holds no model.
        """
        if not (folder / "config.json").is_file():
            is_run = (folder / "attempts").is_dir() or (folder / "checkpoints").is_dir()
            raise Refused(
                f"{folder} is the folder of a run." if is_run else f"{folder} holds no model.", where=str(folder),
                remedy=f"Export it with `harness export {shlex.quote(str(folder))} --to FOLDER`, and ask that one." if is_run
                else "Give a folder that `harness export` wrote.",
            )
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        if not sys.stderr.isatty():
            disable_progress_bar()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
        described = folder / TEMPLATE_FILE
        template = Template.from_dict(files.read_json(described)["template"]) if described.is_file() else None
        return cls(model, AutoTokenizer.from_pretrained(folder), template)

    def refuse_chat(self) -> None:
        """Refuse a folder that knows no conversations.

        Raises:
            Refused: when its tokenizer has no chat template, and it was not trained on turns without one.
        """
        if not Template.for_messages(self.tokenizer).chat and not (self.template and self.template.kind == "messages"):
            raise Refused(
                "The folder has no chat template.", where=f"--chat, {self.tokenizer.name_or_path}",
                remedy="Leave --chat out: the prompt is written as in training.",
            )

    def answer(
        self, prompt: str, *, chat: bool = False, raw: bool = False, max_new_tokens: int = 128, temperature: float = 0.0, top_p: float | None = None,
        seed: int = 0,
    ) -> str:
        """The text that follows `prompt`.

        Args:
            prompt: as a user would type it.
            chat: write it as a user's turn with the tokenizer's chat template.
            raw: do not apply the template of training.
            max_new_tokens: bound of the answer.
            temperature: 0 is greedy.
            top_p: sample from the likeliest tokens that together have this probability; by default as the folder has it.
            seed: of sampling.
        """
        import torch

        ids = self._ids(prompt, chat=chat, raw=raw)
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if positions and len(ids) >= positions:
            raise Refused(f"The prompt has {len(ids)} tokens; the model has {positions} positions.", where="--prompt", remedy="Shorten it.")
        room = positions - len(ids) if positions else max_new_tokens
        tensor = torch.tensor([ids], device=self.model.device)
        torch.manual_seed(seed)
        sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        if top_p is not None:
            sampling["top_p"] = top_p
        with torch.no_grad():
            output = self.model.generate(
                tensor, attention_mask=torch.ones_like(tensor), max_new_tokens=min(max_new_tokens, room), use_cache=True,
                eos_token_id=self._stop_ids(chat=chat), pad_token_id=self.tokenizer.eos_token_id, **sampling,
            )
        return self.tokenizer.decode(output[0, len(ids):], skip_special_tokens=True).strip()

    def _stop_ids(self, *, chat: bool) -> list[int] | None:
        """None leaves it to the model, where the tokenizer has no token that ends a text."""
        template = Template.for_messages(self.tokenizer) if chat else self.template
        stops = template.stop_ids(self.tokenizer) if template else [self.tokenizer.eos_token_id]
        return [stop for stop in stops if stop is not None] or None

    def _opening(self) -> list[int]:
        if self.tokenizer.eos_token_id is None:
            raise Refused("The prompt has no token, and the tokenizer none to begin with.", where="--prompt", remedy="Write something.")
        return [self.tokenizer.eos_token_id]

    def _ids(self, prompt: str, *, chat: bool, raw: bool) -> list[int]:
        if chat:
            return Template.for_messages(self.tokenizer).prompt_ids(prompt, self.tokenizer)
        if self.template is None or raw:
            return self.tokenizer(prompt, add_special_tokens=False)["input_ids"] or self._opening()
        return self.template.prompt_ids(prompt, self.tokenizer)
