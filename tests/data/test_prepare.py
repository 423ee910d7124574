"""Preparation: what is trained, what is left out and counted, and bytes that do not depend on the processes."""

from __future__ import annotations

import io
import json
import os

import datasets
import pytest
from rich.console import Console

from harness.data import builtin, encode, maker, workers
from harness.data import prepare as module
from harness.data.prepare import fingerprint, prepare, prepared_index
from harness.data.template import Template
from harness.errors import Refused
from harness.formats.index import read_index
from tests.data.conftest import make_run, write_pairs


def documents(folder, tokenizer, name="train"):
    """(text, trained texts) of every document."""
    for row in datasets.load_from_disk(str(folder / name)):
        spans = zip(row["trained_starts"], row["trained_stops"], strict=True)
        yield tokenizer.decode(row["input_ids"]), [tokenizer.decode(row["input_ids"][a:b]) for a, b in spans]


def tokenizer_of(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "tokenizer")


def test_loss_only_on_completions_and_their_end(tmp_path):
    run = make_run(tmp_path, train={"path": str(write_pairs(tmp_path / "p.jsonl", 60))}, shape="prompt_completion",
                   template={"prompt": "Q: {prompt}\nA:", "completion": " {completion}"})
    prepare(run, progress=False)
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    answers = {row["prompt"]: row["completion"] for row in rows}
    found = [d for name in ("train", "validation") for d in documents(tmp_path / "data", tokenizer_of(tmp_path / "data"), name)]
    assert len(found) == 60
    for text, trained in found:
        question, _, _ = text.removeprefix("Q: ").partition("\nA:")
        assert trained == [f" {answers[question]}<|endoftext|>"]
        assert text == f"Q: {question}\nA:{trained[0]}"


def test_conversations_train_assistant_turns(tmp_path):
    talks = [{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"{n}!"},
                           {"role": "user", "content": "Again"}, {"role": "assistant", "content": f"{n} again"}]} for n in range(40)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(t) + "\n" for t in talks))
    run = make_run(tmp_path, train={"path": str(tmp_path / "t.jsonl")}, shape="messages")
    prepare(run, progress=False)
    for text, trained in documents(tmp_path / "data", tokenizer_of(tmp_path / "data")):
        number = text.split("Say ")[1].split("\n")[0]
        assert trained == [f" {number}!<|endoftext|>", f" {number} again<|endoftext|>"]


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
REWRITES = "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last or m.role == 'user' else '...' }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def test_a_chat_template_that_rewrites_trains_the_last_turn_only(prepared):
    tokenizer = tokenizer_of(prepared)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    tokenizer.chat_template = CHAT
    template = Template.for_messages(tokenizer)
    assert [text for text, trained in template.segments(turns, tokenizer) if trained] == ["b</s>", "d</s>"]
    tokenizer.chat_template = REWRITES
    assert [text for text, trained in template.segments(turns, tokenizer) if trained] == ["d</s>"]


def test_generation_sees_the_prompt_as_training_did(prepared):
    tokenizer = tokenizer_of(prepared)
    template = Template("prompt_completion", "t", "Q: {prompt}\nA:", " {completion}")
    (text, _), _ = template.segments(("why", "so"), tokenizer)
    assert template.prompt_ids("why", tokenizer) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert Template.from_dict(template.to_dict()) == template


def made(folder, **data):
    """What identifies both sets that are made of these data: fingerprints, digests of all shards, and what was counted."""
    folder.mkdir()
    prepare(make_run(folder, **data), progress=False)
    indexes = [read_index(folder / "data" / name) for name in module.SETS]
    return [(index.fingerprint, [shard.digest for shard in index.shards], index.audit) for index in indexes]


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_bytes_do_not_depend_on_the_processes(tmp_path, monkeypatch, processes, cores):
    monkeypatch.setattr(module, "SHARD_TEXT_BYTES", 2000)
    data = {"train": {"path": str(write_pairs(tmp_path / "p.jsonl", 60))}, "shape": "prompt_completion"}
    threads = made(tmp_path / "threads", **data, num_processes=1)
    monkeypatch.setattr(workers, "cores", lambda: cores)
    assert made(tmp_path / "other", **data, num_processes=processes) == threads and len(threads[0][1]) > 2


