"""A remote set in S3, as moto's server plays it."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

import pytest

from harness.data.remote import RemoteStore
from harness.data.store import Wanted
from harness.formats import digest
from harness.errors import Failure

pytest.importorskip("s3fs", reason="fsspec reads s3:// through s3fs")
moto_server = pytest.importorskip("moto.server", reason="moto[server] plays S3")
CONTENT = random.Random(0).randbytes(9 << 20)
SECRET = "5ecre7-of-the-tests"
WANTED = Wanted("shard-00000.arrow", len(CONTENT), digest.of_bytes(CONTENT))


@pytest.fixture(scope="module")
def bucket():
    """The options come from the environment, as for a user."""
    import s3fs
    from fsspec.config import conf, set_conf_env

    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"AWS_ACCESS_KEY_ID": "AKIAABCDEFGHIJKLMNOP", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1",
                            "AWS_EC2_METADATA_DISABLED": "true", "FSSPEC_S3_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
        patch.setitem(conf, "s3", {})
        set_conf_env(conf, dict(os.environ))
        s3fs.S3FileSystem.clear_instance_cache()
        system = s3fs.S3FileSystem()
        system.mkdir("sets")
        system.pipe({"sets/a/train/index.json": b"{}", "sets/a/train/shard-00000.arrow": CONTENT, "sets/a/train/empty.npy": b""})
        yield "s3://sets/a/train"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def opened(bucket, tmp_path):
    it = RemoteStore(bucket, cache_dir=tmp_path, cache_bytes=10 << 20, backoff_s=0.01, attempts=2)
    yield it
    it.close()


def test_an_object_is_held(opened):
    assert opened.read_small("index.json") == b"{}" and opened.read_small("none.json") is None
    path = opened.hold(WANTED)
    assert path.read_bytes() == CONTENT and sorted(it.name for it in opened.folder.iterdir()) == [".shard-00000.arrow.lock", "shard-00000.arrow"]
    assert opened.hold(Wanted("empty.npy", 0, digest.of_bytes(b""))).read_bytes() == b""


def test_a_prefetched_object_is_there(opened):
    opened.prefetch([WANTED])
    assert opened.hold(WANTED).read_bytes() == CONTENT


@pytest.mark.parametrize(("wanted", "cause"), [
    (Wanted("shard-00009.arrow", 5, "0"), "there is no such file"),
    (Wanted("shard-00000.arrow", 1000, "0"), "more than the 1000 bytes"),
    (Wanted("shard-00000.arrow", len(CONTENT) + 1, "0"), f"{len(CONTENT)} of {len(CONTENT) + 1} bytes arrived"),
    (Wanted("shard-00000.arrow", len(CONTENT), "0"), "the bytes are not those that were prepared"),
])
def test_the_end_is_clear(opened, wanted, cause):
    with pytest.raises(Failure) as caught:
        opened.hold(wanted)
    text = str(caught.value)
    for part in (wanted.name, "s3://sets/a/train", socket.gethostname(), cause, "Start the same command again", str(opened.folder / wanted.name)):
        assert part in text
    assert SECRET not in text and "AKIA" not in text
    assert not [it for it in Path(opened.folder).iterdir() if it.suffix != ".lock"]


def test_a_bucket_that_is_not_there(opened):
    other = RemoteStore("s3://nowhere/set", cache_dir=opened.cache_dir, cache_bytes=None, backoff_s=0.01)
    with pytest.raises(Failure, match="there is no such file"):
        other.hold(WANTED)
    assert other.read_small("index.json") is None
    other.close()
