"""A remote set: bounded cache, one download a host, retries, and messages that keep secrets."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from harness import files
from harness.data import fetch as module
from harness.data.fetch import redact
from harness.data.remote import RemoteStore, open_store
from harness.data.store import LocalStore, Wanted
from harness.errors import Failure, Refused
from harness.testing.server import serving, wanted

pytest.importorskip("aiohttp", reason="fsspec reads http:// through aiohttp")
QUICK = {"backoff_s": 0.01, "stall_s": 0.5, "room_s": 0.5}


@pytest.fixture
def server():
    with serving() as it:
        yield it


@pytest.fixture
def said(caplog):
    """What was said up to the moment of asking."""
    caplog.set_level(logging.DEBUG)
    return lambda: "\n".join([*caplog.messages, ""])


@pytest.fixture
def opened(tmp_path):
    """A maker of stores that are closed at the end."""
    stores = []

    def make(url: str, *, cache_bytes: int | None = None, **options) -> RemoteStore:
        stores.append(RemoteStore(url, cache_dir=tmp_path / "cache", cache_bytes=cache_bytes, **(QUICK | options)))
        return stores[-1]

    yield make
    for it in stores:
        it.close()


def here(it: RemoteStore) -> list[str]:
    return sorted(path.name for path in it.folder.iterdir() if not path.name.endswith(".lock"))


def until(condition, *, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


def run(code: str, *arguments: object) -> subprocess.Popen[str]:
    head = "import json, os, random, signal, sys, time\nfrom pathlib import Path\nfrom harness.formats import digest\nfrom harness.data.remote import *\n"
    return subprocess.Popen([sys.executable, "-c", head + textwrap.dedent(code), *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def listed(*wants: Wanted) -> str:
    return json.dumps([(it.name, it.size, it.digest) for it in wants])


def finish(*processes: subprocess.Popen[str]) -> str:
    said = "".join(it.communicate(timeout=60)[0] for it in processes)
    assert [it.returncode for it in processes] == [0] * len(processes), said
    return said


def test_a_local_set(tmp_path):
    (tmp_path / "index.json").write_bytes(b"{}")
    for url in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        it = open_store(url, cache_dir=None, cache_bytes=None)
        assert isinstance(it, LocalStore) and not it.is_remote and it.url == str(tmp_path)
        assert it.read_small("index.json") == b"{}" and it.read_small("none.json") is None
        assert it.hold(wanted("index.json", b"{}")) == tmp_path / "index.json"
        it.release("index.json")
        it.prefetch([])
        it.close()
        for there, said in ((wanted("index.json", b"{}}"), "2 bytes instead of 3"), (wanted("a.arrow", b"a"), "a.arrow .* is not there")):
            with pytest.raises(Failure, match=said):
                it.hold(there)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", ".hidden", "", "a//b"])
def test_a_name_stays_inside_the_set(tmp_path, opened, name):
    for it in (open_store(tmp_path, cache_dir=None, cache_bytes=None), opened("memory://set")):
        for ask in (it.read_small, lambda name, it=it: it.hold(Wanted(name, 1, ""))):
            with pytest.raises(Failure, match="no name of a file"):
                ask(name)


def test_memory(opened):
    import fsspec

    content = random.Random(0).randbytes(3000)
    fsspec.filesystem("memory").pipe({"/set-m/index.json": b"{}", "/set-m/a.arrow": content, "/set-m/tokenizer/t.json": b"[]"})
    it = opened("memory://set-m")
    assert it.is_remote and it.read_small("index.json") == b"{}" and it.read_small("none.json") is None
    assert it.hold(wanted("a.arrow", content)).read_bytes() == content
    assert it.hold(wanted("tokenizer/t.json", b"[]")) == it.folder / "tokenizer" / "t.json"
    said = "(?s)b.arrow of memory://set-m could not be fetched to .*: there is no such file.*Start the same command again"
    with pytest.raises(Failure, match=said):
        it.hold(wanted("b.arrow", b"b"))
    it.release("a.arrow")
    with pytest.raises(Failure, match="more than the 2999 bytes"):
        it.hold(Wanted("a.arrow", 2999, "0"))


def test_pieces_make_a_whole(opened, monkeypatch):
    import fsspec

    monkeypatch.setattr(module, "PIECE_BYTES", 1000)
    for size in (1, 999, 1000, 1001, 3000):
        content = random.Random(size).randbytes(size)
        fsspec.filesystem("memory").pipe(f"/set-p/{size}.npy", content)
        assert opened("memory://set-p").hold(wanted(f"{size}.npy", content)).read_bytes() == content


def test_a_stalled_file_system_without_async_ends(opened, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda *_, **__: time.sleep(3))
    started = time.monotonic()
    with pytest.raises(Failure, match="nothing arrived for 0.2 s"):
        opened("memory://set-s", attempts=2, stall_s=0.2).hold(wanted("a", b"a"))
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("faults", [
    [500, 503], ["stall"], ["truncate", "truncate"], ["wrong"], ["long"], [404], [403], [429, 429, 429], [500, "truncate", "wrong", "stall", 502],
])
def test_what_goes_wrong_is_tried_again(server, opened, said, faults):
    want, it = server.add("shard-00000.arrow", 50_000), opened(server.url)
    server.faults["shard-00000.arrow"] = list(faults)
    assert it.hold(want).read_bytes() == server.content["shard-00000.arrow"]
    assert server.gets["shard-00000.arrow"] == len(faults) + 1
    lines = [line for line in said().splitlines() if line.startswith("fetching shard-00000.arrow again: ")]
    assert len(lines) == len(faults) and lines[0].endswith(f"(try 2 of {2 if faults[0] in (404, 403) else 6})")
    assert here(it) == ["shard-00000.arrow"]


@pytest.mark.parametrize(("fault", "tries", "said"), [
    (500, 6, "500, message='Internal Server Error'"), ("stall", 6, "nothing arrived for 0.1 s"), ("truncate", 6, ""),
    (404, 2, "there is no such file"),
    ("wrong", 6, "the bytes are not those that were prepared"), ("long", 6, "more than the 50000 bytes that the index says arrived"), (403, 2, "403"),
])
def test_the_end_is_clear(server, opened, fault, tries, said):
    want, it = server.add("shard-00003.arrow", 50_000), opened(server.url, stall_s=0.1)
    server.faults["shard-00003.arrow"] = [fault] * 9
    with pytest.raises(Failure) as caught:
        it.hold(want)
    text = str(caught.value)
    assert said in text and server.gets["shard-00003.arrow"] == tries and caught.value.exit_code == 1 and caught.value.__suppress_context__
    for part in ("shard-00003.arrow", server.url, module.socket.gethostname(), "Start the same command again", str(it.folder / "shard-00003.arrow")):
        assert part in text
    assert here(it) == []


def test_small_files(server, opened):
    it = opened(server.url)
    server.add("index.json", 5000)
    server.faults["index.json"] = [500, "truncate", "stall", 404]
    assert it.read_small("index.json") == server.content["index.json"]
    assert it.read_small("none.json") is None and server.gets["none.json"] == 2
    server.faults["index.json"] = [500] * 9
    with pytest.raises(Failure, match="index.json"):
        it.read_small("index.json")
    assert here(it) == []


def test_a_slow_body_is_no_stalled_one(server, opened):
    want = server.add("a.arrow", 20_000)
    server.faults["a.arrow"] = ["slow"]
    assert opened(server.url, stall_s=0.4).hold(want).stat().st_size == 20_000
    assert server.gets["a.arrow"] == 1


def test_holds_are_counted_and_the_least_recently_used_goes_first(server, opened):
    a, b, c, d, e = (server.add(name, 1000) for name in "abcde")
    it = opened(server.url, cache_bytes=3000)
    for want in (a, b, c):
        it.hold(want)
        it.release(want.name)
    it.hold(a), it.hold(a), it.release("a")
    it.hold(d)
    assert here(it) == ["a", "c", "d"]
    it.release("d")
    it.hold(c)
    it.hold(e)
    assert here(it) == ["a", "c", "e"]
    with pytest.raises(Failure, match="leaves no room"):
        it.hold(d)
    assert here(it) == ["a", "c", "e"]
    it.release("a")
    it.hold(d)
    assert here(it) == ["c", "d", "e"]
    with pytest.raises(KeyError):
        it.release("a")
    with pytest.raises(Refused, match="(?s)3001 bytes, more than the bound.*Raise the bound"):
        it.hold(server.add("f", 3001))


def test_a_hold_waits_for_room(server, opened):
    a, b = server.add("a", 1000), server.add("b", 1000)
    it = opened(server.url, cache_bytes=1500, room_s=10)
    it.hold(a)
    threading.Timer(0.3, it.release, ["a"]).start()
    started = time.monotonic()
    assert it.hold(b).is_file() and 0.25 < time.monotonic() - started < 5
    assert here(it) == ["b"]


def test_the_bound_covers_all_sets_and_a_smaller_one_is_kept_at_once(server, opened):
    wants = [server.add(name, 1000) for name in "abcd"]
    first, second = opened(server.url, cache_bytes=3000), opened(server.url + "?x=1", cache_bytes=3000)
    other = opened(server.url.replace("/set", "//set"), cache_bytes=3000)
    assert first.folder == second.folder != other.folder
    for want in wants[:3]:
        first.hold(want)
        first.release(want.name)
    server.content["/set/d"] = server.content["d"]
    other.hold(wants[3])
    assert here(first) == ["b", "c"] and here(other) == ["d"]
    opened(server.url, cache_bytes=1500)
    assert here(first) == [] and here(other) == ["d"]


def test_what_is_not_the_cache_is_left_alone(server, opened, tmp_path):
    (tmp_path / "cache" / "mine").mkdir(parents=True)
    (tmp_path / "cache" / "mine" / "thesis.pdf").write_bytes(b"x" * 5000)
    opened(server.url, cache_bytes=1000).hold(server.add("a", 1000))
    assert (tmp_path / "cache" / "mine" / "thesis.pdf").is_file()


def test_a_damaged_copy_is_fetched_again(server, opened, said):
    want = server.add("a", 1000)
    first = opened(server.url)
    path = first.hold(want)
    first.close()
    for turn, damaged in enumerate((b"x" + server.content["a"][1:], server.content["a"][:-1], b""), 1):
        path.write_bytes(damaged)
        later = opened(server.url)
        assert later.hold(want).read_bytes() == server.content["a"]
        later.close()
        assert said().count("fetching a again: its copy in the cache is damaged\n") == turn
    assert server.gets["a"] == 4
    opened(server.url).hold(want)
    assert server.gets["a"] == 4


def test_a_set_that_was_prepared_again_is_fetched_again(server, opened):
    it, want = opened(server.url), server.add("a", 1000)
    it.hold(want), it.release("a")
    server.content["a"] = b"y" * 1000
    assert it.hold(wanted("a", b"y" * 1000)).read_bytes() == b"y" * 1000


def test_prefetch_fetches_in_order_while_there_is_room(server, opened):
    wants = [server.add(name, 1000) for name in "abcdef"]
    it = opened(server.url, cache_bytes=3000)
    it.hold(wants[5])
    it.prefetch(wants[:5])
    until(lambda: here(it) == ["a", "b", "f"])
    time.sleep(0.2)
    assert here(it) == ["a", "b", "f"] and server.gets["c"] == 0
    it.hold(wants[0]), it.release("f")
    until(lambda: here(it) == ["a", "b", "c"])
    it.release("a")
    it.prefetch(wants[1:5])
    until(lambda: here(it) == ["b", "c", "d"])
    it.hold(wants[0])
    assert here(it) == ["a", "b", "c"], "what is needed last makes room"
    assert server.gets["b"] == 1


def test_prefetch_leaves_failures_to_hold(server, opened):
    a, b, c = (server.add(name, 1000) for name in "abc")
    server.faults["a"] = [404, 404]
    server.faults["b"] = [500]
    it = opened(server.url, cache_bytes=2500)
    it.prefetch([Wanted("huge", 3000, ""), a, b, c])
    until(lambda: here(it) == ["b", "c"])
    assert server.gets["huge"] == 0
    assert it.hold(a).is_file()


def test_threads_take_no_signals_and_close_ends_what_is_under_way(server, opened):
    want = server.add("a", 1000)
    server.faults["a"] = ["stall"]
    it = opened(server.url, stall_s=30)
    it.prefetch([want])
    until(lambda: server.gets["a"])
    masks = {thread.name: Path(f"/proc/self/task/{thread.native_id}/status").read_text() for thread in threading.enumerate()}
    blocked = int(next(line for line in masks["harness-prefetch"].splitlines() if line.startswith("SigBlk")).split()[1], 16)
    assert all(blocked >> (number - 1) & 1 for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
    started = time.monotonic()
    it.close()
    assert time.monotonic() - started < 2 and here(it) == []
    assert "harness-prefetch" not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(Failure, match="was closed"):
        it.hold(want)


def test_hold_and_prefetch_share_a_download(server, opened):
    want = server.add("a", 20_000)
    server.faults["a"] = ["slow"]
    it = opened(server.url)
    it.prefetch([want])
    until(lambda: server.gets["a"])
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(it.hold(want))) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(set(paths)) == 1 and len(paths) == 4 and server.gets["a"] == 1
    for _ in paths:
        it.release("a")
    with pytest.raises(KeyError):
        it.release("a")


STORM = """
    wants = [Wanted(*it) for it in json.loads(sys.argv[3])]
    it = RemoteStore(sys.argv[1], cache_dir=Path(sys.argv[2]), cache_bytes=int(sys.argv[4]) or None, backoff_s=0.01)
    draw = random.Random(int(sys.argv[5]))
    for turn in range(int(sys.argv[6])):
        order = draw.sample(wants, len(wants))
        for here, want in enumerate(order):
            it.prefetch(order[here + 1 : here + 3])
            path = it.hold(want)
            assert digest.of_file(path) == want.digest
            time.sleep(draw.random() * 0.02)
            assert path.stat().st_nlink == 1
            it.release(want.name)
    it.close()
