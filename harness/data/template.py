"""How an example becomes tokens, and which of them are trained: named, versioned, and carried by the export."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from harness.config.schema import RunFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1
Segment = tuple[str, bool]


@dataclass(frozen=True)
class Template:
    """A value: the same in training, in the index and in generation.

    Attributes:
        kind: text, prompt_completion or messages.
        name: for people.
        prompt: text before the trained part; `{prompt}` stands for the column.
        completion: the trained part; `{completion}` stands for the column.
        chat: whether the tokenizer's own chat template writes the messages.
    """

    kind: str
    name: str
    prompt: str = ""
    completion: str = ""
    chat: bool = False
    version: int = VERSION

    @classmethod
    def from_run(cls, run: RunFile, tokenizer: PreTrainedTokenizerBase) -> Template:
        """The template that a run file asks for."""
        if run.data.shape == "prompt_completion":
            spec = run.data.template
            return cls("prompt_completion", spec.name, spec.prompt, spec.completion)
        return cls.for_messages(tokenizer) if run.data.shape == "messages" else cls("text", "text")

    @classmethod
    def for_messages(cls, tokenizer: PreTrainedTokenizerBase) -> Template:
        """Conversations: the tokenizer's chat template, or plain `User:` and `Assistant:` turns."""
        chat = bool(getattr(tokenizer, "chat_template", None))
        return cls("messages", "chat-template" if chat else "turns", chat=chat)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Template:
        """As `to_dict` wrote it."""
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def segments(self, example: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[Segment]:
        """The text of an example in pieces that are tokenised apart, each trained or not; an end-of-text token closes it.

        Args:
            example: a string (text), a pair (prompt, completion), or a list of turns with `role` and `content`.
            tokenizer: needed for a chat template only.
        """
        if self.kind == "text":
            return [(example, True)]
        if self.kind == "prompt_completion":
            prompt, completion = example
            return [(self.prompt.replace("{prompt}", prompt), False), (self.completion.replace("{completion}", completion), True)]
        return _chat_segments(example, tokenizer) if self.chat else _turn_segments(example)

    def prompt_ids(self, prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The tokens after which the model is to answer, written as in training."""
        if self.kind == "prompt_completion":
            text = self.prompt.replace("{prompt}", prompt)
        elif self.kind == "messages":
            turns = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) if self.chat else f"User: {prompt}\nAssistant:"
        else:
            text = prompt
        ids = ([] if self.chat else start_ids(tokenizer)) + tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids or [tokenizer.eos_token_id]


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-text token, for tokenizers that put one before every text."""
    ids = tokenizer("")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id and ids != [tokenizer.eos_token_id] else []


def _turn_segments(turns: list[dict[str, str]]) -> list[Segment]:
    segments: list[Segment] = []
    for number, turn in enumerate(turns):
        role, content = turn["role"].capitalize(), turn["content"]
        if role == "Assistant":
            segments += [("Assistant:", False), (f" {content}", True)]
            if number + 1 < len(turns):
                segments.append(("\n", False))
        else:
            segments.append((f"{role}: {content}\n", False))
    return segments


def _chat_segments(turns: list[dict[str, str]], tokenizer: Any) -> list[Segment]:
    """Split the rendered conversation at the borders of the assistant's turns.

    Where rendering more turns changes earlier text, only the last assistant turn is trained.
    """

    def render(until: int, *, ask: bool) -> str:
        return tokenizer.apply_chat_template(turns[:until], tokenize=False, add_generation_prompt=ask)

    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None:
        return [(render(len(turns), ask=False), False)]
    full = render(last + 1, ask=False)
    borders = []
    for number in [i for i, turn in enumerate(turns[: last + 1]) if turn["role"] == "assistant"]:
        before, after = render(number, ask=True), render(number + 1, ask=False)
        if full.startswith(after) and after.startswith(before):
            borders.append((len(before), len(after)))
        elif number == last:
            raise ValueError("the chat template rewrites the prompt when the answer is added")
    segments, place = [], 0
    for start, stop in borders:
        segments += [(full[place:start], False), (full[start:stop], True)]
        place = stop
    return [segment for segment in segments if segment[0]]
