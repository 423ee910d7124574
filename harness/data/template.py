"""How an example becomes tokens, and which of them are trained: named, versioned, and carried by the export."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from harness.config.schema import RunFile
from harness.data.examples import Conversation
from harness.errors import Refused, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 2
MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
TAG = re.compile(r"<(/?)(\w+)>")
Segment = tuple[str, bool]
Span = tuple[int, int]


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

    @property
    def told(self) -> str:
        """For people: what writes the examples."""
        if self.kind == "messages":
            return "the tokenizer's own chat template" if self.chat else "turns as `User: ...` and `Assistant: ...`, for the tokenizer has no chat template"
        return f"{self.name!r} of data.template" if self.kind == "prompt_completion" else "the text as it is"

    def segments(self, example: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[Segment]:
        """The text of an example in pieces that are tokenised apart, each trained or not; an end-of-text token closes each trained one.

        Of a conversation the assistant's turns are trained, each with the token that ends it. What precedes one is what generation sees there;
        where that is not so, as in a chat template that strips the thinking of earlier turns, the turn is not trained. Nothing follows the last
        trained turn. Markers of the template (`{% generation %}`) decide instead, where it has them.

        Args:
            example: a string (text), a pair (prompt, completion), or a conversation (also a bare list of its turns).
            tokenizer: needed for a chat template only.

        Raises:
            Exception: whatever a chat template raises for a conversation that it refuses; ValueError where no turn of the assistant can be trained.
        """
        if self.kind == "text":
            return [(example, True)]
        if self.kind == "prompt_completion":
            prompt, completion = example
            return [(self.prompt.replace("{prompt}", prompt), False), (self.completion.replace("{completion}", completion), True)]
        talk = example if isinstance(example, Conversation) else Conversation(example)
        return _chat_segments(_Chat(talk, tokenizer)) if self.chat else _turn_segments(talk)

    def prompt_ids(self, prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The tokens after which the model is to answer, written as in training.

        Raises:
            Refused: a chat template that does not write a prompt alone.
        """
        if self.kind == "prompt_completion":
            text = self.prompt.replace("{prompt}", prompt)
        elif self.kind == "messages":
            text = _asked(prompt, tokenizer) if self.chat else f"User: {prompt}\nAssistant:"
        else:
            text = prompt
        ids = ([] if self.chat else start_ids(tokenizer)) + tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids or [tokenizer.eos_token_id]

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The tokens that end an answer: the end of text first and, where a chat template closes a turn by a token of its own, that one too.

        Raises:
            Refused: a chat template that writes no answer.
        """
        ids = [tokenizer.eos_token_id]
        if self.chat:
            last = next(text for text, trained in reversed(self._smallest(tokenizer)) if trained)
            closing = tokenizer(last, add_special_tokens=False)["input_ids"][-1:]
            ids += [token for token in closing if token in tokenizer.added_tokens_decoder and token not in ids]
        return ids


    def _smallest(self, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
        """A question and its answer, behind a system turn where the chat template demands one."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            return self.segments(turns, tokenizer)
        except Exception as error:
            with suppress(Exception):
                return self.segments([{"role": "system", "content": "c"}, *turns], tokenizer)
            raise _refusal(error, "a question and its answer, which are plain text") from None


def _refusal(error: Exception, what: str) -> Refused:
    return Refused(f"The tokenizer's chat template cannot write {what}: {first_line(error)}", where="data.tokenizer or model.path (chat template)",
                   remedy="Mend its chat_template, or use a tokenizer without one: then turns are lines after `User:` and `Assistant:`.")