"""


def snapshot(folder: Path) -> dict[int, int]:
    sizes = {}
    for path in folder.rglob("*"):
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        if path.is_file():
            sizes[stat.st_ino] = stat.st_size
    return sizes


def test_three_processes_never_pass_the_bound(server, tmp_path):
    """Disk use is sampled without knowing the locks: a sample counts when two walks in a row saw the same files."""
    wants = [server.add(f"s{i:02d}", 20_000 + 1000 * i) for i in range(10)]
    cache, bound, most, over = tmp_path / "cache", 120_000, [], threading.Event()
    server.faults = {want.name: ["truncate", 500] for want in wants[:4]}
    cache.mkdir()

    def sample() -> None:
        while not over.is_set():
            sizes = snapshot(cache)
            if sizes == snapshot(cache):
                most.append(sum(sizes.values()))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        finish(*(run(STORM, server.url, cache, listed(*wants), bound, seed, 4) for seed in range(3)))
    finally:
        over.set()
        sampler.join()
    print(f"{len(most)} samples, most {max(most)} of {bound}; {sum(server.gets.values())} requests")
    assert len(most) > 100 and 0.7 * bound < max(most) <= bound
    assert not list(cache.rglob("*.part"))


def test_three_processes_fetch_each_file_once(server, tmp_path):
    wants = [server.add(f"s{i:02d}", 20_000) for i in range(10)]
    finish(*(run(STORM, server.url, tmp_path, listed(*wants), 200_000, seed, 2) for seed in range(3)))
    assert server.gets == {want.name: 1 for want in wants}


def test_what_another_process_holds_is_not_evicted(server, opened, tmp_path):
    a, b = server.add("a", 1000), server.add("b", 1000)
    other = run("""
        it = RemoteStore(sys.argv[1], cache_dir=Path(sys.argv[2]), cache_bytes=1500)
        print(it.hold(*(Wanted(*it) for it in json.loads(sys.argv[3]))), flush=True)
        time.sleep(60)
    """, server.url, tmp_path / "cache", listed(a))
    path = Path(other.stdout.readline().strip())
    it = opened(server.url, cache_bytes=1500)
    with pytest.raises(Failure, match="all else in .* is in use, and leaves no room for its 1000 bytes"):
        it.hold(b)
    assert path.is_file() and it.hold(a) == path and server.gets["a"] == 1
    it.release("a")
    other.kill()
    other.communicate()
    assert it.hold(b).is_file() and not path.exists()


def test_a_killed_download_leaves_nothing_harmful(server, opened, tmp_path):
    a, b = server.add("a", 100_000), server.add("b", 1000)
    server.faults["a"] = ["stall"]
    other = run("RemoteStore(sys.argv[1], cache_dir=Path(sys.argv[2]), cache_bytes=100_500).hold(*(Wanted(*it) for it in json.loads(sys.argv[3])))",
                server.url, tmp_path / "cache", listed(a))
    part = tmp_path / "cache" / files.digest_text(server.url)[:16] / ".a.part"
    until(lambda: part.exists() and any(part.read_bytes()))
    assert part.stat().st_size == 100_000, "room is reserved from the start"
    busy = opened(server.url, cache_bytes=100_500)
    with pytest.raises(Failure, match="leaves no room"):
        busy.hold(b)
    os.kill(other.pid, signal.SIGKILL)
    other.communicate()
    assert part.exists()
    assert busy.hold(b).is_file() and not part.exists()
    busy.release("b")
    assert busy.hold(a).read_bytes() == server.content["a"]
    assert here(busy) == ["a"]


def test_a_forked_process_holds_nothing_of_its_parent(server, tmp_path):
    said = finish(run("""
        a, b = (Wanted(*it) for it in json.loads(sys.argv[3]))
        it = RemoteStore(sys.argv[1], cache_dir=Path(sys.argv[2]), cache_bytes=1500, room_s=0.3)
        it.hold(a)
        if not (child := os.fork()):
            time.sleep(3)
            os._exit(0)
        it.release("a")
        it.hold(b)
        it.release("b")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if not os.fork():
            it.hold(a), it.release("a")
            print("the child fetched", flush=True)
            os._exit(0)
        os.wait()
    """, server.url, tmp_path, listed(server.add("a", 1000), server.add("b", 1000))))
    assert "the child fetched" in said


def test_credentials_are_used_and_never_shown(server, opened, said, capsys):
    secret_url = server.url.replace("http://", "http://reader:pa55-w0rd@") + "?X-Amz-Signature=5ecre7&X-Amz-Credential=AKIAABCDEFGHIJKLMNOP"
    it, want, messages = opened(secret_url, attempts=3), server.add("a", 1000), []
    server.faults["a"] = [500, "truncate"]
    it.hold(want)
    assert server.queries == {"X-Amz-Signature=5ecre7&X-Amz-Credential=AKIAABCDEFGHIJKLMNOP"} and server.headers[0].startswith("Basic ")
    for fault in (500, 403, 404, "truncate"):
        server.faults["b"] = [fault] * 9
        with pytest.raises(Failure) as caught:
            it.hold(server.add("b", 1000))
        messages.append(str(caught.value))
    with pytest.raises(Refused) as caught:
        open_store(secret_url, cache_dir=None, cache_bytes=None)
    out = capsys.readouterr()
    shown = "".join([*messages, str(caught.value), it.url, out.out, out.err, said()])
    assert it.url == server.url and server.url in messages[0] and "fetching a again" in said()
    for secret in ("pa55-w0rd", "reader", "5ecre7", "AKIA"):
        assert secret not in shown


@pytest.mark.parametrize(("text", "shown"), [
    ("GET https://u:p@w@host:8/a/b?X-Amz-Signature=1f&y=2 failed", "GET https://host:8/a/b failed"),
    ("url=URL('http://u:p@h/x?sig=zz')", "url=URL('http://h/x')"),
    ("s3://bucket/key: not found", "s3://bucket/key: not found"),
    ("/b/k?X-Amz-Credential=A/2&X-Amz-Security-Token=t", "/b/k?X-Amz-Credential=***&X-Amz-Security-Token=***"),
    ("AWS_SECRET_ACCESS_KEY=a/b+c= tail", "AWS_SECRET_ACCESS_KEY=*** tail"),
    ("{'secret': 'a b', 'Authorization': 'Bearer x.y'}", "{'secret=***, 'Authorization=***"),
    ("AccountName=n;AccountKey=ab==;EndpointSuffix=e", "AccountName=n;AccountKey=***;EndpointSuffix=e"),
    ("<AWSAccessKeyId>AB</AWSAccessKeyId>", "<AWSAccessKeyId>***</AWSAccessKeyId>"),
    ("key AKIAABCDEFGHIJKLMNOP and hf_abcdefghijklmnopqrst", "key *** and ***"),
    ("NoCredentialsError: Unable to locate credentials", "NoCredentialsError: Unable to locate credentials"),
    ("500, message='Internal Server Error'", "500, message='Internal Server Error'"),
])
def test_redact(text, shown):
    assert redact(text) == shown


def test_what_cannot_be_opened_is_refused(tmp_path, monkeypatch):
    import fsspec

    with pytest.raises(Refused, match="remote, and there is no folder"):
        open_store("s3://bucket/set", cache_dir=None, cache_bytes=None)
    with pytest.raises(Refused, match="cannot be opened"):
        open_store("nonsense://set", cache_dir=tmp_path, cache_bytes=None)
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="cannot be written"):
        open_store("memory://set", cache_dir=tmp_path / "file", cache_bytes=None)

    def missing(_):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(Refused, match="(?s)s3://bucket/set needs a package.*pip install s3fs"):
        open_store("s3://bucket/set", cache_dir=tmp_path, cache_bytes=None)
