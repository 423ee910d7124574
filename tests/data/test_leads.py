"""Tokenizers that begin every text with a space: segments amid a document are read as in the whole text, and generation sees the same."""

from __future__ import annotations

import json

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from harness.data import backends, leads
from harness.data import prepare as module
from harness.data.prepare import fingerprint, prepare, prepared_index
from harness.data.template import Template
from tests.data.conftest import make_run, write_pairs

INSTRUCT = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
            "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}")
LINES = ("{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}")
TIGHT = LINES.replace("|>\\n", "|>")
TALK = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hello, the answer"},
        {"role": "user", "content": "more?"}, {"role": "assistant", "content": "☺ 42"}]


def sentencepiece(folder, begins, chat_template):
    """A tokenizer as that of Llama 2: no words, bytes for what is in no vocabulary, and a space before a text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if begins == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=begins, split=False)
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False)
    tokenizer.train_from_iterator(["hi there hello hello, the answer is the answer more? hello [INST] hi [/INST] hello"] * 20, trainer)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return folder


def prepared_with(tmp_path, tokenizer, rows, **data):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "v.jsonl").write_text(json.dumps(rows[0] | ({"prompt": "held"} if "prompt" in rows[0] else {"messages": [TALK[2], TALK[1]]})) + "\n")
    run = make_run(tmp_path, train={"path": str(tmp_path / "t.jsonl")}, validation={"path": str(tmp_path / "v.jsonl")}, train_tokenizer=None,
                   tokenizer=str(tokenizer), sequence_length=512, **data)
    prepare(run, progress=False)
    return run, datasets.load_from_disk(str(tmp_path / "data" / "train")), AutoTokenizer.from_pretrained(tmp_path / "data" / "tokenizer")


@pytest.mark.parametrize("chat_template", [INSTRUCT, LINES, TIGHT])
@pytest.mark.parametrize("begins", ["prepend", "first", "always"])
def test_a_conversation_has_the_tokens_of_its_text(tmp_path, begins, chat_template):
    _, rows, tokenizer = prepared_with(tmp_path, sentencepiece(tmp_path / "tok", begins, chat_template), [{"messages": TALK}], shape="messages")
    ids, starts = rows[0]["input_ids"], rows[0]["trained_starts"]
    text = tokenizer.apply_chat_template(TALK, tokenize=False).rstrip()
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[: starts[0]] == Template.for_messages(tokenizer).prompt_ids(TALK[0]["content"], tokenizer)
    assert len(starts) == 2


@pytest.mark.parametrize("completion, answer", [("{completion}", "hello"), (" {completion}", "▁hello")])
def test_an_answer_begins_as_the_template_says(tmp_path, completion, answer):
    template = {"prompt": "Q: {prompt}\nA:\n", "completion": completion}
    pairs = [{"prompt": f"hi {n}", "completion": "hello"} for n in range(9)]
    _, rows, tokenizer = prepared_with(tmp_path, sentencepiece(tmp_path / "tok", "prepend", None), pairs, shape="prompt_completion", template=template)
    for row, pair in zip(rows, pairs, strict=True):
        [start], ids = row["trained_starts"], row["input_ids"]
        assert "".join(tokenizer.convert_ids_to_tokens(ids[start:])) == f"{answer}</s>"
        assert ids[:start] == Template("prompt_completion", "t", **template).prompt_ids(pair["prompt"], tokenizer)


def test_a_lead_that_melts_into_the_segment_is_not_used(tmp_path):
    backend = backends.Backend(sentencepiece(tmp_path / "tok", "prepend", None), backends.ORACLE)
    backend.leads.before = lambda text: ["hel", "☺", ""] if text else [""]
    ids, offsets = backend.encode_amid(["a", "lo", "", "the"], ["", "a", "b", "c"])
    parts = [ids[start:stop].tolist() for start, stop in zip(offsets, offsets[1:], strict=False)]
    assert parts == [backend.encode([text])[0].tolist()[skipped:] for text, skipped in (("a", 0), ("☺lo", 4), ("", 0), ("helthe", len(backend.leads.tokens("hel"))))]


def test_only_such_tokenizers_need_leads_and_have_another_fingerprint(tmp_path, prepared, monkeypatch):
    assert not leads.may_be_needed(prepared / "tokenizer") and backends.Backend(prepared / "tokenizer", backends.ORACLE).leads is None
    source = {"path": str(write_pairs(tmp_path / "p.jsonl", 20))}
    for name, tokenizer in (("bytes", prepared / "tokenizer"), ("pieces", sentencepiece(tmp_path / "tok", "first", None))):
        run = make_run(tmp_path / name, train=source, shape="prompt_completion", train_tokenizer=None, tokenizer=str(tokenizer))
        prepare(run, progress=False)
        before = fingerprint(run)
        with monkeypatch.context() as patch:
            patch.setattr(module.leads, "VERSION", 0)
            assert (fingerprint(run) != before) == (prepared_index(run) is None) == (name == "pieces")