@pytest.mark.parametrize("shape", ["prompt_completion", "messages"])
def test_bytes_do_not_depend_on_how_much_is_tokenised_at_a_time(tmp_path, monkeypatch, shape):
    monkeypatch.setattr(module, "SHARD_TEXT_BYTES", 6000)
    rows = [json.loads(line) for line in write_pairs(tmp_path / "p.jsonl", 60).read_text().splitlines()]
    rows += rows[::7]
    if shape == "messages":  # one in three has nothing to train
        rows = [{"messages": [{"role": "user", "content": row["prompt"]}] + [{"role": "assistant", "content": row["completion"]}] * (number % 3 > 0)}
                for number, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": {"path": str(tmp_path / "rows.jsonl")}, "shape": shape, "max_dropped_share": 0.5}
    at_once = made(tmp_path / "at once", **data)
    counted = [index[2] for index in at_once]
    assert sum(audit["duplicates"] for audit in counted) == {"prompt_completion": 9, "messages": 6}[shape]
    assert sum(audit["dropped"].get("no trained token", 0) for audit in counted) == {"prompt_completion": 0, "messages": 23}[shape]
    for number, characters in enumerate((1, 300, 1000)):
        monkeypatch.setattr(encode, "BATCH_CHARACTERS", characters)
        assert made(tmp_path / str(number), **data) == at_once


def test_an_interrupted_preparation_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_TEXT_BYTES", 2000)
    run = make_run(tmp_path, train={"path": str(write_pairs(tmp_path / "p.jsonl", 60))}, shape="prompt_completion", num_processes=1)
    made, real = [], maker.make_shard

    def interrupted(job):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(job.name)
        return real(job)

    monkeypatch.setattr(maker, "make_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(run, progress=False)
    assert prepared_index(run) is None
    kept = {name: (tmp_path / "data" / "train" / f"{name}.arrow").stat().st_mtime_ns for name in made}
    monkeypatch.setattr(maker, "make_shard", real)
    prepare(run, progress=False)
    assert prepared_index(run) is not None
    assert kept == {name: (tmp_path / "data" / "train" / f"{name}.arrow").stat().st_mtime_ns for name in made}


def test_a_refused_preparation_leaves_what_stands(tmp_path):
    source = write_pairs(tmp_path / "p.jsonl", 150)
    run = make_run(tmp_path, train={"path": str(source)}, shape="prompt_completion")
    facts, kept = prepare(run, progress=False).facts(), source.read_bytes()
    source.write_bytes(kept + b"\xe9\n")
    with pytest.raises(Refused, match="cannot be decoded"):
        prepare(run, progress=False)
    source.write_bytes(kept)
    assert prepare(run, progress=False).facts() == facts


def test_a_tokenizer_that_is_gone_is_made_anew(tmp_path):
    run = make_run(tmp_path, train={"path": str(write_pairs(tmp_path / "p.jsonl", 60))}, shape="prompt_completion")
    facts = prepare(run, progress=False).facts()
    (tmp_path / "data" / "tokenizer" / "tokenizer.json").unlink()
    assert prepared_index(run) is None
    assert prepare(run, progress=False).facts() == facts and (tmp_path / "data" / "tokenizer" / "tokenizer.json").is_file()


def test_the_same_question_never_stands_on_both_sides(tmp_path):
    rows = [{"prompt": f"q {n % 20}", "completion": f"a {n}"} for n in range(100)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = make_run(tmp_path, train={"path": str(tmp_path / "p.jsonl")}, shape="prompt_completion", validation_share=0.3)
    prepare(run, progress=False)
    sides = [{text.split("\n")[0] for text, _ in documents(tmp_path / "data", tokenizer_of(tmp_path / "data"), name)} for name in ("train", "validation")]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def summaries(path, documents):
    """Conversations that ask the same of several documents, which stand in the system's turn."""
    talks = [[{"role": "system", "content": f"Document {n % documents}"}, {"role": "user", "content": "Summarize it."}, {"role": "assistant", "content": f"s {n}"}] for n in range(100)]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return {"train": {"path": str(path)}, "shape": "messages"}


def test_documents_in_the_turn_of_the_system_are_split(tmp_path):
    audit = prepare(make_run(tmp_path, **summaries(tmp_path / "t.jsonl", 50)), progress=False)
    assert all(facts["documents"] > 5 for facts in audit.facts().values())


def test_too_few_questions_for_two_sets_are_counted(tmp_path):
    with pytest.raises(Refused, match="distinct questions in the source: 1, each") as caught:
        prepare(make_run(tmp_path, **summaries(tmp_path / "t.jsonl", 1), validation_share=0.001), progress=False)
    assert "raise" not in caught.value.remedy and "a source of its own" in caught.value.remedy
    with pytest.raises(Refused, match="distinct questions in the source: 3, each") as caught:
        prepare(make_run(tmp_path, **summaries(tmp_path / "t.jsonl", 3), validation_share=0.999), progress=False)
    assert "lower data.validation_share" in caught.value.remedy


def test_overlap_duplicates_and_empty_rows_are_counted(tmp_path):
    train = [{"prompt": f"q {n}", "completion": "a"} for n in range(20)] + [{"prompt": "q 0", "completion": "a"}, {"prompt": "", "completion": "a"}]
    held = [{"prompt": "Q  3", "completion": "x"}, {"prompt": "new", "completion": "x"}]
    for name, rows in (("t", train), ("v", held)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = make_run(tmp_path, train={"path": str(tmp_path / "t.jsonl")}, validation={"path": str(tmp_path / "v.jsonl")}, shape="prompt_completion")
    facts = prepare(run, progress=False).facts()
    assert facts["train"]["rows in"] == 22 and facts["train"]["documents"] == 21
    assert facts["train"]["duplicates (kept)"] == 1
    assert facts["train"]["dropped: a part is empty or missing"] == 1
    assert facts["validation"]["dropped: its question is in the training set"] == 1 and facts["validation"]["documents"] == 1


@pytest.mark.parametrize("rule, told", [("truncate", "truncated"), ("drop", "dropped: longer than a row"), ("cut", None)])
def test_what_the_sequence_length_costs_is_counted(tmp_path, rule, told):
    texts = ["short", "a rather long text " * 40, "another " * 60, "fine"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "v.jsonl").write_text(json.dumps({"text": "held out"}) + "\n")
    run = make_run(tmp_path, train={"path": str(tmp_path / "t.jsonl")}, validation={"path": str(tmp_path / "v.jsonl")}, shape="text",
                   sequence_length=16, long_documents=rule, packing="none", max_dropped_share=0.5)
    facts = prepare(run, progress=False).facts()["train"]
    assert {key: value for key, value in facts.items() if "longer" in key or "truncated" in key} == ({told: 2} if told else {})
    assert facts["rows of 16"] == {"truncate": 4, "drop": 2, "cut": sum(-(-length // 16) for length in _lengths(tmp_path))}[rule]


def _long(folder, rows, **data):
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "v.jsonl").write_text(json.dumps({"prompt": "held", "completion": "out"}) + "\n")
    return make_run(folder, train={"path": str(folder / "t.jsonl")}, validation={"path": str(folder / "v.jsonl")}, shape="prompt_completion",
                    sequence_length=16, packing="none", **data)


def test_documents_dropped_for_their_length_count_as_dropped_also_of_a_set_that_is_there(tmp_path):
    rows = [{"prompt": f"q {n}", "completion": "a" if n % 4 else "long " * 40} for n in range(20)]
    run = _long(tmp_path, rows, long_documents="drop")
    with pytest.raises(Refused, match="5 of 20 documents of the train set would be dropped: 5 because longer than a row"):
        prepare(run, progress=False)
    assert prepared_index(run) is None
    prepare(_long(tmp_path, rows, long_documents="drop", max_dropped_share=0.25), progress=False)
    with pytest.raises(Refused, match="5 of 20 documents of the train set"):
        prepare(run, progress=False)


def test_rows_without_a_trained_token_are_counted_and_a_set_of_them_is_refused(tmp_path):
    rows = [{"prompt": "long question " * 20 if n % 2 else f"q {n}", "completion": f"a {n}"} for n in range(10)]
    facts = prepare(_long(tmp_path, rows, long_documents="truncate"), progress=False).facts()
    assert facts["train"]["rows without a trained token"] == 5 and "rows without a trained token" not in facts["validation"]
    none = _long(tmp_path, rows[1::2], long_documents="truncate")
    with pytest.raises(Refused, match="No row of 16 tokens of the train set has a trained token"):
        prepare(none, progress=False)


@pytest.mark.parametrize("template, ends", [({}, ""), ({"prompt": "<|endoftext|>{prompt}\n"}, "<|endoftext|>")])
def test_special_tokens_that_rows_say_themselves_are_counted(tmp_path, template, ends):
    rows = [{"prompt": f"q {n}", "completion": f"a {n}{ends}"} for n in range(30)]
    rows[7]["prompt"] += "<|endoftext|> and"
    rows[9] = {"prompt": "both <|endoftext|>", "completion": "be<|endoftext|>fore"}
    rows[11]["completion"] = "ends<|endoftext|>!"
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = make_run(tmp_path, train={"path": str(tmp_path / "t.jsonl")}, validation={"path": str(write_pairs(tmp_path / "v.jsonl", 9))}, shape="prompt_completion",
                   template=template)
    audit = prepare(run, progress=False)
    assert audit.facts()["train"]["special tokens in their own text"] == 3 and "special tokens in their own text" not in audit.facts()["validation"]
    console = Console(width=200, file=io.StringIO())
    console.print(audit.render(console))
    assert f"3 rows of train hold special tokens in their own text, which become control tokens; the first: {tmp_path}/t.jsonl:8" in console.file.getvalue()


@pytest.mark.parametrize("file", ["train/.shard-00000.arrow.{pid}.tmp", "train/parts/.shard-00000.identities.npy.{pid}.tmp"])
def test_a_full_disk_is_refused(tmp_path, file):
    full = tmp_path / "data" / file.format(pid=os.getpid())
    full.parent.mkdir(parents=True)
    full.symlink_to("/dev/full")
    run = make_run(tmp_path, train={"path": str(write_pairs(tmp_path / "p.jsonl", 900))}, shape="prompt_completion")
    with pytest.raises(Refused, match="data cannot be written: No space left on device"):
        prepare(run, progress=False)


def test_a_disk_that_is_full_when_the_tokenizer_is_saved(tmp_path, prepared):
    with pytest.raises(Refused, match="No space left on device"), module._room(tmp_path):
        tokenizer_of(prepared).backend_tokenizer.save("/dev/full")


def _lengths(folder):
    import numpy as np

    return np.load(folder / "data" / "train" / "shard-00000.lengths.npy").tolist()


@pytest.mark.parametrize("kind", ["csv", "parquet", "text"])
def test_other_formats(tmp_path, kind):
    rows = {"frage": [f"Wie geht {n}?" for n in range(30)], "antwort": [f"So, und {n} mal; »ja«" for n in range(30)]}
    path = tmp_path / f"data.{'txt' if kind == 'text' else kind}"
    table = datasets.Dataset.from_dict(rows)
    if kind == "csv":
        table.to_csv(path)
    elif kind == "parquet":
        table.to_parquet(path)
    else:
        path.write_text("\n\n".join(f"{q} {a} " * 40 for q, a in zip(rows["frage"], rows["antwort"], strict=True)))
    shape = {"shape": "text"} if kind == "text" else {"shape": "prompt_completion", "columns": {"prompt": "frage", "completion": "antwort"}}
    run = make_run(tmp_path, train={"path": str(path)}, **shape)
    prepare(run, progress=False)
    text = "".join(t for name in ("train", "validation") for t, _ in documents(tmp_path / "data", tokenizer_of(tmp_path / "data"), name))
    assert all(answer in text for answer in rows["antwort"])


def test_fingerprint_follows_what_changes_a_byte(tmp_path):
    source = {"path": str(write_pairs(tmp_path / "p.jsonl", 30))}
    base = fingerprint(make_run(tmp_path, train=source, shape="prompt_completion"))
    assert base == fingerprint(make_run(tmp_path, train=source, shape="prompt_completion", sequence_length=64, packing="none", num_processes=2))
    assert base != fingerprint(make_run(tmp_path, train=source, shape="prompt_completion", template={"prompt": "{prompt}!"}))
    assert base != fingerprint(make_run(tmp_path, train=source, shape="prompt_completion", validation_share=0.3))
    assert base != fingerprint(make_run(tmp_path, train=source | {"format": "text"}, shape="prompt_completion"))
    write_pairs(tmp_path / "p.jsonl", 31)
    assert base != fingerprint(make_run(tmp_path, train=source, shape="prompt_completion"))


def test_a_tokenizer_without_an_end_is_refused(tmp_path, prepared):
    tokenizer = tokenizer_of(prepared)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "tok")
    run = make_run(tmp_path, train={"path": str(write_pairs(tmp_path / "p.jsonl", 30))}, shape="prompt_completion", train_tokenizer=None, tokenizer=str(tmp_path / "tok"))
    with pytest.raises(Refused, match="no end-of-text token"):
        prepare(run, progress=False)


def test_builtin_sources():
    assert len(builtin.python_prose()) > 100
    questions = dict(builtin.python_questions())
    assert len(questions) > 3000
    assert "What does `shutil.copytree` do?" in questions


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_gives_the_same_bytes(tmp_path, suffix):
    import pyarrow as pa

    from harness.data.sources import COMPRESSED

    plain = write_pairs(tmp_path / "pairs.jsonl", 60)
    packed = tmp_path / f"pairs.jsonl{suffix}"
    with pa.CompressedOutputStream(pa.OSFile(str(packed), "wb"), COMPRESSED[suffix]) as stream:
        stream.write(plain.read_bytes())
    digests = []
    for path in (plain, packed):
        run = make_run(tmp_path / path.name.replace(".", "-"), train={"path": str(path)}, shape="prompt_completion")
        prepare(run, progress=False)
        digests.append([shard.digest for shard in read_index(tmp_path / path.name.replace(".", "-") / "data" / "train").shards])
    assert digests[0] == digests[1]


def test_a_damaged_compressed_file_is_refused_by_its_own_name(tmp_path):
    import gzip

    packed = tmp_path / "pairs.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 50)[:-12])
    run = make_run(tmp_path, train={"path": str(packed)}, shape="prompt_completion")
    with pytest.raises(Refused, match="pairs.jsonl.gz"):
        prepare(run, progress=False)
    packed.write_bytes(gzip.compress(b'{"prompt": "a", "completion": "b"}\noops\n'))
    with pytest.raises(Refused, match=r"pairs\.jsonl\.gz line 2 is not JSON"):
        prepare(run, progress=False)


def test_another_order_is_another_fingerprint(prepared, monkeypatch):
    """A cursor means other rows under it, so that such a run must not be resumed in silence."""
    from harness.data import rows
    from harness.data.packing import Packing

    table = rows.RowTable.build(prepared / "train", Packing(32, "best_fit", "cut"))
    before = table.fingerprint
    monkeypatch.setattr(rows, "ORDER_VERSION", 99)
    assert table.fingerprint != before


def test_a_model_folder_without_a_tokenizer_is_named(tmp_path):
    """transformers makes an empty tokenizer of a configuration alone."""
    from transformers import GPT2Config

    GPT2Config(n_layer=1, n_embd=8, n_head=1).save_pretrained(tmp_path / "model")
    run = make_run(tmp_path, train={"path": str(write_pairs(tmp_path / "pairs.jsonl", 20))}, shape="prompt_completion", train_tokenizer=None)
    run = run.model_copy(update={"model": run.model.model_copy(update={"path": str(tmp_path / "model"), "architecture": None})})
    with pytest.raises(Refused, match="There is no tokenizer in .*model.*"):
        prepare(run, progress=False)