def _asked(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt as the chat template puts it before an answer."""
    try:
        return tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    except Exception as error:
        raise _refusal(error, "a prompt without other turns") from None


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-text token, for tokenizers that put one before every text."""
    ids = tokenizer("")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id and ids != [tokenizer.eos_token_id] else []


def _cut(text: str, spans: Iterable[Span]) -> list[Segment]:
    """The text up to the end of the last span, cut at the borders of the spans, which are trained."""
    segments, place = [], 0
    for start, stop in spans:
        segments += [(text[place:start], False), (text[start:stop], True)]
        place = stop
    return [segment for segment in segments if segment[0]] or [(text, False)]


def _turn_segments(talk: Conversation) -> list[Segment]:
    """`User:` and `Assistant:` turns, each on lines of its own; calls of tools are lines of JSON that end the assistant's turn."""
    text = f"Tools: {_json(talk.tools)}\n" if talk.tools else ""
    spans = []
    for turn in talk.turns:
        text += f"{turn['role'].capitalize()}:"
        said = " " + "\n".join([*filter(None, [turn.get("content")]), *map(_json, map(_call, turn.get("tool_calls", ())))])
        if turn["role"].lower() == "assistant":
            spans.append((len(text), len(text) + len(said)))
        text += f"{said}\n"
    return _cut(text, spans)


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """`{"name": ..., "arguments": {...}}`"""
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    try:
        return {"name": function.get("name"), "arguments": json.loads(arguments) if isinstance(arguments, str) else arguments}
    except ValueError:
        return {"name": function.get("name"), "arguments": arguments}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class _Chat:
    """A conversation and the chat template that writes it."""

    talk: Conversation
    tokenizer: Any

    def render(self, turns: list[dict[str, Any]], *, ask: bool = False) -> str:
        return self.tokenizer.apply_chat_template(turns, tools=self.talk.tools, tokenize=False, add_generation_prompt=ask)

    def marked(self, until: int) -> tuple[str, list[Span]] | None:
        """The text and its spans between `{% generation %}` markers, joined where they touch; None for a template without them."""
        from transformers.utils.chat_template_utils import render_jinja_template

        source = self.tokenizer.get_chat_template(tools=self.talk.tools)
        if not MARKER.search(source):
            return None
        (text,), (marks,) = render_jinja_template([self.talk.turns[:until]], tools=self.talk.tools, chat_template=source,
                                                  return_assistant_tokens_mask=True, **self.tokenizer.special_tokens_map)
        spans: list[Span] = []
        for start, stop in marks:
            if spans and start <= spans[-1][1]:
                start = spans.pop()[0]
            spans.append((start, stop))
        return text, spans

    def header(self, number: int) -> str:
        """What the template writes before the content of the assistant's turn `number`: what two answers have in common."""
        first, second = (self.render([*self.talk.turns[:number], {"role": "assistant", "content": content}]) for content in "XY")
        return first[: next((place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)]

    def asked(self, number: int) -> str:
        """What generation sees before the assistant's turn `number`; without a turn before it, its header."""
        return self.render(self.talk.turns[:number], ask=True) if number else self.header(number)


def _chat_segments(chat: _Chat) -> list[Segment]:
    turns = chat.talk.turns
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        return [(chat.render(turns), False)]
    _refuse_silence(chat, turns[: answers[-1] + 1])
    text, spans = _marked(chat, answers) or _stable(chat, answers)
    endings, eos = _added_tokens(chat.tokenizer), chat.tokenizer.eos_token or "\0"
    return _cut(text, (_ended(text, start, stop, endings, eos) for start, stop in spans if stop > start))


def _refuse_silence(chat: _Chat, turns: list[dict[str, Any]]) -> None:
    """Refuse a template that leaves out what the assistant says: some know no calls of tools, some no content that is plain text.

    Raises:
        ValueError: when other words would give the same text.
    """
    text = chat.render(turns)
    other = [turn | {"tool_calls": [_renamed(call) for call in turn["tool_calls"]]} if "tool_calls" in turn else turn for turn in turns]
    if other != turns and chat.render(other) == text:
        raise ValueError("the chat template does not write calls of tools")
    said = turns[-1].get("content") or ""
    if said.strip() not in text and chat.render([*turns[:-1], turns[-1] | {"content": f"X{said}X"}]) == text:
        raise ValueError("the chat template does not write the content of the assistant")


def _renamed(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    return call | {"name": f"X{function.get('name')}"} | ({"function": function | {"name": f"X{function.get('name')}"}} if "function" in call else {})


def _marked(chat: _Chat, answers: list[int]) -> tuple[str, list[Span]] | None:
    """What the template's own markers say, without what the generation prompt already holds."""
    found = chat.marked(answers[-1] + 1)
    if found is None:
        return None
    text, spans = found
    prompts = []
    for number in answers:
        try:
            prompts.append(chat.asked(number))
        except Exception:  # a chat template may refuse a beginning of a conversation that it accepts
            continue
    places = [len(prompt) for prompt in prompts if text.startswith(prompt)]
    return text, [(next((place for place in places if start < place < stop), start), stop) for start, stop in spans]


@lru_cache(maxsize=1)
def _added_tokens(tokenizer: Any) -> tuple[str, ...]:
    return tuple(tokenizer.get_added_vocab())


def _ended(text: str, start: int, stop: int, endings: tuple[str, ...], eos: str) -> Span:
    """The span up to the token that ends the turn: with it where a marker left it out, without white space after it."""
    if text.startswith(eos, stop):
        return start, stop + len(eos)
    bare = text[start:stop].rstrip()
    return start, start + len(bare) if bare.endswith(endings) else stop


def _stable(chat: _Chat, answers: list[int]) -> tuple[str, list[Span]]:
    """The conversation up to the last answer, and the spans of the answers that read the same when they are given and when more turns follow."""
    turns, last, eos = chat.talk.turns, answers[-1], chat.tokenizer.eos_token or "\0"
    text = chat.render(turns[: last + 1])
    spans: list[Span] = []
    cause: Exception | None = None
    for number in reversed(answers):
        try:
            before = chat.asked(number)
            after = text if number == last else chat.render(turns[: number + 1])
            if number == last and not after.startswith(before):
                after = text = before + _answer(before, after, chat.header(number))
        except Exception as error:  # a chat template may refuse a beginning of a conversation that it accepts
            cause = cause or error
            continue
        if number != last and not text.startswith(after):  # some templates close the whole conversation with it
            after = after.removesuffix(eos)
        if text.startswith(after) and after.startswith(before):
            spans.insert(0, (len(before), min(len(after), spans[0][0] if spans else len(after))))
    if not spans:
        raise cause or ValueError("the chat template rewrites every answer when it is added")
    return text, spans


def _answer(before: str, after: str, header: str) -> str:
    """The last answer where the generation prompt has more after the header than the template writes before an answer.

    Raises:
        ValueError: when the answer does not follow the generation prompt: the template rewrites it, or it opens a tag that the answer never closes.
    """
    if not (header and before.startswith(header) and after.startswith(header)):
        raise ValueError("the chat template rewrites the prompt when the answer is added")
    answer = after[len(header) :]
    opened: list[str] = []
    for closes, tag in TAG.findall(before[len(header) :]):
        opened = [other for other in opened if other != tag] if closes else [*opened, tag]
    missing = next((tag for tag in opened if f"</{tag}>" not in answer), None)
    if missing:
        raise ValueError(f"the generation prompt opens <{missing}>, and the answer as the chat template writes it does not close it")
    return answer
