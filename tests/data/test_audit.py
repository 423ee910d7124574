"""What `prepare` shows: the template in use, and which text is trained, with colours and without."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from harness.data.prepare import prepare
from tests.data.conftest import make_run


def _shown(audit, **console) -> str:
    paper = Console(file=io.StringIO(), width=200, **console)
    paper.print(audit.render(paper))
    return paper.file.getvalue()


@pytest.fixture
def conversations(tmp_path):
    talks = [{"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"{n}!"}]} for n in range(40)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(t) + "\n" for t in talks))
    return {"train": {"path": str(tmp_path / "t.jsonl")}, "shape": "messages"}


def test_trained_text_is_marked_with_colours_and_without(tmp_path, conversations):
    audit = prepare(make_run(tmp_path, **conversations), progress=False)
    plain = _shown(audit)
    assert "(trained text is in [[ ]]): User: Say " in plain and "!<|endoftext|>]]" in plain and "\x1b" not in plain
    assert "[[" in _shown(audit, force_terminal=True, no_color=True)
    coloured = _shown(audit, force_terminal=True, color_system="standard", no_color=False)
    assert "(trained text is marked)" in coloured and "[[" not in coloured and "\x1b[1;32m" in coloured


def test_the_template_is_named(tmp_path, conversations):
    turns = prepare(make_run(tmp_path, **conversations), progress=False)
    assert "template: turns as `User: ...` and `Assistant: ...`, for the tokenizer has no chat template" in _shown(turns)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data" / "tokenizer")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chatty")
    own = make_run(tmp_path, dir=str(tmp_path / "chat"), tokenizer=str(tmp_path / "chatty"), train_tokenizer=None, **conversations)
    assert "template: the tokenizer's own chat template" in _shown(prepare(own, progress=False))
    pairs = make_run(tmp_path, dir=str(tmp_path / "pairs"), train={"path": str(tmp_path / "p.jsonl")}, shape="prompt_completion",
                     template={"name": "qa", "prompt": "Q: {prompt}\nA:", "completion": " {completion}"})
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"{n}", "completion": f"{n}!"}) + "\n" for n in range(40)))
    assert "template: 'qa' of data.template" in _shown(prepare(pairs, progress=False))
