"""The tests of zs3: one S3 suite over every store, then unit, storage, HTTP, command line tests.

They read like the S3 reference: the condition, then the outcome with its error code. The client
below shares no code with the server: it has its own signer, its own checksums and its own HTTP, so
that a mistake cannot agree with itself. `s3` is a client with a fresh bucket, over each store of
STORES in turn.

    Harness · Signature Version 4 · Authentication · Buckets · Objects · Awkward keys
    Bodies and checksums · Conditions · Ranges · Copy · Listing · Multipart · DeleteObjects
    Probes and what is refused · Roles, anonymous read, CORS, virtual hosts · HTTP
    Storage on disk · Command line · boto3 · Distributed mode · Tools · Agreement

Run: pytest
"""

from __future__ import annotations

import ast
import base64
import bisect
import concurrent.futures
import contextlib
import datetime
import errno
import fcntl
import hashlib
import hmac
import http.client
import http.server
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import socketserver
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import types
import urllib.parse
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import boto3
import botocore.auth
import botocore.awsrequest
import botocore.credentials
import pytest
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import ClientError

import zs3
import zs3_dist
from zs3 import S3Error
from zs3_dist import (
    Ask,
    Cluster,
    Contact,
    DistributedStore,
    Housekeeping,
    Membership,
    Message,
    Node,
    Pause,
    Providers,
    Registers,
    Reply,
    Rounds,
    RoutingTable,
    Value,
    View,
    lookup,
    nearest,
    pack,
    parse_message,
)

HERE = Path(__file__).resolve().parent
MISSING_KEY = "there/is/nothing/here"

# The credentials of the servers under test: role, access key, secret.
ADMIN = ("admin", "AKIAADMIN", "admin/secret+with=signs")
WRITER = ("writer", "AKIAWRITER", "writer-secret")
READER = ("reader", "AKIAREADER", "reader-secret")
MIN_PART = 64  # --min-part-size of the servers under test: small parts make fast tests

# What S3 answers, written down here a second time: code -> status. (S3 API reference, "Error
# responses".)
STATUS = {
    "AccessControlListNotSupported": 400, "AccessDenied": 403, "AccessForbidden": 403,
    "HTTPVersionNotSupported": 505, "InsufficientStorage": 507, "InvalidChunkSizeError": 400,
    "InvalidToken": 400, "NoSuchVersion": 404, "AuthorizationHeaderMalformed": 400,
    "AuthorizationQueryParametersError": 400,
    "BadDigest": 400, "BadRequest": 400, "BucketAlreadyExists": 409, "BucketAlreadyOwnedByYou": 409,
    "BucketNotEmpty": 409, "EntityTooLarge": 400, "EntityTooSmall": 400, "IncompleteBody": 400,
    "InternalError": 500, "InvalidAccessKeyId": 403, "InvalidArgument": 400,
    "InvalidBucketName": 400,
    "InvalidDigest": 400, "InvalidEncryptionAlgorithmError": 400,
    "InvalidLocationConstraint": 400, "InvalidPart": 400, "InvalidPartNumber": 416,
    "InvalidPartOrder": 400, "InvalidRange": 416, "InvalidRequest": 400, "InvalidStorageClass": 400,
    "InvalidURI": 400, "KeyTooLongError": 400, "MalformedTrailerError": 400, "MalformedXML": 400,
    "MetadataTooLarge": 400, "MethodNotAllowed": 405, "MissingContentLength": 411,
    "MissingSecurityHeader": 400, "NoSuchBucket": 404, "NoSuchBucketPolicy": 404,
    "NoSuchCORSConfiguration": 404, "NoSuchKey": 404, "NoSuchLifecycleConfiguration": 404,
    "NoSuchPublicAccessBlockConfiguration": 404,
    "NoSuchTagSet": 404, "NoSuchUpload": 404, "NoSuchWebsiteConfiguration": 404,
    "NotImplemented": 501, "ObjectLockConfigurationNotFoundError": 404, "OperationAborted": 409,
    "OwnershipControlsNotFoundError": 404, "PreconditionFailed": 412,
    "ReplicationConfigurationNotFoundError": 404, "RequestHeaderSectionTooLarge": 431,
    "RequestTimeout": 400, "RequestTimeTooSkewed": 403,
    "ServerSideEncryptionConfigurationNotFoundError": 404, "SignatureDoesNotMatch": 403,
    "SlowDown": 503, "XAmzContentSHA256Mismatch": 400,
}  # fmt: skip
PROVOKED: set[str] = (
    set()
)  # every code that some test has seen; the last test compares it with zs3.ERRORS


# --- Harness: XML, checksums, signatures ---------------------------------------------------------


def parse_xml(document: bytes) -> ET.Element:
    """The root of a document, its namespace taken off every name. S3 writes what XML 1.0 cannot
    carry as
    a reference all the same ("&#x1;"): those are read here by a detour through private
    characters."""
    text = re.sub(
        "&#x(0?[0-8bcef]|1[0-9a-f]|fff[ef]);",
        lambda m: chr(0xF0000 + int(m[1], 16)),
        document.decode(),
    )
    root = ET.fromstring(text.encode())
    for element in root.iter():
        element.tag = element.tag.partition("}")[2] or element.tag
        if element.text:
            element.text = re.sub(
                "[\U000f0000-\U000fffff]", lambda m: chr(ord(m[0]) - 0xF0000), element.text
            )
    return root


def crc_table(polynomial: int) -> list[int]:
    """The 256 remainders of a reflected CRC."""
    table = list(range(256))
    for _ in range(8):
        table = [value >> 1 ^ (polynomial if value & 1 else 0) for value in table]
    return table


CRC32C_TABLE = crc_table(0x82F63B78)  # RFC 3720, reflected
CRC64NVME_TABLE = crc_table(0x9A6C9329AC4BC9B5)  # NVMe base specification, reflected


def reflected_crc(table: list[int], bits: int, data: bytes) -> int:
    ones = (1 << bits) - 1
    value = ones
    for byte in data:
        value = value >> 8 ^ table[(value ^ byte) & 255]
    return value ^ ones


CHECKSUMS: dict[str, Callable[[bytes], bytes]] = {
    "CRC32": lambda data: zlib.crc32(data).to_bytes(4, "big"),
    "CRC32C": lambda data: reflected_crc(CRC32C_TABLE, 32, data).to_bytes(4, "big"),
    "CRC64NVME": lambda data: reflected_crc(CRC64NVME_TABLE, 64, data).to_bytes(8, "big"),
    "SHA1": lambda data: hashlib.sha1(data).digest(),
    "SHA256": lambda data: hashlib.sha256(data).digest(),
}


def checksum(algorithm: str, data: bytes) -> str:
    return base64.b64encode(CHECKSUMS[algorithm](data)).decode()


def checksum_of_checksums(algorithm: str, parts: Iterable[bytes]) -> str:
    """The COMPOSITE checksum of a multipart object: of the parts' raw checksums, and their
    number."""
    raw = [CHECKSUMS[algorithm](part) for part in parts]
    return f"{checksum(algorithm, b''.join(raw))}-{len(raw)}"


def md5_hex(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def md5_base64(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def multipart_etag(parts: Iterable[bytes]) -> str:
    digests = [hashlib.md5(part, usedforsecurity=False).digest() for part in parts]
    return f'"{md5_hex(b"".join(digests))}-{len(digests)}"'


def percent(text: str | bytes, safe: str = "") -> str:
    """SigV4's UriEncode: everything but the unreserved characters, hexadecimal in capitals."""
    return urllib.parse.quote(text, safe="-_.~" + safe)


def key_path(bucket: str, key: str) -> str:
    return f"/{bucket}/{percent(key, '/')}"


def query_string(parameters: Mapping[str, object]) -> str:
    """`None` is a name without "=": {"uploads": None} -> "uploads"."""
    return "&".join(
        percent(name) if value is None else f"{percent(name)}={percent(str(value))}"
        for name, value in parameters.items()
    )


def amz_date(when: float | None = None) -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time.time() if when is None else when))


def http_date(when: float) -> str:
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(when))


class Signer:
    """Signature Version 4 for one request: the client's half, written from the specification."""

    def __init__(
        self, credential: tuple[str, str, str] = ADMIN, date: str = "", region: str = "us-east-1"
    ) -> None:
        self.access, self.secret = credential[1:]
        self.date = date or amz_date()
        self.scope = f"{self.date[:8]}/{region}/s3/aws4_request"
        key = b"AWS4" + self.secret.encode()
        for step in self.scope.split("/"):
            key = hmac.digest(key, step.encode(), "sha256")
        self.key = key
        self.seed = ""  # the signature of the request, then of the last chunk
        self.canonical_request = ""
        self.string_to_sign = ""

    def sign(self, text: str) -> str:
        return hmac.digest(self.key, text.encode(), "sha256").hex()

    def signature(
        self, method: str, path: str, query: str, headers: Mapping[str, str], payload: str
    ) -> str:
        """`query` is raw; all of `headers` (lower-case names) are signed; `payload` is its hash or
        mode."""
        pairs = []
        for item in query.split("&") if query else []:
            name, _, value = item.partition("=")
            pairs.append(
                (percent(urllib.parse.unquote(name)), percent(urllib.parse.unquote(value)))
            )
        lines = [f"{name}:{' '.join(headers[name].split())}\n" for name in sorted(headers)]
        self.canonical_request = "\n".join([
            method, path, "&".join(f"{name}={value}" for name, value in sorted(pairs)),
            "".join(lines), ";".join(sorted(headers)), payload,
        ])  # fmt: skip
        hashed = sha256_hex(self.canonical_request.encode())
        self.string_to_sign = f"AWS4-HMAC-SHA256\n{self.date}\n{self.scope}\n{hashed}"
        self.seed = self.sign(self.string_to_sign)
        return self.seed

    def authorization(self, headers: Mapping[str, str], signature: str) -> str:
        return (
            f"AWS4-HMAC-SHA256 Credential={self.access}/{self.scope},"
            f"SignedHeaders={';'.join(sorted(headers))},Signature={signature}"
        )

    def chunk(self, data: bytes) -> str:
        """The signature of the next chunk of a streaming body."""
        parts = ["AWS4-HMAC-SHA256-PAYLOAD", self.date, self.scope, self.seed, sha256_hex(b"")]
        self.seed = self.sign("\n".join([*parts, sha256_hex(data)]))
        return self.seed

    def trailer(self, lines: str) -> str:
        """The signature of the trailer; each line ends in a line feed."""
        parts = ["AWS4-HMAC-SHA256-TRAILER", self.date, self.scope, self.seed]
        return self.sign("\n".join([*parts, sha256_hex(lines.encode())]))


def presign(
    method: str, host: str, path: str, query: Mapping[str, object] | None = None, *,
    expires: object = 900,
    credential: tuple[str, str, str] = ADMIN, headers: Mapping[str, str] | None = None,
    when: float | None = None,
) -> str:  # fmt: skip
    """The target of a presigned URL. `headers` are further headers that the holder must send."""
    signer = Signer(credential, amz_date(when))
    signed = {"host": host, **(headers or {})}
    parameters = {
        "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
        "X-Amz-Credential": f"{signer.access}/{signer.scope}",
        "X-Amz-Date": signer.date,
        "X-Amz-Expires": expires,
        "X-Amz-SignedHeaders": ";".join(sorted(signed)),
        **(query or {}),
    }
    text = query_string(parameters)
    payload = str(parameters.get("X-Amz-Content-Sha256", "UNSIGNED-PAYLOAD"))
    signature = signer.signature(method, path, text, signed, payload)
    return f"{path}?{text}&X-Amz-Signature={signature}"


# --- Harness: answers and the client -------------------------------------------------------------


class Answer(NamedTuple):
    """What a server said. `headers` has lower-case names."""

    status: int
    headers: dict[str, str]
    body: bytes

    def ok(self) -> Answer:
        """Itself, when the request succeeded."""
        assert 200 <= self.status < 300, (self.status, self.body[:2000])
        return self

    @property
    def xml(self) -> ET.Element:
        return parse_xml(self.body)

    @property
    def etag(self) -> str:
        return self.headers["etag"]

    @property
    def error(self) -> str:
        """The code of a well-formed S3 error whose status is that of the S3 reference."""
        assert self.status >= 300, (self.status, self.body[:2000])
        assert self.headers.get("content-type") == "application/xml", (self.status, self.headers)
        root = self.xml
        assert root.tag == "Error"
        code = root.findtext("Code", "")
        assert self.status == STATUS.get(code), (self.status, self.body[:2000])
        assert root.findtext("Message")
        assert root.findtext("RequestId") == self.headers["x-amz-request-id"]
        assert root.find("Resource") is not None
        PROVOKED.add(code)
        return code

    def text(self, path: str) -> str | None:
        """The text of the first element at a path of the XML body, "" for an empty one."""
        element = self.xml.find(path)
        return None if element is None else element.text or ""

    def texts(self, path: str) -> list[str]:
        return [element.text or "" for element in self.xml.findall(path)]


def read_exactly(file: Any, length: int) -> bytes:
    data = file.read(length)
    assert len(data) == length, f"{len(data)} of {length} bytes, then the connection ended"
    return bytes(data)


def read_answer(file: Any, method: str = "GET") -> Answer:
    """The next final answer on a connection; 100 Continue is passed over. ConnectionError at the
    end."""
    status = 100
    while status == 100:
        line = file.readline()
        if not line:
            raise ConnectionError("the server closed the connection")
        version, code, _ = line.decode("latin-1").split(" ", 2)
        assert version == "HTTP/1.1" and line.endswith(b"\r\n"), line
        status = int(code)
        headers: dict[str, str] = {}
        while (line := file.readline()) != b"\r\n":
            name, colon, value = line.decode("latin-1").partition(":")
            assert colon and line.endswith(b"\r\n"), line
            assert name.lower() not in headers or name.lower() == "vary", f"{name} twice"
            headers[name.lower()] = value.strip(" \r\n")
    if method == "HEAD" or status in (204, 304):
        return Answer(status, headers, b"")
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = b""
        while size := int(file.readline(), 16):
            body += read_exactly(file, size)
            assert file.readline() == b"\r\n"
        assert file.readline() == b"\r\n"
        return Answer(status, headers, body)
    return Answer(status, headers, read_exactly(file, int(headers["content-length"])))


class Connection:
    """One TCP connection: what goes down it is written by hand."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self, method: str = "GET") -> Answer:
        return read_answer(self.file, method)

    def closed(self) -> bool:
        """Whether the server ends the connection without another byte."""
        with contextlib.suppress(ConnectionError):
            return self.file.read(1) == b""
        return True

    def close(self) -> None:
        self.file.close()
        self.socket.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def head_bytes(
    method: str, target: str, headers: Mapping[str, str], version: str = "HTTP/1.1"
) -> bytes:
    lines = [
        f"{method} {target} {version}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def http_chunked(body: bytes, size: int = 1000) -> bytes:
    """A body in HTTP's own chunked coding."""
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


class Client:
    """A raw S3 client with a bucket of its own; over several nodes it speaks to each in turn."""

    def __init__(
        self, ports: list[int], bucket: str = "", credential: tuple[str, str, str] = ADMIN
    ) -> None:
        self.ports = ports
        self.bucket = bucket
        self.folder = Path()  # the bucket's folder, for a client that `disk` gave
        self.credential = credential
        self.host = f"127.0.0.1:{ports[0]}"
        self.kept: dict[int, Connection] = {}
        self.turns = itertools.cycle(ports)

    def using(self, credential: tuple[str, str, str]) -> Client:
        return Client(self.ports, self.bucket, credential)

    def close(self) -> None:
        for connection in self.kept.values():
            connection.close()
        self.kept.clear()

    def connect(self) -> Connection:
        return Connection(next(self.turns))

    def exchange(self, method: str, data: bytes) -> Answer:
        """Send on a kept connection, or on a new one where the server has closed that."""
        port = next(self.turns)
        if connection := self.kept.pop(port, None):
            try:
                connection.send(data)
                return self.finish(port, connection, method)
            except ConnectionError:
                connection.close()
        connection = Connection(port)
        connection.send(data)
        return self.finish(port, connection, method)

    def finish(self, port: int, connection: Connection, method: str) -> Answer:
        answer = connection.answer(method)
        if answer.headers.get("connection") == "close":
            connection.close()
        else:
            self.kept[port] = connection
        return answer

    def signed_head(
        self, method: str, path: str, query: str = "", headers: Mapping[str, str] | None = None,
        payload: str = "UNSIGNED-PAYLOAD", signer: Signer | None = None,
    ) -> dict[str, str]:  # fmt: skip
        """All headers of a request: `headers`, those that signing needs, and the signature. Names
        as given."""
        signer = signer or Signer(self.credential)
        mine = {name.lower(): value for name, value in (headers or {}).items()}
        signed = {
            "host": self.host,
            "x-amz-date": signer.date,
            "x-amz-content-sha256": payload,
        } | mine
        unsigned = {
            "content-length",
            "expect",
            "transfer-encoding",
            "connection",
        }  # as boto3 leaves out
        to_sign = {name: value for name, value in signed.items() if name not in unsigned}
        signature = signer.signature(method, path, query, to_sign, signed["x-amz-content-sha256"])
        return signed | {"authorization": signer.authorization(to_sign, signature)}

    def request(
        self, method: str, path: str, query: Mapping[str, object] | str = "", body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:  # fmt: skip
        """A signed request, its payload hashed."""
        query = query if isinstance(query, str) else query_string(query)
        length = {"content-length": str(len(body))} if body or method in ("PUT", "POST") else {}
        given = length | {name.lower(): value for name, value in (headers or {}).items()}
        signed = self.signed_head(method, path, query, given, sha256_hex(body))
        target = f"{path}?{query}" if query else path
        return self.exchange(method, head_bytes(method, target, signed) + body)

    def unsigned(
        self, method: str, target: str, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> Answer:
        """A request without credentials, or with those that its target carries."""
        length = {"content-length": str(len(body))} if body or method in ("PUT", "POST") else {}
        return self.exchange(
            method,
            head_bytes(method, target, {"host": self.host} | length | dict(headers or {})) + body,
        )

    # The operations. `headers` is the last argument throughout.

    def service(self, query: Mapping[str, object] | str = "", **headers: str) -> Answer:
        return self.request("GET", "/", query, headers=dashed(headers))

    def on_bucket(
        self, method: str, query: Mapping[str, object] | str = "", body: bytes = b"",
        headers: Mapping[str, str] | None = None, bucket: str = "",
    ) -> Answer:  # fmt: skip
        return self.request(method, f"/{bucket or self.bucket}", query, body, headers)

    def on_key(
        self, method: str, key: str, query: Mapping[str, object] | str = "", body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:  # fmt: skip
        return self.request(method, key_path(self.bucket, key), query, body, headers)

    def put(self, key: str, body: bytes = b"", **headers: str) -> Answer:
        return self.on_key("PUT", key, "", body, dashed(headers))

    def get(self, key: str, query: Mapping[str, object] | str = "", **headers: str) -> Answer:
        return self.on_key("GET", key, query, headers=dashed(headers))

    def head(self, key: str, query: Mapping[str, object] | str = "", **headers: str) -> Answer:
        return self.on_key("HEAD", key, query, headers=dashed(headers))

    def delete(self, key: str, **headers: str) -> Answer:
        return self.on_key("DELETE", key, headers=dashed(headers))

    def copy(self, source: str, key: str, **headers: str) -> Answer:
        """From a key of the same bucket."""
        copy_source = percent(f"{self.bucket}/{source}", "/")
        return self.on_key("PUT", key, headers={"x-amz-copy-source": copy_source} | dashed(headers))

    def list(self, version: int = 2, **parameters: object) -> Answer:
        """ListObjects or ListObjectsV2; `_` in a parameter's name is "-"."""
        names = {name.replace("_", "-"): value for name, value in parameters.items()}
        return self.on_bucket("GET", ({"list-type": 2} if version == 2 else {}) | names).ok()

    def keys(self, prefix: str = "") -> list[str]:
        """All keys, of a bucket that has at most a page of them."""
        answer = self.list(prefix=prefix, encoding_type="url")
        assert answer.text("IsTruncated") == "false"
        return [urllib.parse.unquote_plus(key) for key in answer.texts("Contents/Key")]

    def delete_objects(self, keys: Iterable[str], quiet: bool = False, **headers: str) -> Answer:
        document = delete_document(keys, quiet)
        given = {"content-md5": md5_base64(document)} | dashed(headers)
        return self.on_bucket("POST", "delete", document, given)

    def create_upload(self, key: str, **headers: str) -> str:
        answer = self.on_key("POST", key, "uploads", headers=dashed(headers)).ok()
        return answer.text("UploadId") or ""

    def put_part(
        self, key: str, upload: str, number: object, body: bytes = b"", **headers: str
    ) -> Answer:
        query = {"partNumber": number, "uploadId": upload}
        return self.on_key("PUT", key, query, body, dashed(headers))

    def complete(
        self, key: str, upload: str, parts: Iterable[tuple[object, str]], **headers: str
    ) -> Answer:
        document = complete_document(parts)
        return self.on_key("POST", key, {"uploadId": upload}, document, dashed(headers))

    def multipart(self, key: str, parts: list[bytes], **headers: str) -> Answer:
        """A multipart upload from beginning to end."""
        upload = self.create_upload(key, **headers)
        etags = [self.put_part(key, upload, n, part).ok().etag for n, part in enumerate(parts, 1)]
        return self.complete(key, upload, list(enumerate(etags, 1)))


def dashed(headers: Mapping[str, str]) -> dict[str, str]:
    """Header names from keyword arguments: x_amz_meta_a -> x-amz-meta-a."""
    return {name.replace("_", "-"): value for name, value in headers.items()}


def xml_text(text: str) -> str:
    """Character data, with what XML 1.0 allows but parsers normalise written as references."""
    for character, escape in {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\r": "&#13;"}.items():
        text = text.replace(character, escape)
    return text


def delete_document(keys: Iterable[str], quiet: bool = False) -> bytes:
    objects = "".join(f"<Object><Key>{xml_text(key)}</Key></Object>" for key in keys)
    return f"<Delete><Quiet>{str(quiet).lower()}</Quiet>{objects}</Delete>".encode()


def complete_document(
    parts: Iterable[tuple[object, str]], extra: Mapping[object, str] | None = None
) -> bytes:
    """`extra` is more XML for a part, by number."""
    items = "".join(
        f"<Part><PartNumber>{number}</PartNumber><ETag>{xml_text(etag)}</ETag>"
        f"{(extra or {}).get(number, '')}</Part>"
        for number, etag in parts
    )
    return f"<CompleteMultipartUpload>{items}</CompleteMultipartUpload>".encode()


# --- Harness: servers ----------------------------------------------------------------------------


class Server:
    """A zs3 process of this Python on a free port of 127.0.0.1. Its log is read all the time."""

    def __init__(
        self, *arguments: str, data: Path, environment: Mapping[str, str] | None = None,
        prelude: str = "",
        script: Path = HERE / "zs3.py", flags: Iterable[str] = (), ready: bool = True,
    ) -> None:  # fmt: skip
        """`prelude` is Python that is run instead of the script; `flags` are Python's own.
        With `ready` this waits until the server is healthy, else only for its banner."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("ZS3_", "MINIO_", "AWS_"))
        }
        self.data = data
        self.started = time.monotonic()
        start = [str(script)]
        if prelude:
            start = ["-c", f"import sys; sys.path[0] = {str(HERE)!r}\n{prelude}"]
        command = [sys.executable, *flags, *start, "--port=0", f"--data-dir={data}", *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=data.parent,
            env=inherited | dict(environment or {}),
        )  # fmt: skip
        self.lines: list[str] = []
        self.news = threading.Condition()
        self.reader = threading.Thread(target=self.read_log, daemon=True)
        self.reader.start()
        try:
            banner = self.wait_for_line(r"http://[^\s/]+:\d+")
            self.port = int(re.findall(r"http://[^\s/]+:(\d+)", banner)[0])
            while ready and not self.healthy():
                time.sleep(0.002)
        except BaseException:
            self.kill()
            raise

    def healthy(self) -> bool:
        """Whether it is ready; an error when it takes too long or has ended."""
        assert self.process.poll() is None and time.monotonic() < self.started + 30, self.lines
        with contextlib.closing(Client([self.port])) as client:
            return client.unsigned("GET", "/_zs3/health").status == 200

    def read_log(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            with self.news:
                self.lines.append(line.decode(errors="replace").rstrip("\n"))
                self.news.notify_all()
        with self.news:
            self.news.notify_all()

    def wait_for_line(self, pattern: str, seconds: float = 20) -> str:
        """The first line of the log that matches, also one that is already there."""
        expression = re.compile(pattern)
        deadline = time.monotonic() + seconds
        at = 0
        with self.news:
            while True:
                for line in self.lines[at:]:
                    if expression.search(line):
                        return line
                at = len(self.lines)
                left = deadline - time.monotonic()
                alive = self.process.poll() is None
                if not self.news.wait(min(left, 0.2)) and (left <= 0 or not alive):
                    raise AssertionError(f"no line with {pattern!r} in: {self.lines[-20:]}")

    def client(self, bucket: str = "", credential: tuple[str, str, str] = ADMIN) -> Client:
        return Client([self.port], bucket, credential)

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.terminate()
        try:
            return self.process.wait(20)
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)
        self.reader.join(20)
        if self.process.stderr:
            self.process.stderr.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        self.kill()
        assert kind or not any("Traceback" in line for line in self.lines), "\n".join(self.lines)


ACL = "--acl=" + ",".join(":".join(credential) for credential in (ADMIN, WRITER, READER))
FLAGS = (
    ACL, "--public-read=public-bucket", "--bucket=public-bucket",
    "--cors-origin=https://app.example",
    "--domain=s3.test", f"--min-part-size={MIN_PART}",
)  # fmt: skip


class Service(NamedTuple):
    """What the suite runs against: a name out of STORES, and the servers that are it."""

    name: str
    servers: list[Server]

    def client(self, bucket: str = "", credential: tuple[str, str, str] = ADMIN) -> Client:
        return Client([server.port for server in self.servers], bucket, credential)


def distributed(bootstrap: list[Server]) -> list[str]:
    peers = ",".join(f"127.0.0.1:{server.port}" for server in bootstrap)
    return ["--distributed", *([f"--bootstrap={peers}"] if peers else [])]


# Where the suite runs: name -> how many nodes; 0 is standalone.
STORES = {"file": 0} | ({"one node": 1, "three nodes": 3} if zs3_dist else {})
# Documented differences: (store, test) -> why that test does not apply there.
DIFFERENCES: dict[tuple[str, str], str] = {}


@pytest.fixture(scope="session", params=list(STORES))
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("store")
    with contextlib.ExitStack() as stack:
        servers: list[Server] = []
        for number in range(max(1, STORES[request.param])):
            mode = distributed(servers) if STORES[request.param] else []
            server = Server(*FLAGS, *mode, data=folder / f"data{number}")
            servers.append(stack.enter_context(server))
        if STORES[request.param] > 1:
            wait_for_peers(servers)
        yield Service(request.param, servers)
    shutil.rmtree(folder)


def wait_for_peers(servers: list[Server]) -> None:
    """Until every node of a cluster counts all the others."""
    deadline = time.monotonic() + 30
    for server in servers:
        while True:
            answer = server.client().unsigned("GET", "/_zs3/peers").ok()
            peers = json.loads(answer.body)
            if len(peers["peers"] if isinstance(peers, dict) else peers) >= len(servers) - 1:
                break
            assert time.monotonic() < deadline, f"peers of port {server.port}: {answer.body!r}"
            time.sleep(0.05)


BUCKET_NUMBERS = itertools.count(1)


@contextlib.contextmanager
def without_tracebacks(*servers: Server) -> Iterator[None]:
    """Whatever a test does, no server may meet an exception that it did not expect."""
    before = [len(server.lines) for server in servers]
    yield
    for server, start in zip(servers, before, strict=True):
        log = server.lines[start:]
        assert not any("Traceback" in line for line in log), "\n".join(log)


@pytest.fixture
def s3(service: Service, request: pytest.FixtureRequest) -> Iterator[Client]:
    """A client of the admin with a fresh bucket."""
    if why := DIFFERENCES.get((service.name, request.node.originalname)):
        pytest.skip(why)
    client = service.client(f"bucket-{next(BUCKET_NUMBERS)}")
    client.on_bucket("PUT").ok()
    with without_tracebacks(*service.servers):
        yield client
    client.close()


@pytest.fixture(scope="session")
def shared_file_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A standalone server, for tests that look at the data folder or at the log."""
    folder = tmp_path_factory.mktemp("file")
    with Server(*FLAGS, data=folder / "data") as server:
        yield server
    shutil.rmtree(folder)


@pytest.fixture
def disk(shared_file_server: Server) -> Iterator[Client]:
    """Like `s3`, always standalone; its bucket is the folder `disk.folder`."""
    client = shared_file_server.client(f"disk-{next(BUCKET_NUMBERS)}")
    client.folder = shared_file_server.data / client.bucket
    client.on_bucket("PUT").ok()
    with without_tracebacks(shared_file_server):
        yield client
    client.close()


@contextlib.contextmanager
def raises(code: str) -> Iterator[None]:
    """The block raises S3Error(code)."""
    with pytest.raises(zs3.S3Error) as caught:
        yield
    assert caught.value.code == code
    PROVOKED.add(code)


def unchanged(s3: Client, key: str, body: bytes) -> bool:
    """After a refused write: the previous object is intact and is the only one."""
    return s3.get(key).body == body and s3.keys() == [key]


# --- Signature Version 4: the examples that AWS publishes ----------------------------------------
# (S3 API reference, "Authenticating Requests (AWS Signature Version 4)".)

EXAMPLE = ("", "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
EXAMPLE_DATE = "20130524T000000Z"
EXAMPLE_HOST = "examplebucket.s3.amazonaws.com"
EMPTY_SHA256 = sha256_hex(b"")


class Example(NamedTuple):
    method: str
    path: str
    query: str
    headers: dict[str, str]
    payload: str
    hashed: str  # of the canonical request
    signature: str


PRESIGNED_QUERY = (
    "X-Amz-Algorithm=AWS4-HMAC-SHA256"
    "&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F20130524%2Fus-east-1%2Fs3%2Faws4_request"
    "&X-Amz-Date=20130524T000000Z&X-Amz-Expires=86400&X-Amz-SignedHeaders=host"
)
AWS_EXAMPLES = {
    "GET Object": Example(
        "GET", "/test.txt", "",
        {"host": EXAMPLE_HOST, "range": "bytes=0-9", "x-amz-content-sha256": EMPTY_SHA256,
         "x-amz-date": EXAMPLE_DATE}, EMPTY_SHA256,
        "7344ae5b7ee6c3e7e6b0fe0640412a37625d1fbfff95c48bbb2dc43964946972",
        "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"),
    "PUT Object": Example(
        "PUT", "/test%24file.text", "",
        {"date": "Fri, 24 May 2013 00:00:00 GMT", "host": EXAMPLE_HOST, "x-amz-date": EXAMPLE_DATE,
         "x-amz-content-sha256": sha256_hex(b"Welcome to Amazon S3."),
         "x-amz-storage-class": "REDUCED_REDUNDANCY"}, sha256_hex(b"Welcome to Amazon S3."),
        "9e0e90d9c76de8fa5b200d8c849cd5b8dc7a3be3951ddb7f6a76b4158342019d",
        "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd"),
    "GET Bucket lifecycle": Example(
        "GET", "/", "lifecycle",
        {"host": EXAMPLE_HOST, "x-amz-content-sha256": EMPTY_SHA256, "x-amz-date": EXAMPLE_DATE},
        EMPTY_SHA256,
        "9766c798316ff2757b517bc739a67f6213b4ab36dd5da2f94eaebf79c77395ca",
        "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"),
    "GET Bucket (List Objects)": Example(
        "GET", "/", "max-keys=2&prefix=J",
        {"host": EXAMPLE_HOST, "x-amz-content-sha256": EMPTY_SHA256, "x-amz-date": EXAMPLE_DATE},
        EMPTY_SHA256,
        "df57d21db20da04d7fa30298dd4488ba3a2b47ca3a489c74750e0f1e7df1b9b7",
        "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"),
    "presigned GET": Example(
        "GET", "/test.txt", PRESIGNED_QUERY, {"host": EXAMPLE_HOST}, "UNSIGNED-PAYLOAD",
        "3bfa292879f6447bbcda7001decf97f4a54dc650c8942174ae0a9121cf58ad04",
        "aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404"),
    "chunked PUT": Example(
        "PUT", "/examplebucket/chunkObject.txt", "",
        {"content-encoding": "aws-chunked", "content-length": "66824", "host": "s3.amazonaws.com",
         "x-amz-content-sha256": "STREAMING-AWS4-HMAC-SHA256-PAYLOAD", "x-amz-date": EXAMPLE_DATE,
         "x-amz-decoded-content-length": "66560", "x-amz-storage-class": "REDUCED_REDUNDANCY"},
        "STREAMING-AWS4-HMAC-SHA256-PAYLOAD",
        "cee3fed04b70f867d036f722359b0b1f2f0e5dc0efadbc082b76c4c60e316455",
        "4f232c4386841ef735655705268965c44a0e4690baa4adea153f7db9fa80a0a9"),
    "chunked PUT with a trailer": Example(
        "PUT", "/examplebucket/chunkObject.txt", "",
        {"content-encoding": "aws-chunked", "host": "s3.amazonaws.com",
         "x-amz-content-sha256": "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER",
         "x-amz-date": EXAMPLE_DATE,
         "x-amz-decoded-content-length": "66560", "x-amz-storage-class": "REDUCED_REDUNDANCY",
         "x-amz-trailer": "x-amz-checksum-crc32c"},
        "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER",
        "44d48b8c2f70eae815a0198cc73d7a546a73a93359c070abbaa5e6c7de112559",
        "106e2a8a18243abcf37539882f36619c00e2dfc72633413f02d3b74544bfeb8e"),
}  # fmt: skip
# The signatures of the chunks of 65,536, 1,024 and 0 bytes "a" of the two chunked examples.
CHUNK_SIGNATURES = {
    "chunked PUT": [
        "ad80c730a21e5b8d04586a2213dd63b9a0e99e0e2307b0ade35a65485a288648",
        "0055627c9e194cb4542bae2aa5492e3c1575bbb81b612b7d234b86a503ef5497",
        "b6c6ea8a5354eaf15b3cb7646744f4275b71ea724fed81ceb9323e279d449df9",
    ],
    "chunked PUT with a trailer": [
        "b474d8862b1487a5145d686f57f013e54db672cee1c953b3010fb58501ef5aa2",
        "1c1344b170168f8e65b41376b44b20fe354e373826ccbbe2c1d40a8cae51e5c7",
        "2ca2aba2005185cf7159c6277faf83795951dd77a3a99e6e65d5c9f85863f992",
    ],
}
TRAILER_SIGNATURE = "d81f82fc3505edab99d459891051a732e8730629a2e4a59689829ca17fe2e435"


@pytest.mark.parametrize("name", AWS_EXAMPLES)
def test_the_tests_own_signer_gives_the_signatures_that_aws_publishes(name: str) -> None:
    example = AWS_EXAMPLES[name]
    signer = Signer(EXAMPLE, EXAMPLE_DATE)
    assert signer.signature(*example[:5]) == example.signature
    assert sha256_hex(signer.canonical_request.encode()) == example.hashed
    chunks = [b"a" * 65536, b"a" * 1024, b""]
    for data, signature in zip(chunks, CHUNK_SIGNATURES.get(name, []), strict=False):
        assert signer.chunk(data) == signature
    if name == "chunked PUT with a trailer":
        line = f"x-amz-checksum-crc32c:{checksum('CRC32C', b'a' * 66560)}\n"
        assert line == "x-amz-checksum-crc32c:sOO8/Q==\n"
        assert signer.trailer(line) == TRAILER_SIGNATURE


def example_request(name: str, secret: str = EXAMPLE[2]) -> Any:
    """An example as a request that has arrived, where the key's secret is `secret`."""
    example = AWS_EXAMPLES[name]
    credential = zs3.Credential("admin", EXAMPLE[1], secret)
    settings = zs3.Settings(credentials={credential.access: credential}, domain="s3.amazonaws.com")
    headers, query = dict(example.headers), example.query
    if name == "presigned GET":
        query += f"&X-Amz-Signature={example.signature}"
    else:
        signed = ";".join(sorted(headers))
        headers["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={EXAMPLE[1]}/20130524/us-east-1/s3/aws4_request,"
            f"SignedHeaders={signed},Signature={example.signature}"
        )
    request = zs3.Request(example.method, example.path, query, headers, settings)
    request.query = dict(zs3.split_query(query))
    return request


EXAMPLE_TIME = datetime.datetime(2013, 5, 24, tzinfo=datetime.timezone.utc).timestamp()


@pytest.mark.parametrize("name", AWS_EXAMPLES)
def test_zs3_signs_the_examples_of_aws_step_by_step(name: str) -> None:
    example = AWS_EXAMPLES[name]
    names = ";".join(sorted(example.headers))
    canonical = zs3.canonical_request(*example[:4], names, example.payload)
    assert sha256_hex(canonical.encode()) == example.hashed
    text = zs3.string_to_sign(EXAMPLE_DATE, "20130524/us-east-1/s3/aws4_request", canonical)
    assert (
        text
        == f"AWS4-HMAC-SHA256\n{EXAMPLE_DATE}\n20130524/us-east-1/s3/aws4_request\n{example.hashed}"
    )
    key = zs3.signing_key(EXAMPLE[2], "20130524", "us-east-1")
    assert zs3.signature(key, text) == example.signature


@pytest.mark.parametrize("name", AWS_EXAMPLES)
def test_zs3_accepts_the_examples_of_aws_at_their_time_and_at_no_other(name: str) -> None:
    request = example_request(name)
    assert zs3.authenticate(request, EXAMPLE_TIME).access == EXAMPLE[1]
    with raises("AccessDenied" if name == "presigned GET" else "RequestTimeTooSkewed"):
        zs3.authenticate(request, EXAMPLE_TIME + DAY + 1)
    with raises("SignatureDoesNotMatch"):
        zs3.authenticate(example_request(name, "another secret"), EXAMPLE_TIME)
    request.path += "x"
    with raises("SignatureDoesNotMatch"):
        zs3.authenticate(request, EXAMPLE_TIME)


@pytest.mark.parametrize("name", CHUNK_SIGNATURES)
@pytest.mark.parametrize("spoil", [-1, 100, 66200])
def test_zs3_reads_the_chunked_examples_of_aws(name: str, spoil: int) -> None:
    """`spoil` is where a byte of the body is changed, -1 for nowhere."""
    body = b""
    for data, proof in zip([b"a" * 65536, b"a" * 1024, b""], CHUNK_SIGNATURES[name], strict=True):
        body += b"%x;chunk-signature=%b\r\n%b" % (
            len(data),
            proof.encode(),
            data + b"\r\n" if data else b"",
        )
    if "trailer" in name:
        body += (
            b"x-amz-checksum-crc32c:sOO8/Q==\r\nx-amz-trailer-signature:"
            + TRAILER_SIGNATURE.encode()
            + b"\r\n"
        )
    body += b"\r\n"
    if spoil >= 0:
        body = body[:spoil] + b"b" + body[spoil + 1 :]
    request = example_request(name)
    request.wire = zs3.WireBody(io.BytesIO(body), len(body))
    request.body = zs3.open_body(request, zs3.authenticate(request, EXAMPLE_TIME))
    zs3.expect_checksums(request)
    if spoil >= 0:
        with raises("SignatureDoesNotMatch"):
            list(request.body)
    else:
        assert b"".join(bytes(block) for block in request.body) == b"a" * 66560
        assert request.body.md5 == md5_hex(b"a" * 66560)


CHECK_VALUES = {  # of the nine bytes "123456789", as the RFCs and the NVMe specification print them
    "CRC32": "cbf43926", "CRC32C": "e3069283", "CRC64NVME": "ae8b14860a799888",
    "SHA1": "f7c3bc1d808e04732adf679965ccc34ca7ae3441",
    "SHA256": "15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225",
}  # fmt: skip


@pytest.mark.parametrize("algorithm", CHECKSUMS)
def test_checksums_have_the_published_check_values(algorithm: str) -> None:
    assert CHECKSUMS[algorithm](b"123456789").hex() == CHECK_VALUES[algorithm]
    digest = zs3.CHECKSUMS[algorithm]()
    digest.update(b"123456789")
    assert digest.digest().hex() == CHECK_VALUES[algorithm]


CRC32C_EXAMPLES = {  # (RFC 3720, B.4, as integers)
    b"\0" * 32: 0x8A9136AA, b"\xff" * 32: 0x62A8AB43, bytes(range(32)): 0x46DD794E,
    bytes(reversed(range(32))): 0x113FDB5C,
}  # fmt: skip


@pytest.mark.parametrize("data", CRC32C_EXAMPLES)
def test_crc32c_examples_of_rfc_3720(data: bytes) -> None:
    assert zs3.CRCS["CRC32C"](data) == CRC32C_EXAMPLES[data]


@pytest.mark.parametrize("algorithm", zs3.CRCS)
def test_the_hops_of_a_crc_are_a_multiple_of_its_polynomial(algorithm: str) -> None:
    row = zs3.CRCS[algorithm]
    polynomial = int(f"{row.polynomial:0{row.width}b}"[::-1], 2) | 1 << row.width
    multiple = sum(1 << (row.hops[-1] - hop) for hop in (0, *row.hops))
    while multiple.bit_length() > row.width:
        multiple ^= polynomial << (multiple.bit_length() - polynomial.bit_length())
    assert multiple == 0 and list(row.hops) == sorted(set(row.hops))


SLOW_CRCS: dict[str, Callable[[bytes], int]] = {
    "CRC32": zlib.crc32,
    "CRC32C": lambda data: reflected_crc(CRC32C_TABLE, 32, data),
    "CRC64NVME": lambda data: reflected_crc(CRC64NVME_TABLE, 64, data),
}


@pytest.mark.parametrize("algorithm", SLOW_CRCS)
def test_law_a_folded_crc_is_the_crc_byte_by_byte(algorithm: str) -> None:
    rng = random.Random(algorithm)
    fast, slow = zs3.CRCS[algorithm], SLOW_CRCS[algorithm]
    for length in [*range(300), 511, 512, 513, 558, 895, 1000, 4097, 65_537]:
        data = rng.choice([rng.randbytes(length), b"\0" * length, b"\xff" * length])
        assert fast(data) == slow(data), length
    if algorithm == "CRC32":
        data = rng.randbytes(1_000_003)
        assert fast(data, 12345) == zlib.crc32(data, 12345)


@pytest.mark.parametrize("algorithm", SLOW_CRCS)
def test_law_a_crc_in_pieces_and_the_combined_crcs_of_pieces_are_that_of_the_whole(
    algorithm: str,
) -> None:
    rng = random.Random(algorithm)
    crc = zs3.CRCS[algorithm]
    data = rng.randbytes(50_001)
    whole = crc(data)
    for _ in range(20):
        cuts = sorted(rng.randrange(len(data)) for _ in range(rng.randrange(6)))
        running = combined = 0
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            piece = memoryview(data)[start:end]
            running = crc(piece, running)
            combined = crc.combine(combined, crc(piece), end - start)
        assert running == combined == whole == zs3.crc_function(algorithm)(data)
    assert (
        crc.combine(crc(b""), crc(b"abc"), 3)
        == crc.combine(crc(b"abc"), crc(b""), 0)
        == crc(b"abc")
    )
    zeros, length = crc(b"\0"), 1  # terabytes of zeros, put together in two orders
    for _ in range(42):
        zeros, length = crc.combine(zeros, zeros, length), length * 2
    assert crc.combine(zeros, crc(b"\0"), 1) == crc.combine(crc(b"\0"), zeros, length)


@pytest.mark.parametrize("algorithm", SLOW_CRCS)
def test_without_awscrt_a_crc_is_zs3s_own(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "awscrt.checksums", None)
    zs3.crc_function.cache_clear()
    expected = zlib.crc32 if algorithm == "CRC32" else zs3.CRCS[algorithm]
    assert zs3.crc_function(algorithm) is expected
    zs3.crc_function.cache_clear()


# --- Authentication ------------------------------------------------------------------------------

DAY = 86400
STRANGER = ("", "AKIASTRANGER", "whatever")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_a_request_without_credentials_is_AccessDenied(s3: Client, method: str) -> None:
    s3.put("k", b"old").ok()
    for path in (f"/{s3.bucket}/k", f"/{s3.bucket}", f"/{s3.bucket}/{MISSING_KEY}"):
        assert s3.unsigned(method, path).error == "AccessDenied"
    assert s3.unsigned("GET", "/").error == "AccessDenied"
    assert unchanged(s3, "k", b"old")


def test_an_unknown_access_key_is_InvalidAccessKeyId(s3: Client) -> None:
    answer = s3.using(STRANGER).put("k", b"x")
    assert answer.error == "InvalidAccessKeyId"
    assert answer.text("AWSAccessKeyId") == "AKIASTRANGER"
    assert s3.using(STRANGER).head("k").status == 403
    target = presign("GET", s3.host, f"/{s3.bucket}/k", credential=STRANGER)
    assert s3.unsigned("GET", target).error == "InvalidAccessKeyId"


def test_a_wrong_secret_is_SignatureDoesNotMatch_and_shows_what_the_server_signed(
    s3: Client,
) -> None:
    signer = Signer((*ADMIN[:2], "not the secret"))
    query = "x-id=PutObject&a=%20b"
    headers = s3.signed_head(
        "PUT", f"/{s3.bucket}/k", query, {"x-amz-meta-a": "<&>"}, signer=signer
    )
    head = head_bytes("PUT", f"/{s3.bucket}/k?{query}", headers | {"content-length": "1"})
    answer = s3.exchange("PUT", head + b"x")
    assert answer.error == "SignatureDoesNotMatch"
    assert answer.text("AWSAccessKeyId") == ADMIN[1]
    assert answer.text("CanonicalRequest") == signer.canonical_request
    assert answer.text("StringToSign") == signer.string_to_sign
    assert answer.text("SignatureProvided") == signer.seed
    as_hex = signer.canonical_request.encode().hex(" ")
    assert (answer.text("CanonicalRequestBytes") or as_hex).lower().split() == as_hex.split()
    assert ADMIN[2].encode() not in answer.body


TAMPERED = {  # what changes after signing: method, target, headers
    "the method": ("DELETE", "/{bucket}/k?a=1", {}),
    "the path": ("GET", "/{bucket}/l?a=1", {}),
    "a doubled slash": ("GET", "//{bucket}/k?a=1", {}),
    "the query": ("GET", "/{bucket}/k?a=2", {}),
    "a removed parameter": ("GET", "/{bucket}/k", {}),
    "an added parameter": ("GET", "/{bucket}/k?a=1&partNumber=1", {}),
    "a signed header": ("GET", "/{bucket}/k?a=1", {"x-amz-meta-a": "changed"}),
    "the host": ("GET", "/{bucket}/k?a=1", {"host": "elsewhere"}),
    "the payload hash": ("GET", "/{bucket}/k?a=1", {"x-amz-content-sha256": "0" * 64}),
    "the date": ("GET", "/{bucket}/k?a=1", {"x-amz-date": amz_date(time.time() + 600)}),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_request_changed_after_signing_is_refused(s3: Client, what: str) -> None:
    s3.put("k", b"old").ok()
    method, target, headers = TAMPERED[what]
    given = {"x-amz-meta-a": "b"}
    signed = s3.signed_head("GET", f"/{s3.bucket}/k", "a=1", given, EMPTY_SHA256) | headers
    answer = s3.exchange(method, head_bytes(method, target.format(bucket=s3.bucket), signed))
    midnight = (
        "AuthorizationHeaderMalformed" if what == "the date" else ""
    )  # when a day ends just now
    assert answer.error in ("SignatureDoesNotMatch", midnight)
    assert unchanged(s3, "k", b"old")


def test_an_x_amz_header_that_was_not_signed_is_AccessDenied(s3: Client) -> None:
    for name in ("x-amz-meta-a", "x-amz-copy-source"):
        headers = s3.signed_head("PUT", f"/{s3.bucket}/k", payload=EMPTY_SHA256)
        headers |= {name: f"{s3.bucket}/other", "content-length": "0"}
        answer = s3.exchange("PUT", head_bytes("PUT", f"/{s3.bucket}/k", headers))
        assert answer.error == "AccessDenied"
    assert s3.keys() == []


MALFORMED_AUTHORIZATION = {  # header -> codes S3 may give
    "AWS4-HMAC-SHA256": "AuthorizationHeaderMalformed",
    "AWS4-HMAC-SHA256 Credential=a": "AuthorizationHeaderMalformed",
    "AWS4-HMAC-SHA256 Credential={scope},SignedHeaders=host": "AuthorizationHeaderMalformed",
    "AWS4-HMAC-SHA256 Credential={scope},Signature=0": "AuthorizationHeaderMalformed",
    "AWS4-HMAC-SHA256 Credential=,SignedHeaders=host,Signature=0": "AuthorizationHeaderMalformed",
    "AWS4-HMAC-SHA256 Credential=AKIAADMIN/20240101/us-east-1/s3,SignedHeaders=host,Signature=0":
        "AuthorizationHeaderMalformed",
    "AWS4-HMAC-SHA256 Credential=AKIAADMIN/{day}/us-east-1/ec2/aws4_request,SignedHeaders=host,"
    "Signature=0": "AuthorizationHeaderMalformed",
    "AWS4-HMAC-SHA256 Credential=AKIAADMIN/{day}/us-east-1/s3/aws2_request,SignedHeaders=host,"
    "Signature=0": "AuthorizationHeaderMalformed",
    "AWS4-HMAC-SHA256 Credential=AKIAADMIN/20000101/us-east-1/s3/aws4_request,SignedHeaders=host,"
    "Signature=0": "AuthorizationHeaderMalformed",
    "AWS AKIAADMIN:c2lnbmF0dXJl": "InvalidRequest",
    "AWS4-ECDSA-P256-SHA256 Credential={scope},SignedHeaders=host,Signature=0": "InvalidRequest",
    "Basic dXNlcjpwYXNz": "InvalidRequest",
    "Bearer token": "InvalidRequest",
}  # fmt: skip


@pytest.mark.parametrize("authorization", MALFORMED_AUTHORIZATION)
def test_a_malformed_authorization_header(s3: Client, authorization: str) -> None:
    date = amz_date()
    scope = f"AKIAADMIN/{date[:8]}/us-east-1/s3/aws4_request"
    value = authorization.format(scope=scope, day=date[:8])
    headers = {"authorization": value, "x-amz-date": date, "x-amz-content-sha256": EMPTY_SHA256}
    answer = s3.unsigned("GET", f"/{s3.bucket}", headers)
    # S3 says InvalidArgument "Unsupported Authorization Type" of a scheme that is none of its own.
    wanted = MALFORMED_AUTHORIZATION[authorization]
    assert answer.error in (wanted, "InvalidArgument" if wanted == "InvalidRequest" else wanted)


def test_an_empty_authorization_header_is_none(s3: Client) -> None:
    public = Client(s3.ports, "public-bucket")
    public.put("k", b"for all").ok()
    empty = {"authorization": ""}
    assert s3.unsigned("GET", "/public-bucket/k", empty).ok().body == b"for all"
    assert s3.unsigned("PUT", "/public-bucket/k", empty, b"x").error == "AccessDenied"
    assert s3.unsigned("GET", f"/{s3.bucket}", empty).error == "AccessDenied"
    assert s3.unsigned("GET", "/_zs3/health", empty).status == 200
    target = presign("GET", s3.host, "/public-bucket/k")
    assert s3.unsigned("GET", target, empty).ok().body == b"for all"
    public.delete("k").ok()
    public.close()


def test_headers_that_signing_needs(s3: Client) -> None:
    path = f"/{s3.bucket}"
    for missing, code in (
        ("x-amz-date", "AccessDenied"),
        ("x-amz-content-sha256", "InvalidRequest"),
    ):
        headers = s3.signed_head("GET", path, payload=EMPTY_SHA256)
        del headers[missing]
        assert s3.exchange("GET", head_bytes("GET", path, headers)).error == code
    headers = s3.signed_head("GET", path, payload="sha256:0")
    assert s3.exchange("GET", head_bytes("GET", path, headers)).error == "InvalidArgument"
    for bad in ("yesterday", "20240230T000000Z", ""):
        headers = s3.signed_head("GET", path, payload=EMPTY_SHA256) | {"x-amz-date": bad}
        answer = s3.exchange("GET", head_bytes("GET", path, headers))
        assert answer.error in ("AccessDenied", "AuthorizationHeaderMalformed")


def test_a_signature_must_cover_the_host(s3: Client) -> None:
    signer = Signer()
    headers = {"x-amz-date": signer.date, "x-amz-content-sha256": EMPTY_SHA256}
    signature = signer.signature("GET", f"/{s3.bucket}", "", headers, EMPTY_SHA256)
    headers |= {"authorization": signer.authorization(headers, signature), "host": s3.host}
    answer = s3.exchange("GET", head_bytes("GET", f"/{s3.bucket}", headers))
    assert answer.error in ("AccessDenied", "AuthorizationHeaderMalformed", "SignatureDoesNotMatch")


def test_a_header_named_twice_in_signed_headers_is_refused_with_a_small_answer(s3: Client) -> None:
    """The canonical request, which an error shows, would hold its value each time."""
    names = "host" + ";x-amz-meta-a" * 300
    headers = s3.signed_head("GET", f"/{s3.bucket}") | {"x-amz-meta-a": "x" * 4000}
    given = headers["authorization"]
    headers["authorization"] = re.sub("SignedHeaders=[^,]*", f"SignedHeaders={names}", given)
    in_header = s3.exchange("GET", head_bytes("GET", f"/{s3.bucket}", headers))
    target = presign("GET", s3.host, f"/{s3.bucket}")
    target = target.replace("SignedHeaders=host", f"SignedHeaders={percent(names)}")
    in_query = s3.unsigned("GET", target, {"x-amz-meta-a": "x" * 4000})
    for answer in (in_header, in_query):
        assert answer.error == "AccessDenied" and len(answer.body) < 1000


@pytest.mark.parametrize("form", [http_date, amz_date])
def test_the_date_header_stands_in_for_x_amz_date(s3: Client, form: Callable[[float], str]) -> None:
    """In either form. (AWS General Reference, "Handling dates in Signature Version 4".)"""
    now = time.time()
    signer = Signer(date=amz_date(now))
    headers = {"host": s3.host, "date": form(now), "x-amz-content-sha256": EMPTY_SHA256}
    signature = signer.signature("GET", f"/{s3.bucket}", "", headers, EMPTY_SHA256)
    headers["authorization"] = signer.authorization(headers, signature)
    s3.exchange("GET", head_bytes("GET", f"/{s3.bucket}", headers)).ok()


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_clock_may_be_fifteen_minutes_off_and_no_more(s3: Client, sign: int) -> None:
    for seconds, code in ((890, ""), (910, "RequestTimeTooSkewed"), (DAY, "RequestTimeTooSkewed")):
        signer = Signer(date=amz_date(time.time() + sign * seconds))
        headers = s3.signed_head("GET", f"/{s3.bucket}", payload=EMPTY_SHA256, signer=signer)
        answer = s3.exchange("GET", head_bytes("GET", f"/{s3.bucket}", headers))
        assert answer.error == code if code else answer.ok()


@pytest.mark.parametrize("region", ["us-east-1", "eu-central-1", "auto", "garage", "local-zone-7"])
def test_every_region_is_accepted(s3: Client, region: str) -> None:
    headers = s3.signed_head("GET", f"/{s3.bucket}", signer=Signer(region=region))
    s3.exchange("GET", head_bytes("GET", f"/{s3.bucket}", headers)).ok()


SIGNED_QUERIES = [  # as clients send them: unsorted, "+" for a space, raw "/", no "=", extra names
    "list-type=2&prefix=a/b&delimiter=/",
    "prefix=a%2Fb&list-type=2&delimiter=%2F",
    "list-type=2&prefix=a~b-c_d.e",
    "list-type=2&prefix=%C3%A9%20&x-id=ListObjectsV2",
    "list-type=2&prefix=a%2bb&max-keys=5",
    "uploads",
    "uploads=",
    "uploads=&prefix=a",
    "location=&",
]


@pytest.mark.parametrize("query", SIGNED_QUERIES)
def test_queries_are_signed_as_they_are_on_the_wire(s3: Client, query: str) -> None:
    headers = s3.signed_head("GET", f"/{s3.bucket}", query.rstrip("&"))
    s3.exchange("GET", head_bytes("GET", f"/{s3.bucket}?{query}", headers)).ok()


def test_a_query_is_sorted_by_name_even_when_one_name_begins_another(s3: Client) -> None:
    """`=` is above `-`: by whole parameters, `x-amz-meta-file=1` would come last."""
    query = "x-amz-meta-file-name=2&x-amz-meta-file=1&a.=4&a=3"
    assert zs3.canonical_query(query) == "a=3&a.=4&x-amz-meta-file=1&x-amz-meta-file-name=2"
    credentials = botocore.credentials.Credentials(*ADMIN[1:])
    url = f"http://{s3.host}/{s3.bucket}/k?x-amz-meta-file=1&x-amz-meta-file-name=2"
    request = botocore.awsrequest.AWSRequest("PUT", url)
    botocore.auth.S3SigV4QueryAuth(credentials, "s3", "us-east-1").add_auth(request)
    s3.unsigned("PUT", request.url.partition(s3.host)[2], body=b"x").ok()
    headers = s3.head("k").headers
    assert (headers["x-amz-meta-file"], headers["x-amz-meta-file-name"]) == ("1", "2")


def test_a_plus_in_a_query_is_a_space(s3: Client) -> None:
    s3.put("a b", b"x").ok()
    headers = s3.signed_head("GET", f"/{s3.bucket}", "list-type=2&prefix=a%20b")
    answer = s3.exchange("GET", head_bytes("GET", f"/{s3.bucket}?list-type=2&prefix=a+b", headers))
    assert answer.ok().texts("Contents/Key") == ["a b"]


def test_header_values_are_signed_with_blanks_collapsed(s3: Client) -> None:
    s3.put("k", b"x", x_amz_meta_a="  one   two  ").ok()
    assert s3.head("k").headers["x-amz-meta-a"].split() == ["one", "two"]


def test_the_host_may_be_signed_without_its_port(s3: Client) -> None:
    headers = s3.signed_head("GET", f"/{s3.bucket}", headers={"host": "127.0.0.1"})
    s3.exchange("GET", head_bytes("GET", f"/{s3.bucket}", headers | {"host": s3.host})).ok()


def test_blanks_in_the_authorization_header(s3: Client) -> None:
    headers = s3.signed_head("GET", f"/{s3.bucket}")
    headers["authorization"] = headers["authorization"].replace(",", ",  ")
    s3.exchange("GET", head_bytes("GET", f"/{s3.bucket}", headers)).ok()


# Presigned URLs


def test_a_presigned_url_gets_puts_heads_and_deletes(s3: Client) -> None:
    path = key_path(s3.bucket, "é +/k")
    s3.unsigned("PUT", presign("PUT", s3.host, path), body=b"presigned").ok()
    assert s3.unsigned("GET", presign("GET", s3.host, path)).ok().body == b"presigned"
    assert s3.unsigned("HEAD", presign("HEAD", s3.host, path)).ok().headers["content-length"] == "9"
    overridden = presign("GET", s3.host, path, {"response-content-type": "text/x"})
    assert s3.unsigned("GET", overridden).ok().headers["content-type"] == "text/x"
    assert s3.unsigned("DELETE", presign("DELETE", s3.host, path)).ok().status == 204
    assert s3.keys() == []


def test_a_presigned_put_ignores_the_sdks_checksum_of_an_empty_body_in_its_query(
    s3: Client,
) -> None:
    query = {
        "x-amz-checksum-crc32": "AAAAAA==",
        "x-amz-sdk-checksum-algorithm": "CRC32",
        "x-id": "PutObject",
    }
    s3.unsigned("PUT", presign("PUT", s3.host, f"/{s3.bucket}/k", query), body=b"not empty").ok()
    assert s3.get("k").body == b"not empty"


def test_headers_that_an_sdk_moves_into_the_query_of_a_presigned_url_count(s3: Client) -> None:
    path = f"/{s3.bucket}/k"
    query = {"x-amz-meta-name": "J\u00fcrgen", "x-amz-storage-class": "STANDARD"}
    s3.unsigned("PUT", presign("PUT", s3.host, path, query), body=b"x").ok()
    stored = s3.head("k").headers["x-amz-meta-name"]
    assert stored.encode("latin-1").decode() == "J\u00fcrgen"
    s3.unsigned("PUT", presign("PUT", s3.host, path, {"X-Amz-Meta-Name": "b"}), body=b"x").ok()
    assert s3.head("k").headers["x-amz-meta-name"] == "b"
    copied = {"x-amz-copy-source": f"{s3.bucket}/k"}
    s3.unsigned("PUT", presign("PUT", s3.host, f"/{s3.bucket}/l", copied)).ok()
    assert s3.get("l").body == b"x"


def test_a_web_page_that_knows_the_keys_cannot_delete_objects_by_a_post_without_headers(
    s3: Client,
) -> None:
    """What DeleteObjects needs beside its body counts in headers only: for these browsers ask."""
    s3.put("k", b"x").ok()
    document = delete_document(["k"])
    body = b"%x\r\n%b\r\n0\r\nx-amz-checksum-crc32:%b\r\n\r\n" % (
        len(document), document, checksum("CRC32", document).encode(),
    )  # fmt: skip
    query = {
        "delete": "",
        "X-Amz-Content-Sha256": "STREAMING-UNSIGNED-PAYLOAD-TRAILER",
        "x-amz-decoded-content-length": len(document),
        "x-amz-trailer": "x-amz-checksum-crc32",
    }
    simple = {"content-type": "text/plain", "origin": "https://evil.example"}
    target = presign("POST", s3.host, f"/{s3.bucket}", query)
    assert s3.unsigned("POST", target, simple, body).error == "MissingContentLength"
    del query["X-Amz-Content-Sha256"]
    target = presign("POST", s3.host, f"/{s3.bucket}", query)
    assert s3.unsigned("POST", target, simple, document).error == "InvalidRequest"
    assert unchanged(s3, "k", b"x")


@pytest.mark.parametrize("name", ["x-amz-meta-foo", "x-amz-tagging", "X-Amz-Meta-Foo"])
def test_an_empty_header_in_a_presigned_query_is_no_subresource(s3: Client, name: str) -> None:
    target = presign("PUT", s3.host, f"/{s3.bucket}/k", {name: ""})
    s3.unsigned("PUT", target, body=b"x").ok()
    assert s3.head("k").headers.get("x-amz-meta-foo") == ("" if "eta" in name else None)


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("x-amz-tagging", "a=b", "NotImplemented"),
        ("x-amz-acl", "public-read", "AccessControlListNotSupported"),
        ("x-amz-storage-class", "GLACIER", "InvalidStorageClass"),
        ("x-amz-object-lock-mode", "COMPLIANCE", "NotImplemented"),
        ("x-amz-meta-a", "b\r\nx: y", "InvalidArgument"),
        ("x-amz-meta-a b", "c", "InvalidArgument"),
        ("x-amz-meta-a", "b" * 2048, "MetadataTooLarge"),
    ],
)
def test_what_is_refused_in_a_header_is_refused_in_the_query_of_a_presigned_url(
    s3: Client, name: str, value: str, code: str
) -> None:
    target = presign("PUT", s3.host, f"/{s3.bucket}/k", {name: value})
    assert s3.unsigned("PUT", target, body=b"x").error == code
    assert s3.keys() == []


def test_a_presigned_put_with_a_signed_header_needs_that_header(s3: Client) -> None:
    target = presign("PUT", s3.host, f"/{s3.bucket}/k", headers={"content-type": "text/x"})
    assert s3.unsigned("PUT", target, body=b"x").error in ("SignatureDoesNotMatch", "AccessDenied")
    wrong = s3.unsigned("PUT", target, {"content-type": "text/y"}, b"x")
    assert wrong.error == "SignatureDoesNotMatch"
    s3.unsigned("PUT", target, {"content-type": "text/x"}, b"x").ok()
    assert s3.head("k").headers["content-type"] == "text/x"


@pytest.mark.parametrize("expires", [1, 60, 7 * DAY])
def test_a_presigned_url_lives_one_second_to_seven_days(s3: Client, expires: int) -> None:
    soon = time.time() + 60  # so that the shortest has not ended before it is used
    target = presign("GET", s3.host, f"/{s3.bucket}", expires=expires, when=soon)
    s3.unsigned("GET", target).ok()


@pytest.mark.parametrize("expires", [0, -1, 7 * DAY + 1, "soon", "", "1.5", 10**30, "٣"])
def test_any_other_lifetime_is_AuthorizationQueryParametersError(
    s3: Client, expires: object
) -> None:
    target = presign("GET", s3.host, f"/{s3.bucket}", expires=expires)
    assert s3.unsigned("GET", target).error == "AuthorizationQueryParametersError"


def test_an_expired_presigned_url_is_AccessDenied(s3: Client) -> None:
    now = time.time()
    alive = presign("GET", s3.host, f"/{s3.bucket}", expires=7 * DAY, when=now - 7 * DAY + 30)
    s3.unsigned("GET", alive).ok()
    dead = presign("GET", s3.host, f"/{s3.bucket}", expires=60, when=now - 62)
    answer = s3.unsigned("GET", dead)
    assert answer.error == "AccessDenied"
    assert answer.text("Message") == "Request has expired"
    early = presign("GET", s3.host, f"/{s3.bucket}", when=now + 1000)
    assert s3.unsigned("GET", early).error in ("AccessDenied", "RequestTimeTooSkewed")


@pytest.mark.parametrize("missing", [
    "X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-Date", "X-Amz-Expires", "X-Amz-SignedHeaders",
    "X-Amz-Signature",
])  # fmt: skip
def test_a_presigned_url_without_one_of_its_parameters_is_refused(s3: Client, missing: str) -> None:
    target = presign("GET", s3.host, f"/{s3.bucket}")
    without = re.sub(f"{missing}=[^&]*&?", "", target).rstrip("&")
    assert missing not in without
    # Without its algorithm a request carries no credentials at all that S3 would know.
    codes = {"AuthorizationQueryParametersError", "AccessDenied"}
    assert s3.unsigned("GET", without).error in codes


PRESIGNED_CHANGES = {
    "X-Amz-Algorithm=AWS4-HMAC-SHA256": (
        "X-Amz-Algorithm=AWS4-HMAC-SHA1",
        "AuthorizationQueryParametersError",
    ),
    "%2Fs3%2F": ("%2Fec2%2F", "AuthorizationQueryParametersError"),
    "%2Faws4_request": ("", "AuthorizationQueryParametersError"),
    "X-Amz-Expires=900": ("X-Amz-Expires=901", "SignatureDoesNotMatch"),
    "X-Amz-Signature=": ("X-Amz-Signature=0", "SignatureDoesNotMatch"),
    "X-Amz-SignedHeaders=host": ("X-Amz-SignedHeaders=", "AuthorizationQueryParametersError"),
    "SignedHeaders=host&": ("SignedHeaders=host%3B%E2%82%AC&", "AuthorizationQueryParametersError"),
    "&X-Amz-Date=": (
        "&X-Amz-Content-Sha256=%E2%82%AC&X-Amz-Date=",
        "AuthorizationQueryParametersError",
    ),
}


@pytest.mark.parametrize("old", PRESIGNED_CHANGES)
def test_a_changed_presigned_url(s3: Client, old: str) -> None:
    new, code = PRESIGNED_CHANGES[old]
    target = presign("GET", s3.host, f"/{s3.bucket}/k")
    changed = target.replace(old, new)
    assert changed != target
    assert s3.unsigned("GET", changed).error in (code, "AccessDenied" if not new else code)


def test_a_presigned_url_is_for_one_method_and_one_path(s3: Client) -> None:
    target = presign("GET", s3.host, f"/{s3.bucket}/k")
    assert s3.unsigned("PUT", target, body=b"x").error == "SignatureDoesNotMatch"
    assert s3.unsigned("DELETE", target).error == "SignatureDoesNotMatch"
    assert s3.unsigned("GET", target.replace("/k?", "/l?")).error == "SignatureDoesNotMatch"
    assert s3.unsigned("GET", f"{target}&partNumber=1").error == "SignatureDoesNotMatch"
    assert s3.keys() == []


def test_a_presigned_url_of_signature_version_2_is_told_what_to_use(s3: Client) -> None:
    """boto3 still makes these where nobody asks for s3v4."""
    query = "AWSAccessKeyId=AKIAADMIN&Signature=c2lnbmF0dXJl&Expires=4000000000"
    answer = s3.unsigned("GET", f"/{s3.bucket}/k?{query}")
    assert answer.error == "InvalidRequest"
    assert "AWS4-HMAC-SHA256" in (answer.text("Message") or "")


def test_a_session_token_is_InvalidToken(s3: Client) -> None:
    headers = s3.signed_head("GET", f"/{s3.bucket}", headers={"x-amz-security-token": "token"})
    assert s3.exchange("GET", head_bytes("GET", f"/{s3.bucket}", headers)).error == "InvalidToken"
    target = presign("GET", s3.host, f"/{s3.bucket}", {"X-Amz-Security-Token": "token"})
    assert s3.unsigned("GET", target).error == "InvalidToken"


def test_two_ways_of_signing_at_once_are_refused(s3: Client) -> None:
    target = presign("GET", s3.host, f"/{s3.bucket}")
    path, _, query = target.partition("?")
    headers = s3.signed_head("GET", path, query)
    answer = s3.exchange("GET", head_bytes("GET", target, headers))
    assert answer.error == "InvalidArgument"


# --- Buckets -------------------------------------------------------------------------------------

BUCKET_NAMES = [  # (S3 User Guide, "General purpose bucket naming rules")
    "abc", "a" * 63, "a-b", "a.b", "a--b", "123", "1a2", "a.b-c.d", "0-9", "xn-a", "a1.2.3.4",
    "1.2.3",
    "s3alias", "alias-s3", "sthree", "my-mrap",
]  # fmt: skip
INVALID_BUCKET_NAMES = [
    "ab", "a", "a" * 64, "Abc", "abC", "a_b", "-ab", "ab-", ".ab", "ab.", "a..b", "192.168.5.4",
    "1.2.3.4",
    "xn--abc", "sthree-abc", "sthree-configurator", "amzn-s3-demo-bucket", "abc-s3alias",
    "abc--ol-s3",
    "abc.mrap", "abc--x-s3", "abc--table-s3", "a b", "a%b", "é" * 3, "a+b", "abc\n", "a\x00b", "..",
    "...", ".uploads", ".tmp", ".meta", "_zs3", "a:b", "a*b", "abc~",
]  # fmt: skip


@pytest.mark.parametrize("name", BUCKET_NAMES)
def test_a_bucket_name_within_the_rules(s3: Client, name: str) -> None:
    answer = s3.on_bucket("PUT", bucket=name).ok()
    assert answer.headers["location"] == f"/{name}"
    assert name in s3.service().texts("Buckets/Bucket/Name")
    assert s3.on_bucket("DELETE", bucket=name).ok().status == 204
    assert name not in s3.service().texts("Buckets/Bucket/Name")


@pytest.mark.parametrize("name", INVALID_BUCKET_NAMES)
def test_a_bucket_name_outside_the_rules_is_InvalidBucketName(s3: Client, name: str) -> None:
    before = s3.service().texts("Buckets/Bucket/Name")
    bucket = percent(name)
    assert s3.on_bucket("PUT", bucket=bucket).error == "InvalidBucketName"
    assert s3.on_bucket("GET", bucket=bucket).error in ("InvalidBucketName", "NoSuchBucket")
    if name != "_zs3":  # below that are no keys but what servers tell each other
        refused = s3.request("PUT", f"/{bucket}/k", body=b"x")
        assert refused.error in ("InvalidBucketName", "NoSuchBucket")
    assert s3.on_bucket("DELETE", bucket=bucket).error in ("InvalidBucketName", "NoSuchBucket")
    assert s3.service().texts("Buckets/Bucket/Name") == before


def test_creating_ones_own_bucket_again_succeeds_and_keeps_it(s3: Client) -> None:
    s3.put("k", b"kept").ok()
    assert s3.on_bucket("PUT").ok().headers["location"] == f"/{s3.bucket}"
    assert unchanged(s3, "k", b"kept")


@pytest.mark.parametrize("document", [
    b"<CreateBucketConfiguration><LocationConstraint>eu-west-1</LocationConstraint>"
    b"</CreateBucketConfiguration>",
    b'<CreateBucketConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/"/>',
])  # fmt: skip
def test_create_bucket_takes_a_configuration(s3: Client, document: bytes) -> None:
    s3.on_bucket("PUT", body=document, bucket=f"{s3.bucket}-x").ok()
    s3.on_bucket("DELETE", bucket=f"{s3.bucket}-x").ok()


def test_create_bucket_with_a_malformed_configuration_is_MalformedXML(s3: Client) -> None:
    answer = s3.on_bucket("PUT", body=b"<CreateBucketConfiguration>", bucket=f"{s3.bucket}-x")
    assert answer.error == "MalformedXML"
    assert s3.on_bucket("HEAD", bucket=f"{s3.bucket}-x").status == 404


def test_create_bucket_with_object_lock_is_NotImplemented_and_makes_none(s3: Client) -> None:
    other = Client(s3.ports, f"{s3.bucket}-locked")
    lock = {"x-amz-bucket-object-lock-enabled": "true"}
    assert other.on_bucket("PUT", headers=lock).error == "NotImplemented"
    assert other.on_bucket("HEAD").status == 404
    other.on_bucket("PUT", headers={"x-amz-bucket-object-lock-enabled": "false"}).ok()
    other.on_bucket("DELETE").ok()
    other.close()


def test_create_bucket_checks_a_declared_checksum(s3: Client) -> None:
    body = b"<CreateBucketConfiguration/>"
    for data, code in ((b"other", "BadDigest"), (body, "")):
        headers = {"x-amz-checksum-crc32": checksum("CRC32", data)}
        answer = s3.on_bucket("PUT", "", body, headers, bucket=f"{s3.bucket}-b")
        assert answer.error == code if code else answer.ok()
        assert s3.on_bucket("HEAD", bucket=f"{s3.bucket}-b").status == (404 if code else 200)


@pytest.mark.parametrize(
    ("ownership", "is_right"),
    [("BucketOwnerEnforced", True), ("ObjectWriter", False), ("BucketOwnerPreferred", False)],
)
def test_all_objects_of_a_bucket_are_its_owners(
    s3: Client, ownership: str, is_right: bool
) -> None:
    headers = {"x-amz-object-ownership": ownership}
    answer = s3.on_bucket("PUT", headers=headers, bucket=f"{s3.bucket}-o")
    assert answer.ok() if is_right else answer.error == "AccessControlListNotSupported"
    assert s3.on_bucket("HEAD", bucket=f"{s3.bucket}-o").status == (200 if is_right else 404)


def test_head_bucket(s3: Client) -> None:
    answer = s3.on_bucket("HEAD").ok()
    assert answer.headers["x-amz-bucket-region"] == "us-east-1"
    assert s3.request("HEAD", f"/{s3.bucket}/").ok().body == b""
    assert s3.on_bucket("HEAD", bucket="no-such-bucket").status == 404


def test_get_bucket_location(s3: Client) -> None:
    answer = s3.on_bucket("GET", "location").ok()
    assert answer.xml.tag == "LocationConstraint" and not answer.xml.text
    assert s3.on_bucket("GET", "location", bucket="no-such-bucket").error == "NoSuchBucket"


def test_a_data_folder_that_was_removed_under_the_server_is_begun_anew(folder: Path) -> None:
    with Server(ACL, "--bucket=bucket", data=folder) as server:
        s3 = server.client("bucket")
        s3.put("k", b"x").ok()
        shutil.rmtree(folder)
        assert s3.put("k", b"x").error == s3.get("k").error == "NoSuchBucket"
        assert s3.service().ok().texts("Buckets/Bucket/Name") == []
        s3.on_bucket("PUT").ok()
        s3.put("k", b"new").ok()
        assert s3.get("k").ok().body == b"new" and s3.keys() == ["k"]
        s3.close()


def test_a_bucket_with_an_object_is_BucketNotEmpty(s3: Client) -> None:
    s3.put("deep/in/here", b"x").ok()
    assert s3.on_bucket("DELETE").error == "BucketNotEmpty"
    assert s3.keys() == ["deep/in/here"]
    s3.delete("deep/in/here").ok()
    s3.on_bucket("DELETE").ok()
    assert s3.on_bucket("DELETE").error == "NoSuchBucket"
    assert s3.put("k", b"x").error == "NoSuchBucket"
    assert s3.on_bucket("HEAD").status == 404


def test_a_bucket_may_be_deleted_with_an_upload_in_progress_and_starts_empty_again(
    s3: Client,
) -> None:
    upload = s3.create_upload("k")
    s3.put_part("k", upload, 1, b"x").ok()
    s3.on_bucket("DELETE").ok()
    s3.on_bucket("PUT").ok()
    assert s3.keys() == []
    assert s3.on_bucket("GET", "uploads").ok().texts("Upload") == []
    assert s3.put_part("k", upload, 2, b"x").error == "NoSuchUpload"


NEED_A_BUCKET = [
    ("GET", ""),
    ("GET", "list-type=2"),
    ("GET", "uploads"),
    ("DELETE", ""),
    ("GET", "location"),
]


@pytest.mark.parametrize(("method", "query"), NEED_A_BUCKET)
def test_a_missing_bucket_is_NoSuchBucket(s3: Client, method: str, query: str) -> None:
    answer = s3.on_bucket(method, query, bucket="no-such-bucket")
    assert answer.error == "NoSuchBucket"
    assert answer.text("BucketName") == "no-such-bucket"


NEED_AN_OBJECTS_BUCKET = [
    ("GET", "", {}), ("PUT", "", {}), ("DELETE", "", {}), ("POST", "uploads", {}), ("GET",
    "attributes",
    {"x-amz-object-attributes": "ETag"}), ("PUT", "partNumber=1&uploadId=x", {}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "query", "headers"), NEED_AN_OBJECTS_BUCKET)
def test_a_key_in_a_missing_bucket_is_NoSuchBucket(
    s3: Client, method: str, query: str, headers: dict[str, str]
) -> None:
    answer = s3.request(method, "/no-such-bucket/k", query, headers=headers)
    assert answer.error in (
        "NoSuchBucket",
        "NoSuchUpload" if "uploadId" in query else "NoSuchBucket",
    )


def test_list_buckets(s3: Client) -> None:
    names = [f"{s3.bucket}-{letter}" for letter in "bca"]
    for name in names:
        s3.on_bucket("PUT", bucket=name).ok()
    answer = s3.service({"prefix": f"{s3.bucket}-"}).ok()
    assert answer.xml.tag == "ListAllMyBucketsResult"
    assert answer.texts("Buckets/Bucket/Name") == sorted(names)
    assert answer.text("Prefix") == f"{s3.bucket}-"
    assert answer.text("Owner/ID") and answer.text("ContinuationToken") is None
    for date in answer.texts("Buckets/Bucket/CreationDate"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", date)
    every = s3.service().texts("Buckets/Bucket/Name")
    assert set(names) < set(every) and every == sorted(every)
    assert not [name for name in every if name.startswith(".")]


def test_list_buckets_by_pages(s3: Client) -> None:
    names = [f"{s3.bucket}-{number}" for number in range(5)]
    for name in names:
        s3.on_bucket("PUT", bucket=name).ok()
    seen: list[str] = []
    token: dict[str, object] = {}
    for expected in (2, 2, 1):
        answer = s3.service({"prefix": f"{s3.bucket}-", "max-buckets": 2} | token).ok()
        page = answer.texts("Buckets/Bucket/Name")
        assert len(page) == expected
        seen += page
        token = {"continuation-token": answer.text("ContinuationToken")}
    assert seen == names and token == {"continuation-token": None}


@pytest.mark.parametrize("maximum", [1, 10000, 0, 10001, -1, "many"])
def test_max_buckets_is_1_to_10000(s3: Client, maximum: object) -> None:
    answer = s3.service({"max-buckets": maximum})
    if maximum in (1, 10000):
        answer.ok()
    else:
        assert answer.error == "InvalidArgument"


def test_a_bucket_is_addressed_with_and_without_a_slash(s3: Client) -> None:
    s3.put("k", b"x").ok()
    for path in (f"/{s3.bucket}", f"/{s3.bucket}/"):
        assert s3.request("GET", path).ok().texts("Contents/Key") == ["k"]
        s3.request("PUT", path).ok()
        s3.request("HEAD", path).ok()
        assert s3.request("DELETE", path).error == "BucketNotEmpty"


# --- Objects -------------------------------------------------------------------------------------


def test_put_get_head_delete(s3: Client) -> None:
    before = int(time.time())
    put = s3.put("folder/file.txt", b"hello", content_type="text/plain").ok()
    assert put.status == 200 and put.etag == f'"{md5_hex(b"hello")}"' and put.body == b""
    got = s3.get("folder/file.txt").ok()
    head = s3.head("folder/file.txt").ok()
    assert got.body == b"hello" and head.body == b""
    for answer in (got, head):
        assert answer.status == 200 and answer.etag == put.etag
        assert answer.headers["content-length"] == "5"
        assert answer.headers["content-type"] == "text/plain"
        assert answer.headers["accept-ranges"] == "bytes"
        modified = datetime.datetime.strptime(
            answer.headers["last-modified"], "%a, %d %b %Y %H:%M:%S GMT"
        )
        assert (
            before - 2
            <= modified.replace(tzinfo=datetime.timezone.utc).timestamp()
            <= time.time() + 2
        )
    assert s3.delete("folder/file.txt").ok().status == 204
    assert s3.get("folder/file.txt").error == "NoSuchKey"
    assert s3.keys() == []


def test_a_missing_key_is_NoSuchKey(s3: Client) -> None:
    answer = s3.get(MISSING_KEY)
    assert answer.error == "NoSuchKey"
    assert answer.text("Key") == MISSING_KEY
    head = s3.head(MISSING_KEY)
    assert head.status == 404 and head.body == b""


def test_deleting_what_is_not_there_succeeds(s3: Client) -> None:
    assert s3.delete(MISSING_KEY).status == 204
    s3.put("a/b", b"x").ok()
    for key in ("a", "a/", "a/b/", "a/b/c"):
        assert s3.delete(key).status == 204
    assert unchanged(s3, "a/b", b"x")


def test_an_object_is_replaced_whole(s3: Client) -> None:
    s3.put(
        "k",
        b"a long old body",
        content_type="text/old",
        x_amz_meta_old="1",
        cache_control="no-store",
    ).ok()
    s3.put("k", b"new").ok()
    got = s3.get("k").ok()
    assert got.body == b"new" and got.headers["content-type"] == "binary/octet-stream"
    assert "x-amz-meta-old" not in got.headers and "cache-control" not in got.headers


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 1 << 20, (1 << 20) + 1, 3_000_001])
def test_objects_of_many_sizes(s3: Client, size: int) -> None:
    body = random.Random(size).randbytes(size)
    assert s3.put("k", body).ok().etag == f'"{md5_hex(body)}"'
    assert s3.get("k").ok().body == body
    assert s3.list().text("Contents/Size") == str(size)


KEPT_HEADERS = {
    "content-type": "text/plain; charset=utf-8",
    "cache-control": "max-age=60, public",
    "content-disposition": "attachment; filename=\"a b.txt\"; filename*=UTF-8''%C3%A9",
    "content-encoding": "gzip",
    "content-language": "de, en",
    "expires": "Thu, 01 Dec 2033 16:00:00 GMT",
    "x-amz-meta-simple": "value",
    "x-amz-meta-empty": "",
    "x-amz-meta-comma": "a, b;c=d",
}


def test_the_headers_of_an_object_are_kept_and_returned(s3: Client) -> None:
    s3.put(
        "k", b"x", **{name.replace("-", "_"): value for name, value in KEPT_HEADERS.items()}
    ).ok()
    for answer in (s3.get("k"), s3.head("k"), s3.get("k", range="bytes=0-0")):
        assert {name: answer.headers.get(name) for name in KEPT_HEADERS} == KEPT_HEADERS


ENCODINGS = {
    "": None, "aws-chunked": None, "aws-chunked,gzip": "gzip", "gzip, aws-chunked": "gzip",
    "gzip": "gzip",
    "br,gzip": "br,gzip",
}  # fmt: skip


def test_an_empty_header_is_not_kept(s3: Client) -> None:
    """Browsers send an empty Content-Type with a file of unknown type."""
    names = (*zs3.STORED_HEADERS, "x-amz-meta-a")
    s3.put("k", b"x", **{name.replace("-", "_"): "" for name in names}).ok()
    headers = s3.head("k").ok().headers
    assert headers["content-type"] == "binary/octet-stream" and headers["x-amz-meta-a"] == ""
    assert headers.keys() & {*names} == {"content-type", "x-amz-meta-a"}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_aws_chunked_is_no_content_encoding_of_the_object(s3: Client, encoding: str) -> None:
    upload(
        s3,
        "k",
        b"body",
        "STREAMING-AWS4-HMAC-SHA256-PAYLOAD",
        headers={"content-encoding": encoding},
    ).ok()
    got = s3.get("k").ok()
    assert got.body == b"body"
    stored = got.headers.get("content-encoding")
    assert (stored and stored.replace(" ", "")) == ENCODINGS[encoding]


@pytest.mark.parametrize("text", ["é", "日本 語", "=?UTF-8?B?w6k=?="])
def test_metadata_beyond_ascii_comes_back_as_it_was_sent(s3: Client, text: str) -> None:
    """Clients send UTF-8 as it is, and sign that; or they send an RFC 2047 word."""
    signer = Signer()
    path = f"/{s3.bucket}/k"
    headers = s3.signed_head("PUT", path, headers={"x-amz-meta-a": text}, signer=signer)
    wire = headers | {"x-amz-meta-a": text.encode().decode("latin-1"), "content-length": "0"}
    s3.exchange("PUT", head_bytes("PUT", path, wire)).ok()
    assert s3.head("k").headers["x-amz-meta-a"] in (wire["x-amz-meta-a"], rfc2047(text))


def rfc2047(text: str) -> str:
    """How S3 returns metadata that is not ASCII."""
    return f"=?UTF-8?B?{base64.b64encode(text.encode()).decode()}?="


def test_user_metadata_of_2048_bytes_is_kept_and_more_is_MetadataTooLarge(s3: Client) -> None:
    """The sum of names (without x-amz-meta-) and values, in bytes. (User Guide, "Working with
    metadata".)"""
    s3.put("k", b"old").ok()
    assert s3.put("k", b"x", x_amz_meta_a="v" * 2048).error == "MetadataTooLarge"
    assert (
        s3.put("k", b"x", x_amz_meta_a="v" * 1000, x_amz_meta_b="v" * 1047).error
        == "MetadataTooLarge"
    )
    assert unchanged(s3, "k", b"old")
    s3.put("k", b"x", x_amz_meta_a="v" * 2047).ok()
    assert s3.head("k").headers["x-amz-meta-a"] == "v" * 2047
    s3.put("k", b"x", x_amz_meta_a="v" * 1000, x_amz_meta_b="v" * 1046).ok()


def test_all_headers_of_an_object_together_may_exceed_one_extended_attribute(s3: Client) -> None:
    value = "v" * 2000
    s3.put("k", b"x", x_amz_meta_a=value, content_disposition=value, cache_control=value).ok()
    headers = s3.head("k").headers
    assert [headers[name] for name in ("x-amz-meta-a", "content-disposition", "cache-control")] == [
        value
    ] * 3


RESPONSE_OVERRIDES = {
    "response-content-type": "text/x", "response-cache-control": "no-store",
    "response-expires": "never",
    "response-content-disposition": "attachment; filename=x", "response-content-encoding": "br",
    "response-content-language": "fr",
}  # fmt: skip


def test_response_parameters_override_headers(s3: Client) -> None:
    s3.put("k", b"x", content_type="text/plain", cache_control="max-age=1").ok()
    for answer in (s3.get("k", RESPONSE_OVERRIDES).ok(), s3.head("k", RESPONSE_OVERRIDES).ok()):
        for name, value in RESPONSE_OVERRIDES.items():
            assert answer.headers[name.removeprefix("response-")] == value
    assert s3.get("k").headers["content-type"] == "text/plain"


@pytest.mark.parametrize("value", ["a\r\nset-cookie: b", "a\nb", "a\x00b"])
def test_a_response_parameter_cannot_split_the_answer(s3: Client, value: str) -> None:
    s3.put("k", b"x").ok()
    answer = s3.get("k", {"response-content-type": value})
    assert "set-cookie" not in answer.headers and "\n" not in answer.headers["content-type"]
    assert answer.status == 200 or answer.error == "InvalidArgument"


@pytest.mark.parametrize("length", [1024, 1025, 2000])
def test_a_key_has_at_most_1024_bytes(s3: Client, length: int) -> None:
    folders = "/".join(["f" * 100] * 20)
    for key in ("k" * length, folders[:length], "é" * (length // 2) + "k" * (length % 2)):
        answer = s3.put(key, b"x")
        if length <= 1024:
            answer.ok()
            assert s3.get(key).ok().body == b"x"
            s3.delete(key).ok()
        else:
            assert answer.error == "KeyTooLongError"
            assert s3.get(key).error == "KeyTooLongError"
            assert s3.on_key("POST", key, "uploads").error == "KeyTooLongError"
    assert s3.keys() == []


DOTTED_KEYS = [".", "..", "../x", "a/../b", "a/..", "a/.", "./a", "a/./b", "../../../../etc/passwd"]


@pytest.mark.parametrize("key", DOTTED_KEYS)
def test_a_key_with_a_dot_component_is_InvalidArgument(s3: Client, key: str) -> None:
    path = key_path(s3.bucket, key)
    for method in ("PUT", "GET", "DELETE"):
        body = b"x" if method == "PUT" else b""
        assert s3.request(method, path, body=body).error == "InvalidArgument"
        hidden = path.replace("..", "%2E%2E").replace("/etc", "%2Fetc")  # the same once decoded
        headers = s3.signed_head(method, path) | {"content-length": str(len(body))}
        answer = s3.exchange(method, head_bytes(method, hidden, headers) + body)
        assert answer.error == "InvalidArgument"
    assert s3.request("HEAD", path).status == 400
    assert s3.keys() == []


@pytest.mark.parametrize("path", ["/{}/%FF", "/{}/a%80b", "/{}/%ED%A0%80"])
def test_a_key_that_is_not_utf8_is_refused(s3: Client, path: str) -> None:
    answer = s3.request("PUT", path.format(s3.bucket), body=b"x")
    assert answer.error in ("InvalidURI", "InvalidArgument")
    assert s3.keys() == []


@pytest.mark.parametrize("storage", ["STANDARD", "GLACIER", "REDUCED_REDUNDANCY", "nonsense"])
def test_only_the_standard_storage_class_exists(s3: Client, storage: str) -> None:
    for answer in (s3.put("k", b"x", x_amz_storage_class=storage),
                   s3.on_key("POST", "k", "uploads",
                   headers={"x-amz-storage-class": storage})):  # fmt: skip
        if storage == "STANDARD":
            answer.ok()
        else:
            assert answer.error == "InvalidStorageClass"
    assert s3.keys() == (["k"] if storage == "STANDARD" else [])


REFUSED_HEADERS = {
    "content-range": "bytes 0-2/10",
    "x-amz-server-side-encryption": "AES256",
    "x-amz-server-side-encryption-customer-algorithm": "AES256",
    "x-amz-server-side-encryption-aws-kms-key-id": "key",
    "x-amz-object-lock-mode": "GOVERNANCE",
    "x-amz-object-lock-legal-hold": "ON",
    "x-amz-tagging": "a=b",
    "x-amz-website-redirect-location": "/elsewhere",
    "x-amz-grant-read": "id=1",
    "x-amz-write-offset-bytes": "3",
    "x-amz-if-match-size": "3",
    "x-amz-if-match-last-modified-time": "Sun, 06 Nov 1994 08:49:37 GMT",
}


@pytest.mark.parametrize("name", REFUSED_HEADERS)
def test_a_header_that_asks_for_what_is_not_there_is_refused(s3: Client, name: str) -> None:
    s3.put("k", b"old").ok()
    number = s3.create_upload("k")
    headers = {name: REFUSED_HEADERS[name]}
    part, copy = {"partNumber": 1, "uploadId": number}, {"x-amz-copy-source": f"{s3.bucket}/k"}
    for answer in (s3.on_key("PUT", "k", body=b"new", headers=headers),
                   s3.on_key("DELETE", "k", headers=headers),
                   s3.on_key("POST", "k", "uploads", headers=headers),
                   s3.on_key("PUT", "k", part, headers=headers | copy),
                   s3.on_key("DELETE", "k", {"uploadId": number}, headers=headers)):  # fmt: skip
        assert answer.error in (
            "NotImplemented",
            "InvalidArgument",
            "AccessControlListNotSupported",
        )
    assert unchanged(s3, "k", b"old")
    assert s3.on_bucket("GET", "uploads").ok().texts("Upload/UploadId") == [number]
    assert s3.on_key("GET", "k", {"uploadId": number}).ok().texts("Part") == []


def test_a_part_with_a_content_range_is_NotImplemented(s3: Client) -> None:
    number = s3.create_upload("k")
    answer = s3.put_part("k", number, 1, b"x", content_range="bytes 0-0/2")
    assert answer.error == "NotImplemented"
    assert s3.on_key("GET", "k", {"uploadId": number}).ok().texts("Part") == []


def test_a_body_where_there_is_to_be_none_is_EntityTooLarge_and_changes_nothing(
    s3: Client,
) -> None:
    s3.put("k", b"old").ok()
    number, copy = s3.create_upload("k"), {"x-amz-copy-source": f"{s3.bucket}/k"}
    for answer in (
        s3.on_key("POST", "k", "uploads", b"x"),
        s3.on_key("PUT", "copy", "", b"x", copy),
        s3.on_key("PUT", "k", {"partNumber": 1, "uploadId": number}, b"x", copy),
    ):
        assert answer.error == "EntityTooLarge"
    assert unchanged(s3, "k", b"old")
    assert s3.on_bucket("GET", "uploads").ok().texts("Upload/UploadId") == [number]
    assert s3.on_key("GET", "k", {"uploadId": number}).ok().texts("Part") == []


def test_a_deletion_with_a_large_body_is_EntityTooLarge_and_changes_nothing(s3: Client) -> None:
    s3.put("k", b"old").ok()
    path = key_path(s3.bucket, "k")
    headers = s3.signed_head("DELETE", path) | {"content-length": str((4 << 20) + 1)}
    with s3.connect() as connection:
        connection.send(head_bytes("DELETE", path, headers))
        assert connection.answer().error == "EntityTooLarge"
    assert unchanged(s3, "k", b"old")


EVERY_ATTRIBUTE = {"x-amz-object-attributes": "ETag,Checksum,ObjectParts,StorageClass,ObjectSize"}


def test_get_object_attributes(s3: Client) -> None:
    s3.put("k", b"hello", x_amz_checksum_sha256=checksum("SHA256", b"hello")).ok()
    answer = s3.on_key("GET", "k", "attributes", headers=EVERY_ATTRIBUTE).ok()
    assert answer.xml.tag == "GetObjectAttributesResponse"
    assert answer.text("ETag") == md5_hex(b"hello")  # the one ETag that S3 gives without quotes
    assert answer.text("ObjectSize") == "5" and answer.text("StorageClass") == "STANDARD"
    assert answer.text("Checksum/ChecksumSHA256") == checksum("SHA256", b"hello")
    assert answer.text("Checksum/ChecksumType") == "FULL_OBJECT"
    assert answer.text("ObjectParts") is None
    assert "last-modified" in answer.headers
    one = s3.on_key("GET", "k", "attributes", headers={"x-amz-object-attributes": "ObjectSize"})
    assert [element.tag for element in one.ok().xml] == ["ObjectSize"]


def test_get_object_attributes_of_a_multipart_object(s3: Client) -> None:
    parts = [bytes([n]) * MIN_PART for n in range(5)]
    upload_with_checksums(s3, "k", parts, "SHA256", "COMPOSITE").ok()
    answer = s3.on_key("GET", "k", "attributes", headers=EVERY_ATTRIBUTE).ok()
    assert answer.text("ObjectParts/PartsCount") == "5"
    assert answer.texts("ObjectParts/Part/PartNumber") == list("12345")
    assert answer.texts("ObjectParts/Part/Size") == [str(MIN_PART)] * 5
    assert answer.texts("ObjectParts/Part/ChecksumSHA256") == [
        checksum("SHA256", part) for part in parts
    ]
    paged = EVERY_ATTRIBUTE | {"x-amz-max-parts": "2", "x-amz-part-number-marker": "1"}
    answer = s3.on_key("GET", "k", "attributes", headers=paged).ok()
    assert answer.texts("ObjectParts/Part/PartNumber") == ["2", "3"]
    assert answer.text("ObjectParts/IsTruncated") == "true"
    assert answer.text("ObjectParts/NextPartNumberMarker") == "3"


def test_get_object_attributes_without_or_with_unknown_attributes(s3: Client) -> None:
    s3.put("k", b"x").ok()
    assert s3.on_key("GET", "k", "attributes").error in ("InvalidArgument", "InvalidRequest")
    answer = s3.on_key("GET", "k", "attributes", headers={"x-amz-object-attributes": "Nonsense"})
    assert answer.error == "InvalidArgument"
    answer = s3.on_key("GET", MISSING_KEY, "attributes", headers=EVERY_ATTRIBUTE)
    assert answer.error == "NoSuchKey"


# --- Awkward keys --------------------------------------------------------------------------------

AWKWARD_KEYS = [
    "a/b",  # beside "a", which every test here has put first
    "a/", "a//b", "a///", "/a", "//", "/", "dir/", "dir/sub/", "a-b", "a.b", "a0", "a b", "a+b",
    "a%b", "a%2Fb",
    "a%20b", "a&b=c", "a;b", "a?b", "a#b", "a:b", "a*b", "a|b", "a\\b", "a\"b'c", "<a>&amp;</a>",
    "]]>",
    " leading and trailing ", "~", "$@!()=,", ".hidden", "a/.b", "...", "a/...", "-rf", "CON", "a.",
    "n" * 255, "n" * 256, "n" * 1000, "é" * 127 + "/" + "é" * 128, "x/" * 400 + "x",
    "/".join("y" * 255 for _ in "1234"),
    "日本語/キー", "e\u0301", "\u00e9", "🪣/🪣", "\ufeffbom", "\uffff",
    "\U0010ffff", "\u2028", "\u0085",
    "tab\there", "line\nfeed", "carriage\rreturn", "\x01\x1f", "\x7f", "nul\x00byte",
    ".uploads/x", ".tmp/x", ".meta/x", ".keys/x", ".zs3", ".zs3/x", ".locks/x", "_zs3/health",
    "a.tmp", "a.meta", "a~",
    ".node_id", ".cas/ab/x", ".index/x", "k.zs3", "a/.zs3-dir", ".DS_Store", "lost+found",
]  # fmt: skip


@pytest.mark.parametrize("key", AWKWARD_KEYS, ids=ascii)
def test_an_awkward_key_through_every_operation(s3: Client, key: str) -> None:
    s3.put("a", b"beside").ok()
    body = key.encode()
    put = s3.put(key, body, x_amz_meta_a="1").ok()
    assert s3.get(key).ok().body == body
    assert s3.head(key).ok().headers["x-amz-meta-a"] == "1"
    assert sorted(s3.keys()) == sorted(["a", key])
    assert s3.keys(prefix=key) == [key]
    # Copied away, copied back, put together from parts, and deleted both ways.
    assert s3.copy(key, "copied").ok().text("ETag") == put.etag
    s3.copy("a", key).ok()
    assert s3.get(key).ok().body == b"beside"
    upload = s3.create_upload(key)
    copied = s3.on_key(
        "PUT", key, {"partNumber": 1, "uploadId": upload},
        headers={"x-amz-copy-source": f"{s3.bucket}/{percent('copied')}"},
    ).ok()  # fmt: skip
    uploads = s3.on_bucket("GET", "uploads&encoding-type=url").ok().text("Upload/Key")
    assert uploads and urllib.parse.unquote_plus(uploads) == key
    done = s3.complete(key, upload, [(1, copied.text("ETag") or "")]).ok()
    assert s3.get(key).ok().body == body
    assert done.text("Key") == key
    assert s3.delete(key).status == 204
    assert s3.get(key).error == "NoSuchKey"
    assert sorted(s3.keys()) == ["a", "copied"]
    s3.put(key, b"again").ok()
    if xml_can_carry(key):
        assert s3.delete_objects([key]).ok().texts("Deleted/Key") == [key]
    else:
        s3.delete(key).ok()
    assert sorted(s3.keys()) == ["a", "copied"]


def xml_can_carry(key: str) -> bool:
    """Whether XML 1.0 has a way to write this text."""
    return not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", key)


def test_all_awkward_keys_beside_one_another(s3: Client) -> None:
    keys = ["a", *AWKWARD_KEYS]
    for key in keys:
        s3.put(key, key.encode()).ok()
    assert s3.keys() == sorted(keys, key=str.encode)
    pages = [key for page in walk(s3, 2, max_keys=7) for key in page[0]]
    assert pages == sorted(keys, key=str.encode)
    for key in keys:
        assert s3.get(key).ok().body == key.encode(), ascii(key)
    tops = {key[: key.index("/") + 1] for key in keys if "/" in key}
    listed = s3.list(delimiter="/", encoding_type="url")
    assert {
        urllib.parse.unquote_plus(text) for text in listed.texts("CommonPrefixes/Prefix")
    } == tops
    random.Random(1).shuffle(keys)
    for key in keys:
        s3.delete(key).ok()
        assert s3.get(key).error == "NoSuchKey"
    s3.on_bucket("DELETE").ok()


def test_what_xml_cannot_carry_is_written_as_a_reference(s3: Client) -> None:
    keys = ["\x01", "\r", "a\x00b", "fine", "\x7f", "\uffff"]
    for key in keys:
        s3.put(key, b"x").ok()
    answer = s3.list()
    assert b"<Key>&#x1;</Key>" in answer.body and b"<Key>&#xd;</Key>" in answer.body
    assert sorted(answer.texts("Contents/Key")) == sorted(keys)
    assert s3.get("a\x00c").text("Key") == "a\x00c"


@pytest.mark.parametrize("target", ["/{}/a//b", "/{}//a", "/{}/a/"])
def test_slashes_in_a_path_are_never_squeezed(s3: Client, target: str) -> None:
    path = target.format(s3.bucket)
    s3.request("PUT", path, body=b"x").ok()
    assert s3.keys() == [path.removeprefix(f"/{s3.bucket}/")]


# --- Bodies and checksums ------------------------------------------------------------------------

CHUNK_SIGNED = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
TRAILER_SIGNED = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER"
TRAILER_UNSIGNED = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
BODY_MODES = ["hash", "UNSIGNED-PAYLOAD", CHUNK_SIGNED, TRAILER_SIGNED, TRAILER_UNSIGNED]
FRAMINGS = ["length", "http chunked"]


def aws_chunked(
    mode: str, signer: Signer, pieces: list[bytes], trailer: str, wrong: str = ""
) -> bytes:
    """A body in AWS's chunked coding. `trailer` is "name:value" or ""; `wrong` names what is
    spoiled."""
    out = []
    for number, data in enumerate([*pieces, b""]):
        piece, where = data, f"chunk {number}" if data else "the last chunk"
        extension = b""
        if mode != TRAILER_UNSIGNED:
            right = signer.chunk(piece)
            extension = (
                b";chunk-signature="
                + (spoiled(right) if wrong == f"signature of {where}" else right).encode()
            )
        if wrong == f"no signature of {where}":
            extension = b""
        if wrong == f"a flipped bit in {where}":
            piece = bytes([piece[0] ^ 1]) + piece[1:]
        size = b"%x" % len(piece)
        if wrong == f"size of {where}":
            size = b"-1"
        out.append(size + extension + b"\r\n" + piece + (b"\r\n" if piece else b""))
    if wrong == "chunks swapped":
        out[0], out[1] = out[1], out[0]
    if wrong == "no last chunk":
        del out[-1]
    if trailer:
        out.append(trailer.encode() + b"\r\n")
        if mode == TRAILER_SIGNED and wrong != "no trailer signature":
            right = signer.trailer(trailer + "\n")
            signature = spoiled(right) if wrong == "trailer signature" else right
            out.append(f"x-amz-trailer-signature:{signature}\r\n".encode())
    return b"".join(out) + b"\r\n"


def spoiled(signature: str) -> str:
    return ("1" if signature[0] == "0" else "0") + signature[1:]


def upload(
    s3: Client, key: str, data: bytes, mode: str, *, algorithm: str = "", wrong: str = "",
    framing: str = "length",
    query: str = "", headers: Mapping[str, str] | None = None, chunk: int = 1000,
) -> Answer:  # fmt: skip
    """PUT in any body mode, with a checksum where the mode puts it, and one thing spoiled."""
    given = {name.lower(): value for name, value in (headers or {}).items()}
    streamed, trailing = mode.startswith("STREAMING"), mode.endswith("TRAILER")
    signer = Signer(s3.credential)
    trailer = ""
    if algorithm:
        value = checksum(algorithm, data + b"!" if wrong == "checksum" else data)
        value = "malformed!" if wrong == "form of the checksum" else value
        name = f"x-amz-checksum-{algorithm.lower()}"
        if trailing:
            given["x-amz-trailer"] = name
            trailer = f"{name}:{value}"
        else:
            given[name] = value
    if wrong == "no trailer":
        trailer = ""
    if wrong == "another trailer":
        trailer = "x-amz-checksum-sha1:" + checksum("SHA1", data)
    if wrong == "content-md5":
        given["content-md5"] = md5_base64(data + b"!")
    if wrong == "form of the content-md5":
        given["content-md5"] = "bm90IDE2IGJ5dGVz"
    if streamed:
        off = {"decoded length too large": 1, "decoded length too small": -1}.get(wrong, 0)
        given["x-amz-decoded-content-length"] = str(len(data) + off)
        if given.setdefault("content-encoding", "aws-chunked") == "":
            del given["content-encoding"]
    payload = (
        sha256_hex(data + b"!" if wrong == "payload hash" else data) if mode == "hash" else mode
    )
    path = key_path(s3.bucket, key)
    signed = s3.signed_head("PUT", path, query, given, payload, signer)
    body = data
    if streamed:
        pieces = [data[at : at + chunk] for at in range(0, len(data), chunk)]
        body = aws_chunked(mode, signer, pieces, trailer, wrong)
    if framing == "length":
        signed["content-length"] = str(len(body))
    else:
        signed["transfer-encoding"] = "chunked"
        body = http_chunked(body, 700)
    target = f"{path}?{query}" if query else path
    return s3.exchange("PUT", head_bytes("PUT", target, signed) + body)


DATA = random.Random(7).randbytes(3500)


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("mode", BODY_MODES)
@pytest.mark.parametrize("algorithm", ["", *CHECKSUMS])
def test_every_body_mode_with_every_checksum(
    s3: Client, mode: str, framing: str, algorithm: str
) -> None:
    for data in (DATA, b"", b"x"):
        answer = upload(s3, "k", data, mode, algorithm=algorithm, framing=framing).ok()
        assert answer.etag == f'"{md5_hex(data)}"'
        got = s3.get("k", x_amz_checksum_mode="ENABLED").ok()
        assert got.body == data and "content-encoding" not in got.headers
        if algorithm:
            name = f"x-amz-checksum-{algorithm.lower()}"
            assert got.headers[name] == answer.headers[name] == checksum(algorithm, data)
            assert got.headers["x-amz-checksum-type"] == "FULL_OBJECT"


@pytest.mark.parametrize("mode", BODY_MODES)
def test_a_body_of_many_chunks(s3: Client, mode: str) -> None:
    data = random.Random(8).randbytes(500_000)
    for framing, chunk in (("length", 65536), ("http chunked", 8192), ("length", 500_000)):
        upload(s3, "k", data, mode, algorithm="CRC32", framing=framing, chunk=chunk).ok()
        assert s3.get("k").ok().body == data


FRAMING_ERRORS = ("IncompleteBody", "InvalidChunkSizeError", "InvalidRequest")


def wrong_bodies() -> Iterator[tuple[str, str, str, str]]:
    """(mode, algorithm, what is wrong, the codes that may answer it)."""
    framing = " ".join(FRAMING_ERRORS)
    for mode in BODY_MODES:
        yield mode, "", "content-md5", "BadDigest"
        yield mode, "", "form of the content-md5", "InvalidDigest"
        for algorithm in CHECKSUMS:
            yield mode, algorithm, "checksum", "BadDigest"
            malformed = (
                "InvalidRequest MalformedTrailerError" if "TRAILER" in mode else "InvalidRequest"
            )
            yield mode, algorithm, "form of the checksum", malformed
    yield "hash", "", "payload hash", "XAmzContentSHA256Mismatch"
    for mode in (CHUNK_SIGNED, TRAILER_SIGNED, TRAILER_UNSIGNED):
        algorithm = "" if mode == CHUNK_SIGNED else "CRC32"
        yield mode, algorithm, "decoded length too large", "IncompleteBody InvalidRequest"
        yield mode, algorithm, "decoded length too small", "IncompleteBody InvalidRequest"
        yield mode, algorithm, "size of chunk 1", framing
        yield mode, algorithm, "no last chunk", framing
        if mode == TRAILER_UNSIGNED:
            continue
        for what in (
            "signature of chunk 0", "signature of chunk 2", "signature of the last chunk",
            "a flipped bit in chunk 0",
            "a flipped bit in chunk 3", "chunks swapped",
        ):  # fmt: skip
            yield mode, algorithm, what, "SignatureDoesNotMatch"
        yield mode, algorithm, "no signature of chunk 1", "SignatureDoesNotMatch " + framing
    for mode in (TRAILER_SIGNED, TRAILER_UNSIGNED):
        yield mode, "CRC32", "no trailer", "MalformedTrailerError"
        yield mode, "CRC32", "another trailer", "MalformedTrailerError"
    yield TRAILER_SIGNED, "CRC32", "trailer signature", "SignatureDoesNotMatch"
    yield (
        TRAILER_SIGNED,
        "CRC32",
        "no trailer signature",
        "SignatureDoesNotMatch MalformedTrailerError",
    )


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize(("mode", "algorithm", "wrong", "codes"), [*wrong_bodies()])
def test_a_body_that_is_not_what_was_declared_stores_nothing(
    s3: Client, mode: str, algorithm: str, wrong: str, codes: str, framing: str
) -> None:
    s3.put("k", b"old").ok()
    for key in ("k", "new"):
        answer = upload(s3, key, DATA, mode, algorithm=algorithm, wrong=wrong, framing=framing)
        assert answer.error in codes.split()
    assert unchanged(s3, "k", b"old")


@pytest.mark.parametrize(("mode", "algorithm", "wrong"), [
    ("hash", "", "payload hash"), ("UNSIGNED-PAYLOAD", "CRC32", "checksum"), (CHUNK_SIGNED, "",
    "signature of chunk 2"),
    (TRAILER_UNSIGNED, "SHA256", "checksum"), ("hash", "", "content-md5"),
])  # fmt: skip
def test_a_part_that_is_not_what_was_declared_stores_nothing(
    s3: Client, mode: str, algorithm: str, wrong: str
) -> None:
    number = s3.create_upload("k")
    query = f"partNumber=1&uploadId={number}"
    good = upload(s3, "k", b"the part", mode, algorithm=algorithm, query=query).ok()
    bad = upload(s3, "k", DATA, mode, algorithm=algorithm, wrong=wrong, query=query)
    assert bad.error in ("XAmzContentSHA256Mismatch", "BadDigest", "SignatureDoesNotMatch")
    parts = s3.on_key("GET", "k", {"uploadId": number}).ok()
    assert parts.texts("Part/ETag") == [good.etag]
    s3.complete("k", number, [(1, good.etag)]).ok()
    assert unchanged(s3, "k", b"the part")


WRONG_DIGESTS = {  # of an empty body: header -> value and code
    "x-amz-content-sha256": (sha256_hex(b"x"), "XAmzContentSHA256Mismatch"),
    "content-md5": (md5_base64(b"x"), "BadDigest"),
    "x-amz-checksum-crc32": (checksum("CRC32", b"x"), "BadDigest"),
}


@pytest.mark.parametrize("name", WRONG_DIGESTS)
def test_a_deletion_whose_body_is_not_what_was_declared_changes_nothing(
    s3: Client, name: str
) -> None:
    value, code = WRONG_DIGESTS[name]
    assert s3.on_bucket("DELETE", headers={name: value}).error == code
    s3.put("k", b"old").ok()
    assert s3.on_key("DELETE", "k", headers={name: value}).error == code
    assert unchanged(s3, "k", b"old")
    assert s3.on_key("DELETE", "k", body=b"with a body").status == 204
    number = s3.create_upload("k")
    answer = s3.on_key("DELETE", "k", {"uploadId": number}, headers={name: value})
    # The AWS common runtime aborts with the checksum of the object that it was about to upload.
    assert answer.status == 204 if "checksum" in name else answer.error == code
    left = [] if "checksum" in name else [number]
    assert s3.on_bucket("GET", "uploads").ok().texts("Upload/UploadId") == left


def test_a_right_content_md5_is_accepted(s3: Client) -> None:
    for mode in BODY_MODES:
        upload(s3, "k", DATA, mode, headers={"content-md5": md5_base64(DATA)}).ok()


def test_checksums_are_returned_only_when_asked_for_and_never_of_a_range(s3: Client) -> None:
    value = checksum("CRC32C", DATA)
    s3.put("k", DATA, x_amz_checksum_crc32c=value).ok()
    for method in (s3.get, s3.head):
        assert "x-amz-checksum-crc32c" not in method("k").ok().headers
        whole = method("k", x_amz_checksum_mode="ENABLED").ok()
        assert whole.headers["x-amz-checksum-crc32c"] == value
        part = method("k", x_amz_checksum_mode="ENABLED", range="bytes=0-9").ok()
        assert part.status == 206 and "x-amz-checksum-crc32c" not in part.headers


def test_two_checksums_at_once_are_InvalidRequest(s3: Client) -> None:
    answer = s3.put(
        "k",
        DATA,
        x_amz_checksum_sha1=checksum("SHA1", DATA),
        x_amz_checksum_crc32=checksum("CRC32", DATA),
    )
    assert answer.error == "InvalidRequest"
    assert s3.keys() == []


@pytest.mark.parametrize(("name", "value"), [
    ("x-amz-sdk-checksum-algorithm", "MD4"), ("x-amz-checksum-md4", "AAAA"),
    ("x-amz-decoded-content-length", "many"), ("x-amz-trailer", "x-amz-meta-a"),
])  # fmt: skip
def test_a_declaration_that_does_not_exist_is_refused(s3: Client, name: str, value: str) -> None:
    mode = TRAILER_UNSIGNED if name in ("x-amz-trailer", "x-amz-decoded-content-length") else "hash"
    path = f"/{s3.bucket}/k"
    given = {"x-amz-decoded-content-length": "1", "x-amz-trailer": "x-amz-checksum-crc32"}
    given = (given if mode != "hash" else {}) | {name: value}
    headers = s3.signed_head("PUT", path, "", given, sha256_hex(b"x") if mode == "hash" else mode)
    body = b"x" if mode == "hash" else b"1\r\nx\r\n0\r\nx-amz-meta-a:1\r\n\r\n"
    head = head_bytes("PUT", path, headers | {"content-length": str(len(body))})
    answer = s3.exchange("PUT", head + body)
    assert answer.error in ("InvalidRequest", "InvalidArgument", "MalformedTrailerError")
    assert s3.keys() == []


def test_a_decoded_length_of_a_body_in_no_chunks_is_its_length(s3: Client) -> None:
    for length, code in ((5, ""), (4, "IncompleteBody"), (6, "IncompleteBody")):
        given = {"x-amz-decoded-content-length": str(length), "transfer-encoding": "chunked"}
        headers = s3.signed_head("PUT", f"/{s3.bucket}/k", "", given, "UNSIGNED-PAYLOAD")
        head = head_bytes("PUT", f"/{s3.bucket}/k", headers)
        answer = s3.exchange("PUT", head + b"5\r\nhello\r\n0\r\n\r\n")
        assert answer.error == code if code else answer.ok()
    s3.put("k", b"hello", x_amz_decoded_content_length="5").ok()
    framed = b"5\r\nhello\r\n0\r\n\r\n"
    headers = {"content_encoding": "aws-chunked", "x_amz_decoded_content_length": "5"}
    assert s3.put("k", framed, **headers).error == "InvalidRequest"
    assert unchanged(s3, "k", b"hello")


def test_a_streaming_body_without_its_decoded_length_is_MissingContentLength(s3: Client) -> None:
    headers = s3.signed_head("PUT", f"/{s3.bucket}/k", payload=TRAILER_UNSIGNED)
    head = head_bytes("PUT", f"/{s3.bucket}/k", headers | {"content-length": "6"})
    assert s3.exchange("PUT", head + b"0\r\n\r\n\n").error == "MissingContentLength"


@pytest.mark.parametrize("size", [3, zs3.BLOCK_BYTES + 3])
def test_of_a_body_that_is_longer_than_declared_no_more_is_taken(size: int) -> None:
    taken = 0
    with raises("IncompleteBody"):
        for block in zs3.Body(io.BytesIO(bytes(3 * size)), size):
            taken += len(block)
    assert taken <= size


@pytest.mark.parametrize("size", [4096, 4097])
def test_what_follows_the_last_chunk_of_a_body_has_at_most_4_kib(size: int) -> None:
    name, value = "x-amz-checksum-crc32", checksum("CRC32", b"")
    trailer = f"{name}:{value}".ljust(size - 2).encode() + b"\r\n"
    wire = io.BytesIO(b"0\r\n" + trailer)
    chunks = zs3.AwsChunks(zs3.WireBody(wire, size + 3), name, None, b"")
    with raises("InvalidChunkSizeError") if size > 4096 else contextlib.nullcontext():
        assert chunks.readinto(bytearray(1)) == 0
    assert chunks.trailers == ({} if size > 4096 else {name: value})


def test_an_unknown_body_mode_is_refused(s3: Client) -> None:
    for mode in (
        "STREAMING-AWS4-ECDSA-P256-SHA256-PAYLOAD",
        "STREAMING-NONSENSE",
        "0" * 63,
        "G" * 64,
    ):
        answer = upload(s3, "k", b"x", mode)
        assert answer.error in ("InvalidArgument", "NotImplemented")
    assert s3.keys() == []


def test_a_put_without_a_length_is_MissingContentLength(s3: Client) -> None:
    headers = s3.signed_head("PUT", f"/{s3.bucket}/k", payload=EMPTY_SHA256)
    assert (
        s3.exchange("PUT", head_bytes("PUT", f"/{s3.bucket}/k", headers)).error
        == "MissingContentLength"
    )


@pytest.mark.parametrize("query", ["", "partNumber=1&uploadId={upload}"])
def test_a_put_of_more_than_5_gib_is_EntityTooLarge_before_a_byte_is_sent(
    s3: Client, query: str
) -> None:
    query = query.format(upload=s3.create_upload("k"))
    target = f"/{s3.bucket}/k" + ("?" + query if query else "")
    headers = s3.signed_head("PUT", f"/{s3.bucket}/k", query) | {"expect": "100-continue"}
    with s3.connect() as connection:
        connection.send(head_bytes("PUT", target, headers | {"content-length": str((5 << 30) + 1)}))
        assert connection.answer().error == "EntityTooLarge"
    with s3.connect() as connection:
        connection.send(head_bytes("PUT", target, headers | {"content-length": str(5 << 30)}))
        assert connection.file.readline() == b"HTTP/1.1 100 Continue\r\n"
    assert s3.keys() == []


@pytest.mark.parametrize("mode", BODY_MODES)
@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_client_that_goes_away_in_the_middle_stores_nothing(
    s3: Client, mode: str, framing: str
) -> None:
    s3.put("k", b"old").ok()
    signer = Signer()
    given = {"x-amz-decoded-content-length": "3500"} if mode.startswith("STREAM") else {}
    payload = sha256_hex(DATA) if mode == "hash" else mode
    headers = s3.signed_head("PUT", f"/{s3.bucket}/k", "", given, payload, signer)
    body = DATA
    if mode.startswith("STREAM"):
        body = aws_chunked(mode, signer, [DATA], "")
    headers |= (
        {"content-length": str(len(body))}
        if framing == "length"
        else {"transfer-encoding": "chunked"}
    )
    wire = head_bytes("PUT", f"/{s3.bucket}/k", headers) + (
        body if framing == "length" else http_chunked(body)
    )
    for end in (-1, -2000, -len(body)):
        with s3.connect() as connection:
            connection.send(wire[:end])
            connection.socket.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError, TimeoutError):
                answer = connection.answer()
                assert answer.error in FRAMING_ERRORS
    assert unchanged(s3, "k", b"old")


# --- Conditions ----------------------------------------------------------------------------------

OTHER = '"0123456789abcdef0123456789abcdef"'
PAST, FUTURE = "Mon, 01 Jan 2001 00:00:00 GMT", "Fri, 01 Jan 2100 00:00:00 GMT"
SAME = "{etag}"

READ_CONDITIONS = [  # (RFC 9110, 13.2.2): headers -> status
    ({"if-match": SAME}, 200),
    ({"if-match": OTHER}, 412),
    ({"if-match": "*"}, 200),
    ({"if-match": f"{OTHER}, {SAME}"}, 200),
    ({"if-none-match": SAME}, 304),
    ({"if-none-match": OTHER}, 200),
    ({"if-none-match": "*"}, 304),
    ({"if-none-match": f"{OTHER},{SAME}"}, 304),
    ({"if-none-match": "W/" + SAME}, 304),
    ({"if-modified-since": PAST}, 200),
    (
        {"if-modified-since": FUTURE},
        200,
    ),  # RFC 9110: a date in the future is not valid; S3 may say 304
    ({"if-modified-since": "{modified}"}, 304),
    ({"if-modified-since": "not a date"}, 200),
    ({"if-unmodified-since": PAST}, 412),
    ({"if-unmodified-since": "{modified}"}, 200),
    ({"if-unmodified-since": FUTURE}, 200),
    ({"if-unmodified-since": "not a date"}, 200),
    # If-Match goes before If-Unmodified-Since, If-None-Match before If-Modified-Since.
    ({"if-match": SAME, "if-unmodified-since": PAST}, 200),
    ({"if-match": OTHER, "if-unmodified-since": FUTURE}, 412),
    ({"if-none-match": OTHER, "if-modified-since": "{modified}"}, 200),
    ({"if-none-match": SAME, "if-modified-since": PAST}, 304),
    ({"if-match": OTHER, "if-none-match": SAME}, 412),
    ({"if-match": SAME, "if-none-match": SAME}, 304),
    ({"if-unmodified-since": PAST, "if-none-match": SAME}, 412),
    ({"if-match": SAME, "range": "bytes=1-1"}, 206),
    ({"if-match": OTHER, "range": "bytes=1-1"}, 412),
    ({"if-none-match": SAME, "range": "bytes=99-"}, 304),
]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(("headers", "status"), READ_CONDITIONS)
def test_a_conditional_read(s3: Client, method: str, headers: dict[str, str], status: int) -> None:
    etag = s3.put("k", b"hello", cache_control="max-age=1").ok().etag
    modified = s3.head("k").headers["last-modified"]
    filled = {name: value.format(etag=etag, modified=modified) for name, value in headers.items()}
    answer = s3.on_key(method, "k", headers=filled)
    if headers.get("if-modified-since") == FUTURE:
        assert answer.status in (200, 304)
        return
    assert answer.status == status
    if status == 304:
        assert answer.body == b"" and answer.etag == etag
        assert answer.headers["last-modified"] == modified
        assert answer.headers["cache-control"] == "max-age=1"
    if status == 412 and method == "GET":
        assert answer.error == "PreconditionFailed"
        assert (answer.text("Condition") or "").lower() in headers
    if status < 300 and method == "GET":
        assert answer.body == (b"e" if status == 206 else b"hello")


def test_an_etag_condition_may_lack_its_quotes(s3: Client) -> None:
    etag = s3.put("k", b"hello").ok().etag
    s3.get("k", if_match=etag.strip('"')).ok()
    assert s3.get("k", if_none_match=etag.strip('"')).status == 304


def test_head_304_declares_no_length(s3: Client) -> None:
    """It would have to be the object's. (RFC 9110, 8.6)"""
    etag = s3.put("k", b"hello").ok().etag
    for method in ("HEAD", "GET"):
        answer = s3.on_key(method, "k", headers={"if-none-match": etag})
        assert answer.status == 304 and "content-length" not in answer.headers
    assert s3.head("k").ok().headers["content-length"] == "5"


def test_a_date_without_a_zone_is_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    """As asctime() writes it. (RFC 9110, 5.6.7)"""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        for text in ("Sun, 06 Nov 1994 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"):
            assert zs3.parse_http_date(text) == 784111777
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_condition_on_a_missing_key_is_NoSuchKey(s3: Client) -> None:
    for name in ("if_match", "if_none_match"):
        assert s3.get(MISSING_KEY, **{name: OTHER}).error == "NoSuchKey"
        assert s3.get(MISSING_KEY, **{name: "*"}).error == "NoSuchKey"


WRITE_CONDITIONS = [  # header, value, what is there -> code, or "" for success
    ("if_none_match", "*", b"", ""),
    ("if_none_match", "*", b"old", "PreconditionFailed"),
    ("if_match", SAME, b"old", ""),
    ("if_match", OTHER, b"old", "PreconditionFailed"),
    ("if_match", SAME, b"", "NoSuchKey"),
    ("if_none_match", SAME, b"old", "NotImplemented"),
    ("if_none_match", OTHER, b"old", "NotImplemented"),
]


@pytest.mark.parametrize("how", ["put", "complete", "copy", "streamed"])
@pytest.mark.parametrize(("name", "value", "there", "code"), WRITE_CONDITIONS)
def test_a_conditional_write(
    s3: Client, how: str, name: str, value: str, there: bytes, code: str
) -> None:
    s3.put("source", b"new").ok()
    etag = s3.put("k", there).ok().etag if there else OTHER
    condition = {name: value.format(etag=etag)}
    if how == "put":
        answer = s3.put("k", b"new", **condition)
    elif how == "streamed":
        answer = upload(s3, "k", b"new", CHUNK_SIGNED, headers=dashed(condition))
    elif how == "copy":
        answer = s3.copy("source", "k", **condition)
    else:
        number = s3.create_upload("k")
        part = s3.put_part("k", number, 1, b"new").ok()
        answer = s3.complete("k", number, [(1, part.etag)], **condition)
    if code:
        assert answer.error == code
        if code == "PreconditionFailed":
            assert (answer.text("Condition") or "").lower() == name.replace("_", "-")
        assert s3.keys() == (["k", "source"] if there else ["source"])
        assert not there or s3.get("k").body == there
    else:
        answer.ok()
        assert s3.get("k").body == b"new"


@pytest.mark.parametrize("how", ["put", "delete", "copy", "complete"])
def test_a_write_with_a_date_condition_is_refused_and_changes_nothing(
    s3: Client, how: str
) -> None:
    """The write must not happen as if there were no condition. (RFC 9110, 13.1.4)"""
    s3.put("k", b"old").ok()
    number = s3.create_upload("k")
    part = s3.put_part("k", number, 1, b"new").ok()
    s3.put("source", b"new").ok()
    date = {"if_unmodified_since": PAST}
    write = {
        "put": lambda: s3.put("k", b"new", **date),
        "delete": lambda: s3.delete("k", **date),
        "copy": lambda: s3.copy("source", "k", **date),
        "complete": lambda: s3.complete("k", number, [(1, part.etag)], **date),
    }
    assert write[how]().error == "NotImplemented"
    s3.delete("source").ok()
    assert unchanged(s3, "k", b"old")
    assert s3.on_bucket("GET", "uploads").ok().texts("Upload/UploadId") == [number]


def test_a_failed_condition_of_complete_leaves_the_upload(s3: Client) -> None:
    s3.put("k", b"old").ok()
    number = s3.create_upload("k")
    part = s3.put_part("k", number, 1, b"new").ok()
    assert (
        s3.complete("k", number, [(1, part.etag)], if_none_match="*").error == "PreconditionFailed"
    )
    assert s3.on_key("GET", "k", {"uploadId": number}).ok().texts("Part/PartNumber") == ["1"]
    s3.complete("k", number, [(1, part.etag)], if_match=s3.head("k").etag).ok()
    assert s3.get("k").body == b"new"


def test_a_conditional_delete(s3: Client) -> None:
    """(S3 User Guide, "How to perform conditional deletes".)"""
    etag = s3.put("k", b"old").ok().etag
    assert s3.delete("k", if_match=OTHER).error == "PreconditionFailed"
    assert unchanged(s3, "k", b"old")
    assert s3.delete("k", if_match=etag).status == 204
    s3.put("k", b"old").ok()
    assert s3.delete("k", if_match="*").status == 204
    for value in ("*", etag):
        assert s3.delete("k", if_match=value).error in ("PreconditionFailed", "NoSuchKey")


def test_a_refused_condition_is_answered_before_100_continue_when_it_is_already_known(
    s3: Client,
) -> None:
    """Not promised by S3, but the body must in any case be either taken or refused, never half of
    each."""
    s3.put("k", b"old").ok()
    given = {"if-none-match": "*", "expect": "100-continue", "content-length": "3"}
    headers = s3.signed_head("PUT", f"/{s3.bucket}/k", "", given)
    with s3.connect() as connection:
        connection.send(head_bytes("PUT", f"/{s3.bucket}/k", headers))
        line = connection.file.readline()
        if line.startswith(b"HTTP/1.1 100"):
            assert connection.file.readline() == b"\r\n"
            connection.send(b"new")
            assert connection.answer().error == "PreconditionFailed"
        else:
            assert line.startswith(b"HTTP/1.1 412")
    assert unchanged(s3, "k", b"old")


def race(clients: int, act: Callable[[int], Answer]) -> list[Answer]:
    """What each of many clients got that did the same thing at the same moment."""
    start = threading.Barrier(clients)

    def run(number: int) -> Answer:
        start.wait()
        return act(number)

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        return list(pool.map(run, range(clients)))


@pytest.mark.parametrize("how", ["put", "complete"])
def test_of_fifty_clients_with_if_none_match_exactly_one_wins(s3: Client, how: str) -> None:
    others = [s3.using(ADMIN) for _ in range(50)]
    finish: dict[int, tuple[str, str]] = {}
    if how == "complete":
        for number in range(50):
            name = s3.create_upload("k")
            finish[number] = (name, s3.put_part("k", name, 1, b"%d" % number).ok().etag)

    def act(number: int) -> Answer:
        if how == "put":
            return others[number].put("k", b"%d" % number, if_none_match="*")
        name, etag = finish[number]
        return others[number].complete("k", name, [(1, etag)], if_none_match="*")

    answers = race(50, act)
    lost = [answer.error for answer in answers if answer.status != 200]
    for client in others:
        client.close()
    # S3 also says 409 ConditionalRequestConflict of a race, and a distributed store 503.
    assert set(lost) <= {
        "PreconditionFailed",
        "ConditionalRequestConflict",
        "OperationAborted",
        "SlowDown",
    }
    assert len(lost) == 49
    winner = next(answer for answer in answers if answer.status == 200)
    etag = winner.headers.get("etag") or winner.text("ETag")
    assert s3.head("k").etag == etag


def test_what_many_append_with_if_match_is_there_once_each(s3: Client) -> None:
    s3.put("n", b"").ok()

    def act(number: int) -> Answer:
        mine = b"%d " % number
        with contextlib.closing(s3.using(ADMIN)) as client:
            while mine not in (now := client.get("n").ok()).body:
                answer = client.put("n", now.body + mine, if_match=now.etag)
                assert answer.status in (200, 412, 409, 503)  # a 503 may have happened
        return now

    race(8, act)
    assert sorted(s3.get("n").body.split()) == [b"%d" % number for number in range(8)]


# --- Ranges --------------------------------------------------------------------------------------

RANGES = [  # of the ten bytes "0123456789": header -> bytes, None for 416, ... for the whole object
    ("bytes=0-0", b"0"), ("bytes=0-9", b"0123456789"), ("bytes=9-9", b"9"), ("bytes=2-4", b"234"),
    ("bytes=5-", b"56789"), ("bytes=0-", b"0123456789"), ("bytes=-1", b"9"), ("bytes=-10",
    b"0123456789"),
    ("bytes=-11", b"0123456789"), ("bytes=9-100", b"9"), ("bytes=0-9223372036854775808",
    b"0123456789"),
    ("bytes=-9223372036854775808", b"0123456789"), ("Bytes=0-1", b"01"), ("BYTES = 8-", b"89"),
    ("bytes=10-", None), ("bytes=10-10", None), ("bytes=100-200", None), ("bytes=-0", None),
    # A Range that is not understood is ignored. (RFC 9110, 14.2; S3 gives no multipart/byteranges.)
    ("bytes=5-2", ...), ("bytes=", ...), ("bytes=-", ...), ("bytes=a-b", ...), ("bytes=0x1-2", ...),
    ("items=0-1", ...), ("bytes 0-1", ...), ("0-1", ...), ("bytes=+1-2", ...), ("bytes=1_0-", ...),
    ("bytes=0-1,3-4", ...), ("bytes=٣-٤", ...),
]  # fmt: skip


@pytest.mark.parametrize(("value", "expected"), RANGES)
def test_a_range(s3: Client, value: str, expected: Any) -> None:
    s3.put("k", b"0123456789").ok()
    value = value.encode().decode("latin-1")  # as bytes on the wire
    headers = s3.signed_head("GET", f"/{s3.bucket}/k") | {
        "range": value
    }  # Range need not be signed
    got = s3.exchange("GET", head_bytes("GET", f"/{s3.bucket}/k", headers))
    headers = s3.signed_head("HEAD", f"/{s3.bucket}/k") | {"range": value}
    head = s3.exchange("HEAD", head_bytes("HEAD", f"/{s3.bucket}/k", headers))
    assert head.status == got.status
    if expected is None:
        assert got.error == "InvalidRange"
        assert got.headers["content-range"] == "bytes */10"
        assert got.text("ActualObjectSize") == "10"
        return
    whole = expected is ...
    assert got.status == (200 if whole else 206)
    assert got.body == (b"0123456789" if whole else expected)
    assert head.headers["content-length"] == got.headers["content-length"] == str(len(got.body))
    if not whole:
        first = b"0123456789".index(expected)
        content_range = f"bytes {first}-{first + len(expected) - 1}/10"
        assert got.headers["content-range"] == head.headers["content-range"] == content_range


def test_a_range_of_an_empty_object(s3: Client) -> None:
    s3.put("k").ok()
    for value in ("bytes=0-", "bytes=0-0", "bytes=-1"):
        answer = s3.get("k", range=value)
        assert answer.error == "InvalidRange"
        assert answer.headers["content-range"] == "bytes */0"
    assert s3.get("k").ok().body == b""


def test_random_ranges_of_a_large_object(s3: Client) -> None:
    rng = random.Random(3)
    body = rng.randbytes(1_000_000)
    s3.put("k", body).ok()
    for _ in range(30):
        first, last = sorted(rng.choices(range(len(body)), k=2))
        assert s3.get("k", range=f"bytes={first}-{last}").ok().body == body[first : last + 1]


def test_if_range(s3: Client) -> None:
    """(RFC 9110, 13.1.5.)"""
    etag = s3.put("k", b"0123456789").ok().etag
    assert s3.get("k", range="bytes=0-0", if_range=etag).status == 206
    assert s3.get("k", range="bytes=0-0", if_range=OTHER).body == b"0123456789"


# --- Copy ----------------------------------------------------------------------------------------


def test_a_copy_carries_body_headers_and_checksums(s3: Client) -> None:
    headers = {
        "content_type": "text/x", "x_amz_meta_a": "1", "cache_control": "no-store",
        "x_amz_checksum_sha256": checksum("SHA256", DATA),
    }  # fmt: skip
    put = s3.put("source", DATA, **headers).ok()
    answer = s3.copy("source", "to/copy").ok()
    assert answer.xml.tag == "CopyObjectResult"
    assert answer.text("ETag") == put.etag
    assert answer.text("ChecksumSHA256") == checksum("SHA256", DATA)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", answer.text("LastModified") or ""
    )
    got = s3.get("to/copy", x_amz_checksum_mode="ENABLED").ok()
    assert got.body == DATA and got.etag == put.etag
    assert got.headers["content-type"] == "text/x" and got.headers["x-amz-meta-a"] == "1"
    assert got.headers["cache-control"] == "no-store"
    assert got.headers["x-amz-checksum-sha256"] == checksum("SHA256", DATA)
    s3.delete("source").ok()
    assert s3.get("to/copy").ok().body == DATA


def test_replace_replaces_all_headers_and_copy_keeps_them(s3: Client) -> None:
    s3.put("source", b"x", content_type="text/x", x_amz_meta_a="1").ok()
    new = {"content_type": "text/new", "x_amz_meta_b": "2"}
    s3.copy("source", "replaced", x_amz_metadata_directive="REPLACE", **new).ok()
    headers = s3.head("replaced").headers
    assert headers["content-type"] == "text/new" and headers["x-amz-meta-b"] == "2"
    assert "x-amz-meta-a" not in headers
    s3.copy("source", "kept", x_amz_metadata_directive="COPY", **new).ok()
    headers = s3.head("kept").headers
    assert headers["content-type"] == "text/x" and headers["x-amz-meta-a"] == "1"
    assert "x-amz-meta-b" not in headers
    answer = s3.copy("source", "neither", x_amz_metadata_directive="MERGE")
    assert answer.error == "InvalidArgument"
    assert s3.keys() == ["kept", "replaced", "source"]


def test_a_copy_onto_itself_must_change_something(s3: Client) -> None:
    s3.put("k", DATA, x_amz_meta_a="1").ok()
    assert s3.copy("k", "k").error == "InvalidRequest"
    assert s3.get("k").ok().body == DATA
    s3.copy("k", "k", x_amz_metadata_directive="REPLACE", x_amz_meta_a="2").ok()
    got = s3.get("k").ok()
    assert got.body == DATA and got.headers["x-amz-meta-a"] == "2"


def test_a_copy_to_itself_with_a_storage_class_succeeds(s3: Client) -> None:
    """How clients give an object a new date."""
    s3.put("k", DATA, x_amz_meta_a="1").ok()
    s3.copy("k", "k", x_amz_storage_class="STANDARD").ok()
    got = s3.get("k").ok()
    assert got.body == DATA and got.headers["x-amz-meta-a"] == "1"
    assert s3.copy("k", "k", x_amz_storage_class="GLACIER").error == "InvalidStorageClass"


def test_a_copy_of_an_object_with_a_range_is_InvalidRequest(s3: Client) -> None:
    """A range is for UploadPartCopy; all of the object is not what was asked for."""
    s3.put("source", DATA).ok()
    answer = s3.copy("source", "k", x_amz_copy_source_range="bytes=0-1")
    assert answer.error == "InvalidRequest"
    assert unchanged(s3, "source", DATA)


COPY_SOURCES = ["{b}/a%20b", "/{b}/a%20b", "{b}%2Fa%20b", "%2F{b}%2Fa%20b", "{b}/a+b", "/{b}/a+b"]


@pytest.mark.parametrize("source", COPY_SOURCES)
def test_a_copy_source_is_decoded_once(s3: Client, source: str) -> None:
    s3.put("a b", b"blank").ok()
    given = {"x-amz-copy-source": source.format(b=s3.bucket)}
    s3.on_key("PUT", "k", headers=given).ok()
    assert s3.get("k").body == b"blank"


def test_a_percent_sign_in_a_copy_source(s3: Client) -> None:
    s3.put("a%20b", b"percent").ok()
    s3.put("a b", b"blank").ok()
    s3.copy("a%20b", "k").ok()
    assert s3.get("k").body == b"percent"


COPY_SOURCE_ERRORS = {
    "{b}/missing": "NoSuchKey", "no-such-bucket/k": "NoSuchBucket", "{b}": "InvalidArgument",
    "{b}/": "InvalidArgument",
    "": "InvalidArgument", "/": "InvalidArgument", "k": "InvalidArgument",
    "{b}/../k": "InvalidArgument",
    "{b}/%ff": "InvalidArgument InvalidURI",
    "{b}/k?versionId=3": "NoSuchVersion NotImplemented InvalidArgument",
    ".uploads/x": "NoSuchBucket InvalidBucketName InvalidArgument",
    "UPPER/k": "InvalidBucketName NoSuchBucket InvalidArgument",
    "{b}/{long}": "KeyTooLongError NoSuchKey",
}  # fmt: skip


@pytest.mark.parametrize("source", COPY_SOURCE_ERRORS)
def test_a_bad_copy_source(s3: Client, source: str) -> None:
    s3.put("k", b"old").ok()
    given = {"x-amz-copy-source": source.format(b=s3.bucket, long="x" * 1025)}
    answer = s3.on_key("PUT", "k", headers=given)
    assert answer.error in COPY_SOURCE_ERRORS[source].split()
    number = s3.create_upload("k")
    answer = s3.on_key("PUT", "k", {"partNumber": 1, "uploadId": number}, headers=given)
    assert answer.error in COPY_SOURCE_ERRORS[source].split()
    assert unchanged(s3, "k", b"old")


COPY_CONDITIONS = [  # (S3 API reference, CopyObject): headers without x-amz-copy-source- -> success
    ({"if-match": SAME}, True), ({"if-match": OTHER}, False), ({"if-none-match": OTHER}, True),
    ({"if-none-match": SAME}, False), ({"if-unmodified-since": FUTURE}, True),
    ({"if-unmodified-since": PAST}, False), ({"if-modified-since": PAST}, True),
    ({"if-modified-since": "{modified}"}, False),
    ({"if-match": SAME, "if-unmodified-since": PAST}, True),
    ({"if-none-match": SAME, "if-modified-since": PAST}, False),
]  # fmt: skip


@pytest.mark.parametrize(("headers", "success"), COPY_CONDITIONS)
@pytest.mark.parametrize("part", [False, True], ids=["CopyObject", "UploadPartCopy"])
def test_a_conditional_copy(s3: Client, headers: dict[str, str], success: bool, part: bool) -> None:
    etag = s3.put("source", b"new").ok().etag
    modified = s3.head("source").headers["last-modified"]
    given = {
        f"x-amz-copy-source-{name}": value.format(etag=etag, modified=modified)
        for name, value in headers.items()
    } | {"x-amz-copy-source": f"{s3.bucket}/source"}
    query = {"partNumber": 1, "uploadId": s3.create_upload("k")} if part else {}
    answer = s3.on_key("PUT", "k", query, headers=given)
    if success:
        answer.ok()
    else:
        assert answer.error == "PreconditionFailed"
        assert s3.keys() == ["source"]


def test_a_copy_between_buckets(s3: Client) -> None:
    other = Client(s3.ports, f"{s3.bucket}-b")
    other.on_bucket("PUT").ok()
    s3.put("k", b"x").ok()
    other.on_key("PUT", "k", headers={"x-amz-copy-source": f"/{s3.bucket}/k"}).ok()
    assert other.get("k").ok().body == b"x"
    other.close()


def test_a_copy_may_compute_another_checksum(s3: Client) -> None:
    s3.put("source", DATA).ok()
    answer = s3.copy("source", "k", x_amz_checksum_algorithm="SHA1")
    if answer.status == 200:
        got = s3.get("k", x_amz_checksum_mode="ENABLED").ok()
        assert got.headers["x-amz-checksum-sha1"] == checksum("SHA1", DATA)
    else:
        assert answer.error == "NotImplemented"


def test_a_copy_with_a_body_or_an_encryption_header_changes_nothing_unsaid(s3: Client) -> None:
    s3.put("source", b"x").ok()
    given = {"x_amz_copy_source_server_side_encryption_customer_algorithm": "AES256"}
    assert s3.copy("source", "k", **given).error in (
        "NotImplemented",
        "InvalidArgument",
        "InvalidRequest",
    )
    tagging = s3.copy("source", "k", x_amz_tagging_directive="REPLACE", x_amz_tagging="a=b")
    assert tagging.error in ("NotImplemented", "InvalidArgument")
    assert s3.keys() == ["source"]


# --- Listing -------------------------------------------------------------------------------------

Page = tuple[list[str], list[str], bool]  # keys, common prefixes, whether more follow


def model_page(keys: Iterable[str], prefix: str, delimiter: str, after: str, size: int) -> Page:
    """What S3 lists: the first `size` entries > `after` of the keys in byte order, common prefixes
    rolled up."""
    entries: dict[str, bool] = {}  # entry -> whether it is a common prefix
    for key in sorted(keys, key=str.encode):
        end = key.find(delimiter, len(prefix)) if delimiter else -1
        entry = key if end < 0 else key[: end + len(delimiter)]
        if key.startswith(prefix) and key.encode() > after.encode() and entry != after:
            entries.setdefault(entry, end >= 0)
    page = list(entries.items())[:size]
    return (
        [k for k, rolled in page if not rolled],
        [k for k, rolled in page if rolled],
        len(entries) > size,
    )


def page_of(answer: Answer, encoded: bool = True) -> Page:
    decode = urllib.parse.unquote_plus if encoded else str
    keys = [decode(key) for key in answer.texts("Contents/Key")]
    prefixes = [decode(text) for text in answer.texts("CommonPrefixes/Prefix")]
    return keys, prefixes, answer.text("IsTruncated") == "true"


def walk(s3: Client, version: int, **parameters: object) -> Iterator[Page]:
    """All pages of a listing, each found by what the one before it said."""
    following: dict[str, object] = {}
    while True:
        answer = s3.list(version, encoding_type="url", **(parameters | following))
        page = page_of(answer)
        yield page
        if not page[2]:
            return
        if version == 2:
            following = {"continuation_token": answer.text("NextContinuationToken")}
        elif parameters.get("delimiter"):
            following = {"marker": urllib.parse.unquote_plus(answer.text("NextMarker") or "")}
        else:
            following = {"marker": page[0][-1]}


LISTED = [
    "a",
    "a-b",
    "a.b",
    "a/",
    "a/1",
    "a/2/x",
    "a/2/y",
    "a/b/c",
    "a0",
    "b",
    "b//c",
    "é",
    "é/x",
    "😀",
    "\uff5e",
]


def test_list_objects_v2(s3: Client) -> None:
    for key in ("b", "a&b", "a"):
        s3.put(key, b"12345").ok()
    answer = s3.list(prefix="")
    root = answer.xml
    assert answer.body.startswith(b'<?xml version="1.0" encoding="UTF-8"?>')
    assert b'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">' in answer.body
    assert answer.headers["content-type"] == "application/xml"
    assert root.tag == "ListBucketResult"
    assert root.findtext("Name") == s3.bucket and root.findtext("KeyCount") == "3"
    assert root.findtext("MaxKeys") == "1000" and root.findtext("IsTruncated") == "false"
    assert root.findtext("Prefix") == "" and root.find("NextContinuationToken") is None
    assert root.find("Marker") is None
    assert answer.texts("Contents/Key") == ["a", "a&b", "b"]
    assert answer.texts("Contents/Size") == ["5"] * 3
    assert answer.texts("Contents/ETag") == [f'"{md5_hex(b"12345")}"'] * 3
    assert answer.texts("Contents/StorageClass") == ["STANDARD"] * 3
    for date in answer.texts("Contents/LastModified"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", date)
    assert root.find("Contents/Owner") is None
    assert s3.list(fetch_owner="true").texts("Contents/Owner/ID")


def test_list_objects_v1(s3: Client) -> None:
    for key in ("b", "a", "c/d"):
        s3.put(key, b"x").ok()
    answer = s3.list(1, delimiter="/", max_keys=2)
    root = answer.xml
    assert root.findtext("Marker") == "" and root.findtext("NextMarker") == "b"
    assert root.findtext("Delimiter") == "/" and root.findtext("MaxKeys") == "2"
    assert root.find("KeyCount") is None and root.find("Contents/Owner/ID") is not None
    assert page_of(answer) == (["a", "b"], [], True)
    answer = s3.list(1, delimiter="/", marker="b")
    assert page_of(answer) == ([], ["c/"], False) and answer.text("Marker") == "b"


def test_a_listing_takes_a_prefix_longer_than_any_key(s3: Client) -> None:
    s3.put("k", b"x").ok()
    long = "p" * 1500
    for version, names in ((2, ("prefix", "start_after", "delimiter")), (1, ("marker",))):
        for name in names:
            listed = s3.list(version, **{name: long}).texts("Contents/Key")
            assert listed == (["k"] if name == "delimiter" else [])


def test_the_head_of_a_listing_comes_before_its_contents(s3: Client) -> None:
    s3.put("k", b"x").ok()
    s3.put("p/k", b"x").ok()
    for version in (1, 2):
        names = [element.tag for element in s3.list(version, delimiter="/").xml]
        first = names.index("Contents")
        assert names[first:] == ["Contents", "CommonPrefixes"]
        assert {"Name", "Prefix", "MaxKeys", "Delimiter", "IsTruncated"} <= set(names[:first])


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("delimiter", ["", "/", "//", "b", "-b", "/2/"])
@pytest.mark.parametrize("prefix", ["", "a", "a/", "a/2", "a/2/", "b/", "é", "é/", "zz"])
def test_listing_against_the_model(
    service: Service, version: int, delimiter: str, prefix: str
) -> None:
    s3 = bucket_of_listed(service)
    names: dict[str, object] = {"prefix": prefix} | ({"delimiter": delimiter} if delimiter else {})
    for after in ("", "a/1", "a/2/xx", "a0", "\U0010ffff"):
        start: dict[str, object] = (
            {"marker" if version == 1 else "start_after": after} if after else {}
        )
        answer = s3.list(version, encoding_type="url", **names, **start)
        assert page_of(answer) == model_page(LISTED, prefix, delimiter, after, 1000), after
    whole = model_page(LISTED, prefix, delimiter, "", 1000)
    for size in (1, 2, 3):
        pages = list(walk(s3, version, max_keys=size, **names))
        assert [key for page in pages for key in page[0]] == whole[0]
        assert [text for page in pages for text in page[1]] == whole[1]
        assert all(len(page[0]) + len(page[1]) == size for page in pages[:-1])
    s3.close()


def bucket_of_listed(service: Service) -> Client:
    """A bucket with the keys LISTED, made once for each store."""
    s3 = service.client("listed-keys")
    if s3.on_bucket("HEAD").status == 404:
        s3.on_bucket("PUT").ok()
        for key in LISTED:
            s3.put(key, b"x").ok()
    return s3


def test_keys_are_listed_in_the_byte_order_of_utf8(s3: Client) -> None:
    keys = ["\uff5e", "😀", "Z", "a", "é", "~", "a/b", "a-b", "a.b", "a", "a!", "a0", "B"]
    for key in keys:
        s3.put(key, b"x").ok()
    assert s3.keys() == sorted(set(keys), key=str.encode)


def test_max_keys(s3: Client) -> None:
    for key in ("a", "b", "c"):
        s3.put(key, b"x").ok()
    none = s3.list(max_keys=0)
    assert page_of(none) == ([], [], False) and none.text("KeyCount") == "0"
    assert none.text("NextContinuationToken") is None
    for size in (1000, 1001, 10000, 2**31 - 1):
        assert s3.list(max_keys=size).text("MaxKeys") in ("1000", str(size))
    exact = s3.list(max_keys=3)
    assert page_of(exact) == (["a", "b", "c"], [], False)
    for bad in (-1, "many", "1.5", "٣", "1" * 5000):
        assert s3.on_bucket("GET", {"list-type": 2, "max-keys": bad}).error == "InvalidArgument"
    for name, value in (("encoding-type", "base64"), ("list-type", "3"), ("continuation-token",
    "!"),
                        ("continuation-token", "")):  # fmt: skip
        assert s3.on_bucket("GET", {"list-type": 2} | {name: value}).error == "InvalidArgument"


def test_a_page_has_at_most_1000_keys(s3: Client) -> None:
    keys = [f"{number:04}" for number in range(1003)]
    clients = [s3.using(ADMIN) for _ in range(4)]
    race(4, lambda n: [clients[n].put(key).ok() for key in keys[n::4]][-1])
    for client in clients:
        client.close()
    for version in (1, 2):
        pages = list(walk(s3, version))
        assert [len(page[0]) for page in pages] == [1000, 3]
        assert [key for page in pages for key in page[0]] == keys
    assert len(s3.list(max_keys=10000).texts("Contents/Key")) == 1000
    s3.delete_objects(keys[:1000]).ok()
    assert s3.keys() == keys[1000:]


def test_each_key_has_one_version_which_is_null(s3: Client) -> None:
    """What tools ask that empty a bucket."""
    for key in ("a", "b/1", "b/2", "c d"):
        s3.put(key, b"x").ok()
    query: dict[str, object] = {"versions": "", "delimiter": "/", "max-keys": 2}
    page = s3.on_bucket("GET", query).ok()
    assert page.xml.tag == "ListVersionsResult" and page.text("IsTruncated") == "true"
    assert page.texts("Version/Key") == ["a"] and page.texts("Version/VersionId") == ["null"]
    assert page.texts("Version/IsLatest") == ["true"]
    assert page.texts("CommonPrefixes/Prefix") == ["b/"]
    assert page.text("NextKeyMarker") == "b/" and page.text("NextVersionIdMarker") == "null"
    rest = query | {"key-marker": "b/", "version-id-marker": "null", "encoding-type": "url"}
    page = s3.on_bucket("GET", rest).ok()
    assert page.texts("Version/Key") == ["c%20d"] and page.text("IsTruncated") == "false"
    assert page.text("NextKeyMarker") is None and page.text("KeyMarker") == "b/"
    found = s3.on_bucket("GET", "versions").ok()
    named = [f"<Object><Key>{key}</Key><VersionId>null</VersionId></Object>"
             for key in found.texts("Version/Key")]  # fmt: skip
    document = f"<Delete>{''.join(named)}</Delete>".encode()
    given = {"content-md5": md5_base64(document)}
    assert len(s3.on_bucket("POST", "delete", document, given).ok().texts("Deleted/Key")) == 4
    assert s3.on_bucket("GET", "versions").ok().texts("Version/Key") == s3.keys() == []


def test_encoding_type_url_encodes_every_name(s3: Client) -> None:
    for key in ("a b+c/é&", "a b+c/d", "a b+c/\x02"):
        s3.put(key, b"x").ok()
    answer = s3.list(
        1, encoding_type="url", prefix="a b+c/", delimiter="&", marker="a b", max_keys=2
    )
    assert answer.text("EncodingType") == "url"
    assert answer.texts("Contents/Key") == ["a%20b%2Bc/%02", "a%20b%2Bc/d"]
    assert answer.text("Prefix") == "a%20b%2Bc/" and answer.text("Delimiter") == "%26"
    assert answer.text("Marker") == "a%20b" and answer.text("NextMarker") == "a%20b%2Bc/d"
    rolled = s3.list(encoding_type="url", prefix="a b+c/é", delimiter="&", start_after="a b")
    assert rolled.texts("CommonPrefixes/Prefix") == ["a%20b%2Bc/%C3%A9%26"]
    assert rolled.text("StartAfter") == "a%20b"
    assert s3.list(prefix="a b+c/d").texts("Contents/Key") == ["a b+c/d"]


def test_a_continuation_token_is_a_position_not_a_key(s3: Client) -> None:
    keys = list("abcdefgh")
    for key in keys:
        s3.put(key, b"x").ok()
    first = s3.list(max_keys=3)
    token = first.text("NextContinuationToken")
    for key in ("c", "d", "a"):  # the last key seen, the next one and one before them
        s3.delete(key).ok()
    s3.put("cc", b"x").ok()
    answer = s3.list(max_keys=3, continuation_token=token)
    assert answer.texts("Contents/Key") == ["cc", "e", "f"]
    assert answer.text("ContinuationToken") == token
    again = s3.list(max_keys=3, continuation_token=token, start_after="a")
    assert again.texts("Contents/Key") == ["cc", "e", "f"]


def test_pages_with_writes_and_deletions_between_them_show_what_stayed(s3: Client) -> None:
    rng = random.Random(11)
    for round_number in range(3):
        keys = {"".join(rng.choices("ab/-", k=rng.randint(1, 5))) for _ in range(25)}
        keys = {key for key in keys if not {".", ".."} & set(key.split("/"))}
        for key in keys:
            s3.put(key, b"x").ok()
        delimiter = rng.choice(["", "/", "-", "a/"])
        doomed = set(rng.sample(sorted(keys), 8))
        added = {f"{key}!" for key in rng.sample(sorted(keys), 4)} - keys
        seen: list[str] = []
        for number, (contents, prefixes, _) in enumerate(
            walk(s3, 1 + round_number % 2, max_keys=3, delimiter=delimiter)
        ):
            seen += sorted(contents + prefixes, key=str.encode)
            if number == 1:
                for key in doomed:
                    s3.delete(key).ok()
                for key in added:
                    s3.put(key, b"x").ok()
        before = model_page(keys | added, "", delimiter, "", 10**6)
        stayed = model_page(keys - doomed, "", delimiter, "", 10**6)
        assert seen == sorted(set(seen), key=str.encode), "in order, and nothing twice"
        assert set(stayed[0] + stayed[1]) <= set(seen) <= set(before[0] + before[1])
        for key in keys | added:
            s3.delete(key).ok()


def objects(keys: Iterable[str], prefix: str) -> Callable[[str], Iterator[Any]]:
    """A store's scan over a set of keys, as zs3.list_page wants it."""
    ordered = sorted((key for key in keys if key.startswith(prefix)), key=str.encode)
    infos = [zs3.ObjectInfo(key, 0, "", 0.0, {}, {}, "", (), "") for key in ordered]
    return lambda start: iter([info for info in infos if info.key.encode() >= start.encode()])


def random_keys(rng: random.Random) -> set[str]:
    letters = rng.choice(["ab/", "a/-", "/", "ab/é😀", "a.0/~", "xy"])
    return {"".join(rng.choices(letters, k=rng.randint(1, 7))) for _ in range(rng.randint(0, 25))}


def random_prefix(rng: random.Random, keys: set[str]) -> str:
    if not keys or rng.random() < 0.4:
        return ""
    key = rng.choice(sorted(keys))
    return key[: rng.randint(0, len(key))]


DELIMITERS = ["", "/", "/", "//", "a", "ab", "-a/", "é", "😀", "\U0010ffff"]


@pytest.mark.parametrize(("prefix", "above"), [
    ("a", "b"), ("a\U0010ffff", "b"), ("\U0010ffff", None), ("", None), ("\ud7ff", "\ue000"),
])  # fmt: skip
def test_what_comes_after_all_that_begins_so(prefix: str, above: str | None) -> None:
    """Between U+D7FF and U+E000 are the surrogates, which are no text."""
    assert zs3.successor(prefix) == above


def test_law_a_page_is_the_models_page() -> None:
    rng = random.Random(21)
    for _ in range(4000):
        keys = random_keys(rng)
        prefix, after = random_prefix(rng, keys), random_prefix(rng, keys)
        delimiter, size = rng.choice(DELIMITERS), rng.choice([1, 2, 3, 1000])
        start = zs3.start_after(after, prefix, delimiter)
        page = zs3.list_page(objects(keys, prefix), prefix, delimiter, start, size)
        came = [info.key for info in page.contents], page.prefixes, page.next_start is not None
        assert came == model_page(keys, prefix, delimiter, after, size), (
            keys,
            prefix,
            delimiter,
            after,
        )


def test_law_pages_together_are_the_whole_in_order_and_nothing_twice() -> None:
    """Also while objects are deleted between pages: what stays is shown, what is shown was
    there."""
    rng = random.Random(22)
    for _ in range(2500):
        keys = random_keys(rng)
        prefix, delimiter, size = (
            random_prefix(rng, keys),
            rng.choice(DELIMITERS),
            rng.randint(1, 4),
        )
        doomed = {key for key in keys if rng.random() < rng.choice([0.0, 0.5])}
        left = set(keys)
        shown: list[str] = []
        start: str | None = ""
        while start is not None:
            page = zs3.list_page(objects(left, prefix), prefix, delimiter, start, size)
            assert len(page.contents) + len(page.prefixes) <= size
            shown += sorted([*(info.key for info in page.contents), *page.prefixes], key=str.encode)
            start = page.next_start
            left -= {key for key in doomed if rng.random() < 0.5}
        before, after = (
            model_page(each, prefix, delimiter, "", 999) for each in (keys, keys - doomed)
        )
        assert shown == sorted(set(shown), key=str.encode)
        assert set(after[0] + after[1]) <= set(shown) <= set(before[0] + before[1])


def test_law_a_scan_of_the_disk_is_the_set_of_keys_in_order(tmp_path: Path) -> None:
    rng = random.Random(23)
    store = zs3.FileStore(str(tmp_path / "data"))
    for number in range(40):
        bucket = f"bucket-{number}"
        store.create_bucket(bucket)
        keys = {key for key in random_keys(rng) if not {".", ".."} & set(key.split("/"))}
        for key in keys:
            store.put_object(bucket, key, body_of(b""), {}, zs3.NO_CONDITION)
        for _ in range(12):
            prefix, start = random_prefix(rng, keys), random_prefix(rng, keys)
            wanted = [
                key
                for key in sorted(keys, key=str.encode)
                if key.startswith(prefix) and key >= start
            ]
            assert [info.key for info in store.scan(bucket, prefix, start, "")] == wanted
            delimiter = rng.choice(DELIMITERS)
            page = zs3.list_page(
                lambda at, b=bucket, p=prefix, d=delimiter: store.scan(b, p, at, d),
                prefix,
                delimiter,
                "",
                999,
            )
            assert ([info.key for info in page.contents], page.prefixes, False) == model_page(
                keys, prefix, delimiter, "", 999
            )
        for key in rng.sample(sorted(keys), len(keys)):
            store.delete_object(bucket, key, zs3.NO_CONDITION)
        assert list(store.scan(bucket, "", "", "")) == []
        store.delete_bucket(bucket)
    store.close()


def test_law_a_common_prefix_is_skipped_without_walking_it(tmp_path: Path) -> None:
    """A bucket of 30 folders with 100 objects each: a page of prefixes looks at one object of
    each."""
    store = zs3.FileStore(str(tmp_path / "data"))
    store.create_bucket("bucket")
    for number in range(3000):
        path = tmp_path / f"data/bucket/{number % 30:02}/{number}"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    looked_at: list[str] = []

    def scan(start: str) -> Iterator[Any]:
        for info in store.scan("bucket", "", start, "/"):
            looked_at.append(info.key)
            yield info

    page = zs3.list_page(scan, "", "/", "", 1000)
    assert page.prefixes == [f"{number:02}/" for number in range(30)]
    assert len(looked_at) <= 60
    store.close()


@pytest.mark.parametrize("delimiter", ["-", "/"])
def test_a_listing_reads_a_folder_that_changes_all_the_time_once(
    delimiter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many common prefixes it shows; and it looks at one file of each."""
    store = zs3.FileStore(str(tmp_path / "data"))
    store.create_bucket("bucket")
    bucket = tmp_path / "data/bucket"
    for number in range(200):
        path = bucket / f"{number // 10:02}{delimiter}{number % 10}"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    read, read_names, looked_at, look = [], zs3.read_names, [], store._stat

    def counted(path: str) -> Iterator[str]:
        read.append(path)
        return read_names(path)

    def seen(path: str, *given: str) -> zs3.ObjectInfo:
        looked_at.append(path)
        return look(path, *given)

    monkeypatch.setattr(zs3, "read_names", counted)
    monkeypatch.setattr(store, "_stat", seen)

    def scan(start: str) -> Iterator[Any]:
        return store.scan("bucket", "", start, delimiter)

    page = zs3.list_page(scan, "", delimiter, "", 1000)
    assert page.prefixes == [f"{number:02}{delimiter}" for number in range(20)]
    assert read.count(f"{bucket}/") == 1 and len(looked_at) == 20


@pytest.mark.parametrize("times", [1, 1000])
def test_a_listing_shows_files_that_are_replaced_while_their_folder_is_read(
    times: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tmpfs, a read of the folder misses them. It ends even if the folder never rests."""
    store = zs3.FileStore(str(folder))
    store.create_bucket("bucket")
    keys = [f"k{number}" for number in range(2000)]
    for key in keys:
        (folder / "bucket" / key).touch()
    os.utime(folder / "bucket", (0, 0))
    monkeypatch.setattr(zs3, "RACY_SECONDS", 0.0)
    read_names, reads = zs3.read_names, []

    def busy(path: str) -> Iterator[str]:
        reads.append(path)
        names = list(read_names(path))
        if len(reads) <= times:
            time.sleep(0.02)  # a tick of the file system's clock
            (folder / "temporary").touch()
            os.rename(folder / "temporary", folder / "bucket" / keys[len(reads)])
            names.remove(keys[len(reads)])
        yield from names

    monkeypatch.setattr(zs3, "read_names", busy)
    monkeypatch.setattr(os, "major", lambda device: 0)
    for _ in range(2):  # what was read meanwhile is not remembered
        found = [info.key for info in store.scan("bucket", "", "", "")]
        assert found == sorted(keys)
    assert reads.count(f"{folder}/bucket/") == (3 if times == 1 else 2 * (1 + zs3.REREADS))
    monkeypatch.setattr(os, "major", lambda device: 8)  # a disk
    reads.clear()
    assert len(list(store.scan("bucket", "", "", ""))) == 2000 - times // 1000
    assert reads.count(f"{folder}/bucket/") == times // 1000


# --- Multipart -----------------------------------------------------------------------------------

PARTS = [b"a" * MIN_PART, b"b" * (MIN_PART + 7), b"c"]


def upload_with_checksums(
    s3: Client, key: str, parts: list[bytes], algorithm: str, kind: str, **wrong: str
) -> Answer:
    """A multipart upload with a checksum at every step; `wrong` replaces one: part=, listed=,
    object=."""
    name = f"x-amz-checksum-{algorithm.lower()}"
    asked = {"x-amz-checksum-algorithm": algorithm, "x-amz-checksum-type": kind}
    number = s3.on_key("POST", key, "uploads", headers=asked).ok().text("UploadId") or ""
    done, extra = [], {}
    for index, part in enumerate(parts, 1):
        value = wrong.get("part", checksum(algorithm, part))
        query = {"partNumber": index, "uploadId": number}
        answer = s3.on_key("PUT", key, query, part, {name: value})
        if answer.status != 200:
            return answer
        assert answer.headers[name] == checksum(algorithm, part)
        done.append((index, answer.etag))
        listed = wrong.get("listed", checksum(algorithm, part))
        extra[index] = f"<Checksum{algorithm}>{listed}</Checksum{algorithm}>"
    whole = checksum_of_checksums(algorithm, parts)
    if kind == "FULL_OBJECT":
        whole = checksum(algorithm, b"".join(parts))
    given = {name: wrong.get("object", whole), "x-amz-checksum-type": kind}
    return s3.on_key("POST", key, {"uploadId": number}, complete_document(done, extra), given)


def test_a_multipart_upload(s3: Client) -> None:
    headers = {"content_type": "text/x", "x_amz_meta_a": "1"}
    answer = s3.on_key("POST", "dir/k", "uploads", headers=dashed(headers)).ok()
    assert answer.xml.tag == "InitiateMultipartUploadResult"
    assert answer.text("Bucket") == s3.bucket and answer.text("Key") == "dir/k"
    number = answer.text("UploadId") or ""
    parts = [s3.put_part("dir/k", number, n, part).ok() for n, part in enumerate(PARTS, 1)]
    assert [part.etag for part in parts] == [f'"{md5_hex(part)}"' for part in PARTS]
    assert s3.keys() == [] and s3.get("dir/k").error == "NoSuchKey"
    done = s3.complete("dir/k", number, [(n, part.etag) for n, part in enumerate(parts, 1)]).ok()
    assert done.xml.tag == "CompleteMultipartUploadResult"
    assert done.text("Bucket") == s3.bucket and done.text("Key") == "dir/k"
    assert done.text("ETag") == multipart_etag(PARTS)
    assert (done.text("Location") or "").endswith(f"/{s3.bucket}/dir/k")
    got = s3.get("dir/k").ok()
    assert got.body == b"".join(PARTS) and got.etag == multipart_etag(PARTS)
    assert got.headers["content-type"] == "text/x" and got.headers["x-amz-meta-a"] == "1"
    assert s3.list().texts("Contents/ETag") == [multipart_etag(PARTS)]
    assert s3.on_bucket("GET", "uploads").ok().texts("Upload") == []


def test_the_location_of_a_completed_upload_is_where_it_was_asked_for(s3: Client) -> None:
    virtual = Client(s3.ports)
    virtual.host = f"{s3.bucket}.s3.test"
    for client, path in ((s3, f"/{s3.bucket}/a%20b/k"), (virtual, "/a%20b/k")):
        number = client.request("POST", path, "uploads").ok().text("UploadId")
        part = client.request("PUT", path, f"partNumber=1&uploadId={number}", b"x").ok()
        document = complete_document([(1, part.etag)])
        done = client.request("POST", path, f"uploadId={number}", document).ok()
        assert done.text("Location") == f"http://{client.host}{path}"
    virtual.close()


def test_parts_may_arrive_in_any_order_have_gaps_and_be_left_out(s3: Client) -> None:
    number = s3.create_upload("k")
    etags = {
        n: s3.put_part("k", number, n, b"%05d" % n * MIN_PART).ok().etag for n in (10000, 7, 1, 500)
    }
    s3.complete("k", number, [(n, etags[n]) for n in (1, 500, 10000)]).ok()
    assert s3.get("k").body == b"".join(b"%05d" % n * MIN_PART for n in (1, 500, 10000))


def test_a_part_sent_again_replaces_the_first(s3: Client) -> None:
    number = s3.create_upload("k")
    old = s3.put_part("k", number, 1, b"old" * MIN_PART).ok()
    new = s3.put_part("k", number, 1, b"new" * MIN_PART).ok()
    assert s3.complete("k", number, [(1, old.etag)]).error == "InvalidPart"
    s3.complete("k", number, [(1, new.etag)]).ok()
    assert s3.get("k").body == b"new" * MIN_PART


@pytest.mark.parametrize(
    "part_number", [1, 10000, 0, 10001, -1, "one", "", "1.0", "01", "٣", 2**70]
)
def test_part_numbers_are_1_to_10000(s3: Client, part_number: object) -> None:
    number = s3.create_upload("k")
    answer = s3.put_part("k", number, part_number, b"x")
    if part_number in (1, 10000):
        answer.ok()
    elif part_number == "01":
        assert answer.status == 200 or answer.error == "InvalidArgument"
    else:
        assert answer.error == "InvalidArgument"
        assert s3.on_key("GET", "k", {"uploadId": number}).ok().texts("Part") == []


UNKNOWN_UPLOADS = ["made-up", "", "../../x", "0" * 200, "%00", "x/y", "00000"]


@pytest.mark.parametrize("number", UNKNOWN_UPLOADS)
def test_an_unknown_upload_id_is_NoSuchUpload_and_changes_nothing(s3: Client, number: str) -> None:
    s3.put("k", b"old").ok()
    etag = f'"{md5_hex(b"x")}"'
    answers = [
        s3.put_part("k", number, 1, b"x"),
        s3.complete("k", number, [(1, etag)]),
        s3.on_key("GET", "k", {"uploadId": number}),
        s3.on_key("DELETE", "k", {"uploadId": number}),
        s3.on_key("PUT", "k", {"partNumber": 1, "uploadId": number},
                  headers={"x-amz-copy-source": f"{s3.bucket}/k"}),
    ]  # fmt: skip
    for answer in answers:
        assert answer.error in ("NoSuchUpload", "NoSuchUpload" if number else "InvalidArgument")
    assert unchanged(s3, "k", b"old")


def test_an_upload_belongs_to_its_key_and_bucket(s3: Client) -> None:
    number = s3.create_upload("k")
    part = s3.put_part("k", number, 1, b"x").ok()
    assert s3.put_part("l", number, 1, b"x").error == "NoSuchUpload"
    assert s3.complete("l", number, [(1, part.etag)]).error == "NoSuchUpload"
    assert s3.on_key("DELETE", "l", {"uploadId": number}).error == "NoSuchUpload"
    other = Client(s3.ports, f"{s3.bucket}-b")
    other.on_bucket("PUT").ok()
    assert other.complete("k", number, [(1, part.etag)]).error == "NoSuchUpload"
    other.close()
    s3.complete("k", number, [(1, part.etag)]).ok()


def test_complete_with_a_wrong_etag_is_InvalidPart(s3: Client) -> None:
    s3.put("k", b"old").ok()
    number = s3.create_upload("k")
    part = s3.put_part("k", number, 1, b"x").ok()
    assert s3.complete("k", number, [(1, OTHER)]).error == "InvalidPart"
    assert s3.complete("k", number, [(1, part.etag), (2, part.etag)]).error == "InvalidPart"
    assert s3.complete("k", number, [(2, part.etag)]).error == "InvalidPart"
    assert unchanged(s3, "k", b"old")
    s3.complete("k", number, [(1, part.etag.strip('"'))]).ok()


@pytest.mark.parametrize("order", [(2, 1), (1, 1), (1, 2, 2), (2, 3, 1)])
def test_complete_out_of_order_is_InvalidPartOrder(s3: Client, order: tuple[int, ...]) -> None:
    number = s3.create_upload("k")
    etags = {n: s3.put_part("k", number, n, b"%d" % n * MIN_PART).ok().etag for n in (1, 2, 3)}
    assert s3.complete("k", number, [(n, etags[n]) for n in order]).error == "InvalidPartOrder"
    assert s3.keys() == []


def test_a_part_below_the_minimum_is_EntityTooSmall_unless_it_is_the_last(s3: Client) -> None:
    for size in (MIN_PART - 1, MIN_PART):
        number = s3.create_upload("k")
        etags = [s3.put_part("k", number, n, b"x" * size).ok().etag for n in (1, 2)]
        answer = s3.complete("k", number, list(enumerate(etags, 1)))
        if size < MIN_PART:
            assert answer.error == "EntityTooSmall"
            assert answer.text("PartNumber") == "1" and answer.text("ProposedSize") == str(size)
            assert answer.text("MinSizeAllowed") == str(MIN_PART)
            assert s3.keys() == []
            s3.complete("k", number, [(2, etags[1])]).ok()
        else:
            answer.ok()


BAD_COMPLETES = {
    "empty body": b"", "no parts": b"<CompleteMultipartUpload/>", "not XML": b"parts",
    "unclosed": b"<CompleteMultipartUpload><Part>", "another root": b"<Delete/>",
    "no number": b"<CompleteMultipartUpload><Part><ETag>x</ETag></Part></CompleteMultipartUpload>",
    "no ETag": b"<CompleteMultipartUpload><Part><PartNumber>1</PartNumber></Part>"
               b"</CompleteMultipartUpload>",
    "number in words": complete_document([("one", "x")]),
    "number in Arabic digits": complete_document([("٣", "x")]),
    "two ETags": complete_document([(1, "x")], {1: f"<ETag>{md5_hex(b'x')}</ETag>"}),
    "10,001 parts": complete_document([(n, "x") for n in range(1, 10002)]),
    "a DTD": b'<!DOCTYPE x [<!ENTITY a "1">]>' + complete_document([("&a;", "x")]),
    "bad UTF-8": b"<CompleteMultipartUpload>\xff</CompleteMultipartUpload>",
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_COMPLETES)
def test_complete_with_a_bad_document_is_MalformedXML(s3: Client, what: str) -> None:
    number = s3.create_upload("k")
    s3.put_part("k", number, 1, b"x").ok()
    answer = s3.on_key("POST", "k", {"uploadId": number}, BAD_COMPLETES[what])
    # An empty body is "InvalidRequest: You must specify at least one part" in S3.
    assert answer.error in (
        "MalformedXML",
        "InvalidRequest" if what == "empty body" else "MalformedXML",
    )
    assert s3.on_key("GET", "k", {"uploadId": number}).ok().texts("Part/PartNumber") == ["1"]
    assert s3.keys() == []


def test_completing_twice_with_the_same_list_succeeds(s3: Client) -> None:
    number = s3.create_upload("k")
    part = s3.put_part("k", number, 1, b"x").ok()
    first = s3.complete("k", number, [(1, part.etag)]).ok()
    second = s3.complete("k", number, [(1, part.etag)]).ok()
    assert second.text("ETag") == first.text("ETag")
    assert s3.put_part("k", number, 2, b"x").error == "NoSuchUpload"
    for declared in ({"x_amz_mp_object_size": "2"}, {"x_amz_checksum_crc32": "AAAAAA=="}):
        assert s3.complete("k", number, [(1, part.etag)], **declared).status == 400
    s3.put("k", b"newer").ok()
    assert s3.complete("k", number, [(1, part.etag)]).error == "NoSuchUpload"
    assert unchanged(s3, "k", b"newer")


def test_the_least_size_of_a_part_is_5_mib_unless_the_command_line_says_otherwise(
    folder: Path,
) -> None:
    with Server(ACL, "--bucket=bucket", data=folder) as server:
        s3 = server.client("bucket")
        for size in ((5 << 20) - 1, 5 << 20):
            number = s3.create_upload("k")
            etags = [s3.put_part("k", number, n, bytes(size // n)).ok().etag for n in (1, 100)]
            answer = s3.complete("k", number, list(zip((1, 100), etags, strict=True)))
            assert answer.error == "EntityTooSmall" if size < 5 << 20 else answer.ok()
        s3.close()


def test_abort(s3: Client) -> None:
    s3.put("k", b"old").ok()
    number = s3.create_upload("k")
    part = s3.put_part("k", number, 1, b"x").ok()
    assert s3.on_key("DELETE", "k", {"uploadId": number}).status == 204
    assert s3.put_part("k", number, 1, b"x").error == "NoSuchUpload"
    assert s3.complete("k", number, [(1, part.etag)]).error == "NoSuchUpload"
    assert s3.on_key("GET", "k", {"uploadId": number}).error == "NoSuchUpload"
    again = s3.on_key("DELETE", "k", {"uploadId": number})
    assert again.status == 204 or again.error == "NoSuchUpload"
    assert unchanged(s3, "k", b"old")
    assert s3.on_bucket("GET", "uploads").ok().texts("Upload") == []


def test_list_parts(s3: Client) -> None:
    number = s3.create_upload("k")
    numbers = [1, 2, 5, 40, 10000]
    etags = {n: s3.put_part("k", number, n, b"x" * n).ok().etag for n in reversed(numbers)}
    answer = s3.on_key("GET", "k", {"uploadId": number}).ok()
    assert answer.xml.tag == "ListPartsResult"
    assert answer.text("Bucket") == s3.bucket and answer.text("Key") == "k"
    assert answer.text("UploadId") == number and answer.text("StorageClass") == "STANDARD"
    assert answer.text("Initiator/ID") and answer.text("Owner/ID")
    assert answer.text("PartNumberMarker") == "0" and answer.text("MaxParts") == "1000"
    assert answer.text("IsTruncated") == "false"
    assert answer.texts("Part/PartNumber") == [str(n) for n in numbers]
    assert answer.texts("Part/Size") == [str(n) for n in numbers]
    assert answer.texts("Part/ETag") == [etags[n] for n in numbers]
    assert len(answer.texts("Part/LastModified")) == 5
    seen: list[str] = []
    marker: object = 0
    for left in (5, 3, 1):
        page = s3.on_key(
            "GET", "k", {"uploadId": number, "max-parts": 2, "part-number-marker": marker}
        ).ok()
        seen += page.texts("Part/PartNumber")
        assert page.text("IsTruncated") == ("true" if left > 2 else "false")
        marker = page.text("NextPartNumberMarker")
    assert seen == [str(n) for n in numbers]
    between = s3.on_key("GET", "k", {"uploadId": number, "part-number-marker": 6}).ok()
    assert between.texts("Part/PartNumber") == ["40", "10000"]
    for query in ({"max-parts": -1}, {"max-parts": "x"}, {"part-number-marker": "x"}):
        assert s3.on_key("GET", "k", {"uploadId": number} | query).error == "InvalidArgument"


def test_list_multipart_uploads(s3: Client) -> None:
    keys = ["b", "a", "dir/x", "dir/y", "a"]
    made = sorted((key, s3.create_upload(key)) for key in keys)
    answer = s3.on_bucket("GET", "uploads").ok()
    assert answer.xml.tag == "ListMultipartUploadsResult"
    assert answer.text("Bucket") == s3.bucket and answer.text("MaxUploads") == "1000"
    assert answer.text("IsTruncated") == "false"
    listed = list(zip(answer.texts("Upload/Key"), answer.texts("Upload/UploadId"), strict=True))
    assert [key for key, _ in listed] == sorted(keys) and sorted(listed) == made
    for date in answer.texts("Upload/Initiated"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", date)
    assert answer.texts("Upload/Initiator/ID") and answer.texts("Upload/StorageClass")
    prefixed = s3.on_bucket("GET", "uploads&prefix=dir/").ok()
    assert prefixed.texts("Upload/Key") == ["dir/x", "dir/y"]
    rolled = s3.on_bucket("GET", "uploads&delimiter=/").ok()
    assert rolled.texts("Upload/Key") == ["a", "a", "b"]
    assert rolled.texts("CommonPrefixes/Prefix") == ["dir/"]
    assert s3.on_bucket("GET", "uploads&key-marker=a").ok().texts("Upload/Key") == [
        "b",
        "dir/x",
        "dir/y",
    ]
    paged: list[tuple[str, str]] = []
    markers: dict[str, object] = {}
    while True:
        page = s3.on_bucket("GET", {"uploads": "", "max-uploads": 2} | markers).ok()
        paged += zip(page.texts("Upload/Key"), page.texts("Upload/UploadId"), strict=True)
        markers = {
            "key-marker": page.text("NextKeyMarker"),
            "upload-id-marker": page.text("NextUploadIdMarker")
        }  # fmt: skip
        if page.text("IsTruncated") == "false":
            break
        assert len(page.texts("Upload")) == 2
    assert paged == listed
    assert s3.on_bucket("GET", "uploads&max-uploads=x").error == "InvalidArgument"


@pytest.mark.parametrize(("value", "expected"), [
    ("bytes=0-9", slice(0, 10)), ("bytes=10-3499", slice(10, 3500)), ("bytes=5-5", slice(5, 6)),
    ("", slice(0, 3500)),
    ("bytes=0-3500", "InvalidArgument InvalidRange"), ("bytes=3500-3501",
    "InvalidArgument InvalidRange"),
    ("bytes=5-", "InvalidArgument"), ("bytes=-5", "InvalidArgument"), ("bytes=5-2",
    "InvalidArgument"),
    ("0-5", "InvalidArgument"), ("bytes=0-1,3-4", "InvalidArgument"), ("bytes=a-b",
    "InvalidArgument"),
])  # fmt: skip
def test_upload_part_copy(s3: Client, value: str, expected: Any) -> None:
    s3.put("source", DATA).ok()
    number = s3.create_upload("k")
    given = {"x-amz-copy-source": f"{s3.bucket}/source"} | (
        {"x-amz-copy-source-range": value} if value else {}
    )
    answer = s3.on_key("PUT", "k", {"partNumber": 3, "uploadId": number}, headers=given)
    if isinstance(expected, str):
        assert answer.error in expected.split()
        assert s3.on_key("GET", "k", {"uploadId": number}).ok().texts("Part") == []
        return
    assert answer.ok().xml.tag == "CopyPartResult"
    assert answer.text("ETag") == f'"{md5_hex(DATA[expected])}"' and answer.text("LastModified")
    s3.complete("k", number, [(3, answer.text("ETag") or "")]).ok()
    assert s3.get("k").body == DATA[expected]


def test_a_part_of_a_multipart_object_by_number(s3: Client) -> None:
    s3.multipart("k", PARTS).ok()
    start = 0
    for n, part in enumerate(PARTS, 1):
        got = s3.get("k", {"partNumber": n}).ok()
        head = s3.head("k", {"partNumber": n}).ok()
        assert got.status == head.status == 206 and got.body == part
        for answer in (got, head):
            assert answer.headers["x-amz-mp-parts-count"] == "3"
            content_range = f"bytes {start}-{start + len(part) - 1}/{sum(map(len, PARTS))}"
            assert answer.headers["content-range"] == content_range
            assert answer.headers["content-length"] == str(len(part))
            assert answer.etag == multipart_etag(PARTS)
        start += len(part)
    assert s3.get("k", {"partNumber": 4}).error == "InvalidPartNumber"
    assert s3.head("k", {"partNumber": 4}).status == 416
    for bad in (0, 10001, "x"):
        assert s3.get("k", {"partNumber": bad}).error == "InvalidArgument"
    assert s3.get("k", {"partNumber": 1}, range="bytes=0-1").error in (
        "InvalidRequest",
        "InvalidArgument",
    )


def test_part_number_1_of_a_plain_object_is_the_object(s3: Client) -> None:
    s3.put("k", b"hello", x_amz_checksum_crc32=checksum("CRC32", b"hello")).ok()
    got = s3.get("k", {"partNumber": 1}, x_amz_checksum_mode="ENABLED").ok()
    assert got.status == 206 and got.body == b"hello"
    assert got.headers["x-amz-checksum-crc32"] == checksum("CRC32", b"hello")
    assert "x-amz-checksum-crc32" not in s3.get("k", {"partNumber": 1}).headers
    assert "x-amz-mp-parts-count" not in got.headers
    assert s3.get("k", {"partNumber": 2}).error == "InvalidPartNumber"


def test_delete_objects_does_not_go_on_for_longer_than_its_client_waits(folder: Path) -> None:
    with Server(
        ACL, "--bucket=bucket", data=folder, prelude=CHANGED.format("zs3.DELETE_SECONDS = 1.0")
    ) as server:
        s3 = server.client("bucket")
        s3.put("k", b"x").ok()
        assert s3.delete_objects(["k"]).ok().texts("Deleted/Key") == ["k"]
        s3.close()
    with Server(
        ACL, data=folder, prelude=CHANGED.format("zs3.DELETE_SECONDS = -1.0")
    ) as server:
        s3 = server.client("bucket")
        s3.put("k", b"x").ok()
        answer = s3.delete_objects(["k", "l"]).ok()
        assert answer.texts("Error/Code") == ["SlowDown", "SlowDown"]
        assert s3.keys() == ["k"]
        s3.close()


CHECKSUM_TYPES = [  # (S3 User Guide, "Checking object integrity for data uploads")
    ("CRC32", "COMPOSITE"), ("CRC32", "FULL_OBJECT"), ("CRC32C", "COMPOSITE"), ("CRC32C",
    "FULL_OBJECT"),
    ("CRC64NVME", "FULL_OBJECT"), ("SHA1", "COMPOSITE"), ("SHA256", "COMPOSITE"),
]  # fmt: skip


@pytest.mark.parametrize(("algorithm", "kind"), CHECKSUM_TYPES)
def test_a_multipart_upload_with_checksums(s3: Client, algorithm: str, kind: str) -> None:
    for parts in (PARTS, PARTS[:1], [b""]):
        done = upload_with_checksums(s3, "k", parts, algorithm, kind).ok()
        whole = checksum(algorithm, b"".join(parts))
        if kind == "COMPOSITE":
            whole = checksum_of_checksums(algorithm, parts)
        assert done.text(f"Checksum{algorithm}") == whole and done.text("ChecksumType") == kind
        got = s3.get("k", x_amz_checksum_mode="ENABLED").ok()
        assert got.body == b"".join(parts)
        assert got.headers[f"x-amz-checksum-{algorithm.lower()}"] == whole
        assert got.headers["x-amz-checksum-type"] == kind
        attributes = s3.on_key("GET", "k", "attributes", headers=EVERY_ATTRIBUTE).ok()
        assert attributes.text(f"Checksum/Checksum{algorithm}") == whole.partition("-")[0]
        assert attributes.text("Checksum/ChecksumType") == kind


@pytest.mark.parametrize(("algorithm", "kind"), CHECKSUM_TYPES)
def test_the_checksum_of_a_part_is_told_with_the_part(
    s3: Client, algorithm: str, kind: str
) -> None:
    name = f"x-amz-checksum-{algorithm.lower()}"
    for parts in (PARTS, PARTS[:1]):
        upload_with_checksums(s3, "k", parts, algorithm, kind).ok()
        for number, part in enumerate(parts, 1):
            got = s3.get("k", {"partNumber": number}, x_amz_checksum_mode="ENABLED").ok()
            head = s3.head("k", {"partNumber": number}, x_amz_checksum_mode="ENABLED").ok()
            assert got.body == part
            if kind == "COMPOSITE" or len(parts) == 1:
                assert got.headers[name] == head.headers[name] == checksum(algorithm, part)
                assert got.headers["x-amz-checksum-type"] == kind
            else:
                assert not [each for each in got.headers if "x-amz-checksum" in each]
                assert not [each for each in head.headers if "x-amz-checksum" in each]
            assert name not in s3.get("k", {"partNumber": number}).ok().headers


@pytest.mark.parametrize(("algorithm", "kind"), CHECKSUM_TYPES)
@pytest.mark.parametrize("where", ["part", "listed", "object"])
def test_a_multipart_upload_with_a_wrong_checksum(
    s3: Client, algorithm: str, kind: str, where: str
) -> None:
    s3.put("k", b"old").ok()
    value = checksum(algorithm, b"something else")
    if where == "object" and kind == "COMPOSITE":
        value += f"-{len(PARTS)}"
    answer = upload_with_checksums(s3, "k", PARTS, algorithm, kind, **{where: value})
    assert (
        answer.error == {"part": "BadDigest", "listed": "InvalidPart", "object": "BadDigest"}[where]
    )
    assert unchanged(s3, "k", b"old")


def test_the_number_behind_a_composite_checksum_is_checked_if_it_is_given(s3: Client) -> None:
    value = checksum_of_checksums("SHA256", PARTS).partition("-")[0]
    wrong = upload_with_checksums(s3, "k", PARTS, "SHA256", "COMPOSITE", object=f"{value}-99")
    assert wrong.error == "BadDigest" and s3.keys() == []
    upload_with_checksums(s3, "k", PARTS, "SHA256", "COMPOSITE", object=value).ok()


def test_a_trailer_with_a_wrong_checksum_of_the_list_of_parts_completes_nothing(
    s3: Client,
) -> None:
    number = s3.create_upload("k")
    document = complete_document([(1, s3.put_part("k", number, 1, b"x").ok().etag)])
    path, query = f"/{s3.bucket}/k", f"uploadId={number}"
    for data, code in ((b"another", "BadDigest"), (document, "")):
        trailer = "x-amz-checksum-crc32:" + checksum("CRC32", data)
        body = aws_chunked(TRAILER_UNSIGNED, Signer(), [document], trailer)
        given = {"x-amz-trailer": "x-amz-checksum-crc32", "content-length": str(len(body)),
                 "x-amz-decoded-content-length": str(len(document))}  # fmt: skip
        headers = s3.signed_head("POST", path, query, given, TRAILER_UNSIGNED)
        answer = s3.exchange("POST", head_bytes("POST", f"{path}?{query}", headers) + body)
        assert answer.error == code if code else answer.ok()
        assert s3.keys() == ([] if code else ["k"])


@pytest.mark.parametrize(("algorithm", "kind"), [
    ("CRC64NVME", "COMPOSITE"), ("SHA1", "FULL_OBJECT"), ("SHA256", "FULL_OBJECT"), ("CRC32",
    "PARTIAL"), ("MD4", ""),
])  # fmt: skip
def test_a_checksum_type_that_does_not_exist_is_refused(
    s3: Client, algorithm: str, kind: str
) -> None:
    given = {"x-amz-checksum-algorithm": algorithm} | (
        {"x-amz-checksum-type": kind} if kind else {}
    )
    answer = s3.on_key("POST", "k", "uploads", headers=given)
    assert answer.error in ("InvalidRequest", "InvalidArgument")
    assert s3.on_bucket("GET", "uploads").ok().texts("Upload") == []


def test_complete_with_another_checksum_type_than_the_uploads_is_InvalidRequest(
    s3: Client,
) -> None:
    for asked, wrong in (({}, "COMPOSITE"), ({"x_amz_checksum_algorithm": "CRC32"}, "FULL_OBJECT")):
        number = s3.create_upload("k", **asked)
        parts = [(1, s3.put_part("k", number, 1, b"x").ok().etag)]
        answer = s3.complete("k", number, parts, x_amz_checksum_type=wrong)
        assert answer.error == "InvalidRequest" and s3.keys() == []
    s3.complete("k", number, parts, x_amz_checksum_type="COMPOSITE").ok()


@pytest.mark.parametrize(("algorithm", "kind"), CHECKSUM_TYPES)
def test_parts_without_a_checksum_of_their_own_get_the_uploads(
    s3: Client, algorithm: str, kind: str
) -> None:
    asked = {"x_amz_checksum_algorithm": algorithm, "x_amz_checksum_type": kind}
    s3.multipart("k", PARTS, **asked).ok()
    whole = checksum_of_checksums(algorithm, PARTS)
    if kind == "FULL_OBJECT":
        whole = checksum(algorithm, b"".join(PARTS))
    got = s3.get("k", x_amz_checksum_mode="ENABLED").ok()
    assert got.headers[f"x-amz-checksum-{algorithm.lower()}"] == whole


def test_parts_with_another_checksum_than_the_uploads_are_InvalidRequest(s3: Client) -> None:
    number = s3.create_upload("k", x_amz_checksum_algorithm="CRC32")
    answer = s3.put_part("k", number, 1, b"x", x_amz_checksum_sha1=checksum("SHA1", b"x"))
    assert answer.error == "InvalidRequest"
    assert s3.on_key("GET", "k", {"uploadId": number}).ok().texts("Part") == []


def test_checksums_of_parts_are_kept_without_any_of_the_upload(s3: Client) -> None:
    """As older SDKs send them; S3 then has no checksum of the object to show."""
    number = s3.create_upload("k")
    part = s3.put_part("k", number, 1, b"x", x_amz_checksum_sha1=checksum("SHA1", b"x")).ok()
    listed = s3.on_key("GET", "k", {"uploadId": number}).ok()
    assert listed.texts("Part/ChecksumSHA1") in ([checksum("SHA1", b"x")], [])
    s3.complete("k", number, [(1, part.etag)]).ok()
    assert s3.get("k", x_amz_checksum_mode="ENABLED").ok().body == b"x"


def test_mp_object_size_is_checked_on_complete(s3: Client) -> None:
    number = s3.create_upload("k")
    part = s3.put_part("k", number, 1, b"12345").ok()
    for size, code in (("4", "InvalidRequest"), ("x", "InvalidRequest InvalidArgument"), ("5", "")):
        answer = s3.complete("k", number, [(1, part.etag)], x_amz_mp_object_size=size)
        assert answer.error in code.split() if code else answer.ok()


def test_a_copy_of_a_multipart_object_is_one_object(s3: Client) -> None:
    s3.multipart("source", PARTS, x_amz_meta_a="1").ok()
    etag = s3.copy("source", "k").ok().text("ETag")
    got = s3.get("k").ok()
    assert got.body == b"".join(PARTS) and got.etag == etag and got.headers["x-amz-meta-a"] == "1"


@pytest.mark.parametrize("directive", ["COPY", "REPLACE"])
def test_completing_an_upload_at_the_key_of_a_copy_is_NoSuchUpload(
    s3: Client, directive: str
) -> None:
    number = s3.create_upload("source")
    parts = [(1, s3.put_part("source", number, 1, b"x").ok().etag)]
    s3.complete("source", number, parts).ok()
    s3.copy("source", "k", x_amz_metadata_directive=directive).ok()
    assert s3.complete("k", number, parts).error == "NoSuchUpload"
    assert s3.complete("k", "", parts).error == "NoSuchUpload"
    s3.complete("source", number, parts).ok()


def test_a_part_whose_upload_was_aborted_meanwhile_is_NoSuchUpload(s3: Client) -> None:
    """And leaves nothing, as nobody could remove it."""
    number, body = s3.create_upload("k"), bytes(range(256)) * 1000
    path, query = key_path(s3.bucket, "k"), f"partNumber=1&uploadId={number}"
    headers = {"content-length": str(len(body))}
    with s3.connect() as connection:
        head = s3.signed_head("PUT", path, query, headers)
        connection.send(head_bytes("PUT", f"{path}?{query}", head) + body[:1000])
        time.sleep(0.1)
        s3.on_key("DELETE", "k", {"uploadId": number}).ok()
        connection.send(body[1000:])
        assert connection.answer().error == "NoSuchUpload"
    if s3.folder:
        assert not (s3.folder.parent / ".uploads" / s3.bucket).exists()


def test_a_range_across_parts(s3: Client) -> None:
    s3.multipart("k", PARTS).ok()
    body = b"".join(PARTS)
    for first, last in (
        (0, len(body) - 1),
        (MIN_PART - 1, MIN_PART),
        (5, MIN_PART + 70),
        (MIN_PART, MIN_PART),
    ):
        assert s3.get("k", range=f"bytes={first}-{last}").ok().body == body[first : last + 1]


def test_ten_uploads_of_one_key_at_once_leave_one_of_them_whole(s3: Client) -> None:
    clients = [s3.using(ADMIN) for _ in range(10)]
    bodies = [[b"%d" % n * MIN_PART, b"%d" % n] for n in range(10)]
    answers = race(10, lambda n: clients[n].multipart("k", bodies[n]))
    for client in clients:
        client.close()
    assert s3.get("k").body in [b"".join(parts) for parts in bodies]
    lost = [answer.error for answer in answers if answer.status != 200]
    if len(s3.ports) > 1:  # one of several nodes may not learn in time how a duel ended
        assert set(lost) <= {"SlowDown"}
    else:
        assert lost == [] and s3.on_bucket("GET", "uploads").ok().texts("Upload") == []


def test_parts_sent_at_once(s3: Client) -> None:
    number = s3.create_upload("k")
    clients = [s3.using(ADMIN) for _ in range(8)]
    etags: dict[int, str] = {}

    def act(n: int) -> Answer:
        answer = clients[n].put_part("k", number, n + 1, b"%d" % n * MIN_PART).ok()
        etags[n + 1] = answer.etag
        return answer

    race(8, act)
    for client in clients:
        client.close()
    s3.complete("k", number, sorted(etags.items())).ok()
    assert s3.get("k").body == b"".join(b"%d" % n * MIN_PART for n in range(8))


# --- DeleteObjects -------------------------------------------------------------------------------


def test_delete_objects(s3: Client) -> None:
    for key in ("a", "b/c", "<&>", "keep"):
        s3.put(key, b"x").ok()
    answer = s3.delete_objects(["a", "b/c", "<&>", "missing"]).ok()
    assert answer.xml.tag == "DeleteResult"
    assert sorted(answer.texts("Deleted/Key")) == sorted(["a", "b/c", "<&>", "missing"])
    assert answer.texts("Error") == []
    assert s3.keys() == ["keep"]


def test_delete_objects_quietly_shows_only_errors(s3: Client) -> None:
    s3.put("a", b"x").ok()
    answer = s3.delete_objects(["a", "missing", "../x", "k" * 1025], quiet=True).ok()
    assert answer.texts("Deleted") == []
    errors = dict(zip(answer.texts("Error/Key"), answer.texts("Error/Code"), strict=True))
    assert errors == {"../x": "InvalidArgument", "k" * 1025: "KeyTooLongError"}
    assert all(answer.texts("Error/Message"))
    assert s3.keys() == []


def test_delete_objects_takes_1000_keys_and_no_more(s3: Client) -> None:
    s3.put("0", b"x").ok()
    assert s3.delete_objects(str(n) for n in range(1001)).error == "MalformedXML"
    assert s3.keys() == ["0"]
    answer = s3.delete_objects(str(n) for n in range(1000)).ok()
    assert len(answer.texts("Deleted/Key")) == 1000
    assert s3.keys() == []


def test_delete_objects_takes_keys_of_any_length_together(s3: Client) -> None:
    keys = [f"{n:04}" + "é" * 510 for n in range(1000)]
    s3.put(keys[500], b"x").ok()
    assert len(s3.delete_objects(keys).ok().texts("Deleted/Key")) == 1000
    assert s3.keys() == []


@pytest.mark.parametrize("algorithm", CHECKSUMS)
def test_delete_objects_checks_any_checksum(s3: Client, algorithm: str) -> None:
    s3.put("a", b"x").ok()
    document = delete_document(["a"])
    name = f"x-amz-checksum-{algorithm.lower()}"
    wrong = s3.on_bucket("POST", "delete", document, {name: checksum(algorithm, b"x")})
    assert wrong.error == "BadDigest"
    assert s3.keys() == ["a"]
    s3.on_bucket("POST", "delete", document, {name: checksum(algorithm, document)}).ok()
    assert s3.keys() == []


def test_delete_objects_checks_content_md5(s3: Client) -> None:
    s3.put("a", b"x").ok()
    assert s3.delete_objects(["a"], content_md5=md5_base64(b"x")).error == "BadDigest"
    assert s3.delete_objects(["a"], content_md5="x").error == "InvalidDigest"
    assert s3.keys() == ["a"]


BAD_DELETES = {
    "empty": b"", "not XML": b"a", "no objects": b"<Delete/>", "another root": b"<Remove/>",
    "no key": b"<Delete><Object><VersionId>1</VersionId></Object></Delete>",
    "two keys": b"<Delete><Object><Key>there</Key><Key>b</Key></Object></Delete>",
    "an element within a key": b"<Delete><Object><Key>there<a/></Key></Object></Delete>",
    "two ETags": b"<Delete><Object><Key>there</Key><ETag>x</ETag><ETag>*</ETag></Object></Delete>",
    "a key, then none": b"<Delete><Object><Key>there</Key></Object><Object/></Delete>",
    "entities": b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">]>'
                b"<Delete><Object><Key>&a;&a;</Key></Object></Delete>",
    "an outside entity": b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>'
                         b"<Delete><Object><Key>&a;</Key></Object></Delete>",
    "a long tag": b"<Delete><Object><Key>there</Key></Object><a b='%b'/></Delete>" % (b"c" * 16380),
    "many attributes": b"<Delete>%b<Object><Key>there</Key></Object></Delete>"
                       % (b"<a b=''/>" * 51000),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_DELETES)
def test_delete_objects_with_a_bad_document_is_MalformedXML(s3: Client, what: str) -> None:
    s3.put("there", b"").ok()
    document = BAD_DELETES[what]
    answer = s3.on_bucket("POST", "delete", document, {"content-md5": md5_base64(document)})
    assert answer.error == "MalformedXML" and s3.keys() == ["there"]


def test_a_key_in_which_every_character_is_escaped_is_no_long_tag(s3: Client) -> None:
    s3.put("k" * 1024, b"x").ok()
    document = b"<Delete><Object><Key>%b</Key></Object></Delete>" % (b"&#x0000006b;" * 1024)
    s3.on_bucket("POST", "delete", document, {"content-md5": md5_base64(document)}).ok()
    assert s3.keys() == []


def test_a_long_namespace_costs_no_more_than_a_short_one() -> None:
    """It would be put before the name of each element."""

    def seconds(namespace: bytes) -> float:
        document = b'<s3:Delete xmlns:s3="%b">%b</s3:Delete>' % (namespace, b"<s3:b/>" * 50000)
        start = time.thread_time()
        assert len(zs3.parse_xml(document, "Delete").findall("b")) == 50000
        return time.thread_time() - start

    # The least of some: what else runs on the machine only adds.
    assert min(seconds(b"u" * 16000) for _ in range(3)) < 4 * min(seconds(b"u") for _ in range(3))


def test_a_document_is_eight_elements_deep_at_most() -> None:
    assert zs3.parse_xml(b"<a>" * 8 + b"</a>" * 8, "a").tag == "a"
    with raises("MalformedXML"):
        zs3.parse_xml(b"<a>" * 9 + b"</a>" * 9, "a")


def test_delete_objects_refuses_a_document_that_no_thousand_keys_need(s3: Client) -> None:
    document = b"<Delete>" + b" " * (8 << 20) + b"</Delete>"
    answer = s3.on_bucket("POST", "delete", document, {"content-md5": md5_base64(document)})
    assert answer.error in ("MalformedXML", "EntityTooLarge")


def test_delete_objects_with_a_version_or_an_etag(s3: Client) -> None:
    etag = s3.put("a", b"x").ok().etag
    s3.put("b", b"x").ok()
    for more in ("<VersionId>17</VersionId>", f"<ETag>{xml_text(OTHER)}</ETag>", "<ETag/>"):
        document = f"<Delete><Object><Key>a</Key>{more}</Object></Delete>".encode()
        answer = s3.on_bucket("POST", "delete", document, {"content-md5": md5_base64(document)})
        code = answer.text("Error/Code") or answer.error
        assert code in ("NoSuchVersion", "NotImplemented", "PreconditionFailed", "InvalidArgument")
        assert s3.keys() == ["a", "b"]
    right = f"<Object><Key>a</Key><ETag>{xml_text(etag)}</ETag></Object>"
    document = f"<Delete>{right}<Object><Key>b</Key><VersionId/></Object></Delete>".encode()
    s3.on_bucket("POST", "delete", document, {"content-md5": md5_base64(document)}).ok()
    assert s3.keys() == []


@pytest.mark.parametrize("more", [
    "<Size>1</Size>", "<LastModifiedTime>{date}</LastModifiedTime>",
])  # fmt: skip
def test_delete_objects_with_a_size_or_a_date_is_NotImplemented_and_the_key_stays(
    s3: Client, more: str
) -> None:
    s3.put("k", b"x").ok()
    more = more.format(date=s3.head("k").headers["last-modified"])
    document = f"<Delete><Object><Key>k</Key>{more}</Object></Delete>".encode()
    answer = s3.on_bucket("POST", "delete", document, {"content-md5": md5_base64(document)}).ok()
    assert answer.texts("Error/Code") == ["NotImplemented"] and answer.texts("Deleted") == []
    assert unchanged(s3, "k", b"x")


# --- Probes and what is refused ------------------------------------------------------------------

BUCKET_PROBES = {  # GET ?sub-resource -> root element of the answer, or S3's code
    "location": "LocationConstraint", "versioning": "VersioningConfiguration",
    "acl": "AccessControlPolicy",
    "policy": "NoSuchBucketPolicy", "cors": "NoSuchCORSConfiguration",
    "lifecycle": "NoSuchLifecycleConfiguration",
    "tagging": "NoSuchTagSet", "encryption": "ServerSideEncryptionConfigurationNotFoundError",
    "object-lock": "ObjectLockConfigurationNotFoundError",
}  # fmt: skip


@pytest.mark.parametrize("name", BUCKET_PROBES)
def test_a_configuration_probe_of_a_bucket(s3: Client, name: str) -> None:
    s3.put("k", b"x").ok()
    answer = s3.on_bucket("GET", name)
    expected = BUCKET_PROBES[name]
    if answer.status == 200:
        assert answer.xml.tag == expected
        assert s3.on_bucket("GET", name, bucket="no-such-bucket").error == "NoSuchBucket"
    else:
        assert answer.error == expected


def test_the_versioning_of_a_bucket_is_empty_and_its_acl_is_the_owners(s3: Client) -> None:
    s3.put("k", b"x").ok()
    assert list(s3.on_bucket("GET", "versioning").ok().xml) == []
    for answer in (s3.on_bucket("GET", "acl").ok(), s3.on_key("GET", "k", "acl").ok()):
        assert answer.text("Owner/ID") == answer.text("AccessControlList/Grant/Grantee/ID")
        assert answer.text("AccessControlList/Grant/Permission") == "FULL_CONTROL"
    assert s3.on_key("GET", MISSING_KEY, "acl").error == "NoSuchKey"


OBJECT_PROBES = ["tagging", "legal-hold", "retention", "torrent"]


@pytest.mark.parametrize("name", OBJECT_PROBES)
def test_a_configuration_probe_of_an_object_is_never_its_body(s3: Client, name: str) -> None:
    s3.put("k", b"the body").ok()
    answer = s3.on_key("GET", "k", name)
    assert b"the body" not in answer.body
    if answer.status == 200:
        assert answer.xml.tag == "Tagging" and name == "tagging"
    elif name == "torrent":
        assert answer.error == "NotImplemented"
    else:
        assert answer.error == "InvalidRequest"
        assert answer.text("Message") == "Bucket is missing Object Lock Configuration"


SUB_RESOURCES = [
    "accelerate", "acl", "analytics", "cors", "encryption", "intelligent-tiering", "inventory",
    "lifecycle", "logging",
    "metrics", "notification", "object-lock", "ownershipControls", "policy", "policyStatus",
    "publicAccessBlock",
    "replication", "requestPayment", "tagging", "versioning", "website", "legal-hold", "retention",
    "restore", "select",
    "torrent", "versions", "versionId=3", "metadataTable", "session", "renameObject", "append",
    "something-new",
]  # fmt: skip


@pytest.mark.parametrize("name", SUB_RESOURCES)
def test_a_write_to_an_unknown_sub_resource_is_NotImplemented_and_changes_nothing(
    s3: Client, name: str
) -> None:
    s3.put("k", b"old", x_amz_meta_a="1").ok()
    buckets = s3.service().body
    for answer in (
        s3.on_key("PUT", "k", name, b"<Tagging/>"), s3.on_key("PUT", "new", name, b"x"),
        s3.on_key("POST", "k", name, b"x"), s3.on_key("DELETE", "k", name),
        s3.on_bucket("PUT", name, b"<x/>"), s3.on_bucket("DELETE", name), s3.on_bucket("POST", name,
        b"x"),
        s3.on_bucket("PUT", name, b"<x/>", bucket="new-bucket-here"),
        s3.on_key("PUT", "k", name, headers={"x-amz-copy-source": f"{s3.bucket}/k"}),
    ):  # fmt: skip
        assert answer.error in ("NotImplemented",
        "NoSuchVersion" if "versionId" in name else "NotImplemented",
                                "MethodNotAllowed", "NoSuchBucket")  # fmt: skip
    assert unchanged(s3, "k", b"old") and s3.head("k").headers["x-amz-meta-a"] == "1"
    assert s3.service().body == buckets


@pytest.mark.parametrize("name", SUB_RESOURCES)
def test_a_read_of_an_unknown_sub_resource_is_never_the_plain_operation(
    s3: Client, name: str
) -> None:
    s3.put("k", b"the body").ok()
    got = s3.on_key("GET", "k", name)
    assert b"the body" not in got.body
    listed = s3.on_bucket("GET", name)
    assert b"<ListBucketResult" not in listed.body
    for answer in (got, listed):
        if answer.status != 200:
            assert answer.error


def test_the_one_version_of_an_object_is_null(s3: Client) -> None:
    s3.put("k", b"x").ok()
    assert s3.get("k", {"versionId": "null"}).ok().body == b"x"
    assert s3.get("k", {"versionId": "another"}).error == "NoSuchVersion"
    assert s3.on_key("DELETE", "k", {"versionId": "another"}).error == "NoSuchVersion"
    assert unchanged(s3, "k", b"x")


def test_names_that_clients_add_to_a_query_are_ignored(s3: Client) -> None:
    for name in ("x-id", "X-Amz-User-Agent", "x-amz-user-agent"):
        s3.on_key("PUT", "k", {name: "PutObject"}, b"x").ok()
        assert s3.on_key("GET", "k", {name: "GetObject"}).ok().body == b"x"
        s3.on_bucket("GET", {name: "ListObjects"}).ok()


def test_methods_that_a_resource_does_not_have(s3: Client) -> None:
    s3.put("k", b"old").ok()
    answers = [
        s3.request("PUT", "/"), s3.request("DELETE", "/"), s3.request("POST", "/"),
        s3.on_bucket("POST"),
        s3.on_key("PATCH", "k"), s3.on_key("POST", "k"), s3.on_bucket("PATCH"), s3.on_key("TRACE",
        "k"),
        s3.on_key("CONNECT", "k"), s3.on_key("FROBNICATE", "k"),
    ]  # fmt: skip
    for answer in answers:
        assert answer.error in (
            "MethodNotAllowed",
            "NotImplemented",
            "BadRequest",
            "InvalidArgument",
        )
    assert unchanged(s3, "k", b"old")


def test_an_error_document(s3: Client) -> None:
    answer = s3.get("missing <&>")
    assert answer.error == "NoSuchKey"
    assert answer.body.startswith(b'<?xml version="1.0" encoding="UTF-8"?>')
    assert answer.text("Key") == "missing <&>"
    assert answer.text("Resource") == key_path(s3.bucket, "missing <&>")
    assert answer.text("RequestId") == answer.headers["x-amz-request-id"]
    assert answer.text("HostId") == answer.headers["x-amz-id-2"]


# --- Roles, anonymous read, CORS, virtual hosts --------------------------------------------------

ROLE_TABLE = [  # method, path below the bucket, query, body -> roles that may
    ("GET", "/k", "", b"", "reader writer admin"),
    ("HEAD", "/k", "", b"", "reader writer admin"),
    ("GET", "", "list-type=2", b"", "reader writer admin"),
    ("GET", "", "location", b"", "reader writer admin"),
    ("HEAD", "", "", b"", "reader writer admin"),
    ("PUT", "/k", "", b"new", "writer admin"),
    ("DELETE", "/k", "", b"", "writer admin"),
    ("POST", "/k", "uploads", b"", "writer admin"),
    ("POST", "", "delete", b"<Delete><Object><Key>k</Key></Object></Delete>", "writer admin"),
    ("PUT", "-new", "", b"", "admin"),
    ("DELETE", "-empty", "", b"", "admin"),
]
ROLES = {"admin": ADMIN, "writer": WRITER, "reader": READER}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("method", "path", "query", "body", "roles"), ROLE_TABLE)
def test_what_a_role_may_do(
    s3: Client, role: str, method: str, path: str, query: str, body: bytes, roles: str
) -> None:
    s3.put("k", b"old").ok()
    s3.on_bucket("PUT", bucket=f"{s3.bucket}-empty").ok()
    client = s3.using(ROLES[role])
    headers = {"content-md5": md5_base64(body)} if query == "delete" else {}
    answer = client.request(method, f"/{s3.bucket}{path}", query, body, headers)
    client.close()
    if role in roles:
        answer.ok()
    else:
        assert answer.error == "AccessDenied"
        assert unchanged(s3, "k", b"old")
        assert s3.on_bucket("HEAD", bucket=f"{s3.bucket}-new").status == 404
        assert s3.on_bucket("HEAD", bucket=f"{s3.bucket}-empty").status == 200


def test_a_reader_cannot_write_by_copying(s3: Client) -> None:
    s3.put("k", b"old").ok()
    assert s3.using(READER).copy("k", "l").error == "AccessDenied"
    number = s3.create_upload("l")
    assert s3.using(READER).put_part("l", number, 1, b"x").error == "AccessDenied"
    target = presign("PUT", s3.host, f"/{s3.bucket}/l", credential=READER)
    assert s3.unsigned("PUT", target, body=b"x").error == "AccessDenied"
    assert s3.keys() == ["k"]


def test_anyone_may_read_a_public_bucket_and_nothing_more(s3: Client) -> None:
    public = Client(s3.ports, "public-bucket")
    public.put("dir/k", b"for all").ok()
    assert s3.unsigned("GET", "/public-bucket/dir/k").ok().body == b"for all"
    assert s3.unsigned("HEAD", "/public-bucket/dir/k").ok().headers["content-length"] == "7"
    assert s3.unsigned("GET", "/public-bucket/dir/k", {"range": "bytes=0-2"}).ok().body == b"for"
    for method, target in (
        ("PUT", "/public-bucket/dir/k"), ("DELETE", "/public-bucket/dir/k"), ("DELETE",
        "/public-bucket"),
        ("POST", "/public-bucket/dir/k?uploads"), ("POST", "/public-bucket?delete"), ("GET", "/"),
        ("PUT", "/public-bucket"), ("GET", f"/{s3.bucket}"), ("GET", "/public-bucket?versions"),
        ("GET", "/public-bucket?uploads"),
    ):  # fmt: skip
        assert s3.unsigned(method, target).error == "AccessDenied", target
    # S3 refuses response-* to whoever has no signature.
    answer = s3.unsigned("GET", "/public-bucket/dir/k?response-content-type=text/html")
    assert answer.error in ("InvalidRequest", "AccessDenied")
    # Wrong credentials are not better than none.
    assert public.using(STRANGER).get("dir/k").error == "InvalidAccessKeyId"
    assert public.get("dir/k").ok().body == b"for all"
    copy = {"x-amz-copy-source": "public-bucket/dir/k"}
    assert s3.unsigned("PUT", f"/{s3.bucket}/stolen", copy).error == "AccessDenied"
    public.delete("dir/k").ok()
    public.close()


@pytest.mark.parametrize("query", ["1699999", "v=", "utm&x=1", "x-amz-meta-a=", "a&b&c=&d=1"])
def test_anyone_may_read_a_public_object_with_an_unknown_parameter(s3: Client, query: str) -> None:
    """Pages add such to links, against caches and to count visits."""
    public = Client(s3.ports, "public-bucket")
    public.put("k", b"for all").ok()
    assert s3.unsigned("GET", f"/public-bucket/k?{query}").ok().body == b"for all"
    assert s3.unsigned("HEAD", f"/public-bucket/k?{query}").ok().headers["content-length"] == "7"
    assert s3.unsigned("PUT", f"/public-bucket/k?{query}").error == "AccessDenied"
    for name in ("acl", "uploadId=", "torrent", "versions", "session=1", "policy=x"):
        answer = s3.unsigned("GET", f"/public-bucket/k?{name}&{query}")
        assert answer.error in ("NotImplemented", "AccessDenied")
    public.delete("k").ok()
    public.close()


def test_the_expected_owner_of_a_bucket_is_ignored(s3: Client) -> None:
    s3.put("k", b"x", x_amz_expected_bucket_owner="111122223333").ok()
    assert s3.get("k", x_amz_expected_bucket_owner="444455556666").ok().body == b"x"


ORIGIN = "https://app.example"


def preflight(s3: Client, origin: str, method: str = "PUT", path: str = "") -> Answer:
    return s3.unsigned("OPTIONS", path or f"/{s3.bucket}/k", {
        "origin": origin, "access-control-request-method": method,
        "access-control-request-headers": "authorization, x-amz-date, content-type",
    })  # fmt: skip


def test_a_cors_preflight_is_answered_before_authentication(s3: Client) -> None:
    for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
        answer = preflight(s3, ORIGIN, method).ok()
        assert answer.headers["access-control-allow-origin"] in (ORIGIN, "*")
        assert method in answer.headers["access-control-allow-methods"]
        allowed = answer.headers["access-control-allow-headers"].lower()
        assert allowed == "*" or {"authorization", "x-amz-date", "content-type"} <= set(
            re.split(", *", allowed)
        )
        assert answer.body == b""


def test_a_cors_preflight_from_elsewhere_gets_no_permission(s3: Client) -> None:
    for origin in (
        "https://evil.example",
        "https://app.example.evil.example",
        "http://app.example",
        "null",
    ):
        answer = preflight(s3, origin)
        assert (
            answer.error == "AccessForbidden"
            and "access-control-allow-origin" not in answer.headers
        )


def test_a_cors_preflight_that_does_not_say_what_it_asks_is_a_BadRequest(s3: Client) -> None:
    asked = {"origin": ORIGIN, "access-control-request-method": "GET"}
    s3.unsigned("OPTIONS", f"/{s3.bucket}/k", asked).ok()
    for name in asked:
        answer = s3.unsigned("OPTIONS", f"/{s3.bucket}/k", asked | {name: ""})
        assert answer.error == "BadRequest" and name in (answer.text("Message") or "").lower()
    assert s3.unsigned("OPTIONS", f"/{s3.bucket}/k").error == "BadRequest"


def test_a_cors_request_gets_its_headers_also_when_it_fails(s3: Client) -> None:
    s3.put("k", b"x").ok()
    for answer in (s3.get("k", origin=ORIGIN), s3.get(MISSING_KEY, origin=ORIGIN),
                   s3.unsigned("GET", f"/{s3.bucket}/k", {"origin": ORIGIN})):  # fmt: skip
        assert answer.headers["access-control-allow-origin"] in (ORIGIN, "*")
        assert "etag" in answer.headers["access-control-expose-headers"].lower()
        if answer.headers["access-control-allow-origin"] != "*":
            assert "origin" in answer.headers["vary"].lower()
    assert "access-control-allow-origin" not in s3.get("k", origin="https://evil.example").headers
    plain = s3.get("k").headers  # which a cache is not to give to a page
    assert "access-control-allow-origin" not in plain and plain["vary"] == "Origin"


@pytest.mark.parametrize(
    "flags", [[], ["--cors-origin=*"], ["--cors-origin=https://a.example,https://b.example"]]
)
def test_cors_origins_of_the_command_line(folder: Path, flags: list[str]) -> None:
    with Server(ACL, "--bucket=bucket", *flags, data=folder) as server:
        s3 = server.client("bucket")
        for origin in ("https://a.example", "https://b.example", "https://c.example"):
            allowed = bool(flags) and ("*" in flags[0] or origin in flags[0])
            assert preflight(s3, origin).status == (200 if allowed else 403)
            assert ("access-control-allow-origin" in s3.get("k", origin=origin).headers) == allowed
        s3.close()


def test_virtual_hosts(s3: Client) -> None:
    """`--domain=s3.test`: bucket.s3.test/key is s3.test/bucket/key."""
    port = s3.host.partition(":")[2]
    virtual = Client(s3.ports)
    for host in (f"{s3.bucket}.s3.test:{port}", f"{s3.bucket}.s3.test", f"{s3.bucket}.S3.Test"):
        virtual.host = host
        virtual.request("PUT", "/dir/k", body=b"virtual").ok()
        assert s3.get("dir/k").ok().body == b"virtual"
        assert virtual.request("GET", "/dir/k").ok().body == b"virtual"
        assert virtual.request("GET", "/", "list-type=2").ok().texts("Contents/Key") == ["dir/k"]
        assert virtual.request("HEAD", "/").ok().body == b""
        virtual.request("DELETE", "/dir/k").ok()
        target = presign("PUT", host, "/presigned")
        virtual.unsigned("PUT", target, body=b"x").ok()
        virtual.request("DELETE", "/presigned").ok()
    virtual.host = "s3.test"
    assert virtual.request("GET", "/").ok().xml.tag == "ListAllMyBucketsResult"
    assert virtual.request("GET", f"/{s3.bucket}").ok().xml.tag == "ListBucketResult"
    virtual.host = "no-such-bucket.s3.test"
    assert virtual.request("GET", "/k").error == "NoSuchBucket"
    virtual.host = ".s3.test"
    assert virtual.request("GET", f"/{s3.bucket}").ok().xml.tag == "ListBucketResult"
    virtual.host = "evils3.test"
    assert virtual.request("GET", "/").ok().xml.tag == "ListAllMyBucketsResult"
    virtual.close()


# --- HTTP ----------------------------------------------------------------------------------------


def signed_get(s3: Client, key: str, method: str = "GET", **headers: str) -> bytes:
    path = key_path(s3.bucket, key)
    return head_bytes(method, path, s3.signed_head(method, path, headers=headers))


def signed_put(s3: Client, key: str, length: int, **headers: str) -> bytes:
    path = key_path(s3.bucket, key)
    given = {"content-length": str(length)} | dashed(headers)
    return head_bytes("PUT", path, s3.signed_head("PUT", path, headers=given))


def test_keep_alive(disk: Client) -> None:
    disk.put("k", b"x").ok()
    with disk.connect() as connection:
        for _ in range(5):
            connection.send(signed_get(disk, "k"))
            assert connection.answer().ok().body == b"x"
            connection.send(signed_get(disk, MISSING_KEY))
            assert connection.answer().error == "NoSuchKey"
            connection.send(signed_get(disk, "k", "HEAD"))
            assert connection.answer("HEAD").headers["content-length"] == "1"
            connection.send(signed_get(disk, MISSING_KEY, "HEAD"))
            assert connection.answer("HEAD").status == 404
            connection.send(signed_put(disk, "l", 3) + b"abc")
            assert connection.answer().ok().body == b""
            connection.send(signed_get(disk, "l", "DELETE"))
            assert connection.answer().status == 204
            etag = f'"{md5_hex(b"x")}"'
            connection.send(signed_get(disk, "k", **{"if-none-match": etag}))
            assert connection.answer().status == 304
        connection.send(signed_get(disk, "k", connection="close"))
        assert connection.answer().ok().headers["connection"] == "close"
        assert connection.closed()


def test_pipelining(disk: Client) -> None:
    with disk.connect() as connection:
        wire = b"".join(signed_put(disk, f"k{n}", 2) + b"%02d" % n for n in range(10))
        wire += b"".join(signed_get(disk, f"k{n}") for n in range(10))
        connection.send(wire)
        for _ in range(10):
            connection.answer().ok()
        assert [connection.answer().ok().body for _ in range(10)] == [
            b"%02d" % n for n in range(10)
        ]


def test_a_request_that_arrives_byte_by_byte(disk: Client) -> None:
    with disk.connect() as connection:
        for byte in signed_put(disk, "k", 5) + b"hello" + signed_get(disk, "k"):
            connection.send(bytes([byte]))
        connection.answer().ok()
        assert connection.answer().ok().body == b"hello"


def test_empty_lines_before_a_request_are_passed_over(disk: Client) -> None:
    """(RFC 9112, 2.2.)"""
    disk.put("k", b"x").ok()
    with disk.connect() as connection:
        connection.send(b"\r\n\r\n" + signed_get(disk, "k"))
        assert connection.answer().ok().body == b"x"


def test_every_answer_has_its_ids_date_and_server(disk: Client) -> None:
    disk.put("k", b"x").ok()
    answers = [
        disk.get("k"), disk.head("k"), disk.get(MISSING_KEY), disk.head(MISSING_KEY),
        disk.delete("k"), disk.service(),
        disk.unsigned("GET", "/"), preflight(disk, ORIGIN), disk.unsigned("GET", "/_zs3/health"),
        disk.on_key("PATCH", "k"),
    ]  # fmt: skip
    for answer in answers:
        assert re.fullmatch(r"[0-9A-Za-z]{12,}", answer.headers["x-amz-request-id"])
        assert answer.headers["x-amz-id-2"] and "zs3" in answer.headers["server"]
        date = datetime.datetime.strptime(answer.headers["date"], "%a, %d %b %Y %H:%M:%S GMT")
        assert abs(date.replace(tzinfo=datetime.timezone.utc).timestamp() - time.time()) < 5
    ids = {answer.headers["x-amz-request-id"] for answer in answers}
    assert len(ids) == len(answers)


@pytest.mark.parametrize("expect", ["100-continue", "100-Continue"])
def test_100_continue_comes_once_the_request_is_accepted(disk: Client, expect: str) -> None:
    with disk.connect() as connection:
        for _ in range(2):
            connection.send(signed_put(disk, "k", 5, expect=expect))
            assert connection.file.readline() == b"HTTP/1.1 100 Continue\r\n"
            assert connection.file.readline() == b"\r\n"
            connection.send(b"hello")
            connection.answer().ok()
    assert disk.get("k").body == b"hello"


def test_100_continue_of_an_empty_body(disk: Client) -> None:
    with disk.connect() as connection:
        connection.send(signed_put(disk, "k", 0, expect="100-continue"))
        connection.answer().ok()
    assert disk.get("k").ok().body == b""


def test_a_refused_request_gets_no_100_continue(disk: Client) -> None:
    wrong = Client(disk.ports, disk.bucket, (*ADMIN[:2], "wrong"))
    nowhere = Client(disk.ports, "no-such-bucket")
    reader = disk.using(READER)
    for client, code in (
        (wrong, "SignatureDoesNotMatch"),
        (nowhere, "NoSuchBucket"),
        (reader, "AccessDenied"),
    ):
        with client.connect() as connection:
            connection.send(signed_put(client, "k", 5, expect="100-continue"))
            assert connection.file.peek(12)[:12] != b"HTTP/1.1 100"
            assert connection.answer().error == code
    assert disk.keys() == []


def test_a_refused_put_with_expect_leaves_the_connection_in_step(disk: Client) -> None:
    """The body was never sent: what follows is a request, or the server has closed."""
    disk.put("k", b"x").ok()
    nowhere = Client(disk.ports, "no-such-bucket")
    with disk.connect() as connection:
        connection.send(signed_put(nowhere, "k", 5, expect="100-continue"))
        answer = connection.answer()
        assert answer.error == "NoSuchBucket"
        if answer.headers.get("connection") == "close":
            assert connection.closed()
        else:
            connection.send(signed_get(disk, "k"))
            assert connection.answer().ok().body == b"x"


def test_an_unknown_expectation_is_417(disk: Client) -> None:
    with disk.connect() as connection:
        connection.send(signed_put(disk, "k", 5, expect="200-ok"))
        assert connection.answer().status in (400, 417)
    assert disk.keys() == []


def test_an_empty_expectation_expects_nothing(disk: Client) -> None:
    disk.put("k", b"hello", expect="").ok()
    assert disk.get("k").body == b"hello"


@pytest.mark.parametrize("body", [
    b"5\r\nhello\r\n0\r\n\r\n", b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
    b"5;a=b\r\nhello\r\n0;c\r\n\r\n",
    b"005\r\nhello\r\n000\r\n\r\n", b"5\r\nhello\r\n0\r\nx-trailer: a\r\n\r\n",
    b"5;a=\"b\"\r\nhello\r\n0\r\n\r\n",
], ids=repr)  # fmt: skip
def test_http_chunked_bodies(disk: Client, body: bytes) -> None:
    path = f"/{disk.bucket}/k"
    with disk.connect() as connection:
        headers = disk.signed_head("PUT", path) | {"transfer-encoding": "Chunked"}
        connection.send(head_bytes("PUT", path, headers) + body + signed_get(disk, "k"))
        connection.answer().ok()
        assert connection.answer().ok().body == b"hello"


BAD_CHUNKS = [
    b"g\r\nhello\r\n0\r\n\r\n", b"-5\r\nhello\r\n0\r\n\r\n", b"+5\r\nhello\r\n0\r\n\r\n",
    b"0x5\r\nhello\r\n0\r\n\r\n",
    b"\r\nhello\r\n0\r\n\r\n", b"5\r\nhello0\r\n\r\n", b"4\r\nhello\r\n0\r\n\r\n",
    b"6\r\nhello\r\n0\r\n\r\n",
    b"5 5\r\nhello\r\n0\r\n\r\n", b"5_0\r\nhello\r\n0\r\n\r\n",
    b"f" * 17 + b"\r\nhello\r\n0\r\n\r\n",
    b"5;" + b"x" * 100_000 + b"\r\nhello\r\n0\r\n\r\n", b"5\nhello\n0\n\n",
    b"5\r\nhello\r\n0\r\n" + b"a: b\r\n" * 20_000,
    "\u0665\r\nhello\r\n0\r\n\r\n".encode(),
]  # fmt: skip


@pytest.mark.parametrize("body", BAD_CHUNKS, ids=lambda body: repr(body[:30]))
def test_a_bad_http_chunk_stores_nothing_and_ends_the_connection(disk: Client, body: bytes) -> None:
    disk.put("k", b"old").ok()
    path = f"/{disk.bucket}/k"
    headers = disk.signed_head("PUT", path) | {"transfer-encoding": "chunked"}
    with disk.connect() as connection:
        connection.send(head_bytes("PUT", path, headers) + body + signed_get(disk, "k"))
        connection.socket.shutdown(socket.SHUT_WR)
        answer = connection.answer()
        assert answer.status == 400 and answer.error in FRAMING_ERRORS
        assert connection.closed()
    assert unchanged(disk, "k", b"old")


SMUGGLING = {  # extra header lines of a PUT whose body is followed by a second request
    "both length and coding": b"content-length: 4\r\ntransfer-encoding: chunked\r\n",
    "coding before length": b"transfer-encoding: chunked\r\ncontent-length: 4\r\n",
    "two lengths": b"content-length: 4\r\ncontent-length: 5\r\n",
    "a list of lengths": b"content-length: 4, 5\r\n",
    "a signed length": b"content-length: +4\r\n",
    "a negative length": b"content-length: -4\r\n",
    "a hexadecimal length": b"content-length: 0x4\r\n",
    "a length with an underscore": b"content-length: 0_4\r\n",
    "a length in Arabic digits": "content-length: ٤\r\n".encode(),
    "an empty length": b"content-length: \r\n",
    "a length too large to be one": b"content-length: " + b"9" * 40 + b"\r\n",
    "an unknown coding": b"transfer-encoding: gzip, chunked\r\n",
    "chunked twice": b"transfer-encoding: chunked, chunked\r\n",
    "chunked in two lines": b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
    "almost chunked": b"transfer-encoding: xchunked\r\n",
    "identity": b"transfer-encoding: identity\r\ncontent-length: 4\r\n",
    "a folded line": b"content-length:\r\n 4\r\n",
    "a blank before the colon": b"content-length : 4\r\n",
    "a blank before the name": b" content-length: 4\r\n",
    "no colon": b"content-length 4\r\n",
    "no name": b": 4\r\ncontent-length: 4\r\n",
    "a bare carriage return": b"x-a: b\rtransfer-encoding: chunked\r\ncontent-length: 4\r\n",
    "a null byte": b"x-a: b\x00c\r\ncontent-length: 4\r\n",
    "two hosts": b"host: elsewhere\r\ncontent-length: 4\r\n",
}


@pytest.mark.parametrize("what", SMUGGLING)
def test_a_request_whose_end_is_in_doubt_is_refused_and_the_connection_closed(
    disk: Client, what: str
) -> None:
    path = f"/{disk.bucket}/k"
    head = head_bytes("PUT", path, disk.signed_head("PUT", path))
    wire = head[:-2] + SMUGGLING[what] + b"\r\n" + b"0\r\n\r\n" + signed_put(disk, "smuggled", 0)
    with disk.connect() as connection:
        connection.send(wire)
        connection.socket.shutdown(socket.SHUT_WR)
        answer = connection.answer()
        assert answer.status in (400, 501) and answer.headers["connection"] == "close"
        assert answer.error in ("InvalidRequest", "InvalidArgument", "NotImplemented")
        assert connection.closed()
    assert disk.keys() == []


BAD_REQUESTS = {
    "nothing but a word": b"HELLO\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a version to come": b"GET / HTTP/3.1\r\nhost: a\r\n\r\n",
    "no version number": b"GET / HTTP/x\r\nhost: a\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "a relative target": b"GET bucket HTTP/1.1\r\nhost: a\r\n\r\n",
    "a blank in the target": b"GET /a b HTTP/1.1\r\nhost: a\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50 + b"\r\n\r\n",
    "a long line": b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\nhost: a\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
    "bytes beyond ASCII in the target": b"GET /\xff\xfe HTTP/1.1\r\nhost: a\r\n\r\n",
}


@pytest.mark.parametrize("what", BAD_REQUESTS)
def test_what_is_no_request_is_refused_and_the_connection_closed(disk: Client, what: str) -> None:
    with disk.connect() as connection:
        connection.send(BAD_REQUESTS[what] + signed_get(disk, "k"))
        connection.socket.shutdown(socket.SHUT_WR)
        answer = connection.answer()
        codes = {
            "InvalidRequest",
            "InvalidURI",
            "HTTPVersionNotSupported",
            "RequestHeaderSectionTooLarge",
        }
        assert answer.error in codes
        assert connection.closed()
    disk.service().ok()


@pytest.mark.parametrize("size", [16384, 16385, 40000])
def test_a_request_head_has_at_most_16_kib(disk: Client, size: int) -> None:
    disk.put("k", b"x").ok()
    head = signed_get(disk, "k")
    padding = size - len(head) - len(b"x-padding: \r\n")
    wire = head[:-2] + b"x-padding: " + b"p" * padding + b"\r\n\r\n"
    assert len(wire) == size
    with disk.connect() as connection:
        connection.send(wire)
        answer = connection.answer()
        if size <= 16384:
            assert answer.ok().body == b"x"
        else:
            assert answer.status == 431 and connection.closed()
            assert answer.error == "RequestHeaderSectionTooLarge"


def test_no_pattern_takes_long_over_what_anyone_may_send() -> None:
    """One that tries every division of a run among its pieces would stop the whole process."""
    for module in (zs3, zs3_dist):
        source = Path(module.__file__).read_text()
        for node in ast.walk(ast.parse(source)):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re.")):
                continue
            pattern = re.compile(eval(ast.unparse(node.args[0]), vars(module)))
            text = pattern.pattern if isinstance(pattern.pattern, str) else pattern.pattern.decode()
            literal = re.sub(r"(?:\\s| )[*?+]?", "", text)
            begins = ["", *re.findall("[a-z-]+[=:]", literal)]
            for begin, one, between, two in itertools.product(begins, " 0a.", ["", "-"], " 0a."):
                long = f"\r\n{begin}{one * 1500}{between}{two * 1500}\0"
                hostile: Any = long if text is pattern.pattern else long.encode()
                start = time.monotonic()
                pattern.fullmatch(hostile, 2)
                pattern.search(hostile)
                assert time.monotonic() - start < 1, (text, begin, one, between, two)


def test_http_1_0(disk: Client) -> None:
    disk.put("k", b"x").ok()
    path = f"/{disk.bucket}/k"
    with disk.connect() as connection:
        connection.send(head_bytes("GET", path, disk.signed_head("GET", path), "HTTP/1.0"))
        assert connection.answer().ok().body == b"x"
        assert connection.closed()
    with disk.connect() as connection:
        connection.send(b"GET /_zs3/health HTTP/1.0\r\n\r\n")
        connection.answer().ok()
        assert connection.closed()


def test_chunks_in_http_1_0_are_InvalidRequest_and_the_connection_is_closed(disk: Client) -> None:
    path = f"/{disk.bucket}/k"
    headers = disk.signed_head("PUT", path) | {
        "transfer-encoding": "chunked", "connection": "keep-alive",
    }  # fmt: skip
    with disk.connect() as connection:
        connection.send(head_bytes("PUT", path, headers, "HTTP/1.0") + http_chunked(b"x"))
        connection.socket.shutdown(socket.SHUT_WR)
        answer = connection.answer()
        assert answer.error == "InvalidRequest" and answer.headers["connection"] == "close"
        assert connection.closed()
    assert disk.keys() == []


@pytest.mark.parametrize(("target", "path", "query", "host"), [
    ("http://b.example:9000/k?x=/y", "/k", "x=/y", "b.example:9000"),
    ("HTTP://b.example", "/", "", "b.example"),
    ("http://b.example?x=/b/k", "/", "x=/b/k", "b.example"),
    ("/http://b.example/k", "/http://b.example/k", "", "a"), ("http://b?", "/", "", "b"),
])  # fmt: skip
def test_an_absolute_target_says_the_host(target: str, path: str, query: str, host: str) -> None:
    """(RFC 9112, 3.2.2: whatever the Host header says.)"""
    head = f"GET {target} HTTP/1.1\r\nhost: a\r\n\r\n".encode()
    parsed = zs3.parse_head(head)
    assert parsed[1:3] == (path, query) and parsed[4] == {"host": host}


@pytest.mark.parametrize(
    "target",
    ["http://", "http:///k", "https://b/k", "ftp://b/k", "k", "http://a\x01b/k", "http://a\rb/k",
     "http://a/k\x7f", "http://a?\xff"],
)  # fmt: skip
def test_other_absolute_targets_are_refused(target: str) -> None:
    with pytest.raises(S3Error, match=r"InvalidURI|InvalidRequest"):
        zs3.parse_head(f"GET {target} HTTP/1.1\r\nhost: a\r\n\r\n".encode("latin-1"))


def test_an_absolute_target_needs_a_host_header_all_the_same() -> None:
    with raises("InvalidRequest"):
        zs3.parse_head(b"GET http://a/k HTTP/1.1\r\n\r\n")
    assert zs3.parse_head(b"GET http://a/k HTTP/1.0\r\n\r\n")[4] == {"host": "a"}


def test_an_absolute_target_is_answered(disk: Client) -> None:
    with disk.connect() as connection:
        target = f"http://{disk.host}/_zs3/health"
        connection.send(head_bytes("GET", target, {"host": disk.host}))
        assert connection.answer().status == 200


def test_a_refused_upload_lets_the_client_read_the_answer(disk: Client) -> None:
    """The server goes on reading for a while, so that no reset overtakes its answer."""
    wrong = Client(disk.ports, disk.bucket, (*ADMIN[:2], "wrong"))
    body = bytes(1 << 20)
    for _ in range(3):
        with wrong.connect() as connection:
            connection.send(signed_put(wrong, "k", 8 * len(body)))
            for _ in range(8):
                connection.send(body)
            assert connection.answer().error == "SignatureDoesNotMatch"
    assert disk.keys() == []


def test_half_a_request_stops_nobody(disk: Client) -> None:
    disk.put("k", b"x").ok()
    halves = [disk.connect() for _ in range(60)]
    for number, connection in enumerate(halves):
        whole = signed_put(disk, "half", 10) + b"12345"
        connection.send(whole[: len(whole) * number // len(halves)])
    started = time.monotonic()
    assert disk.get("k").ok().body == b"x"
    assert time.monotonic() - started < 5
    for connection in halves:
        connection.close()
    assert unchanged(disk, "k", b"x")


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_a_read_under_way_gives_the_object_as_it_was(s3: Client, change: str) -> None:
    body = random.Random(5).randbytes(12 << 20)
    s3.put("k", body).ok()
    with s3.connect() as connection:
        connection.send(signed_get(s3, "k"))
        while connection.file.readline() != b"\r\n":
            pass
        begin = read_exactly(connection.file, 1000)
        if change == "replaced":
            s3.put("k", b"new").ok()
        else:
            s3.delete("k").ok()
        assert begin + read_exactly(connection.file, len(body) - 1000) == body
    assert s3.get("k").status == (200 if change == "replaced" else 404)


def test_a_client_that_goes_away_is_no_traceback(disk: Client) -> None:
    disk.put("k", bytes(8 << 20)).ok()
    for _ in range(3):
        with disk.connect() as connection:
            connection.send(signed_get(disk, "k"))
            connection.file.read(10)
    with disk.connect() as connection:
        connection.send(signed_put(disk, "l", 1000) + b"x")
    assert disk.head("k").status == 200


# Python run instead of zs3.py, to change something in it: a limit, or a bug put in on purpose.
CHANGED = "import zs3\n{}\nsys.exit(zs3.main())"


def test_a_client_that_stops_sending_is_RequestTimeout(folder: Path) -> None:
    run = CHANGED.format("zs3.SOCKET_SECONDS = 0.2")
    with Server(ACL, "--bucket=bucket", data=folder, prelude=run) as server:
        s3 = server.client("bucket")
        s3.put("k", b"old").ok()
        for tail in (b"", b"x", bytes(100)):
            with s3.connect() as connection:
                connection.send(signed_put(s3, "k", 1000) + tail)
                answer = connection.answer()
                assert answer.error == "RequestTimeout"
                assert answer.headers["connection"] == "close" and connection.closed()
        with s3.connect() as connection:  # not a whole head, or nothing at all: nobody to answer
            connection.send(b"GET / HTTP/1.1\r\nhost: a")
            assert connection.file.read(1) in (b"", b"H")
        with s3.connect() as connection:
            assert connection.closed()
        s3.close()
        assert unchanged(s3, "k", b"old")
        s3.close()


def test_a_client_that_does_not_read_its_answer_is_left(folder: Path) -> None:
    run = CHANGED.format("zs3.SOCKET_SECONDS = 0.5")
    with Server(ACL, "--bucket=bucket", data=folder, prelude=run) as server:
        s3 = server.client("bucket")
        (folder / "bucket/large").touch()
        os.truncate(folder / "bucket/large", 64 << 20)
        with s3.connect() as connection:
            connection.send(signed_get(s3, "large"))
            server.wait_for_line("GET /bucket/large")
            with contextlib.suppress(ConnectionError):
                assert len(connection.file.read()) < 64 << 20
        s3.close()


def test_a_connection_beyond_the_last_is_SlowDown(folder: Path) -> None:
    run = CHANGED.format("zs3.MAX_CONNECTIONS = 2")
    with Server(ACL, "--bucket=bucket", data=folder, prelude=run) as server:
        s3 = server.client("bucket")
        with contextlib.ExitStack() as held:
            for kept in range(4):  # noqa: B007
                connection = held.enter_context(s3.connect())
                connection.send(signed_get(s3, "k"))
                if (answer := connection.answer()).status == 503:
                    break
                assert answer.error == "NoSuchKey"
            assert answer.error == "SlowDown" and kept in (1, 2)  # one may be that of `healthy`
        deadline = time.monotonic() + 5
        while s3.get("k").status == 503:
            assert time.monotonic() < deadline, "the places are not given back"
            time.sleep(0.01)
        s3.close()


def test_systems_of_32_bits_with_times_of_64(folder: Path) -> None:
    """Their time-outs of sockets are options 66 and 67, which take two numbers of 64 bits, where
    the C language's long has 32."""
    run = CHANGED.format("""
import socket, struct
pack = struct.pack
struct.pack = lambda form, *numbers: pack(form.replace("l", "i"), *numbers)
socket.SO_RCVTIMEO, socket.SO_SNDTIMEO = 66, 67
zs3.SOCKET_SECONDS = 1.0
""")
    with Server(ACL, "--bucket=bucket", data=folder, prelude=run) as server:
        s3 = server.client("bucket")
        with s3.connect() as connection:
            connection.send(signed_put(s3, "k", 1 << 20) + b"a beginning")
            assert connection.answer().error == "RequestTimeout"
        s3.close()


@pytest.mark.parametrize("comes_at", [1, 3, None])
def test_who_looks_eagerly_goes_to_sleep_only_if_nothing_comes_soon(comes_at: int | None) -> None:
    looks: list[float] = []

    def look(seconds: float) -> str:
        looks.append(seconds)
        return "it" if seconds or len(looks) == comes_at else ""

    began = time.monotonic()
    assert zs3.eagerly(look, 7.0, 0.2) == "it"
    assert (time.monotonic() - began < 0.2) == (comes_at is not None)
    assert looks == ([0.0] * comes_at if comes_at else [*looks[:-1], 7.0])
    assert not any(looks[:-1])


def test_nobody_looks_eagerly_for_longer_than_asked() -> None:
    looks: list[float] = []
    assert zs3.eagerly(looks.append, 0.0, 60.0) is None
    assert zs3.eagerly(looks.append, 5.0, 0.0) is None
    assert looks == [0.0, 5.0]


SLOW = """
import time
slow = zs3.FileStore.stat_object
def stat_object(self, bucket, key):
    time.sleep(2.0 if key == "slow" else 0.0)
    return slow(self, bucket, key)
zs3.FileStore.stat_object = stat_object
"""


def test_nobody_waits_for_the_turn_of_a_slow_request_or_of_a_slow_client(folder: Path) -> None:
    with Server(ACL, "--bucket=bucket", data=folder, prelude=CHANGED.format(SLOW)) as server:
        s3 = server.client("bucket")
        s3.put("k", b"x").ok()
        began = time.monotonic()
        with s3.connect() as slow, s3.connect() as half_sent:
            slow.send(head_bytes("HEAD", "/bucket/slow", s3.signed_head("HEAD", "/bucket/slow")))
            headers = s3.signed_head("PUT", "/bucket/half") | {"content-length": "8"}
            half_sent.send(head_bytes("PUT", "/bucket/half", headers) + b"1234")
            for _ in range(5):
                assert s3.get("k").ok().body == b"x"
            assert time.monotonic() - began < 1.5
            half_sent.send(b"5678")
            half_sent.answer().ok()
            assert slow.answer("HEAD").status == 404
        assert time.monotonic() - began > 1.9, "the slow request was slow"
        s3.close()


def test_nobody_waits_for_a_client_that_does_not_read_its_answer(folder: Path) -> None:
    with Server(ACL, "--bucket=bucket", data=folder) as server:
        s3 = server.client("bucket")
        (folder / "bucket/large").write_bytes(bytes(32 << 20))
        for number in range(1000):
            (folder / f"bucket/{number:0200}").touch()
        began = time.monotonic()
        with contextlib.ExitStack() as idle:
            for query in ("", "", "", "", "list-type=2", "list-type=2", "list-type=2"):
                lazy = idle.enter_context(s3.connect())
                lazy.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
                path = "/bucket" if query else "/bucket/large"
                headers = s3.signed_head("GET", path, query)
                lazy.send(head_bytes("GET", f"{path}?{query}".rstrip("?"), headers))
            for _ in range(5):
                assert s3.head("large").status == 200
        assert time.monotonic() - began < 5
        s3.close()


class InProcess:
    """A zs3.Server in this process whose requests are answered by `respond`."""

    def __init__(self, respond: Callable[[zs3.Request], zs3.Response]) -> None:
        service: Any = types.SimpleNamespace(
            respond=respond, waits=lambda request: False, settings=zs3.Settings({}),
            store=types.SimpleNamespace(waits=False),
        )  # fmt: skip
        self.server = zs3.Server(socket.create_server(("127.0.0.1", 0)), service, None)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))

    def __enter__(self) -> InProcess:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        if self.server.socket.fileno() >= 0:
            self.server.finish()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.server.server_address[:2], timeout=20)


def slow_once() -> Callable[[zs3.Request], zs3.Response]:
    """Answers the first request after more than a turn, and then at once."""
    pauses = [0.3]

    def respond(_: zs3.Request) -> zs3.Response:
        time.sleep(pauses.pop() if pauses else 0.0)
        return zs3.Response(200)

    return respond


def no_thread(_: threading.Thread) -> None:
    """Thread.start where the system has none left."""
    raise RuntimeError("can't start new thread")


PLAIN_GET = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"


def test_beside_a_long_request_the_others_go_on_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight long listings at once would take several times as long as one after the other."""
    monkeypatch.setattr(zs3, "TURN_SECONDS", 0.2)
    under_way, at_once = [0], []

    def respond(_: zs3.Request) -> zs3.Response:
        under_way[0] += 1
        at_once.append(under_way[0])
        time.sleep(0.5)
        under_way[0] -= 1
        return zs3.Response(200)

    with InProcess(respond) as server, contextlib.ExitStack() as opened:
        clients = [opened.enter_context(server.connect()) for _ in range(8)]
        for client in clients:
            client.sendall(PLAIN_GET)
        assert all(client.recv(12) == b"HTTP/1.1 200" for client in clients)
    assert len(at_once) == 8 and 2 <= max(at_once) <= 5


def test_a_client_that_keeps_us_waiting_has_to_go_where_no_thread_is_to_be_had(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def respond(request: zs3.Request) -> zs3.Response:
        with contextlib.suppress(zs3.S3Error):
            request.wire.read()
        return zs3.Response(200)

    with InProcess(respond) as server, server.connect() as client:
        client.sendall(PLAIN_GET)
        assert client.recv(4096)
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", no_thread)
            server.server._spare = 0
            client.sendall(b"PUT /k HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\n")
            assert client.recv(4096) and client.recv(4096) == b""
            assert "can't start new thread" in caplog.text
            with server.connect() as other:
                other.sendall(PLAIN_GET)
                assert other.recv(12) == b"HTTP/1.1 200"


def answers(client: socket.socket, count: int) -> int:
    """How many of `count` answers without a body come, until the server closes the connection."""
    data = b""
    while data.count(b"HTTP/1.1 200") < count and (more := client.recv(4096)):
        data += more
    return data.count(b"HTTP/1.1 200")


def test_pipelined_requests_are_all_answered_though_no_thread_is_to_be_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with InProcess(lambda request: zs3.Response(200)) as server, server.connect() as client:
        client.sendall(PLAIN_GET)
        assert answers(client, 1) == 1
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", no_thread)
            server.server._spare = 0
            client.sendall(PLAIN_GET * 3)
            assert answers(client, 3) == 3


def test_a_block_that_is_lost_midway_cuts_the_answer_short_and_adds_nothing() -> None:
    class Broken:
        def chunks(self, start: int, length: int) -> Iterator[bytes]:
            yield b"whole"
            raise zs3.S3Error("SlowDown")

        def close(self) -> None:
            pass

    def respond(_: zs3.Request) -> zs3.Response:
        return zs3.Response(200, body=zs3.Stream(Broken(), 0, 10))

    with (
        InProcess(respond) as server, server.connect() as client, client.makefile("rb") as file
    ):  # fmt: skip
        client.sendall(PLAIN_GET)
        assert file.read().partition(b"\r\n\r\n")[2] == b"whole"


def test_an_object_of_which_no_byte_can_be_had_is_an_error_like_any_other() -> None:
    def respond(request: zs3.Request) -> zs3.Response:
        return zs3.Response(200, body=zs3.Stream(Broken(), 0, 10) if request.path == "/b" else b"")

    class Broken:
        def chunks(self, start: int, length: int) -> Iterator[bytes]:
            raise zs3.S3Error("SlowDown")
            yield b""

        def close(self) -> None:
            closed.append(self)

    def log(request: zs3.Request, response: zs3.Response, length: int, seconds: float) -> str:
        logged.append((request.path, response.status, length > 0))
        return ""

    closed: list[Broken] = []
    logged: list[tuple[str, int, bool]] = []
    with InProcess(respond) as server, server.connect() as client:
        server.server.log = log
        client.sendall(PLAIN_GET.replace(b"/ ", b"/b ", 1))
        head, _, body = client.recv(4096).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503") and b"<Code>SlowDown</Code>" in body
        client.sendall(PLAIN_GET)
        assert answers(client, 1) == 1
    assert logged == [("/b", 503, True), ("/", 200, False)] and len(closed) == 1


@pytest.mark.parametrize("error", [TimeoutError, BlockingIOError, ConnectionError])
def test_a_disk_that_fails_as_a_network_does_is_not_a_client_that_went_away(
    error: type[OSError], caplog: pytest.LogCaptureFixture
) -> None:
    def respond(_: zs3.Request) -> zs3.Response:
        raise error("of a network file system")

    with InProcess(respond) as server, server.connect() as client:
        client.sendall(PLAIN_GET)
        assert client.recv(4096).startswith(b"HTTP/1.1 500")
    assert "of a network file system" in caplog.text


def test_an_answer_is_whole_though_its_connection_is_closed_with_a_request_behind_it() -> None:
    """Closing a connection that has unread bytes resets it, and drops what is not sent yet."""
    asked, sent = threading.Event(), threading.Event()

    def respond(_: zs3.Request) -> zs3.Response:
        asked.set()
        assert sent.wait(10)
        return zs3.Response(200, body=bytes(8 << 20))

    with InProcess(respond) as server, server.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        assert asked.wait(10)
        client.sendall(PLAIN_GET)
        sent.set()
        time.sleep(0.2)
        received = 0
        while data := client.recv(1 << 20):
            received += len(data)
        assert received > 8 << 20


def test_who_waits_no_more_gives_its_thread_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zs3, "OWN_SECONDS", 0.2)
    with InProcess(slow_once()) as server, server.connect() as client:
        deadline = time.monotonic() + 10
        alone = []
        while not (any(alone) and not alone[-1]):
            client.sendall(PLAIN_GET)
            assert answers(client, 1) == 1
            alone.append(not server.server._selector.get_map())
            assert time.monotonic() < deadline


def test_a_line_end_after_a_request_takes_no_thread() -> None:
    """Some clients send one. (RFC 9112, 2.2)"""
    before = threading.active_count()
    with InProcess(lambda request: zs3.Response(200)) as server, contextlib.ExitStack() as held:
        for _ in range(20):
            client = held.enter_context(server.connect())
            client.sendall(PLAIN_GET + b"\r\n")
            assert answers(client, 1) == 1
        assert threading.active_count() < before + 5


def test_tls_is_refused_at_once() -> None:
    """Its first bytes hold no line end, for which a request's head is waited for."""
    with InProcess(lambda request: zs3.Response(200)) as server, server.connect() as client:
        client.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
        answer = client.recv(4096)
        assert answer.startswith(b"HTTP/1.1 400") and b"only http:// is spoken here" in answer


def test_a_time_out_is_as_long_after_a_slow_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zs3, "SOCKET_SECONDS", 1.0)
    with InProcess(slow_once()) as server, server.connect() as client:
        client.sendall(PLAIN_GET)
        assert answers(client, 1) == 1
        client.sendall(PLAIN_GET[:5])
        began = time.monotonic()
        assert client.recv(4096) == b""
        assert 0.8 < time.monotonic() - began < 1.8


class Panic(BaseException):
    """What no handler of Exception stops."""


def test_whatever_a_request_raises_the_others_are_answered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def respond(request: zs3.Request) -> zs3.Response:
        if request.path == "/panic":
            raise Panic
        return zs3.Response(200)

    with InProcess(respond) as server, server.connect() as other:
        for _ in range(3):
            with server.connect() as client:
                client.sendall(PLAIN_GET.replace(b"/ ", b"/panic ", 1))
                assert client.recv(4096) == b""
            other.sendall(PLAIN_GET)
            assert answers(other, 1) == 1
        assert len(server.server._connections) == 1
    assert "Panic" in caplog.text


@contextlib.contextmanager
def accepted(
    count: int, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[zs3.Server, list[socket.socket]]]:
    """A server with room for three connections, and clients that were accepted one after the other,
    and have sent something, while nobody comes to answer them or to close them."""
    monkeypatch.setattr(zs3, "MAX_CONNECTIONS", 3)
    monkeypatch.setattr(zs3, "OWN_SECONDS", 0.0)
    server = InProcess(lambda request: zs3.Response(200))
    with contextlib.closing(server.server.socket), contextlib.ExitStack() as held:
        clients = [held.enter_context(server.connect()) for _ in range(count)]
        for client in clients:
            client.sendall(sent)
            server.server.process_request(*server.server.get_request())
        for each in server.server._connections:
            held.enter_context(each.socket)
        yield server.server, clients


def test_each_new_connection_beyond_the_limit_ends_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with accepted(6, b"", monkeypatch) as (_, clients):
        assert [client.recv(1) for client in clients[:3]] == [b"", b"", b""]
        for client in clients[3:]:
            client.setblocking(False)
            with pytest.raises(BlockingIOError):
                client.recv(1)


def test_a_connection_that_waits_for_its_answer_is_not_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with accepted(4, PLAIN_GET, monkeypatch) as (server, clients):
        assert len(server._connections) == 3
        assert clients[3].recv(4096).startswith(b"HTTP/1.1 503")


def test_finish_waits_for_a_request_that_was_read_but_not_understood_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reading, real = threading.Event(), zs3.Wire.read_head
    answered = []

    def read_head(wire: zs3.Wire) -> bytes:
        head = real(wire)
        if head and answered:
            reading.set()
            time.sleep(0.3)
        return head

    def respond(_: zs3.Request) -> zs3.Response:
        time.sleep(0.0 if answered else 0.3)  # the first makes the connection one of its own thread
        answered.append(True)
        return zs3.Response(200)

    monkeypatch.setattr(zs3.Wire, "read_head", read_head)
    with InProcess(respond) as server, server.connect() as client:
        client.sendall(PLAIN_GET)
        assert answers(client, 1) == 1
        client.sendall(PLAIN_GET)
        assert reading.wait(10)
    assert len(answered) == 2


@pytest.mark.parametrize(
    ("method", "path", "headers", "waits"),
    [
        ("GET", "/b/k", {}, True),
        ("POST", "/_zs3/read", {"x-zs3-seal": "..."}, False),
        ("POST", "/_zs3/photo.jpg", {}, True),  # a key, with --domain
        ("GET", "/_zs3/ping", {}, True),
        ("GET", "/_zs3/providers/0", {"x-zs3-seal": "..."}, True),  # anyone can say so
    ],
)
def test_only_what_peers_ask_waits_for_nobody(
    method: str, path: str, headers: dict[str, str], waits: bool
) -> None:
    service = zs3.Service(types.SimpleNamespace(waits=True), zs3.Settings({}))  # type: ignore[arg-type]
    request = zs3.Request(method, path, "", headers, service.settings)
    assert service.waits(request) == waits


def test_what_was_sent_before_sigterm_is_answered(folder: Path) -> None:
    with Server(ACL, "--bucket=bucket", "--public-read=bucket", data=folder) as server:
        (folder / "bucket/k").write_bytes(b"x")
        port = server.port
        lost = []

        def ask() -> None:
            with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
                data = b"HTTP/1.1 200"
                while data and b"onnection: close" not in data:
                    client.sendall(b"GET /bucket/k HTTP/1.1\r\nhost: a\r\n\r\n")
                    data = client.recv(4096)
                lost.append(not data)

        threads = [threading.Thread(target=ask) for _ in range(30)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        server.process.terminate()
        for thread in threads:
            thread.join()
        assert server.process.wait(20) == 0
        assert len(lost) == 30 and not any(lost)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_connection_that_was_made_before_sigterm_is_answered(folder: Path, workers: int) -> None:
    with Server(ACL, f"--workers={workers}", data=folder) as server, contextlib.ExitStack() as held:
        clients = []
        for _ in range(200):
            address = ("127.0.0.1", server.port)
            clients.append(held.enter_context(socket.create_connection(address, timeout=20)))
            clients[-1].sendall(b"GET /_zs3/health HTTP/1.1\r\nhost: a\r\n\r\n")
        server.process.terminate()
        assert all(client.recv(4096).startswith(b"HTTP/1.1 200") for client in clients)
        assert server.process.wait(20) == 0


def test_workers_take_new_connections_at_once_beside_idle_ones(folder: Path) -> None:
    with (
        Server(ACL, "--bucket=bucket", "--workers=2", data=folder) as server,
        contextlib.ExitStack() as held,
    ):
        s3 = server.client("bucket")
        for _ in range(600):
            held.enter_context(s3.connect())
        time.sleep(1.2)
        began = time.monotonic()
        for _ in range(20):
            with s3.connect() as connection:
                connection.send(signed_get(s3, "k"))
                assert connection.answer().error == "NoSuchKey"
        assert time.monotonic() - began < 1.5
        s3.close()


def test_connections_that_are_silent_have_no_threads(folder: Path) -> None:
    with Server(ACL, "--bucket=bucket", data=folder) as server, contextlib.ExitStack() as held:
        s3 = server.client("bucket")
        for _ in range(100):
            connection = held.enter_context(s3.connect())
            connection.send(signed_get(s3, "k"))
            assert connection.answer().error == "NoSuchKey"
        assert len(os.listdir(f"/proc/{server.process.pid}/task")) < 10
        s3.close()


def test_a_head_may_come_in_drops_and_takes_no_thread(folder: Path) -> None:
    with Server(ACL, data=folder) as server, contextlib.ExitStack() as held:
        address = ("127.0.0.1", server.port)
        clients = [held.enter_context(socket.create_connection(address)) for _ in range(50)]
        head = b"\r\n\r\nGET /_zs3/health HTTP/1.1\r\nhost: a\r\n\r\n"
        for at in range(len(head)):
            for client in clients:
                client.sendall(head[at : at + 1])
            if at == 20:
                assert len(os.listdir(f"/proc/{server.process.pid}/task")) < 10
        for client in clients:
            assert client.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize("drop", [b"G", b"\r\n"])
def test_a_head_has_to_come_in_time_however_many_drops_it_has(folder: Path, drop: bytes) -> None:
    run = CHANGED.format("zs3.SOCKET_SECONDS = 1.0")
    with Server(ACL, data=folder, prelude=run) as server:
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.settimeout(0.2)
            with contextlib.suppress(ConnectionError):
                while True:
                    client.sendall(drop)
                    with contextlib.suppress(TimeoutError):
                        if client.recv(1) == b"":
                            break
        assert 0.9 < time.monotonic() - began < 10


FEW_FILES = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"


def test_silent_connections_leave_files_for_those_who_ask(folder: Path) -> None:
    run = FEW_FILES + CHANGED.format("zs3.OWN_SECONDS = 0.0")
    with (
        Server(ACL, "--bucket=bucket", data=folder, prelude=run) as server,
        contextlib.ExitStack() as held,
    ):
        for _ in range(100):
            held.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        for _ in range(5):
            s3 = server.client("bucket")
            s3.put("k", DATA).ok()
            assert s3.get("k").ok().body == DATA
            s3.close()


def test_at_the_limit_of_open_files_a_silent_connection_has_to_go(folder: Path) -> None:
    """As when others have the files: half of them are for connections."""
    change = """
zs3.OWN_SECONDS = 0.1
class Server(zs3.Server):
    def serve_forever(self):
        self._most = zs3.MAX_CONNECTIONS
        super().serve_forever()
zs3.Server = Server
"""
    run = FEW_FILES + CHANGED.format(change)
    with Server(ACL, data=folder, prelude=run) as server, contextlib.ExitStack() as held:
        for _ in range(80):
            client = held.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            client.settimeout(10)
            client.sendall(b"GET /_zs3/health HTTP/1.1\r\nhost: a\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.1 200"


def test_at_the_limit_of_connections_a_silent_one_has_to_go(folder: Path) -> None:
    run = CHANGED.format("zs3.MAX_CONNECTIONS, zs3.OWN_SECONDS = 3, 0.2")
    with Server(ACL, "--bucket=bucket", data=folder, prelude=run) as server:
        s3 = server.client("bucket")
        with contextlib.ExitStack() as held:
            connections = []
            for _ in range(6):
                connections.append(held.enter_context(s3.connect()))
                connections[-1].send(signed_get(s3, "k"))
                assert connections[-1].answer().error == "NoSuchKey"
                time.sleep(0.3)
            assert connections[0].closed() and connections[2].closed()
        s3.close()


def test_at_the_limit_of_connections_refused_uploads_have_to_go(folder: Path) -> None:
    """Their clients are read on, and keep nobody out."""
    run = CHANGED.format("zs3.MAX_CONNECTIONS, zs3.OWN_SECONDS, zs3.LINGER_SECONDS = 3, 0.2, 60.0")
    with Server(ACL, "--bucket=bucket", data=folder, prelude=run) as server:
        s3 = server.client("bucket")
        with contextlib.ExitStack() as held:
            for _ in range(3):
                upload = held.enter_context(s3.connect())
                upload.send(b"PUT /bucket/k HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n")
                assert upload.answer().error == "AccessDenied"
            time.sleep(0.3)
            connection = held.enter_context(s3.connect())
            connection.send(signed_get(s3, "k"))
            assert connection.answer().error == "NoSuchKey"
        s3.close()


def test_an_abort_that_waits_for_a_complete_keeps_nobody_waiting(folder: Path) -> None:
    with Server(ACL, "--bucket=bucket", data=folder) as server, contextlib.ExitStack() as held:
        s3 = server.client("bucket")
        query = f"uploadId={s3.create_upload('k')}"
        path = key_path(s3.bucket, "k")
        signed = s3.signed_head("DELETE", path, query)
        (record,) = (folder / ".uploads").rglob("00000")
        with open(record, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            aborts = [held.enter_context(s3.connect()) for _ in range(30)]
            for abort in aborts:
                abort.send(head_bytes("DELETE", f"{path}?{query}", signed))
            began = time.monotonic()
            with s3.connect() as connection:
                connection.send(signed_get(s3, "k"))
                assert connection.answer().error == "NoSuchKey"
            assert time.monotonic() - began < 15 * zs3.TURN_SECONDS
        assert sorted(abort.answer().status for abort in aborts) == [204] + 29 * [404]
        s3.close()


def test_workers_share_the_connections(folder: Path) -> None:
    with (
        Server(ACL, "--bucket=bucket", "--workers=2", data=folder) as server,
        contextlib.ExitStack() as held,
    ):
        s3 = server.client("bucket")

        def ask(connection: Connection) -> int:
            connection.send(signed_get(s3, "k"))
            return int(connection.answer().headers["x-amz-request-id"], 16)

        def of_one(ids: list[int]) -> int:  # each worker counts its own, from a number of 64 bits
            return sum(abs(each - ids[0]) < 10**6 for each in ids)

        ids: list[int] = []
        while not ids or len(ids) == of_one(ids):  # until both have started
            with s3.connect() as connection:
                ids.append(ask(connection))
        connections = [held.enter_context(s3.connect()) for _ in range(40)]
        assert 4 <= of_one([ask(connection) for connection in connections]) <= 36
        s3.close()


def test_a_bug_is_InternalError_with_a_traceback_and_the_server_goes_on(folder: Path) -> None:
    run = CHANGED.format("zs3.FileStore.list_buckets = lambda self: 1 // 0")
    flags = (ACL, "--bucket=bucket", f"--cors-origin={ORIGIN}")
    with Server(*flags, data=folder, prelude=run) as server:
        s3 = server.client("bucket")
        for _ in range(2):
            answer = s3.service(origin=ORIGIN)
            assert answer.headers["access-control-allow-origin"] == ORIGIN
            assert answer.error == "InternalError" and answer.headers["connection"] == "close"
            assert b"ZeroDivisionError" not in answer.body
            server.wait_for_line(answer.headers["x-amz-request-id"])
        server.wait_for_line("ZeroDivisionError")
        s3.put("k", b"x").ok()
        s3.close()
        server.stop()
        server.lines.clear()


DISK_ERRORS = {
    "ENOSPC": "InsufficientStorage", "EDQUOT": "InsufficientStorage", "EMFILE": "SlowDown",
    "EIO": "InternalError", "EPERM": "AccessDenied", "EAGAIN": "SlowDown", "ETIMEDOUT": "SlowDown",
}  # fmt: skip


@pytest.mark.parametrize("name", DISK_ERRORS)
def test_what_the_disk_says_when_an_object_is_put_in_place(folder: Path, name: str) -> None:
    change = f"""
import errno, os
real = os.rename
def rename(old, new, **more):
    if new.endswith("refused"):
        raise OSError(errno.{name}, "on purpose")
    real(old, new, **more)
os.rename = os.replace = rename
"""
    with Server(ACL, "--bucket=bucket", data=folder, prelude=CHANGED.format(change)) as server:
        s3 = server.client("bucket")
        assert s3.put("refused", b"x").error == DISK_ERRORS[name]
        assert s3.get("refused").error == "NoSuchKey"
        s3.put("k", b"x").ok()
        assert s3.keys() == ["k"] and list((folder / ".tmp").iterdir()) == []
        s3.close()
        server.stop()
        server.lines.clear()


@pytest.mark.parametrize("path", ["/_zs3/health", "/minio/health/live", "/minio/health/ready"])
def test_health_needs_no_credentials(s3: Client, path: str) -> None:
    assert s3.unsigned("GET", path).status == 200
    assert s3.unsigned("HEAD", path).status == 200


@pytest.mark.parametrize(
    "path", ["/_zs3/", "/_zs3/nothing", "/_zs3", "/minio/health/", "/minio/health/x"]
)
def test_what_is_beside_health_is_not_there(disk: Client, path: str) -> None:
    assert disk.unsigned("GET", path).status in (403, 404)
    assert disk.unsigned("PUT", path).status in (400, 403, 404, 405)


def test_xml_answers_golden(disk: Client, shared_file_server: Server) -> None:
    """The documents byte for byte, but for times, ids and names."""
    etag = disk.put("a b", b"x").ok().etag
    disk.put("c/d", b"x").ok()
    when = shorthand(disk, disk.list(delimiter="/", prefix="", fetch_owner="false"))
    assert when == (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>BUCKET</Name><Prefix></Prefix>'
        "<Delimiter>/</Delimiter><KeyCount>2</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>"
        "<Contents><Key>a b</Key><LastModified>TIME</LastModified>"
        f"<ETag>{etag}</ETag><Size>1</Size><StorageClass>STANDARD</StorageClass></Contents>"
        "<CommonPrefixes><Prefix>c/</Prefix></CommonPrefixes></ListBucketResult>"
    )
    assert shorthand(disk, disk.get("x&y")) == (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        "<Error><Code>NoSuchKey</Code><Message>The specified key does not exist.</Message>"
        "<Key>x&amp;y</Key>"
        "<Resource>/BUCKET/x%26y</Resource><RequestId>ID</RequestId><HostId>ID</HostId></Error>"
    )
    assert shorthand(disk, disk.copy("a b", "e")) == (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<CopyObjectResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><LastModified>TIME</LastModified>'
        f"<ETag>{etag}</ETag></CopyObjectResult>"
    )


def shorthand(s3: Client, answer: Answer) -> str:
    text = answer.body.decode().replace(s3.bucket, "BUCKET")
    text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", "TIME", text)
    return re.sub(r"<(RequestId|HostId)>[^<]+<", r"<\1>ID<", text)


# --- Storage on disk -----------------------------------------------------------------------------

# Python run before the server, to take something away from it that another system would not have.
BEFORE = "{}\nimport zs3\nsys.exit(zs3.main())"
PRELUDES = {
    "no xattr functions": """
import os
del os.getxattr, os.setxattr, os.listxattr, os.removexattr
""",
    "a file system without xattrs": """
import errno, os
def refuse(*args, **kwargs):
    raise OSError(errno.ENOTSUP, "not supported")
os.getxattr = os.setxattr = os.listxattr = os.removexattr = refuse
""",
    "an xattr that holds no more": """
import errno, os
def refuse(*args, **kwargs):
    raise OSError(errno.ENOSPC, "no space left")
os.setxattr = refuse
""",
    "no sendfile": """
import os
del os.sendfile
""",
}


def test_an_object_is_a_file_at_its_literal_path(disk: Client) -> None:
    disk.put("folder/file.txt", b"hello").ok()
    assert (disk.folder / "folder" / "file.txt").read_bytes() == b"hello"
    for key in ("a b", "é", "日本語/キー", "+%&;?", ".hidden", "a/.b", "n" * 255):
        disk.put(key, key.encode()).ok()
        assert (disk.folder / key).read_bytes() == key.encode()


def test_a_file_copied_in_is_an_object_at_once(disk: Client) -> None:
    disk.put("there", b"x").ok()
    assert disk.keys() == ["there"]
    (disk.folder / "new/sub").mkdir(parents=True)
    (disk.folder / "new/sub/file.txt").write_bytes(b"copied in")
    (disk.folder / ".dot").write_bytes(b"")
    assert disk.keys() == [".dot", "new/sub/file.txt", "there"]
    got = disk.get("new/sub/file.txt").ok()
    assert got.body == b"copied in"
    assert "-" in got.etag, "opaque: no client takes it for an MD5"
    assert disk.list(prefix="new/").texts("Contents/ETag") == [got.etag]
    assert disk.head("new/sub/file.txt").etag == got.etag
    assert disk.get("new/sub/file.txt", range="bytes=0-5").ok().body == b"copied"
    assert disk.get("new/sub/file.txt", if_none_match=got.etag).status == 304
    disk.copy("new/sub/file.txt", "copy").ok()
    assert disk.get("copy").ok().body == b"copied in"
    disk.delete("new/sub/file.txt").ok()
    assert not (disk.folder / "new/sub/file.txt").exists()


def test_the_name_of_a_file_copied_in_says_what_it_is(disk: Client) -> None:
    (disk.folder / "site").mkdir()
    (disk.folder / "data:a").mkdir()
    unknown = "binary/octet-stream"
    for name, kind in (("site/index.html", "text/html"), ("site/a.PNG", "image/png"),
                       ("site/a", unknown), ("site/a.zzz", unknown), ("site/a.html.gz", unknown),
                       ("data:a/日,z", unknown), ("data:a/b\r\nx-evil: y,z", unknown)):  # fmt: skip
        (disk.folder / name).write_bytes(b"x")
        answer = disk.get(name).ok()
        assert answer.headers["content-type"] == kind and "x-evil" not in answer.headers
        disk.copy(name, "copy").ok()
        assert disk.head(name).headers["content-type"] == kind
        assert disk.head("copy").headers["content-type"] == kind
    disk.put("put.html", b"x").ok()
    assert disk.head("put.html").headers["content-type"] == "binary/octet-stream"
    disk.put("typed.html", b"x", content_type="text/plain").ok()
    (disk.folder / "typed.html").write_bytes(b"edited")
    assert disk.head("typed.html").headers["content-type"] == "text/plain"


def test_no_key_is_taken_for_a_url() -> None:
    for key in ("/[a].txt", "//[a].txt", "http://[a].txt", "data:text/html,a.txt"):
        info = zs3.ObjectInfo(key, 1, "0-0", 0.0)
        assert zs3.kept_headers(info) == {"content-type": "text/plain"}


def test_a_copy_of_a_file_made_by_hand_has_the_md5_of_its_bytes(disk: Client) -> None:
    for body in (b"one", b"two", b""):
        (disk.folder / "file").write_bytes(body)
        os.utime(disk.folder / "file", (1e9, 1e9))  # equal in size and time
        etag = disk.copy("file", "copy").ok().text("ETag")
        assert etag == disk.head("copy").etag == f'"{md5_hex(body)}"'
        assert disk.get("copy").ok().body == body
    disk.copy("file", "file", x_amz_metadata_directive="REPLACE").ok()
    assert disk.head("file").etag == f'"{md5_hex(b"")}"'
    number = disk.create_upload("parts")
    part = disk.put_part("parts", number, 1, b"x").ok()
    whole = disk.complete("parts", number, [(1, part.etag)]).ok().text("ETag")
    assert disk.copy("parts", "copy").ok().text("ETag") == whole


def test_the_sweep_goes_on_after_an_error_of_the_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = zs3.FileStore(str(folder))
    outcomes = iter([OSError("too many open files"), KeyboardInterrupt()])

    def sweep() -> None:
        raise next(outcomes)

    monkeypatch.setattr(store, "_sweep", sweep)
    monkeypatch.setattr(zs3, "SWEEP_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):  # that of the second time
        store._keep_house()


def body_of(data: bytes) -> zs3.Body:
    return zs3.Body(io.BytesIO(data), len(data))


def stored(
    store: zs3.FileStore, body: bytes, key: str = "k", **headers: str
) -> zs3.ObjectInfo:
    return store.put_object("bucket", key, body_of(body), headers, zs3.NO_CONDITION)


def without_attributes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> zs3.FileStore:
    """A store with a bucket on a file system that has no extended attributes."""

    def refuse(*_: object) -> None:
        raise OSError("this file system has no attributes")

    monkeypatch.setattr(os, "setxattr", refuse)
    store = zs3.FileStore(str(folder))
    store.create_bucket("bucket")
    return store


def test_a_bucket_deleted_and_made_anew_during_a_put_keeps_what_it_described(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = without_attributes(folder, monkeypatch)
    described = store._write_record

    def then_begin_anew(*given: Any) -> zs3.ObjectInfo:
        info = described(*given)
        store.delete_bucket("bucket")
        store.create_bucket("bucket")
        return info

    monkeypatch.setattr(store, "_write_record", then_begin_anew)
    info = stored(store, b"abc", kind="text/x")
    found = store.stat_object("bucket", "k")
    assert (found.etag, found.headers) == (info.etag, {"kind": "text/x"})


def test_who_loses_within_one_tick_of_the_clock_does_not_describe_the_winners_object(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = without_attributes(folder, monkeypatch)
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_000_000_000)
    describe, won = store._write_record, []

    def after_another(*given: Any) -> zs3.ObjectInfo:
        monkeypatch.setattr(store, "_write_record", describe)
        won.append(stored(store, b"won!", kind="text/won"))
        return describe(*given)

    monkeypatch.setattr(store, "_write_record", after_another)
    with raises("PreconditionFailed"):
        body = body_of(b"lost")
        store.put_object("bucket", "k", body, {}, zs3.Condition(if_none_match="*"))
    assert [store.stat_object("bucket", "k")] == won


def test_a_put_succeeds_though_the_sweep_removes_the_old_description_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = without_attributes(folder, monkeypatch)
    stored(store, b"old")
    in_use = store._side_in_use

    def then_sweep(bucket: str, path: str) -> bool:
        used = in_use(bucket, path)
        os.unlink(path)
        return used

    monkeypatch.setattr(store, "_side_in_use", then_sweep)
    info = stored(store, b"newer", kind="text/x")
    assert store.stat_object("bucket", "k") == info


def test_a_bucket_is_not_deleted_while_a_key_that_no_path_can_spell_gets_its_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is not in the bucket's folder, which would be empty."""
    store = zs3.FileStore(str(folder))
    store.create_bucket("bucket")
    rename, deletions = store._rename, []
    with concurrent.futures.ThreadPoolExecutor(1) as thread:

        def beside_a_deletion(*given: Any) -> bool:
            deletions.append(thread.submit(store.delete_bucket, "bucket"))
            concurrent.futures.wait(deletions, 0.2)
            assert not deletions[0].done()
            return rename(*given)

        monkeypatch.setattr(store, "_rename", beside_a_deletion)
        stored(store, b"x", "a//b")
        with raises("BucketNotEmpty"):
            deletions[0].result()
    assert store.stat_object("bucket", "a//b").size == 1


def test_a_put_whose_temporary_file_was_swept_meanwhile_is_RequestTimeout(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = zs3.FileStore(str(folder))
    store.create_bucket("bucket")
    describe = store._write_record

    def then_sweep(*given: Any) -> zs3.ObjectInfo:
        info = describe(*given)
        monkeypatch.setattr(zs3, "TEMP_SECONDS", -60.0)
        store._sweep()
        return info

    monkeypatch.setattr(store, "_write_record", then_sweep)
    with raises("RequestTimeout"):
        stored(store, b"x")
    assert list(store.scan("bucket", "", "", "")) == []


def test_what_is_refused_already_is_refused_before_the_body_is_read(folder: Path) -> None:
    store = zs3.FileStore(str(folder))
    body = body_of(b"x")
    with raises("NoSuchBucket"):
        store.put_object("bucket", "k", body, {}, zs3.NO_CONDITION)
    store.create_bucket("bucket")
    with raises("NoSuchKey"):
        store.put_object("bucket", "k", body, {}, zs3.Condition(if_match="*"))
    stored(store, b"old")
    with raises("PreconditionFailed"):
        store.put_object("bucket", "k", body, {}, zs3.Condition(if_none_match="*"))
    assert body.source.readinto(bytearray(1)) == 1


def test_a_read_beside_a_write_has_its_description_though_a_snapshot_links_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without attributes, the description of what was replaced is gone, but not the file."""
    store = without_attributes(folder, monkeypatch)
    stored(store, b"old")
    os.link(folder / "bucket" / "k", folder / "snapshot")
    opened = zs3.open_file

    def then_replace(path: str) -> int:
        file = opened(path)
        monkeypatch.setattr(zs3, "open_file", opened)
        stored(store, b"newer", kind="text/x")
        return file

    monkeypatch.setattr(zs3, "open_file", then_replace)
    info, content = store.open_object("bucket", "k")
    with contextlib.closing(content):
        assert b"".join(content.chunks(0, info.size)) == b"newer"
    assert (info.etag, info.headers) == (md5_hex(b"newer"), {"kind": "text/x"})


def test_a_file_in_keys_that_spells_no_key_is_no_object(disk: Client) -> None:
    keys = disk.folder.parent / ".keys" / disk.bucket
    disk.put("a//b", b"x").ok()
    disk.put("k", b"y").ok()
    for name in ("~FF", ".DS_Store", "+2", "a+61", "%61", "\u00e9", "~C3~28", "x" * 201):
        (keys / name).write_bytes(b"stray")
    assert disk.keys() == ["a//b", "k"]
    assert disk.list(delimiter="/").texts("CommonPrefixes/Prefix") == ["a/"]
    assert disk.get("a//b").ok().body == b"x"


def test_an_upload_whose_description_was_lost_is_no_upload_any_more(disk: Client) -> None:
    """As by a copy of the folder without attributes."""
    upload_id = disk.create_upload("k")
    record = disk.folder.parent / ".uploads" / disk.bucket / upload_id / "00000"
    os.removexattr(record, "user.zs3")
    other = disk.create_upload("k")
    assert disk.on_bucket("GET", "uploads").ok().texts("Upload/UploadId") == [other]
    assert disk.on_key("DELETE", "k", f"uploadId={upload_id}").error == "NoSuchUpload"


@pytest.mark.parametrize("left", [["00000"], ["00000", "00001"]])
def test_completing_again_removes_what_a_kill_9_left_of_the_upload(
    disk: Client, tmp_path: Path, left: list[str]
) -> None:
    number = disk.create_upload("k")
    listed = [(1, disk.put_part("k", number, 1, b"x").ok().etag)]
    upload = disk.folder.parent / ".uploads" / disk.bucket / number
    shutil.copytree(upload, tmp_path / "upload")
    first = disk.complete("k", number, listed, if_none_match="*").ok()
    upload.mkdir(parents=True)
    for name in left:
        os.rename(tmp_path / "upload" / name, upload / name)
    second = disk.complete("k", number, listed, if_none_match="*").ok()
    assert second.text("ETag") == first.text("ETag")
    assert disk.on_bucket("GET", "uploads").ok().texts("Upload") == [] and not upload.exists()


class OneUpload:
    """A store with an upload of one part, and requests to end it, each as its operation."""

    def __init__(self, folder: Path) -> None:
        self.store = zs3.FileStore(str(folder))
        self.store.create_bucket("bucket")
        created = zs3.create_multipart_upload(self.store, self.request("uploads"))
        assert isinstance(created.body, bytes)
        found = parse_xml(created.body).findtext("UploadId")
        assert found
        self.id = found
        body = body_of(b"old")
        self.part = f"bucket/{self.id}/00001"
        self.store.put_object(zs3.UPLOADS, self.part, body, {}, zs3.NO_CONDITION)

    def request(self, query: str, body: bytes = b"") -> zs3.Request:
        request = zs3.Request("POST", "/bucket/k", query, {}, zs3.Settings({}))
        request.bucket, request.key, request.query = "bucket", "k", dict(zs3.split_query(query))
        request.body = zs3.Body(io.BytesIO(body), len(body))
        return request

    def complete(self) -> int:
        request = self.request(f"uploadId={self.id}", complete_document([(1, md5_hex(b"old"))]))
        return zs3.complete_multipart_upload(self.store, request).status

    def abort(self) -> int:
        return zs3.abort_multipart_upload(self.store, self.request(f"uploadId={self.id}")).status

    def found(self) -> list[int]:
        return [each.size for each in self.store.scan("bucket", "", "", "")]


def test_of_requests_to_complete_one_upload_one_at_a_time_is_at_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that has waited long enough asks again: that must not double the work."""
    upload, appended = OneUpload(folder), []
    append = upload.store._append

    def slowly(*given: Any) -> None:
        appended.append(given)
        time.sleep(0.05)
        append(*given)

    monkeypatch.setattr(upload.store, "_append", slowly)
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        answers = [threads.submit(upload.complete) for _ in range(3)]
        assert [each.result() for each in answers] == [200] * 3
    assert len(appended) == 1 and upload.found() == [3]


@pytest.mark.parametrize("what", ["abort", "delete_bucket"])
def test_an_upload_is_not_aborted_while_it_is_completed(
    what: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the object could appear after the Abort was answered."""
    upload = OneUpload(folder)
    rename, answered = upload.store._rename, []
    ends = {
        "abort": upload.abort,
        "delete_bucket": lambda: zs3.delete_bucket(upload.store, upload.request("")).status,
    }
    with concurrent.futures.ThreadPoolExecutor(1) as thread:

        def abort_first(*given: Any) -> bool:
            answered.append(thread.submit(ends[what]))
            concurrent.futures.wait(answered, 0.2)
            assert not answered[0].done()
            return rename(*given)

        monkeypatch.setattr(upload.store, "_rename", abort_first)
        if what == "abort":
            assert upload.complete() == 200 and upload.found() == [3]
            with raises("NoSuchUpload"):
                answered[0].result()
        else:
            with raises("NoSuchBucket"):
                upload.complete()
            assert answered[0].result() == 204


@pytest.mark.parametrize("after", ["put", "delete"])
def test_a_complete_that_is_repeated_does_not_undo_what_came_after_the_first(
    after: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its object is seen, and replaced or deleted, before its upload is discarded."""
    upload, answered = OneUpload(folder), []
    discard = zs3.discard_upload
    with concurrent.futures.ThreadPoolExecutor(1) as thread:

        def late(*given: Any) -> None:
            if not answered:
                if after == "put":
                    stored(upload.store, b"new!")
                else:
                    upload.store.delete_object("bucket", "k", zs3.NO_CONDITION)
                answered.append(thread.submit(upload.complete))
                concurrent.futures.wait(answered, 0.2)
            discard(*given)

        monkeypatch.setattr(zs3, "discard_upload", late)
        assert upload.complete() == 200
        with raises("NoSuchUpload"):
            answered[0].result()
    assert upload.found() == ([4] if after == "put" else [])


def test_a_repeated_complete_that_cannot_see_the_object_is_SlowDown_not_NoSuchUpload(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = OneUpload(folder)
    stat = upload.store.stat_object
    assert upload.complete() == 200

    def undecided(bucket: str, key: str) -> zs3.ObjectInfo:
        if bucket == "bucket":
            raise zs3.S3Error("SlowDown")
        return stat(bucket, key)

    monkeypatch.setattr(upload.store, "stat_object", undecided)
    with raises("SlowDown"):
        upload.complete()


def test_an_upload_that_goes_on_while_it_is_looked_at_is_not_stale(folder: Path) -> None:
    upload = OneUpload(folder)
    horizon = time.time() + 1
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        with zs3.ending(upload.store, "bucket", upload.id):
            swept = thread.submit(zs3.expire_uploads, upload.store, "bucket", horizon)
            concurrent.futures.wait([swept], 0.2)
            os.utime(folder / ".uploads" / upload.part, (horizon + 1, horizon + 1))
        swept.result()
        assert upload.abort() == 204
    zs3.expire_uploads(upload.store, "bucket", horizon)


def test_the_record_of_an_upload_is_deleted_last_and_then_what_came_meanwhile(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash on the way leaves something to abort; a late part is nobody's any more."""
    upload = OneUpload(folder)
    store, delete, deleted = upload.store, upload.store.delete_object, []

    def beside_a_late_part(bucket: str, key: str, condition: zs3.Condition) -> None:
        delete(bucket, key, condition)
        deleted.append(key[-5:])
        if deleted[-1] == "00000":
            late, body = f"bucket/{upload.id}/00002", body_of(b"late")
            store.put_object(zs3.UPLOADS, late, body, {}, zs3.NO_CONDITION)

    monkeypatch.setattr(store, "delete_object", beside_a_late_part)
    assert upload.abort() == 204
    assert deleted == ["00001", "00000", "00002"]
    assert list(store.scan(zs3.UPLOADS, "", "", "")) == []


def part_of_an_upload(store: zs3.Store) -> tuple[zs3.ObjectInfo, zs3.ObjectInfo]:
    """A part in a bucket's upload, and what the finished object is to be."""
    store.create_bucket("bucket")
    key, body = f"bucket/{'0' * 32}/00001", body_of(b"old")
    part = store.put_object(zs3.UPLOADS, key, body, {}, zs3.NO_CONDITION)
    return part, zs3.ObjectInfo("k", 3, zs3.multipart_etag([part]), 0.0, upload_id="0" * 32)


def test_a_part_that_was_replaced_or_deleted_meanwhile_is_InvalidPart(folder: Path) -> None:
    store = zs3.FileStore(str(folder))
    part, whole = part_of_an_upload(store)
    body = body_of(b"new")
    store.put_object(zs3.UPLOADS, part.key, body, {}, zs3.NO_CONDITION)
    with raises("InvalidPart"):
        store.concatenate("bucket", [part], whole, zs3.NO_CONDITION)
    store.delete_object(zs3.UPLOADS, part.key, zs3.NO_CONDITION)
    with raises("InvalidPart"):
        store.concatenate("bucket", [part], whole, zs3.NO_CONDITION)
    assert list(store.scan("bucket", "", "", "")) == []


def test_an_object_stays_where_it_is_until_it_is_deleted(disk: Client) -> None:
    disk.put("a/b", b"x").ok()
    disk.put("a", b"1").ok()
    disk.delete("a/b").ok()
    disk.put("a", b"2").ok()
    assert disk.get("a").body == b"2" and not (disk.folder / "a").exists()
    disk.delete("a").ok()
    disk.put("a", b"3").ok()
    assert (disk.folder / "a").read_bytes() == b"3"


def test_a_file_copied_in_hides_one_in_keys_and_a_put_replaces_both(disk: Client) -> None:
    disk.put("a/b", b"x").ok()
    disk.put("a", b"1").ok()
    disk.delete("a/b").ok()
    (disk.folder / "a").write_bytes(b"copied in")
    assert disk.get("a").body == b"copied in" and disk.keys() == ["a"]
    disk.put("a", b"2").ok()
    assert (disk.folder / "a").read_bytes() == b"2"
    (disk.folder / "a").unlink()
    assert disk.get("a").error == "NoSuchKey" and disk.keys() == []


def test_a_listing_shows_a_key_that_is_overwritten_meanwhile_where_its_path_was_taken(
    folder: Path,
) -> None:
    store = zs3.FileStore(str(folder))
    store.create_bucket("bucket")
    long = "x" * (zs3.SPELLED_NAME_CHARS + 1)  # is spelled in a folder, which a walk reads late
    for key in ("a//b", "c", f"{long}/beside", long):
        stored(store, b"x", key)
    listing = store.scan("bucket", "", "", "")
    assert next(listing).key == "a//b"  # and the names beside "c" were read
    store.delete_object("bucket", f"{long}/beside", zs3.NO_CONDITION)
    stored(store, b"y", long)
    assert [info.key for info in listing] == ["c", long]


def test_while_a_key_with_two_files_is_deleted_nothing_older_shows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody copied a file to a path whose key has one in .keys, which it hides."""
    store = zs3.FileStore(str(folder))
    store.create_bucket("bucket")
    stored(store, b"old")
    old = store._special_path("bucket", "k")
    os.makedirs(os.path.dirname(old))
    os.rename(folder / "bucket" / "k", old)
    (folder / "bucket" / "k").write_bytes(b"newer")
    seen, unlink = [], os.unlink

    def look_after(path: str) -> None:
        unlink(path)
        with contextlib.suppress(S3Error):
            seen.append(store.stat_object("bucket", "k").size)

    monkeypatch.setattr(os, "unlink", look_after)
    store.delete_object("bucket", "k", zs3.NO_CONDITION)
    assert seen == [5]
    with pytest.raises(S3Error, match="NoSuchKey"):
        store.stat_object("bucket", "k")


def test_a_description_that_cannot_be_read_is_an_error_and_not_none_at_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy would be without it for good."""
    store = zs3.FileStore(str(folder))
    store.create_bucket("bucket")
    stored(store, b"x", kind="text/x")

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "a sector cannot be read")

    monkeypatch.setattr(os, "getxattr", refuse)
    for read in (store.stat_object, store.open_object):
        with pytest.raises(OSError, match="a sector cannot be read"):
            read("bucket", "k")


def imitate_nfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its kernel does: a file that is deleted while this process has it open gets another name
    in its folder, which cannot be deleted, until it is closed."""
    unlink, close, hidden = os.unlink, os.close, dict[tuple[int, int], str]()

    def is_open(status: os.stat_result) -> bool:
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # it was closed meanwhile
                if os.path.samestat(os.fstat(int(number)), status):
                    return True
        return False

    def rename_or_unlink(path: str) -> None:
        status = os.stat(path)
        if not is_open(status):
            unlink(path)
        elif path in hidden.values():
            raise OSError(errno.EBUSY, "Device or resource busy", path)
        else:
            name = f".nfs{status.st_ino:016x}{len(hidden):08x}"
            hidden[status.st_dev, status.st_ino] = os.path.join(os.path.dirname(path), name)
            os.rename(path, hidden[status.st_dev, status.st_ino])

    def close_and_unlink(number: int) -> None:
        status = os.fstat(number)
        close(number)
        if (status.st_dev, status.st_ino) in hidden and not is_open(status):
            unlink(hidden.pop((status.st_dev, status.st_ino)))

    monkeypatch.setattr(os, "unlink", rename_or_unlink)
    monkeypatch.setattr(os, "close", close_and_unlink)


def test_what_nfs_keeps_of_a_file_that_is_still_open_is_no_object(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = zs3.FileStore(str(folder))
    store.create_bucket("bucket")
    stored(store, b"x", "folder/k")
    imitate_nfs(monkeypatch)
    _, content = store.open_object("bucket", "folder/k")
    store.delete_object("bucket", "folder/k", zs3.NO_CONDITION)
    assert [path.name[:4] for path in (folder / "bucket" / "folder").iterdir()] == [".nfs"]
    assert list(store.scan("bucket", "", "", "")) == list(store.scan("bucket", "", "", "/")) == []
    assert b"".join(content.chunks(0, 1)) == b"x"
    content.close()
    assert list((folder / "bucket" / "folder").iterdir()) == []


def test_an_upload_ends_on_nfs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is open while it is deleted: by that it is held."""
    store, upload_id = zs3.FileStore(str(folder)), "0" * 32
    for number in range(3):
        body = body_of(b"x")
        key = f"bucket/{upload_id}/{number:05d}"
        store.put_object(zs3.UPLOADS, key, body, {}, zs3.NO_CONDITION)
    imitate_nfs(monkeypatch)
    with zs3.ending(store, "bucket", upload_id):
        zs3.discard_upload(store, "bucket", upload_id)
    assert list((folder / ".uploads" / "bucket").iterdir()) == []


@pytest.mark.parametrize("name", [f".nfs{'0a' * 12}", f".fuse_hidden{'0a' * 8}"])
@pytest.mark.parametrize("key", ["{}", "a/{}", "{}/a"])
def test_a_key_like_the_name_of_a_file_that_is_still_open(
    folder: Path, key: str, name: str
) -> None:
    store, other, key = zs3.FileStore(str(folder)), key.format(f"{name}x"), key.format(name)
    store.create_bucket("bucket")
    for each in (key, other):
        stored(store, b"x", each)
    assert [info.key for info in store.scan("bucket", "", "", "")] == sorted([key, other])
    assert (folder / "bucket" / other).exists() and not (folder / "bucket" / key).exists()
    store.delete_object("bucket", key, zs3.NO_CONDITION)
    with raises("NoSuchKey"):
        store.stat_object("bucket", key)


def test_names_that_are_too_long_for_a_file_system(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of eCryptfs, which encrypts them."""
    rename, mkdir, longest = os.rename, os.mkdir, 143

    def check(path: str) -> None:
        if max(map(len, path.split("/"))) > longest:
            raise OSError(errno.ENAMETOOLONG, "File name too long", path)

    monkeypatch.setattr(os, "rename", lambda old, new: check(new) or rename(old, new))
    monkeypatch.setattr(os, "mkdir", lambda path, mode=0o777: check(path) or mkdir(path, mode))
    store = zs3.FileStore(str(folder))
    store.create_bucket("bucket")
    for key in ("x" * longest, "y" * longest + "/z"):
        stored(store, b"x", key)
        assert store.stat_object("bucket", key).size == 1
        with pytest.raises(OSError, match="File name too long") as refused:
            stored(store, b"x", "x" + key)
        assert zs3.as_s3_error(refused.value, "a test").code == "KeyTooLongError"
    assert os.listdir(folder / ".tmp") == []


def test_the_loser_of_a_race_leaves_no_description(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = without_attributes(folder, monkeypatch)

    class Slow(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            if not self.tell():
                stored(store, b"of the winner")
            return super().readinto(buffer)

    body = zs3.Body(Slow(b"of the loser"), 12)
    with raises("PreconditionFailed"):
        store.put_object("bucket", "k", body, {}, zs3.Condition(if_none_match="*"))
    assert store.stat_object("bucket", "k").size == len(b"of the winner")
    names = [path.name for path in (folder / ".meta").rglob("*") if path.is_file()]
    assert len(names) == 2 and "created" in names
    assert os.listdir(folder / ".tmp") == []


def test_a_copy_where_the_kernel_copies_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems answer copy_file_range by 0 bytes."""
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    store = zs3.FileStore(str(folder))
    store.create_bucket("bucket")
    stored(store, b"123456")
    info, content = store.open_object("bucket", "k")
    with contextlib.closing(content):
        store.copy_object(zs3.replace(info, key="copy"), content, "bucket", zs3.NO_CONDITION)
    assert (folder / "bucket" / "copy").read_bytes() == b"123456"


def test_a_file_that_somebody_puts_beside_the_parts_of_an_upload_is_no_part(folder: Path) -> None:
    store, upload_id = zs3.FileStore(str(folder)), "0" * 32
    upload = zs3.Upload(upload_id, "bucket", "k", 0.0, "", "", {})
    for number in (0, 1, 10_000):
        body = body_of(b"x")
        store.put_object(zs3.UPLOADS, upload.part_key(number), body, {}, zs3.NO_CONDITION)
    for name in ("Thumbs.db", "00002.bak", "0003", "sub/00004"):
        path = folder / ".uploads" / "bucket" / upload_id / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    assert [number for number, _ in zs3.list_parts(store, upload)] == [1, 10_000]
    zs3.discard_upload(store, "bucket", upload_id)
    assert not [path for path in (folder / ".uploads").rglob("*") if path.is_file()]


def test_a_listing_keeps_no_parts_in_memory(folder: Path) -> None:
    store = zs3.FileStore(str(folder))
    store.create_bucket("bucket")
    stored(store, b"12", "source")
    info, content = store.open_object("bucket", "source")
    parts = (zs3.PartInfo(1), zs3.PartInfo(1))
    with contextlib.closing(content):
        info = zs3.replace(info, key="k", parts=parts)
        store.copy_object(info, content, "bucket", zs3.NO_CONDITION)
    assert store.stat_object("bucket", "k").parts == parts
    assert [found.parts for found in store.scan("bucket", "", "", "")] == [(), ()]


@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.parametrize(
    ("edited", "size"), [(b"12", 6), (b"12345!", 6), (b"1234567", 6), (None, 7)]
)
def test_a_source_that_is_edited_meanwhile_or_ends_early_is_no_copy(
    edited: bytes | None, size: int, by_kernel: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy would have other bytes than its ETag says, or fewer."""
    if not by_kernel:
        monkeypatch.delattr(os, "copy_file_range")
    store = zs3.FileStore(str(folder))
    store.create_bucket("bucket")
    stored(store, b"123456")
    info, content = store.open_object("bucket", "k")
    if edited is not None:
        (folder / "bucket" / "k").write_bytes(edited)  # in place
    copy = zs3.replace(info, key="copy", size=size)
    with contextlib.closing(content), raises("SlowDown"):
        store.copy_object(copy, content, "bucket", zs3.NO_CONDITION)
    assert [each.key for each in store.scan("bucket", "", "", "")] == ["k"]
    assert os.listdir(folder / ".tmp") == []


def test_an_error_in_the_last_digest_of_a_large_body_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Broken:
        def update(self, data: memoryview) -> None:
            if len(data) < zs3.BLOCK_BYTES:
                raise MemoryError

        def digest(self) -> bytes:
            return bytes(16)

    monkeypatch.setitem(zs3.DIGESTS, "MD5", Broken)
    size = zs3.BLOCK_BYTES + 5
    with pytest.raises(MemoryError):
        list(zs3.Body(io.BytesIO(bytes(size)), size))


def test_an_error_in_the_first_digest_of_a_large_body_ends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All blocks may be in the hands of the thread that failed."""

    class Broken:
        def update(self, data: memoryview) -> None:
            raise MemoryError

    def read() -> None:
        with pytest.raises(MemoryError):
            list(zs3.Body(io.BytesIO(bytes(size)), size))
        ended.set()

    monkeypatch.setitem(zs3.DIGESTS, "MD5", Broken)
    size, ended = 10 * zs3.BLOCK_BYTES, threading.Event()
    threading.Thread(target=read, daemon=True).start()
    assert ended.wait(20)


def test_a_large_body_is_SlowDown_where_no_thread_is_to_be_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = zs3.BLOCK_BYTES + 1
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with raises("SlowDown"):
        list(zs3.Body(io.BytesIO(bytes(size)), size))


def test_a_description_replaced_within_one_tick_of_the_clock_is_the_new_one(folder: Path) -> None:
    tick = "\nimport time\ntime.time_ns = lambda: 1_700_000_000_000_000_000"
    prelude = BEFORE.format(PRELUDES["a file system without xattrs"] + tick)
    with Server(ACL, "--bucket=bucket", data=folder, prelude=prelude) as server:
        s3 = server.client("bucket")
        for body in (b"old", b"new"):
            etag = s3.put("k", body, content_type=f"text/{body.decode()}").ok().etag
        got = s3.get("k").ok()
        assert (got.body, got.etag) == (b"new", etag)
        assert got.headers["content-type"] == "text/new"
        s3.close()


def test_a_file_edited_by_hand_has_a_new_etag_at_once(disk: Client) -> None:
    old = (
        disk.put(
            "k", b"hello", content_type="text/x", x_amz_checksum_sha1=checksum("SHA1", b"hello")
        )
        .ok()
        .etag
    )
    seen = {old}
    for body in (b"jello", b"a longer one", b""):  # the first has the same size
        (disk.folder / "k").write_bytes(body)
        got = disk.get("k", x_amz_checksum_mode="ENABLED").ok()
        assert got.body == body and got.headers["content-length"] == str(len(body))
        assert got.etag not in seen and "-" in got.etag
        assert disk.list().texts("Contents/ETag") == [got.etag]
        assert disk.list().texts("Contents/Size") == [str(len(body))]
        assert "x-amz-checksum-sha1" not in got.headers
        seen.add(got.etag)
    with open(disk.folder / "k", "ab") as file:
        file.write(b"appended")
    assert disk.get("k").ok().body == b"appended" and disk.head("k").etag not in seen
    assert disk.put("k", b"x", if_match=old).error == "PreconditionFailed"


def test_a_file_that_grew_has_a_new_etag_though_its_date_was_put_back(disk: Client) -> None:
    etag, path = disk.put("k", b"old").ok().etag, disk.folder / "k"
    before = path.stat().st_mtime_ns
    path.write_bytes(b"old!")
    os.utime(path, ns=(before, before))
    got = disk.get("k").ok()
    assert got.body == b"old!" and got.etag != etag
    assert disk.list().texts("Contents/Size") == ["4"]


DATES = [  # seconds since the epoch -> in a header, in XML; the years of four digits can be written
    (784111777, "Sun, 06 Nov 1994 08:49:37 GMT", "1994-11-06T08:49:37.000Z"),
    (253_402_300_799, "Fri, 31 Dec 9999 23:59:59 GMT", "9999-12-31T23:59:59.000Z"),
    (253_402_300_800, "Fri, 31 Dec 9999 23:59:59 GMT", "9999-12-31T23:59:59.000Z"),
    (2**62, "Fri, 31 Dec 9999 23:59:59 GMT", "9999-12-31T23:59:59.000Z"),
    (-30_610_224_001, "Wed, 01 Jan 1000 00:00:00 GMT", "1000-01-01T00:00:00.000Z"),
    (-(2**62), "Wed, 01 Jan 1000 00:00:00 GMT", "1000-01-01T00:00:00.000Z"),
]


@pytest.mark.parametrize(("seconds", "header", "xml"), DATES)
def test_a_date_that_cannot_be_written_is_the_nearest_that_can(
    seconds: int, header: str, xml: str
) -> None:
    assert zs3.http_date(seconds) == header
    assert zs3.iso_date(seconds) == xml


def test_a_file_with_an_impossible_date_can_be_read(disk: Client) -> None:
    for seconds in (2**38, -(2**37)):  # the years 10680 and -2386
        (disk.folder / "k").write_bytes(b"x")
        os.utime(disk.folder / "k", (seconds, seconds))
        if os.stat(disk.folder / "k").st_mtime != seconds:
            pytest.skip("this file system has no such dates")
        assert disk.get("k").ok().body == b"x" and disk.keys() == ["k"]
        disk.head("k").ok()


def test_a_file_removed_or_renamed_by_hand_is_gone_at_once(disk: Client) -> None:
    disk.put("dir/a", b"x").ok()
    disk.put("b", b"y").ok()
    assert disk.keys() == ["b", "dir/a"]
    (disk.folder / "b").unlink()
    assert disk.keys() == ["dir/a"] and disk.get("b").error == "NoSuchKey"
    (disk.folder / "dir").rename(disk.folder / "moved")
    assert disk.keys() == ["moved/a"] and disk.get("moved/a").ok().body == b"x"
    shutil.rmtree(disk.folder / "moved")
    assert disk.keys() == []
    disk.on_bucket("DELETE").ok()


def test_a_folder_made_by_hand_is_a_bucket(disk: Client) -> None:
    by_hand = disk.folder.parent / f"{disk.bucket}-by-hand"
    by_hand.mkdir()
    (by_hand / "k").write_bytes(b"x")
    (disk.folder.parent / f"{disk.bucket}-file").write_bytes(b"not a bucket")
    (disk.folder.parent / f"{disk.bucket}_bad").mkdir()
    names = disk.service().texts("Buckets/Bucket/Name")
    assert by_hand.name in names
    assert f"{disk.bucket}-file" not in names and f"{disk.bucket}_bad" not in names
    client = Client(disk.ports, by_hand.name)
    assert client.get("k").ok().body == b"x"
    client.delete("k").ok()
    client.on_bucket("DELETE").ok()
    client.close()
    assert not by_hand.exists()


def test_what_is_no_file_is_no_object(disk: Client) -> None:
    os.mkfifo(disk.folder / "pipe")
    (disk.folder / "loop").symlink_to("loop")
    (disk.folder / "dangling").symlink_to("nowhere")
    (disk.folder / "round").symlink_to(".")
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(disk.folder)  # a socket's path is short
        try:
            listener.bind("socket")
        finally:
            os.chdir(HERE)
    disk.put("k", b"x").ok()
    assert disk.keys("p") == [] and disk.keys("k") == ["k"] and disk.keys("s") == []
    for key in ("pipe", "loop", "dangling", "socket"):
        assert disk.get(key).error == "NoSuchKey"


def test_a_loop_of_links_is_followed_no_deeper_than_a_key_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = "x" * 99
    (tmp_path / link).symlink_to(".")
    read, real = [], zs3.read_names
    monkeypatch.setattr(zs3, "read_names", lambda path: (read.append(path), real(path))[1])
    assert list(zs3.any_file(f"{tmp_path}/", "")) == []
    assert len(read) == 12  # with 10 times 100 characters it could still be the beginning of a key


def test_deleting_prunes_folders_that_became_empty(disk: Client) -> None:
    for key in ("a/b/c/d", "a/b/e"):
        disk.put(key, b"x").ok()
    disk.delete("a/b/c/d").ok()
    assert not (disk.folder / "a/b/c").exists() and (disk.folder / "a/b/e").exists()
    disk.delete("a/b/e").ok()
    assert disk.folder.is_dir() and list(disk.folder.iterdir()) == []
    disk.put("a", b"now a file").ok()
    assert (disk.folder / "a").read_bytes() == b"now a file"


def test_a_settled_folder_is_read_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = zs3.FileStore(str(tmp_path))
    store.create_bucket("bucket")
    bucket = tmp_path / "bucket"
    for key in ("a", "b"):
        (bucket / key).write_bytes(b"x")
    read: list[str] = []
    real = zs3.read_names
    monkeypatch.setattr(zs3, "read_names", lambda path: (read.append(path), real(path))[1])

    def keys() -> list[str]:
        return [info.key for info in store.scan("bucket", "", "", "")]

    for _ in range(3):  # changed just now: it may change again within one tick of its clock
        read.clear()
        assert keys() == ["a", "b"] and any("/bucket" in path for path in read)
    os.utime(bucket, (time.time() - 60,) * 2)  # the ctime tells that it is not that old
    read.clear()
    assert keys() == ["a", "b"] and any("/bucket" in path for path in read)
    monkeypatch.setattr(zs3, "RACY_SECONDS", -1.0)  # from here on it counts as settled
    assert keys() == ["a", "b"]
    read.clear()
    assert keys() == ["a", "b"] and not any(path.endswith("/bucket/") for path in read)
    (bucket / "c").write_bytes(b"x")
    (bucket / "a").unlink()
    assert keys() == ["b", "c"]
    before = bucket.stat().st_mtime_ns
    (bucket / "d").write_bytes(b"x")
    os.utime(bucket, ns=(before, before))  # as rsync, cp and tar do to a folder they copy
    assert keys() == ["b", "c", "d"]
    store.close()


def test_of_too_many_names_the_folder_that_was_asked_for_longest_ago_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zs3, "RACY_SECONDS", -1.0)  # every folder counts as settled
    monkeypatch.setattr(zs3, "MAX_CACHED_NAMES", 20)  # two folders of two names count as 20
    for path in ("a/1", "a/2", "b/1", "b/2", "c/1", "c/2"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    cache, read, real = zs3.DirectoryCache(), [], zs3.read_names
    monkeypatch.setattr(zs3, "read_names", lambda path: (read.append(path[-1]), real(path))[1])
    for name in "abaccacb":  # b goes for c, and a for b
        assert cache.names(f"{tmp_path}/{name}") == ["1", "2"]
    assert "".join(read) == "abcb"
    os.utime(tmp_path / "b", (0, 0))
    for name in "bcbc":  # b is read anew, and counts no more than before
        assert cache.names(f"{tmp_path}/{name}") == ["1", "2"]
    assert "".join(read) == "abcbb"


@pytest.mark.parametrize("path", ["//key", "//newbucket/key", "//.uploads/x", "//.meta/x"])
def test_no_request_reaches_outside_a_bucket(disk: Client, path: str) -> None:
    before = sorted(entry.name for entry in disk.folder.parent.iterdir())
    for method in ("PUT", "GET", "DELETE"):
        answer = disk.request(method, path)
        assert answer.status in (400, 404, 405)
    assert sorted(entry.name for entry in disk.folder.parent.iterdir()) == before


def test_a_link_to_a_folder_is_not_replaced_by_an_object(disk: Client, tmp_path: Path) -> None:
    (tmp_path / "album").mkdir()
    (tmp_path / "album/one").write_bytes(b"1")
    (disk.folder / "photos").symlink_to(tmp_path / "album")
    disk.put("photos", b"beside").ok()
    assert disk.get("photos/one").body == b"1" and disk.get("photos").body == b"beside"


def test_a_link_that_leads_nowhere_is_in_nobodys_way(disk: Client) -> None:
    (disk.folder / "dang").symlink_to(disk.folder / "nothing")
    (disk.folder / "loop").symlink_to(disk.folder / "loop")
    for key in ("dang/x", "loop/x", "loop"):
        disk.put(key, b"x").ok()
        assert disk.get(key).body == b"x"
    assert disk.keys() == ["dang/x", "loop", "loop/x"]


def test_what_a_link_leads_to_later_is_listed_from_then_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As to a disk that is mounted later: the folder of the link does not change by that."""
    monkeypatch.setattr(zs3, "RACY_SECONDS", -1.0)  # every folder counts as settled
    store, disk = zs3.FileStore(str(folder)), folder.parent / "disk"
    store.create_bucket("bucket")
    for link in ("bucket/file", "bucket/folder", "other-bucket"):
        (folder / link).symlink_to(disk / link.replace("/", "-"))

    def found() -> tuple[list[str], list[str], list[str]]:
        keys, groups = ([info.key for info in store.scan("bucket", "", "", d)] for d in ("", "/"))
        return keys, groups, [bucket.name for bucket in store.list_buckets()]

    assert found() == ([], [], ["bucket"])
    (disk / "bucket-folder").mkdir(parents=True)
    (disk / "other-bucket").mkdir()
    for path in ("bucket-file", "bucket-folder/x"):
        (disk / path).write_bytes(b"x")
    keys = ["file", "folder/x"]
    assert found() == (keys, keys, ["bucket", "other-bucket"])
    shutil.rmtree(disk)
    assert found() == ([], [], ["bucket"])


def test_an_empty_folder_does_not_keep_a_bucket(disk: Client) -> None:
    (disk.folder / "left/over").mkdir(parents=True)
    assert disk.keys() == [] and disk.list(delimiter="/").texts("CommonPrefixes/Prefix") == []
    disk.on_bucket("DELETE").ok()
    assert not disk.folder.exists()


def test_a_bucket_whose_folder_cannot_be_read_is_not_deleted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, scandir = zs3.FileStore(str(folder)), os.scandir
    store.create_bucket("bucket")
    stored(store, b"x")

    def refuse(path: str) -> Any:
        if path.startswith(str(folder / "bucket")):
            raise PermissionError(errno.EACCES, "on purpose")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with raises("BucketNotEmpty"):
        store.delete_bucket("bucket")
    assert store.stat_object("bucket", "k").size == 1
    (folder / "bucket" / "k").unlink()
    store.delete_bucket("bucket")
    assert not (folder / "bucket").exists()


def test_a_file_in_a_folder_that_may_be_read_but_not_entered_is_not_listed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, stat = zs3.FileStore(str(folder)), os.stat
    store.create_bucket("bucket")
    stored(store, b"x", "a/k")
    stored(store, b"x", "b")

    def refuse(path: Any, **given: Any) -> os.stat_result:
        if path == str(folder / "bucket/a/k"):
            raise PermissionError(errno.EACCES, "on purpose")
        return stat(path, **given)

    monkeypatch.setattr(os, "stat", refuse)
    for delimiter in ("", "/"):
        assert [info.key for info in store.scan("bucket", "", "", delimiter)] == ["b"]


def test_puts_and_deletes_racing_in_one_folder_all_succeed(disk: Client) -> None:
    clients = [disk.using(ADMIN) for _ in range(8)]

    def act(number: int) -> Answer:
        for _ in range(40):
            clients[number].put(f"dir/sub/{number}", b"x").ok()
            assert clients[number].get(f"dir/sub/{number}").ok().body == b"x"
            clients[number].delete(f"dir/sub/{number}").ok()
        return clients[number].put(f"dir/{number}", b"x").ok()

    race(8, act)
    for client in clients:
        client.close()
    assert disk.keys() == [f"dir/{number}" for number in range(8)]


def test_a_key_beside_its_own_prefix_in_either_order(disk: Client) -> None:
    for first, second in (("a", "a/b"), ("x/y/z", "x/y"), ("p/", "p"), ("q", "q/")):
        disk.put(first, b"1").ok()
        disk.put(second, b"2").ok()
        assert disk.get(first).ok().body == b"1" and disk.get(second).ok().body == b"2"
        disk.delete(first).ok()
        assert disk.get(first).error == "NoSuchKey" and disk.get(second).ok().body == b"2"
        disk.put(first, b"3").ok()
        disk.delete(second).ok()
        assert disk.get(first).ok().body == b"3" and disk.get(second).error == "NoSuchKey"
        disk.delete(first).ok()
    assert disk.keys() == []
    disk.on_bucket("DELETE").ok()


def test_the_record_of_an_object_golden(disk: Client) -> None:
    """What zs3 keeps beside the bytes. Data folders outlive versions: this may grow, never
    change."""
    disk.put(
        "k",
        DATA,
        content_type="text/x",
        x_amz_meta_a="1",
        x_amz_checksum_sha1=checksum("SHA1", DATA),
    ).ok()
    upload_with_checksums(disk, "parts", PARTS, "CRC32", "COMPOSITE").ok()
    disk.put("plain", DATA).ok()
    disk.put("summed", DATA, x_amz_checksum_crc32=checksum("CRC32", DATA)).ok()
    keys = ("k", "parts", "plain", "summed")
    try:
        texts = [os.getxattr(disk.folder / key, "user.zs3").decode() for key in keys]
    except (AttributeError, OSError):
        pytest.skip("no extended attributes here")
    times = [(disk.folder / key).stat().st_mtime_ns for key in keys]
    md5 = base64.b64encode(hashlib.md5(DATA).digest()).decode()
    assert texts[2:] == [
        f"{times[2]} 3500 {md5}", f"{times[3]} 3500 {md5} CRC32={checksum('CRC32', DATA)}",
    ]  # fmt: skip
    records = [json.loads(text) for text in texts[:2]]
    assert [record.pop("mtime") for record in records] == times[:2]
    assert len(records[1].pop("upload_id")) >= 16
    assert records == [
        {
            "size": 3500, "etag": md5_hex(DATA), "headers": {"content-type": "text/x",
            "x-amz-meta-a": "1"},
            "checksums": {"SHA1": checksum("SHA1", DATA)}, "checksum_type": "FULL_OBJECT",
        },
        {
            "size": sum(map(len, PARTS)), "etag": multipart_etag(PARTS).strip('"'),
            "checksums": {"CRC32": checksum_of_checksums("CRC32", PARTS)},
            "checksum_type": "COMPOSITE",
            "parts": [[len(part), checksum("CRC32", part)] for part in PARTS],
        },
    ]  # fmt: skip


def test_a_record_that_says_little_is_short_and_all_are_read_as_they_were_written() -> None:
    little = {"mtime": 1732752000123456789, "size": 99_999_999, "etag": md5_hex(DATA)}
    summed = little | {
        "checksums": {"CRC32": checksum("CRC32", DATA)}, "checksum_type": "FULL_OBJECT"
    }  # fmt: skip
    for record in (little, summed):
        assert len(zs3.record_text(record)) <= 68  # what an inode of 256 bytes has room for
        # As data folders of before have it.
        assert zs3.parse_record(json.dumps(record)) == record
    for record in (
        little, summed, summed | {"checksum_type": "COMPOSITE"}, little | {"etag": "ab-1"},
        little | {"headers": {"content-type": "text/x"}}, summed | {"upload_id": "1"},
    ):  # fmt: skip
        assert zs3.parse_record(zs3.record_text(record).decode()) == record


@pytest.mark.parametrize("text", [b"", b"1 2", b"1 x ==", b"a b c d", b"\xff", b"[1]", b"{}", b"1"])
def test_an_attribute_that_is_somebody_elses_is_none(disk: Client, text: bytes) -> None:
    disk.put("k", DATA).ok()
    try:
        os.setxattr(disk.folder / "k", "user.zs3", text)
    except (AttributeError, OSError):
        pytest.skip("no extended attributes here")
    answer = disk.get("k").ok()
    assert answer.body == DATA and answer.etag.endswith('-0"')


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A data folder of its own."""
    yield tmp_path / "data"
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.parametrize("prelude", PRELUDES)
def test_metadata_without_extended_attributes(
    folder: Path, prelude: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = BEFORE.format(PRELUDES[prelude])
    with Server(
        ACL, "--bucket=bucket", f"--min-part-size={MIN_PART}", data=folder, prelude=run
    ) as server:
        s3 = server.client("bucket")
        headers = {
            "content_type": "text/x",
            "x_amz_meta_a": "1",
            "x_amz_checksum_sha1": checksum("SHA1", DATA),
        }
        etag = s3.put("dir/k", DATA, **headers).ok().etag
        s3.put("dir/k/beside", b"x", content_type="text/y").ok()
        s3.multipart("big", PARTS).ok()
        for answer in (s3.get("dir/k").ok(), s3.copy("dir/k", "copy") and s3.get("copy").ok()):
            assert answer.body == DATA and answer.etag == etag
            assert (
                answer.headers["content-type"] == "text/x" and answer.headers["x-amz-meta-a"] == "1"
            )
        assert s3.get("big", {"partNumber": 2}).ok().body == PARTS[1]
        assert s3.keys() == ["big", "copy", "dir/k", "dir/k/beside"]
        (folder / "bucket/dir/k").write_bytes(b"edited")
        edited = s3.get("dir/k").ok()
        assert edited.etag != etag and "-" in edited.etag
        s3.put("dir/k", b"plain").ok()
        assert s3.head("dir/k").headers["content-type"] == "binary/octet-stream"
        (folder / "bucket/copy").unlink()
        (folder / "bucket/copy").write_bytes(b"another")
        assert "x-amz-meta-a" not in s3.get("copy").ok().headers
        keys = s3.keys()
        assert all(s3.delete(key).ok() for key in keys)
        s3.on_bucket("DELETE").ok()
        assert s3.service().texts("Buckets/Bucket/Name") == []
        s3.close()
        monkeypatch.setattr(zs3, "DESCRIPTION_SECONDS", -1.0)
        for _ in range(2):
            zs3.FileStore(str(folder))._sweep()  # takes what described files that were edited
        left = [
            path
            for path in folder.rglob("*")
            if path.is_file() and not re.search("lock", str(path), re.I)
        ]
        assert left == [], "deleting leaves nothing"


def test_objects_survive_a_restart(folder: Path) -> None:
    with Server(ACL, "--bucket=bucket", data=folder) as server:
        s3 = server.client("bucket")
        for key in AWKWARD_KEYS:
            s3.put(key, key.encode(), x_amz_meta_a="1").ok()
        number = s3.create_upload("upload")
        part = s3.put_part("upload", number, 1, b"part").ok()
        listed = s3.list(encoding_type="url").body
        s3.close()
        assert server.stop() == 0
    with Server(ACL, "--bucket=bucket", data=folder) as server:
        s3 = server.client("bucket")
        assert s3.list(encoding_type="url").body == listed
        for key in AWKWARD_KEYS:
            got = s3.get(key).ok()
            assert got.body == key.encode() and got.headers["x-amz-meta-a"] == "1"
        s3.complete("upload", number, [(1, part.etag)]).ok()
        s3.close()


def test_kill_9_during_a_put_leaves_the_old_object(folder: Path) -> None:
    with Server(ACL, "--bucket=bucket", data=folder) as server:
        s3 = server.client("bucket")
        s3.put("k", b"old", x_amz_meta_a="1").ok()
        for key in ("k", "new", "new/er"):
            connection = s3.connect()
            connection.send(signed_put(s3, key, 2_000_000) + bytes(1_500_000))
        done = s3.put("answered", DATA, content_type="text/x").ok()
        server.kill()
    with Server(ACL, "--bucket=bucket", data=folder) as server:
        s3 = server.client("bucket")
        assert s3.keys() == ["answered", "k"]
        got = s3.get("k").ok()
        assert got.body == b"old" and got.headers["x-amz-meta-a"] == "1"
        got = s3.get("answered").ok()
        assert (
            got.body == DATA and got.etag == done.etag and got.headers["content-type"] == "text/x"
        )
        s3.close()


def test_kill_9_at_any_moment_never_tears_an_object(folder: Path) -> None:
    rng = random.Random(13)
    written: dict[str, bytes] = {}  # acknowledged
    for _ in range(4):
        with Server(ACL, "--bucket=bucket", f"--min-part-size={MIN_PART}", data=folder) as server:
            s3 = server.client("bucket")
            for key, body in written.items():
                assert s3.get(key).ok().body == body
            timer = threading.Timer(rng.uniform(0.02, 0.15), server.process.kill)
            timer.start()
            key, body, before = "", b"", None
            try:
                while True:
                    key, body = f"dir/{rng.randrange(5)}", rng.randbytes(rng.randrange(200_000))
                    before = written.get(key)
                    if rng.random() < 0.3:
                        s3.multipart(key, [body[:MIN_PART].ljust(MIN_PART), body]).ok()
                        body = body[:MIN_PART].ljust(MIN_PART) + body
                    else:
                        s3.put(key, body).ok()
                    written[key] = body
            except (OSError, AssertionError):
                timer.join()
            s3.close()
            server.kill()
        with Server(ACL, "--bucket=bucket", data=folder) as server:
            s3 = server.client("bucket")
            got = s3.get(key)
            whole = [body, body[:MIN_PART].ljust(MIN_PART) + body, before]
            assert (got.body if got.status == 200 else None) in whole
            if got.status == 200:
                written[key] = got.body
            s3.close()


def test_two_servers_on_one_data_folder(folder: Path) -> None:
    with Server(ACL, "--bucket=bucket", data=folder) as one, Server(ACL, data=folder) as two:
        both = Client([one.port, two.port], "bucket")
        check_sharing(both)
        # What is being written is not swept away by a server that starts.
        connection = Connection(one.port)
        both.host = f"127.0.0.1:{one.port}"
        connection.send(signed_put(both, "slow", 10) + b"01234")
        with Server(ACL, data=folder) as three:
            assert three.client("bucket").get("0").status == 200
        connection.send(b"56789")
        connection.answer().ok()
        connection.close()
        assert both.get("slow").ok().body == b"0123456789"
        both.close()


def test_workers_share_one_socket(folder: Path) -> None:
    with Server(ACL, "--bucket=bucket", "--workers=3", data=folder) as server:
        s3 = server.client("bucket")
        check_sharing(s3)
        s3.close()
        assert server.stop() == 0
    with pytest.raises(OSError):
        Connection(server.port)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process is told of that")
def signal_while_uploading(server: Server, s3: Client, number: int) -> None:
    """Nothing is accepted any more, what is under way is finished, and then the server ends."""
    with s3.connect() as connection:
        connection.send(signed_put(s3, "slow", 10, expect="100-continue"))
        assert connection.file.readline() == b"HTTP/1.1 100 Continue\r\n"
        connection.file.readline()
        server.process.send_signal(number)
        deadline = time.monotonic() + 5
        while reachable("127.0.0.1", server.port):
            assert time.monotonic() < deadline, "still accepting"
            time.sleep(0.01)
        connection.send(b"0123456789")
        connection.answer().ok()
    assert server.process.wait(10) == 0


def test_stopping_workers_take_no_new_connections(folder: Path) -> None:
    with Server(ACL, "--bucket=bucket", "--workers=2", data=folder) as server:
        s3 = server.client("bucket")
        signal_while_uploading(server, s3, signal.SIGTERM)
        s3.close()


def test_a_worker_is_replaced_even_if_that_fails_at_first_and_its_end_was_to_be_ignored(
    folder: Path,
) -> None:
    change = """
import errno, os, signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
zs3.RESPAWN_SECONDS = 0.1
real, refusals = os.fork, [None, None, OSError(errno.ENOMEM, "no memory"), None]
def fork():
    if error := refusals.pop(0):
        raise error
    return real()
os.fork = fork
"""
    run = CHANGED.format(change)
    with Server(ACL, "--workers=2", data=folder, prelude=run) as server:
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
        server.wait_for_line("no memory")
        deadline = time.monotonic() + 10
        while len(children.read_text().split()) != 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert server.stop() == 0


def test_workers_end_with_their_parent(folder: Path) -> None:
    with Server(ACL, "--workers=3", data=folder) as server:
        parent = server.process.pid
        workers = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        try:
            os.kill(parent, signal.SIGKILL)
            deadline = time.monotonic() + 10
            while reachable("127.0.0.1", server.port):
                assert time.monotonic() < deadline, "a worker goes on"
                time.sleep(0.01)
        finally:
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(worker), signal.SIGKILL)


def check_sharing(s3: Client) -> None:
    """Several processes over one folder: each sees what the others did, and decisions are made
    once."""
    for number in range(20):
        s3.put(str(number), b"%d" % number).ok()
        assert s3.get(str(number)).ok().body == b"%d" % number
        assert len(s3.keys()) == number + 1
    for round_number in range(5):
        clients = [s3.using(ADMIN) for _ in range(12)]
        answers = race(
            12,
            lambda n, c=clients, r=round_number: c[n].put(f"race{r}", b"%d" % n, if_none_match="*"),
        )
        assert sorted(answer.status for answer in answers) == [200] + [412] * 11
        for client in clients:
            client.close()


def age(path: Path, seconds: float) -> None:
    """Make everything below a path older."""
    for item in [*path.rglob("*"), path]:
        then = item.lstat().st_mtime - seconds
        os.utime(item, (then, then), follow_symlinks=False)


def test_stale_uploads_and_temporary_files_are_removed_at_start(folder: Path) -> None:
    with Server(ACL, "--bucket=bucket", data=folder) as server:
        s3 = server.client("bucket")
        s3.put_part("stale", s3.create_upload("stale"), 1, b"x").ok()
        s3.put("k", b"x").ok()
        s3.close()
        server.stop()
    (folder / ".tmp/left-behind").write_bytes(b"half an object")
    age(folder, 8 * DAY)
    later = CHANGED.format("zs3.TEMP_SECONDS = -1.0")
    with Server(ACL, data=folder, prelude=later) as server:
        s3 = server.client("bucket")
        deadline = time.monotonic() + 10
        while (
            s3.on_bucket("GET", "uploads").ok().texts("Upload")
            or (folder / ".tmp/left-behind").exists()
        ):
            assert time.monotonic() < deadline, "not swept"
            time.sleep(0.02)
        assert s3.get("k").ok().body == b"x"
        s3.close()


def test_the_sweep_leaves_a_description_for_seven_days_without_its_object(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder may be moved away and back; tar and rsync restore .meta before the bucket, and with
    the times of then."""
    store = without_attributes(folder, monkeypatch)
    info = stored(store, b"x", kind="text/x")
    age(folder / ".meta", 8 * DAY)
    clock = time.time
    for _ in range(2):
        os.rename(folder / "bucket" / "k", folder / "away")
        monkeypatch.setattr(time, "time", lambda: clock() + 8 * DAY)
        store._sweep()  # it is older than seven days, but not missed for so long
        monkeypatch.setattr(time, "time", lambda: clock() + 6 * DAY)
        store._sweep()
        os.rename(folder / "away", folder / "bucket" / "k")
        assert store.stat_object("bucket", "k") == info
        store._sweep()
    (folder / "bucket" / "k").unlink()
    (folder / ".meta" / "bucket" / "strange").write_text('{"key": "\\ud800"}')
    (folder / ".meta" / "bucket" / "deep").write_text("[" * 100_000)
    refused = [PermissionError(errno.EPERM, "of another owner"), None, None]
    real = os.utime

    def utime(path: str, times: tuple[int, int] | None) -> None:
        if error := refused.pop():
            raise error
        real(path, times and (DAY * 3652, DAY * 3652))  # FAT takes nothing before 1980

    monkeypatch.setattr(os, "utime", utime)
    for _ in range(2):
        refused.append(None)
        store._sweep()
    monkeypatch.setattr(time, "time", lambda: clock() + 8 * DAY)
    store._sweep()
    assert [path.name for path in (folder / ".meta").rglob("*") if path.is_file()] == ["created"]


def test_an_upload_younger_than_the_expiry_stays(folder: Path) -> None:
    with Server(ACL, "--bucket=bucket", data=folder) as server:
        s3 = server.client("bucket")
        number = s3.create_upload("k")
        s3.put_part("k", number, 1, b"x").ok()
        s3.close()
        server.stop()
    age(folder, 6 * DAY)
    with Server(ACL, data=folder) as server:
        s3 = server.client("bucket")
        s3.get("k")
        assert s3.on_bucket("GET", "uploads").ok().texts("Upload/UploadId") == [number]
        s3.close()
    with Server(ACL, "--upload-expiry=5d", data=folder) as server:
        s3 = server.client("bucket")
        deadline = time.monotonic() + 10
        while s3.on_bucket("GET", "uploads").ok().texts("Upload"):
            assert time.monotonic() < deadline, "not swept"
            time.sleep(0.02)
        s3.close()


def test_a_disk_that_takes_no_more_is_an_error_and_nothing_else(folder: Path) -> None:
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    with Server(ACL, "--bucket=bucket", data=folder, prelude=BEFORE.format(limit)) as server:
        s3 = server.client("bucket")
        s3.put("k", b"old").ok()
        answer = s3.put("k", bytes(300_000))
        assert answer.error in ("InsufficientStorage", "InternalError")
        assert unchanged(s3, "k", b"old")
        s3.put("k", bytes(90_000)).ok()
        assert not list((folder / ".tmp").glob("*")), "no temporary file is left"
        s3.close()


@pytest.mark.parametrize("flags", [["--fsync"], []])
def test_fsync_is_asked_for_before_an_object_is_visible(folder: Path, flags: list[str]) -> None:
    watch = """
import os
def spy(name):
    real = getattr(os, name)
    def call(*args, **kwargs):
        os.write(2, f"called {name}\\n".encode())
        return real(*args, **kwargs)
    setattr(os, name, call)
spy("fsync"), spy("rename"), spy("replace")
"""
    with Server(
        ACL, "--bucket=bucket", *flags, data=folder, prelude=BEFORE.replace("{}", watch)
    ) as server:
        s3 = server.client("bucket")
        start = len(server.lines)
        s3.put("dir/k", b"x").ok()
        s3.get("dir/k").ok()
        s3.close()
        server.wait_for_line("GET /bucket/dir/k")
        calls = [line for line in server.lines[start:] if line.startswith("called ")]
    if flags:  # the file before, its folder after
        assert calls[0] == calls[-1] == "called fsync"
        assert {"called rename", "called replace"} & set(calls)
    else:
        assert "called fsync" not in calls


def test_fsync_is_of_the_bucket_when_what_was_deleted_was_in_a_folder_that_is_now_a_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, bucket, synced = zs3.FileStore(str(folder), fsync=True), folder / "bucket", []
    store.create_bucket("bucket")
    stored(store, b"x", "a/b/c")

    def then_replace(*_: object) -> None:
        shutil.rmtree(bucket / "a")
        (bucket / "a").write_bytes(b"another's object")

    monkeypatch.setattr(store, "_remove_side", then_replace)
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    store.delete_object("bucket", "a/b/c", zs3.NO_CONDITION)
    assert synced == [bucket.stat().st_ino]


def flushes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of what is flushed from now on."""
    paths: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: paths.append(os.readlink(f"/proc/self/fd/{fd}")))
    return paths


def test_fsync_of_a_bucket_is_of_the_data_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, paths = zs3.FileStore(str(folder), fsync=True), flushes(monkeypatch)
    store.create_bucket("bucket")
    assert paths == [str(folder)]
    store.delete_bucket("bucket")
    assert paths == [str(folder)] * 2


def test_fsync_of_an_object_is_of_its_file_and_then_of_every_folder_with_a_new_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, bucket = zs3.FileStore(str(folder), fsync=True), folder / "bucket"
    store.create_bucket("bucket")
    paths = flushes(monkeypatch)
    stored(store, b"x", "a/b/c")
    assert Path(paths[0]).parent == folder / ".tmp"
    assert paths[1:] == [str(bucket), str(bucket / "a"), str(bucket / "a/b")]


def test_fsync_of_a_description_is_of_its_file_and_its_folder_before_the_object(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = without_attributes(folder, monkeypatch)
    monkeypatch.setattr(store, "_fsync", True)
    paths = flushes(monkeypatch)
    stored(store, b"x")
    side = next(path for path in (folder / ".meta/bucket").glob("*/*") if path.is_file())
    described, temporary = [str(side.parent.parent), str(side), str(side.parent)], paths[3]
    assert paths == [*described, temporary, str(folder / "bucket")]
    assert Path(temporary).parent == folder / ".tmp"


# --- Command line --------------------------------------------------------------------------------


def run_zs3(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """zs3.py to its end: for what does not serve."""
    names = {
        name: value for name, value in os.environ.items() if not name.startswith(("ZS3_", "MINIO_"))
    }
    return subprocess.run(
        check=False, args=[sys.executable, str(HERE / "zs3.py"), *arguments],
        env=names | environment, text=True,
        timeout=30,
        capture_output=True,
    )  # fmt: skip


FLAG_NAMES = [
    "--port", "--host", "--data-dir", "--acl", "--public-read", "--bucket", "--cors-origin",
    "--domain", "--workers",
    "--fsync", "--min-part-size", "--upload-expiry", "--log-format", "--quiet", "--version",
    "--check",
]  # fmt: skip


def test_help_names_every_flag_and_its_environment_variable() -> None:
    answer = run_zs3("--help")
    assert answer.returncode == 0 and answer.stderr == ""
    for flag in FLAG_NAMES:
        assert flag in answer.stdout
    assert "ZS3_" in answer.stdout and "MINIO_ROOT_USER" in answer.stdout


def test_version() -> None:
    answer = run_zs3("--version")
    assert answer.returncode == 0 and re.search(r"\d+\.\d+", answer.stdout)


BAD_COMMANDS = [
    ["--no-such-flag"], ["stray"], ["--port=many"], ["--port=70000"], ["--port=-1"],
    ["--acl=king:a:b"],
    ["--acl=admin:a"], ["--acl=admin"], ["--acl=admin::b"], ["--acl=admin:a:b,reader:a:c"],
    ["--log-format=xml"],
    ["--workers=0"], ["--workers=x"], ["--min-part-size=-1"], ["--min-part-size=x"],
    ["--upload-expiry=-1"],
    ["--bucket=UPPER"], ["--public-read=no_bucket"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", BAD_COMMANDS, ids=" ".join)
def test_a_flag_that_is_unknown_or_has_a_bad_value_is_refused(
    arguments: list[str], tmp_path: Path
) -> None:
    answer = run_zs3(f"--data-dir={tmp_path / 'data'}", *arguments)
    assert answer.returncode == 2, answer
    assert "Traceback" not in answer.stderr and answer.stderr.strip()
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [([], "data"), (["--port=9001"], "data"), (["--distributed"], "data"),
     (["--distributed", "--port=9001"], "data-9001"),
     (["--distributed", "--port=9001", "--data-dir=here"], "here")],
)  # fmt: skip
def test_the_folder_when_none_is_given(
    arguments: list[str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ZS3_DATA_DIR", raising=False)
    assert zs3.parse_arguments(arguments).data_dir == folder


def test_flags_may_come_from_the_environment(folder: Path) -> None:
    environment = {
        "ZS3_ACL": ACL.removeprefix("--acl="), "ZS3_BUCKET": "one-bucket,two-bucket",
        "ZS3_PUBLIC_READ": "one-bucket",
        "ZS3_LOG_FORMAT": "json", "ZS3_MIN_PART_SIZE": "10",
    }  # fmt: skip
    with Server(data=folder, environment=environment) as server:
        s3 = server.client("one-bucket")
        assert s3.service().texts("Buckets/Bucket/Name") == ["one-bucket", "two-bucket"]
        s3.multipart("k", [b"0123456789", b"x"]).ok()
        assert s3.unsigned("GET", "/one-bucket/k").ok().body == b"0123456789x"
        s3.close()
        json.loads(server.wait_for_line('"GET"|GET /one-bucket/k'))
    answer = run_zs3("--help", ZS3_PORT="many")
    assert answer.returncode in (0, 2) and "Traceback" not in answer.stderr


def test_what_kubernetes_says_of_a_service_called_zs3_is_no_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ZS3_PORT", "tcp://10.96.0.12:9000")
    assert zs3.parse_arguments([]).port == 9000
    monkeypatch.setenv("ZS3_PORT", "9001")
    assert zs3.parse_arguments([]).port == 9001


@pytest.mark.parametrize(
    ("replicas", "taken"), [(1, True), (3, True), (19, True), (2, False), (21, False), (0, False)]
)
def test_replicas_are_an_odd_number(replicas: int, taken: bool) -> None:
    """A majority of an even number bears no more losses, and half of it could read alone."""
    with contextlib.nullcontext() if taken else pytest.raises(SystemExit):
        args = zs3.parse_arguments(["--distributed", f"--replicas={replicas}"])
        assert args.replicas == replicas


@pytest.mark.parametrize(
    "given",
    ["--bootstrap=a:1", "--discover", "--advertise=a:1", "--cluster-secret=s", "--replicas=5",
     "--gossip-interval-ms=100", "--gc-grace=1s", "--tombstone-grace=1s", f"--forget={'0' * 40}"],
)  # fmt: skip
def test_what_only_a_cluster_can_do_is_refused_without_one(
    given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        zs3.parse_arguments([given])
    assert f"{given.partition('=')[0]} needs --distributed" in capsys.readouterr().err
    zs3.parse_arguments(["--distributed", given])


def test_an_environment_for_nodes_may_be_that_of_others_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As that of a container in which --check is run."""
    monkeypatch.setenv("ZS3_CLUSTER_SECRET", "secret")
    assert zs3.parse_arguments(["--check"]).check


def test_an_origin_has_a_scheme(capsys: pytest.CaptureFixture[str]) -> None:
    """Or else it would match none that a browser sends."""
    taken = ["*", "null", "http://a:1"]
    assert zs3.parse_arguments([f"--cors-origin={','.join(taken)}"]).cors_origin == taken
    for wrong in ("example.com", "http://a/", "http://a/b"):
        with pytest.raises(SystemExit):
            zs3.parse_arguments([f"--cors-origin={wrong}"])
        assert f"'{wrong}' is no origin" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["a:80", "a/", ".a", "a.", "a..b", "a b"])
def test_a_domain_is_a_name(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    for taken in ("S3.Example.com", "localhost", ""):
        assert zs3.parse_arguments([f"--domain={taken}"]).domain == taken.lower()
    with pytest.raises(SystemExit):
        zs3.parse_arguments([f"--domain={wrong}"])
    assert f"{wrong!r} is no domain" in capsys.readouterr().err


def test_an_acl_that_names_nobody_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one from a variable that is not set: the default keys are known to anyone."""
    for argument in ([], ["--acl="]):
        if not argument:
            monkeypatch.setenv("ZS3_ACL", "")
        with pytest.raises(SystemExit):
            zs3.parse_arguments(argument)
        monkeypatch.delenv("ZS3_ACL", raising=False)
        assert "--acl names nobody" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "served"),
    [("localhost", True), ("127.0.0.1", True), ("[::1]", True), ("s3", True), ("a.test", True),
     ("b.localhost", True), ("host.docker.internal", True), ("mine.example", True),
     ("localhost.", True), ("b.localhost.", True), ("localhost.localdomain", True),
     ("b.mine.example", True), ("evil.example", False), ("evilmine.example", False),
     ("127.0.0.1.evil.example", False), ("localhost.evil.example", False)],
)  # fmt: skip
def test_the_default_keys_are_for_local_names(folder: Path, host: str, served: bool) -> None:
    """A page could have any other, by DNS rebinding: then it is of the same origin."""
    service = zs3.Service(
        zs3.FileStore(str(folder)),
        zs3.Settings({}, domain="mine.example", only_local=True),
    )
    request = zs3.Request("GET", "/", "", {"host": f"{host}:9000"}, service.settings)
    assert (b"The default keys" in service.respond(request).body) != served
    service.settings = request.settings = zs3.Settings({})
    assert b"The default keys" not in service.respond(request).body


def test_the_default_keys_are_not_for_the_posts_of_pages(folder: Path) -> None:
    """A browser sends them without asking the server: a presigned one could fill its disk."""
    service = zs3.Service(zs3.FileStore(str(folder)), zs3.Settings({}, only_local=True))
    allowed = zs3.Settings({}, only_local=True, cors_origins=(ORIGIN,))
    for settings, method, origin, served in (
        (service.settings, "POST", "https://evil.example", False),
        (service.settings, "POST", "null", False), (service.settings, "POST", "", True),
        (service.settings, "GET", "https://evil.example", True), (allowed, "POST", ORIGIN, True),
        (allowed, "POST", "https://evil.example", False),
        (zs3.Settings({}), "POST", "https://evil.example", True),
    ):  # fmt: skip
        head = {"host": "localhost:9000"} | ({"origin": origin} if origin else {})
        answer = service.respond(zs3.Request(method, "/bucket/k", "uploads", head, settings))
        assert (b"The default keys" not in answer.body) == served
        assert answer.status == 403  # nobody signed it


def test_a_folder_is_that_of_one_mode(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What one of them wrote would seem to be lost in the other."""
    standalone = ["--port=0", f"--data-dir={folder}"]
    (folder / "bucket").mkdir(parents=True)
    (folder / "a-loop").symlink_to("a-loop")
    (folder / "aquota.user").write_bytes(b"a file with the name of a bucket")
    assert zs3.main([*standalone, "--distributed"]) == 1
    assert "it has the buckets of a standalone server" in capsys.readouterr().err
    (folder / ".node_id").write_text("0" * 40)
    assert zs3.main(standalone) == 1
    assert "it is that of a node, which needs --distributed" in capsys.readouterr().err
    zs3.prepare_folder(zs3.parse_arguments([*standalone, "--distributed"]))
    (folder / ".node_id").unlink()
    zs3.prepare_folder(zs3.parse_arguments(standalone))
    (folder / "bucket").rmdir()
    zs3.prepare_folder(zs3.parse_arguments([*standalone, "--distributed"]))


@pytest.mark.parametrize("part", ["", "/.tmp"])
def test_a_folder_that_cannot_be_written_is_said_at_the_start(
    folder: Path, part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode, **_: path != f"{folder}{part}")
    assert zs3.main(["--port=0", f"--data-dir={folder}"]) == 1
    assert f"no permission to read and write in {folder}{part}\n" in capsys.readouterr().err
    read_only = types.SimpleNamespace(f_flag=os.ST_RDONLY)
    monkeypatch.setattr(os, "statvfs", lambda path: read_only)  # then reading is what is wanted
    zs3.prepare_folder(zs3.parse_arguments([f"--data-dir={folder}"]))
    with pytest.raises(PermissionError):  # but a node writes even then
        zs3.prepare_folder(zs3.parse_arguments([f"--data-dir={folder}", "--distributed"]))


def test_distributed_mode_without_its_module_says_which(tmp_path: Path) -> None:
    shutil.copy(HERE / "zs3.py", tmp_path / "zs3.py")
    # -S: no packages, of which this may be one.
    command = [sys.executable, "-S", str(tmp_path / "zs3.py"), "--distributed", "--port=0"]
    run = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False
    )
    assert run.returncode == 1 and "needs zs3_dist.py beside zs3.py" in run.stderr


def test_minios_variables_are_honoured(folder: Path) -> None:
    credential = ("admin", "minio-user", "minio-password")
    environment = {"MINIO_ROOT_USER": credential[1], "MINIO_ROOT_PASSWORD": credential[2]}
    with Server("--bucket=bucket", data=folder, environment=environment) as server:
        s3 = server.client("bucket", credential)
        s3.put("k", b"x").ok()
        default = server.client("bucket", ("admin", "minioadmin", "minioadmin"))
        assert default.get("k").error == "InvalidAccessKeyId"
        assert not [line for line in server.lines if "minio-password" in line]
        s3.close()
        default.close()


DEFAULT = ("admin", "minioadmin", "minioadmin")


def reachable(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True


def test_the_default_credentials_bind_the_loopback_and_warn_otherwise(folder: Path) -> None:
    with Server(data=folder) as server:
        s3 = server.client("bucket", DEFAULT)
        s3.on_bucket("PUT").ok()
        s3.host = f"evil.example:{server.port}"
        assert s3.service().error == "AccessDenied"
        s3.close()
        if sys.platform == "linux":  # where every 127.x.x.x is the loopback
            assert not reachable("127.0.0.2", server.port)
        assert not [line for line in server.lines if "warn" in line.lower()]
    with Server("--host=0.0.0.0", data=folder) as server:
        server.wait_for_line("(?i)warn.*|default credentials")
        s3 = server.client("bucket", DEFAULT)
        s3.host = "any.example"
        s3.service().ok()
        s3.close()


def test_own_credentials_bind_every_address(folder: Path) -> None:
    with Server(ACL, data=folder) as server:
        if sys.platform == "linux":
            assert reachable("127.0.0.2", server.port)
    with Server(ACL, "--host=127.0.0.1", data=folder) as server:
        assert not reachable("127.0.0.2", server.port)


def test_the_banner(folder: Path) -> None:
    with Server(ACL, data=folder) as server:
        server.client().unsigned("GET", "/_zs3/health").ok()
        banner = "\n".join(server.lines[:8])
        assert server.lines[0].count("http://") == 1 and str(server.port) in server.lines[0]
        assert str(folder) in banner and ADMIN[1] in banner
        assert ADMIN[2] not in banner


def test_the_banner_says_names_as_they_are(tmp_path: Path) -> None:
    with Server(data=tmp_path / "données-数据") as server:
        server.wait_for_line(f"data in {tmp_path}/données-数据")


@pytest.mark.parametrize(
    ("name", "text", "beside"),
    [("ZS3_ACL", "admin:from-a-file:of-a-file", {}),
     ("MINIO_ROOT_USER", "from-a-file", {"MINIO_ROOT_PASSWORD": "of-a-file"}),
     ("MINIO_ROOT_PASSWORD", "of-a-file", {"MINIO_ROOT_USER": "from-a-file"})],
)  # fmt: skip
def test_a_variable_may_come_in_a_file(
    name: str, text: str, beside: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As containers are given secrets."""
    (tmp_path / "secret").write_text(f"{text}\n")
    for other, value in beside.items():
        monkeypatch.setenv(other, value)
    monkeypatch.setenv(f"{name}_FILE", str(tmp_path / "secret"))
    expected = {"from-a-file": zs3.Credential("admin", "from-a-file", "of-a-file")}
    assert zs3.parse_arguments([]).credentials == expected
    (tmp_path / "empty").touch()
    for file, why in (("missing", "No such file"), ("empty", "is empty")):
        monkeypatch.setenv(f"{name}_FILE", str(tmp_path / file))
        with pytest.raises(SystemExit, match=f"{name}_FILE: .*{why}"):
            zs3.parse_arguments([])
    monkeypatch.setenv(f"{name}_FILE", "")
    access = beside.get("MINIO_ROOT_USER", "minioadmin")
    secret = beside.get("MINIO_ROOT_PASSWORD", "minioadmin")
    without = {access: zs3.Credential("admin", access, secret)}
    assert zs3.parse_arguments([]).credentials == without
    monkeypatch.setenv(f"{name}_FILE", "a-secret")  # that of Docker is looked for in its folder
    with pytest.raises(SystemExit, match="/run/secrets/a-secret"):
        zs3.parse_arguments([])
    monkeypatch.setenv(name, "admin:a:b")  # what is given itself counts
    assert zs3.parse_arguments([]).credentials


def test_what_the_system_says_of_its_disk_is_logged_with_the_request(folder: Path) -> None:
    run = CHANGED.format("""
def full(*_):
    raise OSError(28, "No space left on device")
zs3.write_all = full
""")
    with Server(ACL, "--bucket=bucket", data=folder, prelude=run) as server:
        s3 = server.client("bucket")
        answer = s3.put("k", b"hello")
        assert answer.error == "InsufficientStorage"
        line = rf"request {answer.headers['x-amz-request-id']}: .*No space left on device"
        server.wait_for_line(line)
        s3.close()


def test_the_banner_says_whose_secret_is_the_default_one(folder: Path) -> None:
    with Server(data=folder, environment={"MINIO_ROOT_USER": "app"}) as server:
        assert server.wait_for_line("access key app, secret minioadmin")


def test_check_asks_a_running_server(folder: Path) -> None:
    with Server(ACL, data=folder) as server:
        assert run_zs3("--check", f"--port={server.port}").returncode == 0
        assert run_zs3("--check", ZS3_PORT=str(server.port)).returncode == 0
    answer = run_zs3("--check", f"--port={server.port}")
    assert answer.returncode == 1 and "Traceback" not in answer.stderr
    (folder / "a-file").write_bytes(b"in the place of a bucket")
    with Server(ACL, "--bucket=a-file", data=folder, ready=False) as server:
        answer = run_zs3("--check", f"--port={server.port}")
        assert answer.returncode == 1 and "answers 503" in answer.stderr
        server.wait_for_line("GET /_zs3/health .* 503 ")
    with socket.create_server(
        ("127.0.0.1", 0)
    ) as listener:  # something else is there, and says nothing of use

        def speak() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-hello\r\n")
                connection.close()

        thread = threading.Thread(target=speak)
        thread.start()
        assert run_zs3("--check", f"--port={listener.getsockname()[1]}").returncode == 1
        thread.join(10)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_check_finds_a_server_on_all_ipv6_addresses(folder: Path) -> None:
    with Server(ACL, "--host=::", data=folder) as server:  # which is asked at 127.0.0.1
        assert reachable("::1", server.port)
        assert run_zs3("--check", "--host=::", f"--port={server.port}").returncode == 0


def test_a_port_in_use_is_said_plainly(folder: Path) -> None:
    with Server(ACL, data=folder) as server:
        answer = run_zs3(ACL, f"--port={server.port}", f"--data-dir={folder}")
        where = f"0.0.0.0:{server.port}"
        assert answer.returncode == 1
        assert answer.stderr == f"zs3: cannot listen on {where}: Address already in use\n"


def test_what_is_logged_gets_into_no_file_or_connection_that_took_the_number_of_the_log(
    folder: Path,
) -> None:
    """Whoever starts the server may have closed its standard input, output and error."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    command = f'exec "{sys.executable}" "{HERE / "zs3.py"}" --port={port} "--data-dir={folder}"'
    process = subprocess.Popen(["sh", "-c", f"{command} <&- >&- 2>&-"])
    try:
        deadline = time.monotonic() + 20
        while not reachable("127.0.0.1", port):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with contextlib.closing(Client([port])) as client:
            client.unsigned("GET", "/_zs3/health").ok()
        open_files = Path(f"/proc/{process.pid}/fd")
        assert {os.readlink(open_files / number) for number in "012"} == {os.devnull}
    finally:
        process.terminate()
        assert process.wait(20) == 0


def test_a_signal_right_after_the_banner_is_exit_0(folder: Path) -> None:
    for flags in ([], ["--workers=3"]) * 3:
        with Server(ACL, *flags, data=folder, ready=False) as server:
            assert server.stop() == 0


def test_a_bucket_of_the_command_line_is_there_when_the_server_is_healthy(folder: Path) -> None:
    names = [f"bucket-{number}" for number in range(50)]
    with Server(ACL, f"--bucket={','.join(names)}", data=folder, ready=False) as server:
        s3 = server.client(names[-1])
        while (answer := s3.unsigned("GET", "/_zs3/health")).status != 200:
            assert answer.error == "SlowDown"
        s3.put("k", b"x").ok()
        s3.close()


def test_a_bucket_that_cannot_be_made_is_tried_until_it_can(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = zs3.Service(zs3.FileStore(str(folder)), zs3.Settings(credentials={}))
    refusals: list[Exception] = [S3Error("SlowDown"), OSError(errno.EMFILE, "too many files")]
    make, ready = service.store.create_bucket, []
    (folder / "one-bucket").write_bytes(b"a file in its place")

    def create(bucket: str) -> bool:
        if refusals:
            raise refusals.pop()
        return make(bucket)

    def sleep(_: float) -> None:
        ready.append(service.ready)
        if len(ready) == 3:
            (folder / "one-bucket").unlink()

    monkeypatch.setattr(service.store, "create_bucket", create)
    monkeypatch.setattr(zs3, "time", types.SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(zs3, "sweep_uploads", lambda *_: None)
    zs3.prepare(zs3.parse_arguments(["--bucket=one-bucket,two-bucket"]), service)
    assert service.ready and ready == [False] * 3
    assert {"one-bucket", "two-bucket"} <= set(os.listdir(folder))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and "too many files" in told[0] and "NoSuchBucket" in told[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_requests_under_way_and_exits_0(folder: Path, number: int) -> None:
    with Server(ACL, "--bucket=bucket", data=folder) as server:
        s3 = server.client("bucket")
        s3.put("k", b"x").ok()  # leaves an idle connection, which must not keep the server
        signal_while_uploading(server, s3, number)
        s3.close()
    assert (folder / "bucket/slow").read_bytes() == b"0123456789"
    assert not [line for line in server.lines if "Traceback" in line]


@pytest.mark.parametrize("sent", [PLAIN_GET + b"\r\n", PLAIN_GET + b"GET / HT"])
def test_a_part_of_a_head_does_not_keep_a_server_from_stopping(sent: bytes) -> None:
    """A client may send a line end behind a request (RFC 9112, 2.2), or be stuck."""
    with InProcess(slow_once()) as server, server.connect() as client:
        client.sendall(sent)
        assert answers(client, 1) == 1
        time.sleep(0.2)
        began = time.monotonic()
        server.__exit__()
        assert time.monotonic() - began < zs3.OWN_SECONDS + 2


def test_requests_that_wait_for_their_turn_are_answered_before_stopping(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(zs3, "OWN_SECONDS", 0.1)

    def respond(_: zs3.Request) -> zs3.Response:
        time.sleep(0.03)  # less than a turn
        return zs3.Response(200)

    with InProcess(respond) as server, contextlib.ExitStack() as held:
        clients = [held.enter_context(server.connect()) for _ in range(20)]
        for client in clients:
            client.sendall(PLAIN_GET)
            assert answers(client, 1) == 1
        for client in clients:
            client.sendall(PLAIN_GET)
        server.__exit__()
        assert [answers(client, 1) for client in clients] == [1] * 20


def test_a_client_that_was_silent_for_long_may_send_a_head_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(zs3, "SOCKET_SECONDS", 1.0)
    with InProcess(lambda request: zs3.Response(200)) as server, server.connect() as client:
        client.sendall(PLAIN_GET)
        assert answers(client, 1) == 1
        time.sleep(0.8)
        client.sendall(PLAIN_GET[:5])
        time.sleep(0.6)
        client.sendall(PLAIN_GET[5:])
        assert answers(client, 1) == 1


def test_stopping_at_the_limit_of_open_files_takes_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is no accepting the connections that wait."""
    monkeypatch.setattr(zs3, "SHUTDOWN_SECONDS", 0.3)

    def get_request(_: object) -> None:
        time.sleep(0.1)
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(zs3.Server, "get_request", get_request)
    with InProcess(lambda request: zs3.Response(200)) as server, server.connect():
        began = time.monotonic()
        server.__exit__()
        assert time.monotonic() - began < 3


def test_a_request_that_never_ends_does_not_keep_a_server_from_stopping(folder: Path) -> None:
    hurry = "import zs3\nzs3.SHUTDOWN_SECONDS = 1.0\nsys.exit(zs3.main())"
    with Server(ACL, "--bucket=bucket", data=folder, prelude=hurry) as server:
        s3 = server.client("bucket")
        with s3.connect() as connection:
            connection.send(signed_put(s3, "slow", 10) + b"x")
            s3.get("x")
            started = time.monotonic()
            assert server.stop() == 0
            assert 0.9 < time.monotonic() - started < 10
        s3.close()
    assert not (folder / "bucket/slow").exists()


TEXT_LINE = re.compile(  # the combined log format
    r'127\.0\.0\.1 - (?P<user>\S+) \[(?P<time>[^]]+)\] "(?P<request>[^"]*)" '
    r"(?P<status>\d{3}) (?P<size>\d+|-)"
)


def test_the_access_log_in_text(folder: Path) -> None:
    with Server(ACL, "--bucket=bucket", data=folder) as server:
        s3 = server.client("bucket")
        s3.put("a b", b"hello").ok()
        s3.get("a b").ok()
        s3.unsigned("GET", "/bucket/secret")
        s3.get('"quote', user_agent='a "b"')
        s3.request("GET", "/_zs3")
        s3.unsigned("GET", "/minio/health/live").ok()
        minio = Client(s3.ports, "minio")
        minio.on_bucket("PUT").ok()
        minio.put("health/live", b"an object").ok()
        minio.close()
        s3.close()
        get = TEXT_LINE.search(server.wait_for_line(r'"GET /bucket/a%20b'))
        assert get and get["request"] == "GET /bucket/a%20b HTTP/1.1"
        assert get["status"] == "200" and get["size"] == "5" and get["user"] == ADMIN[1]
        assert not re.search(r"[a-z]$", server.wait_for_line(r'"GET /bucket/a%20b'))
        refused = TEXT_LINE.search(server.wait_for_line(r"GET /bucket/secret.* AccessDenied$"))
        assert refused and refused["status"] == "403" and refused["user"] == "-"
        server.wait_for_line("%22quote")
        server.wait_for_line("GET /_zs3 HTTP/1.1.*InvalidBucketName")
        server.wait_for_line('"PUT /minio/health/live HTTP/1.1" 200')
        assert (
            len([line for line in server.lines if "HTTP/1.1" in line and "_zs3" not in line]) == 6
        )
        assert not [line for line in server.lines if re.search('GET .*health .*" 200 ', line)]


def test_the_access_log_in_json(folder: Path) -> None:
    with Server(ACL, "--bucket=bucket", "--log-format=json", data=folder) as server:
        s3 = server.client("bucket")
        s3.put("k", b"hello").ok()
        s3.get('"quote\\')
        s3.close()
        line = json.loads(server.wait_for_line("PUT"))
        assert line["method"] == "PUT" and line["target"] == "/bucket/k" and line["status"] == 200
        assert line["error"] is None
        assert json.loads(server.wait_for_line("quote"))["error"] == "NoSuchKey"


def test_quiet_logs_no_accesses(folder: Path) -> None:
    with Server(ACL, "--bucket=bucket", "--quiet", data=folder) as server:
        s3 = server.client("bucket")
        s3.put("k", b"hello").ok()
        s3.close()
        server.stop()
        assert not [line for line in server.lines if "/bucket/k" in line]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_log_has_no_secrets_and_no_forged_lines(folder: Path, log_format: str) -> None:
    with Server(ACL, "--bucket=bucket", f"--log-format={log_format}", data=folder) as server:
        s3 = server.client("bucket")
        s3.put("k", b"x").ok()
        target = presign("GET", s3.host, "/bucket/k")
        for name in ("X-Amz-Signature", "X-Amz-%53ignature", "X-Amz-S%69gnature"):
            s3.unsigned("GET", target.replace("X-Amz-Signature", name)).ok()
        s3.unsigned("GET", target + "0")
        s3.using((*ADMIN[:2], "wrong")).get("k")
        s3.get("line\nfeed\x1b[31m")
        s3.get("k", user_agent="\x1b[31mred")
        s3.get("last").error  # noqa: B018
        s3.close()
        server.wait_for_line("/bucket/last")
        log = "\n".join(server.lines)
        assert ADMIN[2] not in log and percent(ADMIN[2]) not in log
        assert target.rpartition("X-Amz-Signature=")[2] not in log, (
            "who reads the log could use the URL"
        )
        assert "\x1b" not in log and not [line for line in server.lines if line.startswith("feed")]


def test_zs3_alone_in_a_folder_is_the_whole_server(tmp_path: Path) -> None:
    shutil.copy(HERE / "zs3.py", tmp_path / "zs3.py")
    with Server(
        ACL, "--bucket=bucket", data=tmp_path / "data", script=tmp_path / "zs3.py", flags=["-I"]
    ) as server:
        s3 = server.client("bucket")
        s3.put("k", b"x").ok()
        s3.close()


# How the server is started: what of, with which flags, where zs3.py is, and a link to it.
STARTS = {
    "another name": ("server.py", [], "server.py", ""),
    "no ending": ("zs3", [], "zs3", ""),
    "a link": ("bin/s3d", [], "lib/zs3.py", "bin/s3d"),
    "-m": ("zs3", ["-m"], "zs3.py", ""),
    "-m and others": ("zs3", ["-X", "dev", "-B", "-m"], "zs3.py", ""),
}


@pytest.mark.parametrize("how", STARTS)
def test_the_server_starts_under_any_name_as_a_link_and_with_dash_m(
    tmp_path: Path, how: str
) -> None:
    name, flags, place, link = STARTS[how]
    (tmp_path / place).parent.mkdir(exist_ok=True)
    shutil.copy(HERE / "zs3.py", tmp_path / place)
    if link:
        (tmp_path / link).parent.mkdir()
        (tmp_path / link).symlink_to(tmp_path / place)
    script = Path(name) if "-m" in flags else tmp_path / name
    data = tmp_path / "data"
    with Server(ACL, "--bucket=bucket", data=data, script=script, flags=flags) as server:
        s3 = server.client("bucket")
        s3.put("k", b"x").ok()
        s3.close()
    # zs3_dist is the one beside the file, and the module that it imports is this one.
    beside = (tmp_path / place).parent / "zs3_dist.py"
    beside.write_text("import zs3\nraise ImportError(zs3.__file__)")
    command = [sys.executable, *flags, str(script), "--distributed", "--port=0"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.stderr.splitlines()[-1] == f"zs3: {tmp_path / place}"


def test_keys_that_are_not_ascii_work_in_the_c_locale(folder: Path) -> None:
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    folder = folder.with_name("donn\u00e9es")
    with Server(ACL, "--bucket=bucket", data=folder, environment=environment) as server:
        s3 = server.client("bucket")
        s3.put("\u00e9/\u65e5", b"x").ok()
        assert s3.keys() == ["\u00e9/\u65e5"]
        s3.close()
    assert (folder / "bucket/\u00e9/\u65e5").read_bytes() == b"x"


def test_modules_in_the_working_directory_are_not_imported(tmp_path: Path) -> None:
    for name in ("json", "secrets", "calendar", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(
            "raise SystemExit('imported from the working directory')"
        )
    with Server(ACL, "--bucket=bucket", data=tmp_path / "data") as server:
        s3 = server.client("bucket")
        s3.put("k", b"x").ok()
        s3.close()


def test_zs3_imports_nothing_outside_the_standard_library() -> None:
    """But for what it can do without: imports inside `try`, and zs3_dist where the store is
    opened."""
    tree = ast.parse((HERE / "zs3.py").read_text())
    optional = {
        id(inner) for node in ast.walk(tree) if isinstance(node, (ast.Try,
        ast.FunctionDef)) for inner in ast.walk(node)
    }  # fmt: skip
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            known = name.partition(".")[0] in sys.stdlib_module_names
            assert known or id(node) in optional, name
    assert (HERE / "zs3.py").read_text().count("import zs3_dist") == 1


# --- boto3 ---------------------------------------------------------------------------------------


@pytest.fixture
def boto(s3: Client) -> Any:
    """boto3's own client, in its default configuration."""
    retries = Config(
        retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}, signature_version="s3v4"
    )
    return boto3.client(
        "s3", endpoint_url=f"http://{s3.host}", aws_access_key_id=ADMIN[1],
        aws_secret_access_key=ADMIN[2],
        region_name="us-east-1", config=retries,
    )  # fmt: skip


def test_boto3_objects(s3: Client, boto: Any) -> None:
    boto.create_bucket(Bucket=s3.bucket)
    put = boto.put_object(
        Bucket=s3.bucket, Key="é/k &+", Body=DATA, Metadata={"a": "1"}, ContentType="text/x"
    )
    got = boto.get_object(Bucket=s3.bucket, Key="é/k &+")
    assert got["Body"].read() == DATA and got["ETag"] == put["ETag"]
    assert got["Metadata"] == {"a": "1"} and got["ContentType"] == "text/x"
    assert boto.head_object(Bucket=s3.bucket, Key="é/k &+")["ContentLength"] == len(DATA)
    part = boto.get_object(Bucket=s3.bucket, Key="é/k &+", Range="bytes=5-9")
    assert part["Body"].read() == DATA[5:10]
    boto.copy_object(
        Bucket=s3.bucket, Key="copy", CopySource={"Bucket": s3.bucket, "Key": "é/k &+"}
    )
    keys = [item["Key"] for item in boto.list_objects_v2(Bucket=s3.bucket)["Contents"]]
    assert keys == ["copy", "é/k &+"]
    assert [item["Key"] for item in boto.list_objects(Bucket=s3.bucket)["Contents"]] == keys
    objects = {"Objects": [{"Key": key} for key in keys]}
    assert len(boto.delete_objects(Bucket=s3.bucket, Delete=objects)["Deleted"]) == 2
    boto.delete_bucket(Bucket=s3.bucket)


def test_boto3_pages(s3: Client, boto: Any) -> None:
    for number in range(25):
        s3.put(f"dir{number % 3}/{number:02}", b"x").ok()
    pages = boto.get_paginator("list_objects_v2").paginate(
        Bucket=s3.bucket, PaginationConfig={"PageSize": 4}
    )
    assert len([item for page in pages for item in page["Contents"]]) == 25
    pages = boto.get_paginator("list_objects").paginate(
        Bucket=s3.bucket, Delimiter="/", PaginationConfig={"PageSize": 1}
    )
    assert [text["Prefix"] for page in pages for text in page["CommonPrefixes"]] == [
        "dir0/",
        "dir1/",
        "dir2/",
    ]


def test_boto3_transfers_a_file_in_parts(s3: Client, boto: Any, tmp_path: Path) -> None:
    body = random.Random(1).randbytes(11 << 20)
    (tmp_path / "up").write_bytes(body)
    config = TransferConfig(
        multipart_threshold=5 << 20, multipart_chunksize=5 << 20, max_concurrency=3
    )
    boto.upload_file(
        str(tmp_path / "up"), s3.bucket, "big", Config=config, ExtraArgs={"Metadata": {"a": "1"}}
    )
    boto.download_file(s3.bucket, "big", str(tmp_path / "down"), Config=config)
    assert (tmp_path / "down").read_bytes() == body
    assert boto.head_object(Bucket=s3.bucket, Key="big")["ETag"].endswith('-3"')
    assert boto.list_multipart_uploads(Bucket=s3.bucket).get("Uploads", []) == []


def test_boto3_presigned_urls(s3: Client, boto: Any) -> None:
    parameters = {"Bucket": s3.bucket, "Key": "a b/é"}
    for name, method, body in (("put_object", "PUT", b"x"), ("get_object", "GET", b"")):
        target = boto.generate_presigned_url(name, Params=parameters).partition(s3.host)[2]
        answer = s3.unsigned(method, target, body=body).ok()
    assert answer.body == b"x"


def test_boto3_errors(s3: Client, boto: Any) -> None:
    with pytest.raises(boto.exceptions.NoSuchKey):
        boto.get_object(Bucket=s3.bucket, Key="missing")
    with pytest.raises(boto.exceptions.NoSuchBucket):
        boto.list_objects_v2(Bucket="no-such-bucket")
    for key, code in (("k", "PreconditionFailed"), ("l", "")):
        boto.put_object(Bucket=s3.bucket, Key="k", Body=b"x")
        try:
            boto.put_object(Bucket=s3.bucket, Key=key, Body=b"y", IfNoneMatch="*")
            assert not code
        except ClientError as error:
            assert error.response["Error"]["Code"] == code


# --- Distributed mode -----------------------------------------------------------------------------

# --- A seeded network in one process: registers, views, garbage ---


class StubBlocks:
    """No disk in a simulation."""

    def has(self, block: str) -> bool:
        return False

    touch = has


class StubPeers:
    def __init__(self, own: Contact) -> None:
        self.seal = zs3_dist.Seal(own, "secret")
        self.moved: dict[Contact, Contact] = {}

    def skipped(self, node: int) -> bool:
        return False

    def heard(self, contact: Contact) -> None:
        pass

    keep = heard


class SimCluster(Cluster):
    """A Cluster whose network is `net`: calls by background jobs are atomic, and may get lost."""

    def __init__(self, node: Node, net: Net) -> None:
        super().__init__(node, StubPeers(node.own))  # type: ignore[arg-type]
        self.net = net
        self.rounds = Rounds(node.own.node, self.known_view, net.clock, net.pick)
        self.young_until = -math.inf
        self.joined.set()

    def tell(self, name, message, contacts, enough=None, first=0, meanwhile=None):  # type: ignore[no-untyped-def]
        if meanwhile:
            meanwhile()
        replies = {}
        for contact in dict.fromkeys(contacts):
            if contact.address == self.own.address:  # it asks itself, over the network
                answer = self.node.answer(name, message, self.own)
            else:
                answer = self.net.deliver(name, message, self.own, contact.node)
            replies[contact.node] = Reply(200, pack(answer)) if answer is not None else Reply(0)
            if answer is not None and contact.node:
                self.node.saw(contact)
        return replies

    def run(self, steps):  # type: ignore[no-untyped-def]
        try:
            step = next(steps)
            while True:
                self.net.now += 0.05
                step = steps.send({} if isinstance(step, Pause) else self.ask(step))
        except StopIteration as end:
            return end.value


class Net:
    """Nodes that can be cut off, and a clock that is the number of steps."""

    def __init__(self, seed: int, size: int) -> None:
        self.pick = random.Random(seed)
        self.now = 0.0
        self.loss = 0.0
        self.down: set[int] = set()
        self.nodes: dict[int, Node] = {}
        self.clusters: dict[int, SimCluster] = {}
        self.late: list[tuple[str, Message, Contact, int]] = []
        for _ in range(size):
            self.add()
        contacts = tuple(sorted(node.own for node in self.nodes.values()))
        for node in self.nodes.values():
            node.registers.install([View("0" * 16, 1, 3, contacts)])

    def add(self, number: int | None = None) -> Node:
        own = Contact(number or self.pick.getrandbits(160), f"sim:{len(self.nodes) + 1}")
        node = Node(own, Registers(own.node, ":memory:"), StubBlocks(), self.clock)  # type: ignore[arg-type]
        self.nodes[own.node] = node
        self.clusters[own.node] = SimCluster(node, self)
        return node

    def clock(self) -> float:
        return self.now

    def deliver(self, name: str, message: Message, sender: Contact, to: int) -> Message | None:
        """Through the wire's form, checks included; None when the message or the answer is lost."""
        if to in self.down or sender.node in self.down or self.pick.random() < self.loss:
            return None
        if name == "views" and self.loss and self.pick.random() < 0.7:
            return None  # so that there are stragglers
        checked = parse_message(name, pack(message))
        answer = json.loads(pack(self.nodes[to].answer(name, checked, sender)))
        return None if self.pick.random() < self.loss else answer


AGAIN: list[Any] = []  # reads that had to ask a second time


class Proposing:
    """One operation as steps; each message is delivered at a time that the scheduler picks."""

    def __init__(self, net: Net, at: Node, steps: Any) -> None:
        self.net, self.at, self.steps = net, at, steps
        self.waiting: list[Contact] = []
        self.answers: dict[int, Message] = {}
        self.ask: Ask | None = None
        self.brief = False  # the others leave out values, as in Cluster.ask
        self.result: Any = None
        self.error: S3Error | None = None
        self.done = False
        self._advance(None)

    def _advance(self, answers: Any) -> None:
        try:
            step = self.steps.send(answers)
        except StopIteration as end:
            self.result, self.done = end.value, True
            return
        except S3Error as error:
            self.error, self.done = error, True
            return
        if isinstance(step, Pause):
            self.ask, self.waiting = None, []
            return
        own = self.at.own.node
        here = any(c.node == own for group in step.groups for c in group)
        alone = zs3_dist.covers(step.groups, {own}, step.quorum)
        self._begin(step, "brief" in step.message and here and not alone)

    def _begin(self, ask: Ask, brief: bool) -> None:
        self.ask, self.answers, self.brief = ask, {}, brief
        self.waiting = list(dict.fromkeys(c for group in ask.groups for c in group))
        self.net.pick.shuffle(self.waiting)

    def _question(self, to: int) -> Message:
        assert self.ask is not None
        brief = {"brief": True} if self.brief and to != self.at.own.node else {}
        return self.ask.message | brief

    def _missed_a_change(self) -> bool:
        """Have the others accepted something newer, whose value they left out?"""
        own = self.at.own.node
        if self.brief and own not in self.answers:
            self.answers[own] = self.at.answer("read", self._question(own), self.at.own)
        newest = max(answer.get("accepted", "") for answer in self.answers.values())
        return self.brief and newest > self.answers[own].get("accepted", "")

    def tick(self) -> None:
        net = self.net
        if self.ask is None:
            return self._advance({})
        if self.at.own.node in net.down:
            self.error, self.done = S3Error("SlowDown"), True  # the coordinator died
            return
        to = self.waiting.pop()
        if net.pick.random() < 0.05:
            net.late.append((self.ask.name, self._question(to.node), self.at.own, to.node))
        answer = net.deliver(self.ask.name, self._question(to.node), self.at.own, to.node)
        if answer and "views" in answer:
            self.at.registers.adopt(map(View.from_json, answer["views"]))
        if answer and "behind" in answer:
            views = self.at.registers.views_after(answer["behind"])
            net.deliver("views", {"views": views}, self.at.own, to.node)
            answer = None
        self.answers[to.node] = answer or {"failed": True}
        if not self.waiting or self.ask.enough(self.answers):
            if self._missed_a_change():
                AGAIN.append(self)
                return self._begin(self.ask, False)
            for contact in self.waiting:
                if net.pick.random() < 0.7:  # what was on its way arrives, later
                    question = self._question(contact.node)
                    net.late.append((self.ask.name, question, self.at.own, contact.node))
            self._advance(self.answers)


class Operation:
    """One line of a history: what was asked, and between which ticks."""

    def __init__(self, kind: str, begin: int, argument: str = "", expected: str = "") -> None:
        self.kind, self.argument, self.expected = kind, argument, expected
        self.begin, self.end, self.result = begin, math.inf, None

    def __repr__(self) -> str:
        return f"{self.kind}({self.argument}{self.expected})={self.result}@{self.begin}-{self.end}"


def linearizable(history: list[Operation]) -> bool:
    """Is there an order of a register's operations that respects time and gives each its result?

    Operations without an end may or may not have happened. (Wing & Gong, 1993, with a memo)
    """
    seen = set()
    todo: list[tuple[frozenset[int], str]] = [(frozenset(range(len(history))), "")]
    while todo:
        left, value = todo.pop()
        if all(history[i].end == math.inf for i in left):
            return True
        if (left, value) in seen:
            continue
        seen.add((left, value))
        first_end = min(history[i].end for i in left)
        for i in left:
            op = history[i]
            if op.begin > first_end:
                continue
            after = apply(op, value)
            if after is not None:
                todo.append((left - {i}, after))
    return False


def apply(op: Operation, value: str) -> str | None:
    """The register after `op`, None when its result would have been another."""
    known = op.end != math.inf
    if op.kind == "read":
        return value if op.result == value else None
    if op.kind == "write":
        return op.argument
    if op.kind == "create":  # If-None-Match: *
        succeeds = value == ""
    elif op.kind == "delete":
        return ""
    else:  # "swap": If-Match
        succeeds = value == op.expected
    if known and succeeds != op.result:
        return None
    return op.argument if succeeds else value


def value_of(text: str) -> Value:
    record = zs3.ObjectInfo("k", 1, text, 0.0).record()
    return {"id": text.rjust(16, "0"), "info": record, "inline": ""}


def text_of(value: Value | None) -> str:
    return value["info"]["etag"] if value else ""


class Run:
    """Clients on all nodes at one register, while messages are lost and nodes come and go."""

    def __init__(self, seed: int, size: int, loss: float) -> None:
        self.net = Net(seed, size)
        self.history: list[Operation] = []
        self.active: list[tuple[Proposing, Operation]] = []
        self.ticks = 0
        self.serial = 0
        create = self.clusters()[0]
        bucket = {"id": "b" * 16, "bucket": {"created": 0.0, "state": "open"}}
        create.run(create.rounds.change("bucket", "", lambda current: bucket))
        self.net.loss = loss

    def clusters(self) -> list[SimCluster]:
        return list(self.net.clusters.values())

    def start(self) -> None:
        at = self.net.pick.choice(
            [n for n in self.net.nodes.values() if n.own.node not in self.net.down]
        )
        rounds = self.net.clusters[at.own.node].rounds
        kind = self.net.pick.choice(["read", "read", "write", "create", "swap", "delete"])
        self.serial += 1
        op = Operation(kind, self.ticks, f"{self.serial:04x}" if kind != "read" else "")
        last = next((o.argument for o in reversed(self.history) if o.argument), "")
        op.expected = last if kind == "swap" else ""

        def decide(current: Value | None) -> Value | None:
            if kind == "delete":
                return {"id": op.argument.rjust(16, "d")} if current else None
            if (kind == "create" and current) or (
                kind == "swap" and text_of(current) != op.expected
            ):
                raise S3Error("PreconditionFailed")
            return value_of(op.argument)

        steps = (
            rounds.read("bucket", "k") if kind == "read" else rounds.change("bucket", "k", decide)
        )
        self.history.append(op)
        self.active.append((Proposing(self.net, at, steps), op))

    def tick(self) -> None:
        self.ticks += 1
        self.net.now += 0.01
        if self.net.late and self.net.pick.random() < 0.2:
            late = self.net.late.pop(self.net.pick.randrange(len(self.net.late)))
            self.net.deliver(*late)
        client, op = self.net.pick.choice(self.active)
        client.tick()
        if client.done:
            self.active.remove((client, op))
            self.finish(client, op)

    def finish(self, client: Proposing, op: Operation) -> None:
        if client.error is None:
            op.end = self.ticks
            op.result = text_of(client.result[0]) if op.kind == "read" else True
        elif client.error.code == "PreconditionFailed":
            op.end, op.result = self.ticks, False
        elif op.kind == "read" or client.error.code != "SlowDown":
            assert client.error.code == "SlowDown", client.error
            self.history.remove(op)  # a read without an answer says nothing

    def drain(self) -> None:
        while self.active:
            self.tick()

    def check(self) -> None:
        assert linearizable(self.history), self.history


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_register_is_linearizable_under_lost_late_and_repeated_messages(size: int) -> None:
    AGAIN.clear()
    for seed in range(SEEDS // 2):
        run = Run(seed, size, loss=seed % 4 * 0.06)
        for _ in range(12):
            while len(run.active) < 3:
                run.start()
            for _ in range(run.net.pick.randrange(25)):
                if run.active:
                    run.tick()
        run.drain()
        run.check()
    assert bool(AGAIN) == (size == 3)  # where no node is enough for a read


@pytest.mark.parametrize("size", [2, 3])
def test_a_register_is_linearizable_while_nodes_die_and_return(size: int) -> None:
    for seed in range(SEEDS * 2 // 3):
        run = Run(seed, size, loss=0.03)
        for _ in range(12):
            nodes = list(run.net.nodes)
            run.net.down = {run.net.pick.choice(nodes)} if run.net.pick.random() < 0.6 else set()
            while len(run.active) < 3:
                run.start()
            for _ in range(run.net.pick.randrange(25)):
                if run.active:
                    run.tick()
        run.net.down = set()
        run.drain()
        run.check()


def housekeeping(
    cluster: SimCluster, tombstone_grace: float = 0.0
) -> tuple[Housekeeping, Membership]:
    store = DistributedStore(cluster)
    return Housekeeping(store, 0.0, tombstone_grace), Membership(store, [], 3)


SEEDS = int(os.environ.get("ZS3_SIM_SEEDS", "120"))


def test_a_register_is_linearizable_while_members_join_and_leave() -> None:
    finals = 0
    first = int(os.environ.get("ZS3_SIM_FIRST", "0"))
    for seed in range(first, first + SEEDS):
        run = Run(seed, 1 + seed % 4, loss=0.02)
        pick = run.net.pick
        for _ in range(14):
            change_members(run, pick)
            while len(run.active) < 3:
                run.start()
            for _ in range(pick.randrange(20)):
                if run.active:
                    run.tick()
        run.drain()
        run.net.loss = 0.0
        for _ in range(6):
            background(list(run.net.clusters.values()))
        members = [c for c in run.clusters() if newest(run).member(c.own.node)]
        views = {c.node.registers.view.epoch for c in members}
        finals += len(views) == 1 and not members[0].known_view().previous
        for _ in range(3):
            run.start()
            run.drain()
        run.check()
    assert finals > SEEDS * 0.8


def newest(run: Run) -> View:
    views = (node.registers.view for node in run.net.nodes.values())
    return max(views, key=lambda view: view.epoch)


def change_members(run: Run, pick: random.Random) -> None:
    what = pick.random()
    try:
        if what < 0.25 and len(run.net.nodes) < 7:
            source = pick.choice(run.clusters())
            node = run.net.add()
            node.registers.install(
                [View.from_json(v) for v in source.node.registers.views_after(0)]
            )
            cluster = run.net.clusters[node.own.node]
            housekeeping(cluster)[1]._enter()
        elif what < 0.4:
            victim = pick.choice(run.clusters()).own.node
            if len(newest(run).members) > 2:
                other = pick.choice([c for c in run.clusters() if c.own.node != victim])
                housekeeping(other)[1].forget(victim)
        elif what < 0.9:
            background(pick.choices(run.clusters(), k=3))
    except S3Error as error:
        assert error.code == "SlowDown", error


def background(clusters: list[SimCluster]) -> None:
    for cluster in clusters:
        keep, member = housekeeping(cluster)
        view = cluster.known_view()
        try:
            member._hello_all(view)
            if cluster.known_view().member(cluster.own.node) is None:
                continue  # forgotten: it would join anew, which another node does here
            keep.pull()
            member.settle()
            keep.bury()
        except S3Error as error:
            assert error.code == "SlowDown", error


# --- One interleaving each: what a random walk seldom meets ---

OLD, NEW = "aaaa", "bbbb"
BURIAL_SECONDS = zs3_dist.BURIAL_SECONDS


@pytest.fixture(autouse=True)
def burial_at_once() -> Iterator[None]:
    """No answer is under way in these tests, but where one says so, when a tombstone is dropped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zs3_dist, "BURIAL_SECONDS", -math.inf)
        yield


def owners(size: int) -> tuple[Net, list[SimCluster]]:
    """Nodes that all own "bucket", which is there; nothing gets lost but what a test loses."""
    run = Run(1, size, loss=0.0)
    return run.net, run.clusters()


def say(net: Net, to: SimCluster, name: str, **fields: Any) -> Message:
    """What one node answers to a message about "bucket" that somebody sends it."""
    place = {"epoch": to.known_view().epoch, "bucket": "bucket", **fields}
    answer = net.deliver(name, place, Contact(0, "sim:0"), to.own.node)
    assert answer is not None
    return answer


def reaching(net: Net, at: SimCluster, ask: Ask, *nodes: SimCluster) -> dict[int, Message]:
    """What `at` is answered when its question reaches only `nodes`."""
    answers = {c.node: {"failed": True} for group in ask.groups for c in group}
    for node in nodes:
        answers[node.own.node] = net.deliver(ask.name, ask.message, at.own, node.own.node) or {}
    return answers


def put(at: SimCluster, text: str) -> None:
    at.run(at.rounds.change("bucket", "k", lambda current: value_of(text)))


def get(at: SimCluster) -> str:
    return text_of(at.run(at.rounds.read("bucket", "k"))[0])


def delete_for_good(net: Net, nodes: list[SimCluster]) -> None:
    """Delete k, and have each of its owners drop the tombstone."""
    erase(nodes[0])
    for node in nodes:
        housekeeping(node, -1.0)[0].bury()
    for node in nodes:
        assert say(net, node, "read", key="k", brief=False)["accepted"] == ""


def come_back(net: Net, node: SimCluster) -> None:
    """Start a node again that was silent and may have been forgotten."""
    net.down.discard(node.own.node)
    node.joined.clear()
    member = housekeeping(node)[1]
    member.join()  # asks the others whether it still is a member
    member.join()  # and enters again if it is not
    assert node.joined.is_set()


def test_an_accept_older_than_a_dropped_tombstone_is_refused() -> None:
    net, nodes = owners(3)
    put(nodes[0], OLD)
    old = say(net, nodes[0], "read", key="k", brief=False)
    delete_for_good(net, nodes)
    late = {"ballot": old["accepted"], "value": old["value"], "chosen": False, "basis": None}
    assert "refused" in say(net, nodes[1], "accept", key="k", **late)
    assert [get(node) for node in nodes] == ["", "", ""]


def test_a_read_at_an_owner_that_missed_a_change_finds_the_new_value() -> None:
    net, nodes = owners(3)
    put(nodes[0], OLD)
    net.down.add(nodes[2].own.node)
    put(nodes[0], NEW)
    net.down.clear()
    assert text_of(nodes[2].node.registers.slot("bucket", "k").value) == OLD
    assert get(nodes[2]) == NEW
    erase(nodes[0])
    assert get(nodes[2]) == ""


@pytest.mark.parametrize("what", ["put", "copy", "complete"])
def test_a_put_through_a_node_that_was_forgotten_meanwhile_is_not_acknowledged(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asked it then which blocks it needs, and they may be gone."""
    net, (one, other, third) = owners(3)
    store = DistributedStore(one)
    part, info = part_of_an_upload(store)
    value = {**value_of(OLD), "blocks": [[5000, "0" * 64]]}
    del value["inline"]
    one.run(one.rounds.change(zs3.UPLOADS, part.key, lambda current: value))
    part, content = store.open_object(zs3.UPLOADS, part.key)
    pin = one.node.pins.add

    def forgotten(blocks: Any) -> None:
        pin(blocks)
        if one.known_view().epoch == 1:
            net.down = {one.own.node}
            housekeeping(other)[1].forget(one.own.node)
            background([other, third, other])
            assert not other.known_view().previous
            come_back(net, one)

    monkeypatch.setattr(one.node.pins, "add", forgotten)
    monkeypatch.setattr(one, "fetch", lambda block: b"")
    monkeypatch.setattr(one, "store", lambda block, data: None)
    body, always = zs3.Body(io.BytesIO(b"x" * 5000), 5000), zs3.NO_CONDITION
    with raises("SlowDown"):
        if what == "put":
            store.put_object("bucket", "k", body, {}, always)
        elif what == "copy":
            store.copy_object(info, content, "bucket", always)
        else:
            store.concatenate("bucket", [part], info, always)
    assert one.joined.is_set() and get(other) == ""
    store.copy_object(info, content, "bucket", always)
    assert get(other) == info.etag


def accepted_by(net: Net, at: SimCluster, only: SimCluster, value: Value) -> None:
    """A change of k begun at `at`, which dies when only one owner has accepted it."""
    steps = at.rounds.change("bucket", "k", lambda current: value)
    accept = steps.send(reaching(net, at, next(steps), *net.clusters.values()))
    assert reaching(net, at, accept, only)[only.own.node] == {"done": True}


def test_a_bucket_is_not_empty_while_a_deletion_in_it_is_undecided() -> None:
    net, (one, other, third) = owners(3)
    put(one, OLD)
    accepted_by(net, one, third, zs3_dist.tombstone())
    net.down = {one.own.node}
    store = DistributedStore(other)
    store.delete_bucket("bucket")  # decides it first
    store.create_bucket("bucket")
    net.down = {third.own.node}
    assert get(other) == get(one) == ""


def test_nothing_is_taken_over_into_a_bucket_that_is_gone() -> None:
    net, (one, other, third) = owners(3)
    accepted_by(net, one, third, value_of(OLD))
    store = DistributedStore(other)
    without(net, third, lambda: store.delete_bucket("bucket"))
    for node in (one, other, third):
        housekeeping(node, math.inf)[0].pull()
        assert node.node.registers.live_keys("bucket") == []
    with raises("NoSuchBucket"):
        store.stat_object("bucket", "k")
    with raises("NoSuchBucket"):
        list(store.scan("bucket", "", "", ""))


def test_nothing_undecided_is_pulled_into_a_bucket_that_is_being_deleted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or it could be read, and the bucket be gone with it: the deletion has found nothing."""
    net, (one, other, third) = owners(3)
    accepted_by(net, third, third, value_of(OLD))
    store = DistributedStore(one, None)  # type: ignore[arg-type]
    entries, seen = store._entries, []

    def pull_after(*asked: Any) -> Any:
        found = list(entries(*asked))
        net.down.clear()
        housekeeping(one)[0].pull()
        seen.append(get(one))
        return iter(found)

    monkeypatch.setattr(store, "_entries", pull_after)
    net.down = {third.own.node}
    with raises("SlowDown"):  # the mark was taken back
        store.delete_bucket("bucket")
    assert seen == [OLD] and get(other) == OLD


def without(net: Net, node: SimCluster, change: Callable[[], Any]) -> None:
    """A change that does not reach `node`."""
    net.down.add(node.own.node)
    change()
    net.down.clear()


def erase(at: SimCluster, key: str = "k") -> None:
    at.run(at.rounds.change("bucket", key, lambda current: {"id": "d" * 16}))


def let_know(net: Net, node: SimCluster, key: str = "k") -> None:
    """That what it has accepted was chosen."""
    accepted = say(net, node, "read", key=key, brief=False)["accepted"]
    say(net, node, "learn", key=key, ballot=accepted)


def test_a_view_that_the_disk_has_no_room_for_is_left_for_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = owners(3)[1]

    def full(views: Any) -> bool:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(nodes[0].node.registers, "adopt", full)
    with raises("SlowDown"):
        housekeeping(nodes[0])[1].forget(nodes[2].own.node)
    monkeypatch.undo()
    housekeeping(nodes[0])[1].forget(nodes[2].own.node)
    assert nodes[0].known_view().member(nodes[2].own.node) is None


def test_a_node_that_was_told_of_a_view_without_it_notes_it_before_it_asks_anybody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, nodes = owners(3)
    view = nodes[0].known_view()
    last = net.clusters[view.members[2].node]
    after = view.with_members(view.members[:2])
    net.deliver("views", {"views": [after.as_json()]}, nodes[0].own, last.own.node)
    net.down.update({contact.node for contact in view.members[:2]})
    with raises("SlowDown"):
        housekeeping(last)[1].join()
    assert not last.joined.is_set()


def test_a_read_does_not_mix_what_it_was_told_at_two_times(monkeypatch: pytest.MonkeyPatch) -> None:
    net, nodes = owners(3)
    put(nodes[0], OLD)
    for node in nodes:
        let_know(net, node)
    without(net, nodes[2], lambda: erase(nodes[0]))
    tell, asked = nodes[2].tell, []

    def slow(name: str, *rest: Any) -> Any:
        asked.append(name)
        if asked == ["read", "read"]:  # before the second question, the tombstone is dropped
            housekeeping(nodes[2])[0].pull()
            for node in nodes:
                housekeeping(node, -1.0)[0].bury()
        return tell(name, *rest)

    monkeypatch.setattr(nodes[2], "tell", slow)
    assert get(nodes[2]) == "" and asked[:2] == ["read", "read"]


def test_one_answer_about_a_bucket_does_not_say_that_it_is_gone() -> None:
    net, nodes = owners(3)
    put(nodes[0], OLD)
    again = {"id": "f" * 16, "bucket": {"created": 1.0, "state": "open"}}
    without(net, nodes[2], lambda: erase(nodes[0]))
    let_know(net, nodes[0])
    without(net, nodes[2], lambda: erase(nodes[0], ""))
    let_know(net, nodes[0], "")
    change = nodes[1].rounds.change("bucket", "", lambda current: again)
    without(net, nodes[0], lambda: nodes[1].run(change))
    net.down.add(nodes[1].own.node)  # the other two: one knows of the bucket only what is old
    value, bucket = nodes[0].run(nodes[0].rounds.read("bucket", "k"))
    assert value is None and bucket is None
    assert nodes[0].run(nodes[0].rounds.bucket("bucket"))["id"] == "f" * 16


def test_a_brief_answer_leaves_out_an_object_but_not_a_tombstone() -> None:
    net, nodes = owners(3)
    put(nodes[0], OLD)
    brief, full = (say(net, nodes[1], "read", key="k", brief=brief) for brief in (True, False))
    assert brief == {**full, "value": None} and text_of(full["value"]) == OLD
    erase(nodes[0])
    brief, full = (say(net, nodes[1], "read", key="k", brief=brief) for brief in (True, False))
    assert brief == full and full["value"]["id"] == "d" * 16 and full["basis"]


def pull_while_it_is_deleted(
    monkeypatch: pytest.MonkeyPatch, net: Net, nodes: list[SimCluster]
) -> None:
    """The last node pulls k; while the answer is on its way, k is deleted for good."""
    deliver = net.deliver

    def slow(name: str, *rest: Any) -> Message | None:
        answer = deliver(name, *rest)
        if name == "values":
            monkeypatch.undo()
            delete_for_good(net, nodes)
        return answer

    monkeypatch.setattr(net, "deliver", slow)
    housekeeping(nodes[-1])[0].pull()
    assert net.deliver == deliver  # it was asked for


def test_a_value_pulled_before_a_tombstone_was_dropped_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, nodes = owners(3)
    net.down = {nodes[2].own.node}
    put(nodes[0], OLD)
    net.down = set()
    pull_while_it_is_deleted(monkeypatch, net, nodes)
    assert [get(node) for node in nodes] == ["", "", ""]


def test_a_chosen_value_pulled_before_a_tombstone_was_dropped_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That it was chosen once does not say that nothing followed it."""
    net, nodes = owners(1)
    put(nodes[0], OLD)
    new = net.clusters[net.add().own.node]
    views = nodes[0].node.registers.views_after(0)
    new.node.registers.install([View.from_json(view) for view in views])
    come_back(net, new)
    nodes.append(new)
    pull_while_it_is_deleted(monkeypatch, net, nodes)
    assert [get(node) for node in nodes] == ["", ""]


def test_a_read_that_began_before_a_tombstone_was_dropped_does_not_show_what_it_deleted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One owner answers, misses nothing any more, all drop the tombstone, another owner answers."""
    monkeypatch.setattr(zs3_dist, "BURIAL_SECONDS", 4.0)
    net, nodes = owners(3)
    first, second, third = nodes
    put(first, OLD)
    for node in nodes:
        let_know(net, node)
    without(net, third, lambda: erase(first))
    steps = first.rounds.read("bucket", "k")
    ask: Any = next(steps)
    answers = reaching(net, first, ask, third)
    housekeeping(third)[0].pull()
    for node in nodes:
        housekeeping(node, -1.0)[0].bury()
    answers |= {second.own.node: reaching(net, first, ask, second)[second.own.node]}
    assert not ask.enough(answers)
    monkeypatch.setattr(time, "time", lambda clock=time.time: clock() + 5)
    for node in nodes:
        housekeeping(node, -1.0)[0].bury()
    assert say(net, second, "read", key="k", brief=False)["accepted"] == ""


def test_a_tombstone_stays_while_a_read_may_hold_an_answer_from_before_it(
    lonely: Lonely, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three owners one answers at once, one has to be told of a view first, one is silent."""
    ready, behind, silent = (Contact(number, f"sim:{number}") for number in (1, 2, 3))
    now, told = 0.0, {}

    def ask(questions: Any, enough: Any, first: int, seconds: float, **_: Any) -> dict[int, Reply]:
        nonlocal now
        name, began = questions[0].path, now
        now += seconds
        answers: dict[int, Reply] = {}
        for contact in {question.to for question in questions} - {silent}:
            old = contact == behind and behind not in told and name == "read"
            told[contact] = began if contact == ready else now
            answer = {"behind": 1} if old else {"accepted": "", "chosen": False, "value": None}
            answers[contact.node] = Reply(200, pack(answer))
        return answers

    monkeypatch.setattr(lonely.peers, "ask", ask)
    groups = ((ready, behind, silent),)
    message = {"epoch": 1, "bucket": "bucket", "key": "k", "brief": False}
    ask_all = Ask("read", message, groups, lambda answers: False, zs3_dist.read_quorum)
    assert zs3_dist.settled(groups, lonely.cluster.ask(ask_all))
    assert now == 3 * zs3_dist.CONNECT_SECONDS
    assert told[behind] - told[ready] < BURIAL_SECONDS


def test_a_key_that_was_only_promised_keeps_the_floor_of_its_bucket() -> None:
    """Its tombstone is dropped, since an owner that missed it says that its floor is above."""
    net, nodes = owners(3)
    first, second, third = nodes
    low = f"{1:08x}{500:012x}{'0' * 16}"
    value = {**value_of(NEW), "base": ""}
    late = {"key": "k", "ballot": low, "value": value, "chosen": False, "basis": None}
    for node in (first, third):
        say(net, node, "prepare", key="k", ballot=low)
    for node in (first, second):
        assert say(net, node, "accept", **late)["done"]
    without(net, third, lambda: erase(first))
    for value in (value_of(OLD), zs3_dist.tombstone()):
        first.run(first.rounds.change("bucket", "z", lambda current, new=value: new))
    for node in (third, first, second):
        housekeeping(node, -1.0)[0].bury()
    assert "refused" in say(net, third, "accept", **late)
    assert [get(node) for node in nodes] == ["", "", ""]


def mark_for_deletion(at: SimCluster) -> None:
    """The first half of a deletion of the bucket, which then dies."""

    def close(bucket: Any) -> Any:
        return {"id": "9" * 16, "bucket": {**bucket["bucket"], "state": "deleting"}}

    at.run(at.rounds.change("bucket", "", close))


def test_an_object_can_be_read_after_a_deletion_of_its_bucket_died() -> None:
    net, nodes = owners(3)
    first, second, third = nodes
    without(net, third, lambda: put(first, OLD))
    mark_for_deletion(first)
    net.down = {first.own.node}
    assert get(second) == get(third) == OLD


def test_an_object_can_be_written_after_a_deletion_of_its_bucket_died() -> None:
    _net, (one, other, _) = owners(3)
    mark_for_deletion(one)
    put(other, OLD)
    assert get(one) == OLD
    record = one.run(one.rounds.bucket("bucket"))
    assert record is not None and record["bucket"]["state"] == "open"


def test_an_owner_without_the_mark_does_not_say_that_the_bucket_is_empty() -> None:
    """It may still accept an object, after it was asked."""
    net, (one, _, third) = owners(3)
    without(net, third, lambda: mark_for_deletion(one))
    page = {"prefix": "", "start": "", "delimiter": "/", "whole": False, "mark": "9" * 16}
    assert say(net, one, "page", **page) == {"entries": [], "more": False}
    assert say(net, third, "page", **page) == {"unmarked": True}


def test_a_bucket_that_is_not_empty_is_open_again_at_once() -> None:
    _, (one, *_) = owners(3)
    put(one, OLD)
    with raises("BucketNotEmpty"):
        DistributedStore(one).delete_bucket("bucket")
    assert zs3_dist.is_open(one.run(one.rounds.bucket("bucket")))


def test_only_the_mark_that_was_met_is_taken_back() -> None:
    """Another deletion may have begun meanwhile, and found the bucket empty."""
    _, (one, *_) = owners(3)
    mark_for_deletion(one)
    for mark, is_open in (("8" * 16, False), ("9" * 16, True)):
        one.run(one.rounds.reopen("bucket", mark))
        assert zs3_dist.is_open(one.run(one.rounds.bucket("bucket"))) == is_open


def test_no_block_is_garbage_before_every_node_has_said_so() -> None:
    net, (one, _, third) = owners(3)
    keep, block = housekeeping(one)[0], "0" * 64
    assert keep._unused([block]) == {block}
    net.down = {third.own.node}
    assert keep._unused([block]) == set()
    net.down = set()
    one.adopt([one.known_view().with_members(one.known_view().members).as_json()])
    assert keep._unused([block]) == set()  # the others do not know this view yet


def test_the_tombstone_of_a_bucket_stays_while_something_is_left_in_it() -> None:
    """Puts whose outcome nobody knew: they would be in the next bucket of that name."""
    _, (one,) = owners(1)
    put(one, OLD)
    erase(one, "")
    registers = one.node.registers
    assert not registers.bury("bucket", "", registers.slot("bucket", "").accepted)
    housekeeping(one, -1.0)[0].bury()
    assert registers.live_keys("bucket") == []
    assert registers.slot("bucket", "").accepted == ""


def test_nothing_is_cleared_out_of_a_bucket_that_was_made_anew() -> None:
    _, (one, *_) = owners(3)
    put(one, OLD)
    before = one.node.registers.slot("bucket", "k")
    housekeeping(one)[0]._clear_out("bucket")
    assert one.node.registers.slot("bucket", "k") == before


@pytest.mark.parametrize("epoch", [0, 2])
def test_nothing_is_taken_over_in_another_view_than_it_was_told_in(epoch: int) -> None:
    """This node may own the bucket no more, and it would keep what it took."""
    _, (one, *_) = owners(3)
    with pytest.raises(zs3_dist.StaleView):
        one.node.registers.offer(epoch, "bucket", "k", BALLOT, True, {**value_of(OLD), "base": ""})


def test_a_ballot_of_another_view_than_its_message_makes_no_sense() -> None:
    """A straggler could outrank what a later view decided."""
    net, (one, *_) = owners(3)
    with pytest.raises(ValueError, match="bad ballot"):
        say(net, one, "prepare", key="k", ballot=f"{2:08x}{1:012x}{'0' * 16}")


def owners_by_distance(writer: int, size: int = 3) -> tuple[Net, int, list[SimCluster]]:
    """The owners of "bucket", nearest to its point first, and that point; the owner of that place
    made the bucket and wrote the object. Of more than three nodes, the last ones own nothing."""
    net = Net(5, size)
    target = zs3_dist.target_of(b"bucket")
    nodes = sorted(net.clusters.values(), key=lambda each: each.own.node ^ target)
    record = {"id": "b" * 16, "bucket": {"created": 0.0, "state": "open"}}
    nodes[writer].run(nodes[writer].rounds.change("bucket", "", lambda current: record))
    put(nodes[writer], OLD)
    return net, target, nodes


def test_what_a_new_owner_pulled_is_no_vote() -> None:
    """Two changes failed half-way, each with one owner: which of them was, all readers agree on,
    also after two of three owners changed while the one with the later change was away."""
    net, target, (away, one, two) = owners_by_distance(writer=1)
    base = one.node.registers.slot("bucket", "k").accepted
    low, high = (f"{1:08x}{counter:012x}{'0' * 16}" for counter in (600, 601))
    for ballot, owner, asked, text in (
        (low, one, (one, two), "1111"),
        (high, away, (two, away), "2222"),
    ):
        for node in asked:
            assert say(net, node, "prepare", key="k", ballot=ballot)["accepted"] == base
        value = {**value_of(text), "base": base}
        rest = {"value": value, "chosen": False, "basis": None}
        assert say(net, owner, "accept", key="k", ballot=ballot, **rest)["done"]
    net.down = {away.own.node}
    new = []
    for distance in (1, 2):
        new.append(joining(net, one, target ^ distance))
    for _ in range(4):
        background([*new, one, two])
    view = one.known_view()
    assert not view.previous and {each.own for each in (*new, away)} == set(
        view.groups("bucket")[0]
    )
    seen = get(new[0])
    net.down = set()
    background([away])
    net.down = {new[1].own.node}
    assert get(new[0]) == seen


def test_a_new_owner_takes_a_tombstone_below_the_floor_that_it_took_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A floor stands for all keys of a bucket: it does not say which tombstones were dropped."""
    net, target, (one, late, third) = owners_by_distance(writer=0)
    let_know(net, late)
    one.rounds.ballots.observe(f"{1:08x}{500:012x}{'0' * 16}")
    one.run(one.rounds.change("bucket", "z", lambda current: value_of(NEW)))
    erase(one, "z")
    for node in (one, late, third):
        housekeeping(node, -1.0)[0].bury()
    for key in "lmno":  # so that the tombstone is told after the floor
        one.run(one.rounds.change("bucket", key, lambda current: value_of(NEW)))
    net.down = {late.own.node}
    erase(third)
    assert third.node.registers.slot("bucket", "k").accepted < one.node.registers.floor("bucket")
    new = joining(net, one, target ^ 1)
    monkeypatch.setattr(zs3_dist, "BATCH", 4)
    background([new, one, third] * 2)
    monkeypatch.undo()
    assert not one.known_view().previous and one.known_view().owns(new.own.node, "bucket")
    net.down = {one.own.node}
    housekeeping(late)[1]._hello_all(late.known_view())
    assert get(new) == get(late) == ""


def test_a_new_owner_takes_over_what_others_promised_for_tombstones_they_dropped() -> None:
    net, target, nodes = owners_by_distance(writer=0)
    _, accepted, _, value = nodes[0].node.registers.slot("bucket", "k")
    delete_for_good(net, nodes)
    new = joining(net, nodes[0], target ^ 1)
    housekeeping(new)[0].pull()
    assert not new.node.registers.offer(2, "bucket", "k", accepted, True, value)


def test_a_node_that_becomes_an_owner_looks_at_all_again() -> None:
    """What it has seen up to, it saw when others' buckets were left out."""
    _, _, (first, _, gone, next_one) = owners_by_distance(writer=0, size=4)
    housekeeping(next_one)[0].pull()
    assert next_one.node.registers.meta(f"pulled {first.own.node:040x}")
    housekeeping(first)[1].forget(gone.own.node)
    housekeeping(next_one)[0].pull()
    assert text_of(next_one.node.registers.slot("bucket", "k").value) == OLD


def joining(net: Net, at: SimCluster, node: int | None = None) -> SimCluster:
    """A node that a joint view was decided for, and that has copied nothing yet."""
    new = net.clusters[net.add(node).own.node]
    views = at.node.registers.views_after(0)
    new.node.registers.install([View.from_json(view) for view in views])
    housekeeping(new)[1]._enter()
    return new


@pytest.mark.parametrize(("who", "said"), [(None, "no answer"), (0, "it is another")])
def test_a_node_does_not_enter_by_an_address_at_which_it_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, who: int | None, said: str
) -> None:
    net, nodes = owners(3)
    new = net.clusters[net.add().own.node]
    view = nodes[0].known_view()
    new.node.registers.install([view])
    member = housekeeping(new)[1]
    answer = None if who is None else nodes[who].node.on_hello(view.epoch)
    monkeypatch.setattr(new, "call", lambda *_: answer)
    for _ in range(2):
        member.join()
    assert not new.joined.is_set() and new.known_view() == nodes[0].known_view() == view
    assert [line.message for line in caplog.records if line.levelname == "ERROR"] == [
        f"the node at {new.own.address} should be this one (see --advertise): {said}"
    ]
    monkeypatch.undo()
    member.join()
    assert new.joined.is_set() and nodes[0].known_view().member(new.own.node) == new.own


def test_a_node_whose_id_the_view_has_at_another_address_is_no_member() -> None:
    """Its disk was copied, and the copy is the member now."""
    _, (one, other) = owners(2)
    view = one.known_view()
    copy = one.own._replace(address="sim:9")
    one.adopt([view.with_members([copy, other.own]).as_json()])
    assert not one.joined.is_set()


def where(*there: tuple[str, Contact, SimCluster]) -> Callable[..., Any]:
    """`Cluster.call` where each of these nodes answers, as that contact, at that address."""
    nodes = {address: (contact, node) for address, contact, node in there}

    def call(name: str, message: Message, to: Contact) -> Message | None:
        if to.address not in nodes:
            return None
        contact, cluster = nodes[to.address]
        answer = cluster.node.answer(name, message, Contact(0, "sim:0"))
        return {**answer, "contact": contact.as_json()}

    return call


@pytest.mark.parametrize("moved", [True, False])
def test_a_member_that_is_found_elsewhere_is_asked_there_if_it_does_not_answer_in_its_place(
    moved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of its disk, which does not yet know that it is one, must not vote for it."""
    _, (one, other, _) = owners(3)
    found = other.own._replace(address="sim:9")
    places = [("sim:9", found, other)] + [(other.own.address, other.own, other)] * (not moved)
    monkeypatch.setattr(one, "call", where(*places))
    one.joined.clear()
    member = zs3_dist.Membership(housekeeping(one)[0].store, ["sim:9"], 3)
    member.join()
    assert one.peers.moved == ({other.own: found} if moved else {})
    assert one.joined.is_set()


def test_a_copy_that_once_met_its_original_stays_out_also_when_that_falls_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, (one, other, _) = owners(3)
    original, view = one.own, one.known_view()
    one.own = one.node.own = original._replace(address="sim:9")
    one.joined.clear()
    member = housekeeping(one)[1]
    monkeypatch.setattr(one, "call", where((original.address, original, other)))
    member.join()
    monkeypatch.setattr(one, "call", where(("sim:9", one.own, other)))
    for _ in range(2):
        member.join()
    assert not one.joined.is_set() and other.known_view() == view
    with pytest.raises(ValueError, match="copied"):  # and does not vote for it
        net.deliver("hello", {"epoch": 1}, other.own, one.own.node)
    one.node.is_copy = False  # started again
    monkeypatch.setattr(one, "call", where(("sim:9", one.own, one)))
    housekeeping(one)[1].join()
    assert one.joined.is_set() and other.known_view().member(original.node) == one.own


def test_a_copy_that_says_that_it_is_where_its_original_is_stays_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cloned machine, --advertise and all. The view has it, and tells it that it is a member."""
    _, (one, other, third) = owners(3)
    member = housekeeping(one)[1]
    for answering in (None, other, None, one):  # at its address
        there = [(one.own.address, one.own, answering)] if answering else []
        monkeypatch.setattr(one, "call", where(*there))
        for _ in range(2):
            member.join()
            one.adopt([third.known_view().with_members(third.known_view().members).as_json()])
        # Where nobody answers, it may be that it cannot reach itself: what it was, it is.
        assert one.joined.is_set() == (answering is not other)


def test_a_new_identity_is_flushed_and_begins_without_the_registers_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".index").mkdir()
    for name in ("registers.db", "registers.db-wal"):
        (tmp_path / ".index" / name).write_bytes(b"")
    flushed = flushes(monkeypatch)
    zs3_dist.node_id(tmp_path)
    assert flushed == [str(tmp_path / ".node_id.new")]
    assert list((tmp_path / ".index").iterdir()) == []


@pytest.mark.parametrize("left", ["all", "nothing", "no table", "no view"])
def test_a_node_that_lost_its_registers_gets_a_new_id(tmp_path: Path, left: str) -> None:
    """Under its old one it would vote without what it promised."""
    path = tmp_path / ".index" / "registers.db"
    path.parent.mkdir()
    before = zs3_dist.node_id(tmp_path)
    assert zs3_dist.node_id(tmp_path) != before  # it has promised nothing yet
    before = zs3_dist.node_id(tmp_path)
    registers = Registers(before, str(path))
    if left == "all":
        registers.install([View("0" * 16, 1, 3, (Contact(before, "sim:1"),))])
    registers.close()
    if left in ("nothing", "no table"):
        path.unlink()
    if left == "no table":
        path.write_bytes(b"")
    assert (zs3_dist.node_id(tmp_path) == before) == (left == "all")


def test_registers_that_cannot_be_read_are_not_taken_for_lost(tmp_path: Path) -> None:
    path = tmp_path / ".index" / "registers.db"
    path.parent.mkdir()
    before = zs3_dist.node_id(tmp_path)
    path.write_bytes(b"no database at all" * 1000)
    assert zs3_dist.node_id(tmp_path) == before and path.exists()


@pytest.mark.parametrize("hearing", [None, 0, 1])
def test_a_member_is_forgotten_when_a_majority_hears_nothing_of_it(hearing: int | None) -> None:
    """To one alone it may be a broken link. Others need not have missed it for as long."""
    net, nodes = owners(4)
    first, *others = [
        zs3_dist.Membership(housekeeping(node)[0].store, [], 3, forget_after=4.0)
        for node in nodes[:3]
    ]
    first.gossip()
    net.now += 3
    for member in others:
        member.node.patience = 1.0
        member.node.heard.clear()  # started anew
        member.gossip()
    net.now += 2
    net.down = {nodes[3].own.node}
    if hearing is not None:
        nodes[hearing].node.saw(nodes[3].own)
    first.gossip()
    assert (nodes[1].known_view().member(nodes[3].own.node) is None) == (hearing is None)


def test_who_was_ordered_to_be_forgotten_and_is_no_member_is_said_once_we_know(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zs3_dist, "JOIN_WAIT_SECONDS", 0.0)
    net, nodes = owners(3)
    gone = net.add().own
    member = zs3_dist.Membership(housekeeping(nodes[0])[0].store, [], 3, ordered=gone.node)
    nodes[0].joined.clear()
    with raises("SlowDown"):  # our view may be of long ago
        member.obey()
    nodes[0].joined.set()
    for _ in range(2):
        member.obey()
    assert caplog.messages == [f"--forget: no member of this cluster is {gone.node:040x}"]


@pytest.mark.parametrize("copied", [False, True])
def test_the_last_of_two_may_forget_the_other_from_a_new_address_unless_its_disk_was_copied(
    copied: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(zs3_dist, "JOIN_WAIT_SECONDS", 0.0)
    net, (one, other) = owners(2)
    put(one, OLD)
    one.own = one.node.own = one.own._replace(address="sim:99")
    net.down = {other.own.node}
    one.check_membership()
    member = zs3_dist.Membership(housekeeping(one)[0].store, [], 3, ordered=other.own.node)
    monkeypatch.setattr(member, "_is_elsewhere", lambda address: copied)
    if copied:
        with raises("SlowDown"):
            member.obey()
        assert not one.joined.is_set() and len(one.known_view().members) == 2
        return
    member.obey()
    member.join()
    assert one.joined.is_set() and one.known_view().members == (one.own,) and get(one) == OLD
    assert "was forgotten: empty its folder before it is started again" in caplog.text


def test_who_joins_with_the_order_to_forget_its_only_peer_first_has_all_that_this_has() -> None:
    net, (one,) = owners(1)
    put(one, OLD)
    new = joining(net, one)
    member = zs3_dist.Membership(housekeeping(new)[0].store, [], 3, ordered=one.own.node)
    member.obey()
    assert new.known_view().previous and get(new) == OLD
    background([new, one] * 2)
    assert new.known_view().members == (new.own,) and not new.known_view().previous
    net.down = {one.own.node}
    assert get(new) == OLD


def test_an_order_to_forget_that_only_another_can_follow_says_to_whom_it_belongs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net, (one, two) = owners(2)
    new = joining(net, one)
    net.down = {two.own.node}
    member = zs3_dist.Membership(housekeeping(new)[0].store, [], 3, ordered=two.own.node)
    for _ in range(2):
        member.obey()
    text = f"--forget: only {one.own.address} can do that now: start it with this option"
    assert caplog.messages == [text]
    zs3_dist.Membership(housekeeping(one)[0].store, [], 3, ordered=two.own.node).obey()
    background([new, one] * 2)
    assert zs3_dist.ids(one.known_view().members) == {one.own.node, new.own.node}


def test_two_nodes_that_have_forgotten_each_other_say_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    net, pair = owners(2)
    for one, other in (pair, pair[::-1]):
        net.down = {other.own.node}
        store = housekeeping(one)[0].store
        member = zs3_dist.Membership(store, ["b:1"], 3, ordered=other.own.node)
        member.obey()
    monkeypatch.setattr(one, "call", other.node.answer)
    caplog.clear()
    for _ in range(2):
        member.join()
    text = "the node at b:1 and this one forgot each other: empty the folder of one"
    assert caplog.messages == [text]


def test_a_joint_view_does_not_end_while_a_new_owner_lacks_something() -> None:
    net, nodes = owners(3)
    new = joining(net, nodes[0])
    background(nodes * 2)
    assert nodes[0].known_view().previous
    net.down = {nodes[2].own.node}  # who owned all before may be late
    background([new, *nodes[:2]])
    assert not nodes[0].known_view().previous


def test_a_joint_view_does_not_end_while_one_lacks_what_a_member_that_left_had_owned() -> None:
    net = Net(1, 5)
    gone, late, *nodes = net.clusters.values()
    net.down = {late.own.node}
    housekeeping(nodes[0])[1].forget(gone.own.node)
    background(nodes * 2)
    assert nodes[0].known_view().previous
    net.down = {gone.own.node}
    background([late, *nodes])
    assert not nodes[0].known_view().previous


def test_a_joint_view_ends_when_the_node_that_joined_died_and_is_forgotten() -> None:
    net, nodes = owners(3)
    new = joining(net, nodes[0])
    put(nodes[0], OLD)
    net.down = {new.own.node}
    background(nodes * 2)
    assert nodes[0].known_view().previous and get(nodes[1]) == OLD
    housekeeping(nodes[0])[1].forget(new.own.node)
    background(nodes * 2)
    assert not nodes[0].known_view().previous and get(nodes[1]) == OLD


def test_a_view_of_two_ends_only_when_both_are_reached_or_one_is_ordered_to_be_forgotten() -> None:
    """Either of two may answer reads alone, so it must know when the view is over."""
    net, (one, other) = owners(2)
    put(one, OLD)
    new = joining(net, one)
    net.down = {other.own.node}
    for _ in range(3):
        background([one, new])
    assert one.known_view().previous
    store = DistributedStore(one)
    zs3_dist.Membership(store, [], 3, ordered=other.own.node).forget(other.own.node)
    for _ in range(3):
        background([one, new])
    assert not one.known_view().previous and len(one.known_view().members) == 2
    put(new, NEW)
    assert get(one) == get(new) == NEW


def test_two_clusters_of_one_secret_that_meet_say_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one, other, fresh = (cluster for seed in range(3) for cluster in Net(seed, 1).clusters.values())
    other.node.registers.install([View("1" * 16, 7, 5, (other.own,))])
    fresh.node.registers.install([View("2" * 16, 1, 3, (fresh.own,))])
    members = [zs3_dist.Membership(housekeeping(c)[0].store, ["b:1"], 3) for c in (one, fresh)]
    record = {"id": "b" * 16, "bucket": {"created": 0.0, "state": "open"}}
    for cluster in (one, other):
        cluster.run(cluster.rounds.change("bucket", "", lambda current: record))
    for cluster in (one, fresh):
        monkeypatch.setattr(cluster, "call", other.node.answer)
    for _ in range(2):
        members[0].join()
    assert one.known_view().cluster == "0" * 16
    assert [line.message for line in caplog.records if line.levelname == "ERROR"] == [
        "the node at b:1 is of another cluster with our secret: both are in use"
    ]
    members[1].join()
    assert fresh.known_view().cluster == "1" * 16
    assert "--replicas=5, as it was founded: our 3 counts for nothing" in caplog.text


def test_who_founded_anew_and_was_joined_before_the_old_cluster_asked_for_it_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, (one, _) = owners(2)
    _, (old, *_) = owners(3)
    old.node.registers.install([View("1" * 16, 1, 3, old.known_view().members)])
    here = (one.own.address, one.own, one)
    monkeypatch.setattr(one, "call", where(("b:1", old.own, old), here))
    member = housekeeping(one)[1]
    for address in ("b:1", "silent:1"):
        member.store.seal.misled.add(address)
    for _ in range(2):
        member.join()
        member.store.seal.misled.add("b:1")
    text = "the node at b:1 is of another cluster with our secret: both are in use"
    assert caplog.messages == [text] and one.known_view().cluster == "0" * 16


def test_nobody_gives_itself_up_for_a_cluster_that_was_given_up_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = Net(1, 2)
    one, other = (net.clusters[node] for node in net.nodes)
    for cluster, name in ((one, "1"), (other, "2")):
        cluster.node.registers.install([View(name * 16, 1, 3, (cluster.own,))])
    if one.own.node < other.own.node:
        one, other = other, one
    view = one.known_view()
    monkeypatch.setattr(one, "call", where(("b:1", other.own, other)))
    member = zs3_dist.Membership(housekeeping(one)[0].store, ["b:1"], 3)
    entered: list[int] = []
    monkeypatch.setattr(member, "_enter", lambda: entered.append(1))

    def meanwhile(_: float) -> bool:
        monkeypatch.setattr(one, "call", where())
        return False

    monkeypatch.setattr(member.store.closing, "wait", meanwhile)
    member._merge(view)
    assert one.known_view() == view and not entered and one.joined.is_set()
    monkeypatch.setattr(one, "call", where(("b:1", other.own, other)))
    monkeypatch.setattr(member.store.closing, "wait", lambda _: False)
    member._merge(view)
    assert one.known_view() == other.known_view() and entered


def test_who_was_to_join_a_node_that_has_joined_others_begins_anew() -> None:
    net = Net(1, 3)
    one, other, third = (net.clusters[node] for node in net.nodes)
    one.node.registers.install([View("1" * 16, 1, 3, (other.own,))])
    for each in (other, third):
        members = tuple(sorted((other.own, third.own)))
        each.node.registers.install([View("2" * 16, 1, 3, members)])
    one.joined.clear()
    housekeeping(one)[1].join()
    assert one.known_view().members == (one.own,) and one.joined.is_set()
    assert one.known_view().cluster not in ("1" * 16, "2" * 16)
    assert one.young_until > time.monotonic()  # until it has met them, it makes no bucket
    assert other.known_view().cluster == "2" * 16


def test_no_two_clusters_are_at_one_epoch() -> None:
    epochs = set()
    for seed in range(20):
        net = Net(seed, 1)
        [one] = net.clusters.values()
        housekeeping(one)[1]._found()
        epochs.add(one.known_view().epoch)
    assert len(epochs) == 20 and min(epochs) >= 1


def test_a_long_history_of_views_is_told_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (one, other) = owners(2)
    for number in range(5):
        view = one.known_view()
        members = [Contact(each.node, f"sim:{number + 10}") for each in view.members]
        one.node.registers.adopt([view.with_members(members)])
    monkeypatch.setattr(zs3_dist, "PAGE_BYTES", 1)
    assert len(one.node.registers.views_after(0)) == 1
    sender = Contact(9, "sim:9")
    monkeypatch.setattr(
        other, "call", lambda name, message, to: one.node.answer(name, message, sender)
    )
    answer = housekeeping(other)[1]._ask("sim:1")
    assert answer is not None
    assert [view["epoch"] for view in answer["views"]] == list(range(1, view.epoch + 2))


def test_changes_are_told_a_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (one, _) = owners(2)
    for key in "abc":
        one.run(one.rounds.change("bucket", key, lambda current: value_of(OLD)))
    monkeypatch.setattr(zs3_dist, "BATCH", 2)
    seen, more, keys = 0, True, []
    while more:
        answer = one.node.registers.changes(seen, lambda bucket: bucket == "bucket")
        assert len(answer["entries"]) <= 2
        keys += [key for _, key, *_ in answer["entries"]]
        seen, more = answer["upto"], answer["more"]
    assert keys == ["", "a", "b", "c"]


@pytest.mark.parametrize("answered", range(3))
def test_a_change_whose_proviso_ceased_to_hold_is_not_made(answered: int) -> None:
    """After so many answers the upload of a part ends, and the key is put and deleted."""
    _, nodes = owners(3)
    first, second, _ = nodes
    first.run(first.rounds.change("bucket", "part", lambda current: value_of(OLD)))

    def proviso() -> zs3_dist.Steps[S3Error | None]:
        value, _ = yield from first.rounds.read("bucket", "part")
        return None if value else S3Error("InvalidPart")

    def interrupted() -> Any:
        change = first.rounds.change("bucket", "k", lambda current: value_of(OLD), proviso=proviso)
        step = next(change)
        for count in itertools.count():
            if count == answered:
                end_part = second.rounds.change(
                    "bucket", "part", lambda current: zs3_dist.tombstone()
                )
                second.run(end_part)
                put(second, NEW)
                erase(second)
            step = change.send((yield step))

    with raises("InvalidPart"):
        first.run(interrupted())
    assert get(first) == ""


def test_a_tombstone_from_a_clock_that_was_ahead_does_not_stay_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(zs3_dist, "BURIAL_SECONDS", 12.0)
    _, nodes = owners(3)
    put(nodes[0], OLD)
    ahead, real = [1e8], time.time
    monkeypatch.setattr(time, "time", lambda: real() + ahead[0])
    erase(nodes[0])
    grave = ("bucket", "k", nodes[2].node.registers.slot("bucket", "k").accepted)
    for ahead[0], buried in ((0.0, False), (11.0, False), (13.0, True)):
        assert nodes[2].node.registers.buried(*grave) == buried
    for ahead[0] in (2 * 86400.0, 4 * 86400.0):
        for node in nodes:
            housekeeping(node, 86400.0)[0].bury()
    assert [node.node.registers.slot("bucket", "k").accepted for node in nodes] == [""] * 3


def test_floors_of_buckets_that_a_node_is_not_asked_about_go_with_the_view() -> None:
    node = next(each for each in Net(5, 5).clusters.values()
                if not each.known_view().asks(each.own.node, "bucket"))  # fmt: skip
    registers, view = node.node.registers, node.known_view()
    registers.raise_floor("bucket", f"{1:08x}{1:012x}{'0' * 16}")
    registers.adopt([view.with_members(view.members)])
    assert registers.floor("bucket") == ""


def test_an_accept_from_before_a_bucket_was_deleted_does_not_bring_it_back() -> None:
    """The accept carries the bucket's record along, as chosen; its tombstone was dropped."""
    net, nodes = owners(3)
    steps = nodes[0].rounds.change("bucket", "k", lambda current: value_of(OLD))
    accept = steps.send(reaching(net, nodes[0], next(steps), *nodes))
    store = DistributedStore(nodes[0])
    store.delete_bucket("bucket")
    for registers in (node.node.registers for node in nodes):
        assert all(registers.bury(*grave) for grave in next(registers.graves(math.inf)))
    answers = reaching(net, nodes[0], accept, nodes[2])
    assert "refused" in answers[nodes[2].own.node]
    assert store.list_buckets() == []


def test_a_value_below_a_promise_is_pulled_by_a_round_of_its_register() -> None:
    """Taken as it is, it would be shown, and then replaced by one that was decided without it."""
    net, nodes = owners(3)
    first, second, third = nodes
    low, high = (f"{1:08x}{counter:012x}{'0' * 16}" for counter in (500, 501))
    rest = {"chosen": False, "basis": None}
    for node in (first, second):
        assert not say(net, node, "prepare", key="k", ballot=high)["accepted"]
    low_value, high_value = ({**value_of(text), "base": ""} for text in (OLD, NEW))
    assert say(net, third, "accept", key="k", ballot=low, value=low_value, **rest)["done"]
    housekeeping(first)[0].pull()
    net.down = {second.own.node}
    assert get(first) == OLD
    net.down = set()
    for node in (first, second):
        say(net, node, "accept", key="k", ballot=high, value=high_value, **rest)
    assert [get(node) for node in nodes] == [OLD, OLD, OLD]


def test_a_register_that_cannot_be_decided_does_not_keep_a_node_from_pulling_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, nodes = owners(3)
    first, second, third = (net.clusters[c.node] for c in nodes[0].known_view().members)
    low, high = (f"{1:08x}{counter:012x}{'0' * 16}" for counter in (500, 501))
    say(net, third, "prepare", key="k", ballot=high)
    late = {"ballot": low, "value": {**value_of(OLD), "base": ""}, "chosen": False, "basis": None}
    assert say(net, first, "accept", key="k", **late)["done"]
    assert say(net, second, "accept", key="z", **late)["done"]

    def repair(*place: str) -> Any:
        raise S3Error("SlowDown")

    monkeypatch.setattr(third.rounds, "repair", repair)
    housekeeping(third)[0].pull()
    assert third.node.registers.slot("bucket", "k").accepted == ""
    assert third.node.registers.slot("bucket", "z").accepted == low


def test_of_two_owners_either_shows_alone_what_both_have_accepted() -> None:
    for alone in (0, 1):
        net, nodes = owners(2)
        put(nodes[0], NEW)
        net.down = {nodes[1 - alone].own.node}
        assert get(nodes[alone]) == NEW


def test_places_in_the_change_log_are_not_given_twice(tmp_path: Path) -> None:
    """Else who was away never sees what came after the tombstones were dropped."""
    path = str(tmp_path / "registers.db")
    registers = Registers(1, path)
    registers.install([View("0" * 16, 1, 3, (Contact(1, "sim:1"),))])
    ballots = [f"{1:08x}{counter:012x}{7:016x}" for counter in range(10)]
    for number, ballot in enumerate(ballots[:9]):
        grave = {"id": f"{number:016x}", "base": ""}
        registers.accept("bucket", f"k{number}", ballot, grave, False, None)
    seen = registers.changes(0, lambda bucket: True)["upto"]
    assert all(registers.bury(*grave) for grave in next(registers.graves(math.inf)))
    registers.close()
    registers = Registers(1, path)
    registers.accept("bucket", "new", ballots[9], {"id": "f" * 16, "base": ""}, False, None)
    news = registers.changes(seen, lambda bucket: True)
    assert [key for _, key, _, _ in news["entries"]] == ["new"]
    assert news["floors"] == {"bucket": ballots[8]}
    assert registers.changes(news["upto"], lambda bucket: True)["floors"] == {}
    registers.close()


def test_what_an_owner_accepts_after_its_disk_was_put_back_to_an_old_copy_is_pulled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net, (one, other, third) = owners(3)
    registers = one.node.registers
    with contextlib.closing(sqlite3.connect(":memory:")) as copy:
        registers._db.backup(copy)
        for key in "abcdef":
            erase(one, key)
        housekeeping(other)[0].pull()
        copy.backup(registers._db)
    registers._seq = registers._one(zs3_dist.LAST_SEQ)
    accepted_by(net, third, one, value_of(NEW))
    housekeeping(other)[0].pull()
    assert text_of(other.node.registers.slot("bucket", "k").value) == NEW
    assert "an old copy" in caplog.text


def test_what_was_only_promised_becomes_the_floor_of_its_bucket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(zs3_dist, "BATCH", 2)
    _, nodes = owners(3)
    registers = nodes[0].node.registers
    ballot = f"{nodes[0].known_view().epoch:08x}{99:012x}{7:016x}"
    for number in range(3):
        registers.prepare("bucket", f"never-put-{number}", ballot)
    put(nodes[0], OLD)
    for before, more, rows in ((0.0, False, 3), (math.inf, True, 1), (math.inf, False, 0)):
        assert registers.drop_promises(before) == more
        assert registers._one("SELECT COUNT(*) FROM registers WHERE accepted = ''") == rows
    assert registers.slot("bucket", "never-put-0").promised == ballot
    assert get(nodes[0]) == OLD


@pytest.mark.parametrize("ordered", [True, False])
def test_of_two_nodes_one_goes_on_alone_only_without_whom_it_was_told_to_forget(
    ordered: bool,
) -> None:
    net, (one, other) = owners(2)
    put(one, OLD)
    whom = other.own.node if ordered else 12345  # the order is for a node that went long ago
    store = DistributedStore(one)
    member = zs3_dist.Membership(store, [], 3, ordered=whom)
    net.down = {other.own.node}
    if ordered:
        member.forget(other.own.node)
        assert one.known_view().members == (one.own,) and get(one) == OLD
    else:
        with pytest.raises(S3Error, match="SlowDown"):
            member.forget(other.own.node)
        assert len(one.known_view().members) == 2


def test_a_node_with_a_new_address_is_asked_once_and_there() -> None:
    old, new, peer = Contact(1, "sim:1"), Contact(1, "sim:11"), Contact(2, "sim:2")
    view = View("0" * 16, 5, 3, (new, peer), (old, peer))
    assert sorted(zs3_dist.everyone(view.groups("bucket"))) == [new, peer]


def test_the_owners_of_made_up_buckets_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zs3_dist, "MAX_KNOWN_BUCKETS", 3)
    view = View("0" * 16, 1, 3, tuple(Contact(node, f"sim:{node}") for node in range(1, 9)))
    first = view.groups("one")
    for name in ("two", "three"):
        view.groups(name)
    assert view.groups("one") is first, "three are remembered"
    view.groups("four")
    assert view.groups("one") == first and view.groups("one") is not first


def test_an_accept_that_comes_twice_does_not_forget_that_it_was_chosen() -> None:
    net, nodes = owners(2)
    put(nodes[0], OLD)
    epoch = nodes[0].known_view().epoch
    value = {**value_of(NEW), "base": ""}
    place = {"key": "k", "ballot": f"{epoch:08x}{99:012x}{7:016x}"}
    accept = {**place, "value": value, "chosen": False, "basis": None}
    for name, fields in (("accept", accept), ("learn", place), ("accept", accept)):
        assert say(net, nodes[1], name, **fields) == {"done": True}
    assert say(net, nodes[1], "read", key="k", brief=False)["chosen"]


def test_of_two_owners_neither_shows_alone_what_the_other_may_not_have() -> None:
    net, nodes = owners(2)
    put(nodes[0], OLD)
    steps = nodes[0].rounds.change("bucket", "k", lambda current: value_of(NEW))
    accept = steps.send(reaching(net, nodes[0], next(steps), *nodes))
    reaching(net, nodes[0], accept, nodes[0])  # and then the change is given up
    net.down = {nodes[1].own.node}
    with pytest.raises(S3Error, match="SlowDown"):
        get(nodes[0])
    net.down = {nodes[0].own.node}
    assert get(nodes[1]) == OLD
    net.down = set()
    assert get(nodes[0]) == NEW  # it is finished, then shown


def test_an_owner_that_comes_back_has_nothing_of_what_it_missed_the_end_of() -> None:
    """Forgotten and a member again, it must not bring back a key deleted meanwhile."""
    net, nodes = owners(3)
    put(nodes[0], OLD)
    net.down = {nodes[2].own.node}
    housekeeping(nodes[0])[1].forget(nodes[2].own.node)
    background(nodes[:2])
    delete_for_good(net, nodes[:2])
    come_back(net, nodes[2])
    background(nodes)
    assert [get(node) for node in nodes] == ["", "", ""]


def test_a_node_that_is_not_asked_in_one_of_a_chain_of_joint_views_keeps_nothing() -> None:
    """Asked again in a later one, it would bring back a key whose tombstone was dropped."""
    net = Net(5, 7)
    target = zs3_dist.target_of(b"bucket")
    order = sorted(net.clusters.values(), key=lambda each: each.own.node ^ target)
    nodes, away = order[:5], order[5:]  # of which three are owners, and none
    record = {"id": "b" * 16, "bucket": {"created": 0.0, "state": "open"}}
    nodes[0].run(nodes[0].rounds.change("bucket", "", lambda current: record))
    net.down = {node.own.node for node in away}  # so that the joint view lasts
    new = joining(net, nodes[0], target ^ 1)
    background([new, *nodes])
    put(nodes[0], OLD)
    background([new])
    assert text_of(new.node.registers.slot("bucket", "k").value) == OLD
    net.down.add(new.own.node)
    housekeeping(nodes[0])[1].forget(new.own.node)
    background(nodes)
    delete_for_good(net, nodes[:3])
    come_back(net, new)
    assert new.known_view().previous and new.known_view().owns(new.own.node, "bucket")
    assert [get(node) for node in (new, *nodes)] == [""] * 6


def test_a_forgotten_node_that_a_joint_view_still_counts_keeps_its_registers() -> None:
    """Half of every quorum is one of the previous owners: it must not vote with amnesia."""
    net, nodes = owners(3)
    net.down = {nodes[1].own.node}
    put(nodes[0], NEW)
    net.down = {nodes[2].own.node}
    housekeeping(nodes[0])[1].forget(nodes[2].own.node)
    come_back(net, nodes[2])
    assert nodes[2].known_view().previous
    net.down = {nodes[0].own.node}
    assert get(nodes[1]) == NEW


def test_a_change_that_others_have_built_on_is_not_decided_again() -> None:
    """Neither PreconditionFailed, since it was done, nor a second time: SlowDown."""
    net, (first, second, third) = owners(3)

    def create(current: Value | None) -> Value:
        if current:
            raise S3Error("PreconditionFailed")
        return value_of(OLD)

    steps = first.rounds.change("bucket", "k", create)
    accept = steps.send(reaching(net, first, next(steps), first, second))
    reaching(net, first, accept, third)  # its answer is lost
    assert isinstance(steps.send(reaching(net, first, accept)), Pause)
    accept = steps.send(reaching(net, first, steps.send({}), second, third))
    assert text_of(accept.message["value"]) == OLD
    found: list[Value | None] = []
    second.run(second.rounds.change("bucket", "k", lambda now: found.append(now) or value_of(NEW)))
    assert text_of(found[-1]) == OLD
    assert isinstance(steps.send(reaching(net, first, accept, second, third)), Pause)
    again = reaching(net, first, steps.send({}), first, second, third)
    with pytest.raises(S3Error, match="SlowDown"):
        steps.send(again)


@pytest.mark.parametrize("followed", [False, True])
def test_a_change_that_was_done_and_undone_is_not_decided_again_when_all_that_was_dropped(
    followed: bool,
) -> None:
    """Its tombstone is: the grace is short, or a clock jumped."""
    net, (first, second, third) = owners(3)
    steps = first.rounds.change("bucket", "k", lambda current: value_of(OLD))
    accept = steps.send(reaching(net, first, next(steps), first, second))
    step = steps.send(reaching(net, first, accept, second))
    assert get(third) == OLD
    delete_for_good(net, [first, second, third])
    if followed:
        put(third, NEW)
    with raises("SlowDown"):
        while True:
            step = steps.send({} if isinstance(step, Pause) else first.ask(step))
    assert get(third) == (NEW if followed else "")


@pytest.mark.parametrize("deleted", [False, True])
def test_a_list_of_buckets_does_not_show_what_a_head_may_then_not_find(deleted: bool) -> None:
    """Only one of three owners has accepted that the bucket is there, or that it is not."""
    net, (first, _, third) = owners(3)
    name = "bucket" if deleted else "other"
    there = {"bucket": {"created": 0.0, "state": "open"}}
    value = {"id": "1" * 16, "base": "", **({} if deleted else there)}
    late = {"ballot": f"{1:08x}{500:012x}{'0' * 16}", "value": value}
    answer = say(net, third, "accept", bucket=name, key="", **late, chosen=False, basis=None)
    assert answer == {"done": True}
    store = DistributedStore(first)
    listed = name in [bucket.name for bucket in store.list_buckets()]
    net.down = {third.own.node}
    assert listed == (first.run(first.rounds.bucket(name)) is not None)


# --- Kademlia, thousands of nodes in one process ---


class Simulated:
    """Nodes that have joined one after the other, each through one of those before it; or, where
    that would take too long, with the routing tables that they would have some time later."""

    def __init__(self, seed: int, size: int, one_by_one: bool) -> None:
        self.pick = random.Random(seed)
        self.contacts = [
            Contact(self.pick.getrandbits(160), f"sim:{i % 65535 + 1}") for i in range(size)
        ]
        self.tables = {contact.node: RoutingTable(contact.node) for contact in self.contacts}
        self.providers = {contact.node: Providers() for contact in self.contacts}
        self.dead: set[int] = set()
        self.now = 0.0
        if one_by_one:
            for number, contact in enumerate(self.contacts[1:], 1):
                self.join(contact, self.pick.choice(self.contacts[:number]))
        else:
            self._fill_tables()

    def _fill_tables(self) -> None:
        """Each k-bucket gets up to k random nodes of its range."""
        ids = sorted(contact.node for contact in self.contacts)
        by_id = {contact.node: contact for contact in self.contacts}
        for own in ids:
            for index in range(159, 0, -1):
                low = (own ^ (1 << index)) >> index << index
                first, last = (
                    bisect.bisect_left(ids, low),
                    bisect.bisect_left(ids, low + (1 << index)),
                )
                for node in self.pick.sample(ids[first:last], min(20, last - first)):
                    self.tables[own].seen(by_id[node], 0.0)
                if last - first == 0 and index < 140:
                    break

    def join(self, contact: Contact, through: Contact) -> None:
        """As a node does: look up its own id, then one in each farther k-bucket."""
        self.tables[contact.node].seen(through, self.now)
        self.find(contact, contact.node)
        neighbour = self.tables[contact.node].closest(contact.node)[0]
        for index in range(zs3_dist.bucket_index(contact.node, neighbour.node), 160):
            self.find(contact, contact.node ^ (1 << index) ^ self.pick.getrandbits(index))

    def ask(self, asker: Contact, those: list[Contact], target: int) -> dict[int, list[Contact]]:
        answers = {}
        for to in those:
            if to.node in self.dead:
                self.tables[asker.node].failed(to)
                continue
            self.tables[to.node].seen(asker, self.now)
            self.tables[asker.node].seen(to, self.now)
            answers[to.node] = self.tables[to.node].closest(target)
        return answers

    def find(self, asker: Contact, target: int) -> tuple[list[Contact], int]:
        """The result of a lookup and how many rounds it took."""
        steps = lookup(target, self.tables[asker.node].closest(target), asker.node)
        rounds = 0
        try:
            todo = next(steps)
            while True:
                rounds += 1
                todo = steps.send(self.ask(asker, todo, target))
        except StopIteration as end:
            return end.value, rounds


@pytest.mark.parametrize(("size", "one_by_one"), [(1000, True), (10_000, False)])
def test_lookups_find_exactly_the_k_closest_in_few_rounds(size: int, one_by_one: bool) -> None:
    network = Simulated(size, size, one_by_one)
    worst = 0
    for _ in range(200):
        asker, target = network.pick.choice(network.contacts), network.pick.getrandbits(160)
        found, rounds = network.find(asker, target)
        everyone = [contact for contact in network.contacts if contact != asker]
        assert found == nearest(everyone, target, 20)
        worst = max(worst, rounds)
    assert worst <= math.log2(size), worst


def test_lookups_find_the_closest_with_a_fifth_of_the_nodes_dead() -> None:
    network = Simulated(7, 1000, one_by_one=False)
    network.dead = {contact.node for contact in network.pick.sample(network.contacts, 200)}
    alive = [contact for contact in network.contacts if contact.node not in network.dead]
    right = 0
    for _ in range(1000):
        asker, target = network.pick.choice(alive), network.pick.getrandbits(160)
        found, _ = network.find(asker, target)
        right += found == nearest([c for c in alive if c != asker], target, 20)
    assert right >= 999, right


def find_providers(network: Simulated, asker: Contact, block: str) -> list[Contact]:
    target = zs3_dist.block_target(block)
    steps = lookup(target, network.tables[asker.node].closest(target), asker.node)
    try:
        todo = next(steps)
        while True:
            answers = network.ask(asker, todo, target)
            for node in answers:
                if found := network.providers[node].get(block, network.now):
                    return found
            todo = steps.send(answers)
    except StopIteration:
        return []


def test_providers_are_found_while_half_the_nodes_change_every_hour() -> None:
    network = Simulated(11, 200, one_by_one=True)
    pick = network.pick
    holders = {f"{pick.getrandbits(256):064x}": contact for contact in network.contacts[:25]}
    alive = list(network.contacts)
    found = tries = 0
    for _ in range(4):
        for block, holder in holders.items():
            for near in network.find(holder, zs3_dist.block_target(block))[0]:
                network.providers[near.node].add(block, holder, network.now)
        network.now += zs3_dist.REPUBLISH_SECONDS  # an hour
        gone = pick.sample(alive[25:], 100)
        network.dead |= {contact.node for contact in gone}
        alive = [contact for contact in alive if contact.node not in network.dead]
        for number in range(100):
            fresh = Contact(pick.getrandbits(160), f"new:{number + 1}")
            network.tables[fresh.node] = RoutingTable(fresh.node)
            network.providers[fresh.node] = Providers()
            network.join(fresh, pick.choice(alive))
            alive.append(fresh)
        for _ in range(250):
            block = pick.choice(list(holders))
            found += holders[block] in find_providers(network, pick.choice(alive), block)
            tries += 1
    assert found >= 0.999 * tries, (found, tries)


def test_old_contacts_that_answer_are_kept() -> None:
    table = RoutingTable(0)
    old = [Contact((1 << 159) + i, "a:1") for i in range(20)]
    for contact in old:
        assert table.seen(contact, 0.0) is None
    for i in range(1000):
        assert table.seen(Contact((1 << 159) + 1000 + i, "b:1"), 1.0) == old[0]
    assert table.contacts() == old
    table.failed(old[0])
    assert old[0] not in table.contacts() and len(table.contacts()) == 20
    assert table.closest(1 << 159)[0] == old[1]


def test_provider_records_expire_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    providers, holder = Providers(), Contact(1, "a:1")
    providers.add("a" * 64, holder, 0.0)
    assert providers.get("a" * 64, 86399.0) == [holder]
    assert providers.get("a" * 64, 86400.0) == []
    for i in range(5):  # each of its holders is another node's disk
        providers.add("a" * 64, Contact(i, "b:1"), 86400.0 * (i + 1))
    assert len(providers._records["a" * 64]) == 1
    monkeypatch.setattr(zs3_dist, "MAX_PROVIDED", 10)
    for i in range(20):
        providers.add(f"{i:064x}", holder, 1.0)
    assert [bool(providers.get(f"{i:064x}", 2.0)) for i in range(20)] == [False] * 10 + [True] * 10


# --- Peers' endpoints ---


class Wire:
    """A request's body as the server gives it."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def readinto(self, view: memoryview) -> int:
        count = min(len(view), len(self.data))
        view[:count], self.data = self.data[:count], self.data[count:]
        return count


def peer_request(path: str, headers: dict[str, str], body: bytes) -> zs3.Request:
    settings = zs3.Settings(credentials={})
    headers = {**headers, "content-length": str(len(body))}
    request = zs3.Request("POST", path, "", headers, settings)
    request.wire = Wire(body)  # type: ignore[assignment]
    return request


def signed(seal: zs3_dist.Seal, to: Contact, path: str, body: bytes) -> zs3.Request:
    head, _ = seal.request(zs3_dist.Question(to, path, body))
    headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:] if line)
    return peer_request("/_zs3/" + path, headers, body)


class Lonely:
    """A node of a cluster of one, with a disk, and a peer's seal."""

    def __init__(self, folder: Path) -> None:
        self.own = Contact(1 << 80, "127.0.0.1:9")
        registers = Registers(self.own.node, str(folder / "registers.db"))
        registers.install([View("0" * 16, 1, 3, (self.own,))])
        self.node = Node(self.own, registers, zs3_dist.Blocks(folder / ".cas"), lambda: 0.0)
        self.peers = zs3_dist.Peers(zs3_dist.Seal(self.own, "secret"))
        self.cluster = Cluster(self.node, self.peers)
        self.cluster.joined.set()
        self.cluster.young_until = -math.inf
        self.store = DistributedStore(self.cluster)
        self.peer = zs3_dist.Seal(Contact(7, "127.0.0.1:7"), "secret")

    def state(self) -> str:
        """All that a request could change."""
        dump = "\n".join(self.node.registers._db.iterdump())
        blocks = sorted(block for block, _ in self.node.blocks.walk())
        return f"{dump}{blocks}{self.node.table.contacts()}{self.node.providers._records}"


@pytest.fixture
def lonely(tmp_path: Path) -> Iterator[Lonely]:
    one = Lonely(tmp_path)
    yield one
    one.store.close()


BALLOT = "0000000100000000000a" + "0" * 16
PLACE = {"epoch": 1, "bucket": "bucket", "key": "k"}
TOMBSTONE = {"id": "a" * 16}
GOOD: dict[str, Message] = {
    "hello": {"epoch": 1},
    "views": {"views": [View("0" * 16, 2, 3, (Contact(1, "a:1"),)).as_json()]},
    "find": {"target": "0" * 40},
    "find_providers": {"hash": "0" * 64},
    "provide": {"hashes": ["0" * 64]},
    "prepare": {**PLACE, "ballot": BALLOT},
    "accept": {**PLACE, "ballot": BALLOT, "value": TOMBSTONE, "chosen": False, "basis": None},
    "learn": {**PLACE, "ballot": BALLOT},
    "read": {**PLACE, "brief": False},
    "page": {
        "epoch": 1,
        "bucket": "bucket",
        "prefix": "",
        "start": "",
        "delimiter": "",
        "whole": False,
        "mark": "",
    },
    "buckets": {"epoch": 1},
    "changes": {"epoch": 1, "since": 0},
    "values": {"epoch": 1, "places": [["bucket", "k"]]},
    "buried": {"epoch": 1, "graves": [["bucket", "k", BALLOT]]},
    "used": {"epoch": 1, "hashes": ["0" * 64]},
    "have": {"hashes": ["0" * 64], "touch": True},
}


def test_a_block_that_cannot_be_read_is_set_aside_and_can_be_stored_again(
    lonely: Lonely, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, data = lonely.node.blocks, b"x" * 5000
    name = zs3_dist.block_hash(data)
    blocks.put(name, data)
    rotten, read = blocks.path(name).stat().st_ino, Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.stat().st_ino == rotten:
            raise OSError(errno.EIO, "a sector cannot be read")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert blocks.get(name) is None and not blocks.has(name) and blocks.count == 0
    blocks.put(name, data)
    rotten = blocks.path(name).stat().st_ino
    blocks.put(name, data)  # in place of what cannot be read
    assert blocks.get(name) == data and blocks.total_bytes == 5000


def test_values_are_told_by_their_real_size(
    lonely: Lonely, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zs3_dist, "PAGE_BYTES", 10_000)
    places = [(zs3.UPLOADS, f"k{number}") for number in range(9)]
    value = {**value_of(OLD), "base": ""}
    value["info"]["headers"] = {"cache-control": "y" * 6000}
    for place in places:
        lonely.node.registers.accept(*place, BALLOT, value, False, None)
    assert len(lonely.node.on_values(places)["slots"]) == 2


@pytest.mark.parametrize("name", ["hello", "find"])
def test_a_member_is_looked_for_where_it_spoke_from_unless_it_only_said_hello(
    lonely: Lonely, name: str
) -> None:
    """A disk that was copied says hello, too, before it knows that it is one."""
    member = lonely.peer.own._replace(address="127.0.0.1:8")
    lonely.node.registers.install([View("0" * 16, 2, 3, (member, lonely.own))])
    lonely.store.internal(signed(lonely.peer, lonely.own, name, pack(GOOD[name])))
    moved = {} if name == "hello" else {member: lonely.peer.own}
    assert lonely.peers.moved == moved


@pytest.mark.parametrize(
    ("index", "ask"),
    [
        ("buckets", lambda registers: registers.buckets()),
        ("graves", lambda registers: next(registers.graves(1e9), None)),
        ("changes", lambda registers: registers.changes(0, bool)),
        ("promises", lambda registers: registers.drop_promises(1e9)),
        ("sqlite_autoindex_registers_1 (bucket=? AND key=?)",
         lambda registers: registers.slot("bucket", "k")),
        ("sqlite_autoindex_registers_1 (bucket=? AND key=?)", lambda registers: registers.doubts()),
        ("sqlite_autoindex_registers_1 (bucket=? AND key>? AND key<?)",
         lambda registers: registers.page("bucket", "a", "", "", False)),
    ],
)  # fmt: skip
def test_no_query_of_the_registers_scans_them_all(
    index: str, ask: Callable[[Registers], Any], lonely: Lonely
) -> None:
    asked: list[str] = []
    database = lonely.node.registers._db
    database.set_trace_callback(asked.append)
    ask(lonely.node.registers)
    database.set_trace_callback(None)
    queries = [query for query in asked if "registers" in query and "SELECT" in query]
    plans = [row[3] for query in queries for row in database.execute(f"EXPLAIN QUERY PLAN {query}")]
    steps = [step for step in plans if re.search("(SCAN|SEARCH).*registers", step)]
    assert steps and all(f"INDEX {index}" in step for step in steps), plans


def test_a_write_does_not_wait_for_the_name_of_a_dead_peer(
    lonely: Lonely, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve, names = socket.getaddrinfo, []

    def slowly(host: str, *rest: Any, **named: Any) -> Any:
        names.append(host)
        return resolve(host, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", slowly)
    with fake_peers(1) as (fakes, _):
        alive = fakes[0].contact
        groups = ((lonely.own, alive, Contact(8, "dead.invalid:1")),)
        for _ in range(3):
            ask = Ask("learn", GOOD["learn"], groups, lambda said: alive.node in said, wide=True)
            lonely.cluster.ask(ask)
        assert fakes[0].asked == 3
    assert names.count("dead.invalid") == 1


@pytest.mark.parametrize(("worked", "rest"), [(0.05, 0.2), (0.25, 1.0), (10.0, 1.0)])
def test_a_walk_over_the_blocks_rests_four_times_as_long_as_it_works_but_not_for_long(
    lonely: Lonely, monkeypatch: pytest.MonkeyPatch, worked: float, rest: float
) -> None:
    """What it waits for is garbage that stays, and blocks that lack copies."""
    monkeypatch.setattr(zs3_dist, "BATCH", 1)
    for data in (b"a", b"b"):
        lonely.node.blocks.put(zs3_dist.block_hash(data), data)
    keep, now, rests = Housekeeping(lonely.store, 600.0, 0.0), itertools.count(), []
    monkeypatch.setattr(lonely.node, "clock", lambda: next(now) * worked)
    monkeypatch.setattr(keep, "_unused", lambda batch: set())
    monkeypatch.setattr(keep, "_collect", lambda unused, suspects: 0)
    monkeypatch.setattr(keep, "_replicate", lambda batch: None)
    monkeypatch.setattr(lonely.store.closing, "wait", rests.append)
    keep.tend()
    assert rests == pytest.approx([rest, rest])


def test_without_a_grace_a_block_that_nobody_needs_is_removed_at_the_second_look(
    lonely: Lonely, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first, a PUT may just have taken it up, after its node was asked."""
    block = zs3_dist.block_hash(b"x")
    lonely.node.blocks.put(block, b"x")
    now = itertools.count()
    monkeypatch.setattr(lonely.node, "clock", lambda: float(next(now)))
    monkeypatch.setattr(lonely.store.closing, "wait", lambda seconds: False)
    keep = Housekeeping(lonely.store, 0.0, 0.0)
    for left in (True, False):
        keep.tend()
        assert lonely.node.blocks.has(block) == left


@pytest.mark.parametrize("have_it", [{1, 2}, {1, 2, 3}])
def test_an_extra_copy_stays_until_all_who_should_have_the_block_have_it(
    have_it: set[int], lonely: Lonely, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, block = lonely.node.blocks, zs3_dist.block_hash(b"x")
    blocks.put(block, b"x")
    others = [Contact(number, f"sim:{number}") for number in (1, 2, 3)]
    monkeypatch.setattr(lonely.cluster, "have", lambda *_, touch: ({block: have_it}, {1, 2, 3}))
    monkeypatch.setattr(lonely.cluster, "holders", lambda block: [*others, lonely.own])
    Housekeeping(lonely.store, 600.0, 0.0)._replicate([block])
    assert blocks.has(block) == (len(have_it) < 3)


@pytest.mark.parametrize(("replicas", "members", "least"), [(3, 3, 2), (3, 1, 1), (1, 3, 1)])
def test_a_copy_takes_over_no_block_that_too_few_nodes_have(
    replicas: int, members: int, least: int, lonely: Lonely, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two, where there are two, as for a block that is written."""
    contacts = (lonely.own, Contact(2 << 80, "127.0.0.1:2"), Contact(3 << 80, "127.0.0.1:3"))
    lonely.node.registers.install([View("0" * 16, 2, replicas, contacts[:members])])
    names = [f"{count:064x}" for count in range(3)]  # which so many nodes have
    there = {name: set(range(count)) for count, name in enumerate(names)}
    monkeypatch.setattr(lonely.cluster, "have", lambda *_, touch: (there, set()))
    assert lonely.cluster.touch(names) == names[:least]


@pytest.mark.parametrize("is_near", [True, False])
def test_a_block_that_was_fetched_stays_here_if_it_should_be_here(
    is_near: bool, lonely: Lonely, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, others = zs3_dist.block_hash(b"x"), [Contact(node, f"sim:{node}") for node in (1, 2, 3)]
    order = [lonely.own, *others] if is_near else [*others, lonely.own]
    monkeypatch.setattr(lonely.cluster, "holders", lambda block: order)
    monkeypatch.setattr(lonely.cluster, "_fetch_from", lambda *_: b"x")
    assert lonely.cluster.fetch(block) == b"x"
    assert lonely.node.blocks.has(block) == is_near


def test_the_blocks_of_an_object_are_in_use_while_it_is_sent(lonely: Lonely) -> None:
    store, data = lonely.store, b"x" * 5000
    store.create_bucket("bucket")
    store.put_object("bucket", "k", body_of(data), {}, zs3.NO_CONDITION)
    assert lonely.node.pins.list() == []
    _, content = store.open_object("bucket", "k")
    assert lonely.node.pins.list() == [zs3_dist.block_hash(data)]
    content.close()
    assert lonely.node.pins.list() == []


def test_the_block_of_a_small_part_is_in_use_before_it_is_stored(
    lonely: Lonely, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, info = part_of_an_upload(lonely.store)
    pins, put_block, seen = lonely.node.pins, lonely.node.blocks.put, []

    def put(block: str, data: bytes) -> None:
        seen.append((block, pins.list()))
        put_block(block, data)

    monkeypatch.setattr(lonely.node.blocks, "put", put)
    lonely.store.concatenate("bucket", [part], info, zs3.NO_CONDITION)
    block = zs3_dist.block_hash(b"old")
    assert seen == [(block, [block])] and pins.list() == []


def test_complete_with_a_part_that_was_replaced_meanwhile_is_InvalidPart(lonely: Lonely) -> None:
    part, info = part_of_an_upload(lonely.store)
    lonely.store.put_object(zs3.UPLOADS, part.key, body_of(b"new"), {}, zs3.NO_CONDITION)
    with raises("InvalidPart"):
        lonely.store.concatenate("bucket", [part], info, zs3.NO_CONDITION)


def test_an_object_of_too_many_blocks_is_EntityTooLarge(
    lonely: Lonely, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zs3_dist, "BLOCK_BYTES", 5000)
    monkeypatch.setattr(zs3_dist, "MAX_OBJECT_BLOCKS", 1)
    store = lonely.store
    part, info = part_of_an_upload(store)
    other = part.key[:-1] + "2"
    parts = [
        store.put_object(zs3.UPLOADS, key, body_of(b"x" * 5000), {}, zs3.NO_CONDITION)
        for key in (part.key, other)
    ]
    with raises("EntityTooLarge"):
        store.put_object("bucket", "k", body_of(b"x" * 5001), {}, zs3.NO_CONDITION)
    with raises("EntityTooLarge"):
        store.concatenate("bucket", parts, info, zs3.NO_CONDITION)
    store.concatenate("bucket", parts[:1], info, zs3.NO_CONDITION)


def test_a_node_that_begins_anew_needs_no_block_and_has_pulled_nothing(lonely: Lonely) -> None:
    registers, data = lonely.node.registers, b"x" * 5000
    lonely.store.create_bucket("bucket")
    lonely.store.put_object("bucket", "k", body_of(data), {}, zs3.NO_CONDITION)
    registers.set_synced(1)
    assert registers.used(zs3_dist.block_hash(data))
    registers.install([View("1" * 16, 5, 3, (lonely.own,))])
    assert not registers.used(zs3_dist.block_hash(data))
    assert registers.synced == 0


def test_who_is_known_to_have_what_was_pulled_is_forgotten_with_the_joint_view(
    lonely: Lonely,
) -> None:
    """In the next one they may have begun anew."""
    registers = lonely.node.registers
    assert registers.doubt("bucket", "k", BALLOT, 1) == {1}
    assert registers.doubt("bucket", "k", BALLOT, 2) == {1, 2}
    registers.set_synced(1)
    assert registers.doubt("bucket", "k", BALLOT, 2) == {2}


def test_a_page_of_keys_ends_when_it_is_large(
    lonely: Lonely, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in "ab":
        value = {**value_of(OLD), "base": ""}
        lonely.node.registers.accept(zs3.UPLOADS, key, BALLOT, value, False, None)
    page = lonely.node.registers.page(zs3.UPLOADS, "", "", "", False)
    assert len(page["entries"]) == 2 and not page["more"]
    monkeypatch.setattr(zs3_dist, "PAGE_BYTES", 1)
    page = lonely.node.registers.page(zs3.UPLOADS, "", "", "", False)
    assert len(page["entries"]) == 1 and page["more"]


def test_the_records_of_made_up_buckets_are_forgotten(
    lonely: Lonely, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zs3_dist, "MAX_KNOWN_BUCKETS", 2)
    for name in ("one", "two", "three"):
        lonely.node.registers.basis(name, "k")
    assert set(lonely.node.registers._bases) == {"three"}


def test_gossip_closes_the_connections_to_who_is_no_member(lonely: Lonely) -> None:
    with fake_peers(1) as (fakes, _):
        link = zs3_dist.Link(fakes[0].contact.address)
        lonely.peers.give(fakes[0].contact.address, link)
        zs3_dist.Membership(lonely.store, [], 3).gossip()
        assert link.socket.fileno() < 0


@pytest.mark.parametrize("met", [True, False])
def test_an_extra_copy_that_a_put_met_while_the_others_were_asked_stays(
    met: bool, lonely: Lonely, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may have removed theirs since they said that they have them."""
    blocks, block = lonely.node.blocks, zs3_dist.block_hash(b"x")
    blocks.put(block, b"x")
    os.utime(blocks.path(block), (1, 1))
    others = [Contact(number, f"sim:{number}") for number in (1, 2, 3)]

    def have(hashes: list[str], touch: bool) -> tuple[dict[str, set[int]], set[int]]:
        if met:
            blocks.put(block, b"x")
        return {block: {1, 2, 3}}, {1, 2, 3}

    monkeypatch.setattr(lonely.cluster, "have", have)
    monkeypatch.setattr(lonely.cluster, "holders", lambda block: [*others, lonely.own])
    Housekeeping(lonely.store, 600.0, 0.0)._replicate([block])
    assert blocks.has(block) == met


def test_a_small_object_that_rots_in_its_record_is_an_error_not_other_bytes(
    lonely: Lonely,
) -> None:
    part, _ = part_of_an_upload(lonely.store)
    rot = "UPDATE registers SET tail = replace(tail, 'b2xk', 'b2xr')"  # "old" in base64
    lonely.node.registers._db.execute(rot)
    with raises("InternalError"):
        lonely.store.open_object(zs3.UPLOADS, part.key)


def test_damaged_registers_are_an_error_of_the_disk(tmp_path: Path) -> None:
    """Then the other owners answer."""
    path = tmp_path / "registers.db"
    registers = Registers(1, str(path))
    registers.install([View("0" * 16, 1, 3, (Contact(1, "sim:1"),))])
    for number in range(300):
        ballot = f"{1:08x}{number + 1:012x}{'0' * 16}"
        value = {**value_of(OLD), "base": "", "inline": "QUJD" * 100}
        registers.accept(zs3.UPLOADS, f"k{number}", ballot, value, False, None)
    registers._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = bytearray(path.read_bytes())
    for page in range(1, len(data) // 4096):
        data[page * 4096 : page * 4096 + 4096] = b"\xff" * 4096
    with open(path, "r+b") as file:
        file.write(data)
    registers._db.execute("PRAGMA shrink_memory")
    with pytest.raises(OSError, match="registers"):
        registers.slot(zs3.UPLOADS, "k7")
    with pytest.raises(OSError, match="registers"):
        registers.page(zs3.UPLOADS, "", "", "", True)
    registers.close()


def test_a_node_whose_registers_are_damaged_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / ".index").mkdir()
    (tmp_path / ".index" / "registers.db").write_bytes(b"rot" * 5000)
    (tmp_path / ".node_id").write_text("1" * 40)
    answer = run_zs3("--distributed", "--port=0", f"--data-dir={tmp_path}")
    assert answer.returncode == 1 and "Traceback" not in answer.stderr
    assert "registers.db" in answer.stderr and "joins anew" in answer.stderr


def test_a_write_of_unknown_outcome_keeps_its_blocks_for_a_while_without_a_thread(
    lonely: Lonely, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, pins = threading.active_count(), lonely.node.pins
    with raises("SlowDown"), lonely.store._pinned() as pin:
        pin.blocks(["0" * 64])
        raise S3Error("SlowDown")
    assert pins.list() == ["0" * 64] and threading.active_count() == threads
    monkeypatch.setattr(time, "monotonic", lambda clock=time.monotonic: clock() + 31)
    assert pins.list() == []


def test_a_repeated_complete_beside_the_first_changes_nothing_that_came_after(
    lonely: Lonely, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first discards parts, that it did not list, its object is replaced."""
    store, parts = lonely.store, []
    store.create_bucket("bucket")
    request = zs3.Request("POST", "/bucket/k", "uploads", {}, zs3.Settings({}, min_part_bytes=1))
    request.bucket, request.key = "bucket", "k"
    request.body = body_of(b"")
    created = zs3.create_multipart_upload(store, request).body
    assert isinstance(created, bytes)
    request.query = {"uploadId": re.findall("<UploadId>(.*)</UploadId>", created.decode())[0]}
    for number in range(1, 4):
        key = f"bucket/{request.query['uploadId']}/{number:05d}"
        stored = store.put_object(zs3.UPLOADS, key, body_of(b"x"), {}, zs3.NO_CONDITION)
        parts.append(zs3.xml(Part=zs3.xml(PartNumber=number, ETag=stored.etag)))
    listed = zs3.document("CompleteMultipartUpload", *parts[:2]).body
    assert isinstance(listed, bytes)
    discard = zs3.discard_upload

    def meanwhile(*given: Any) -> None:
        monkeypatch.setattr(zs3, "discard_upload", discard)
        store.put_object("bucket", "k", body_of(b"newer"), {}, zs3.NO_CONDITION)
        request.body = body_of(listed)
        with raises("InvalidPart"):
            zs3.complete_multipart_upload(store, request)
        discard(*given)

    monkeypatch.setattr(zs3, "discard_upload", meanwhile)
    request.body = body_of(listed)
    assert zs3.complete_multipart_upload(store, request).status == 200
    assert store.stat_object("bucket", "k").size == len(b"newer")
    assert list(store.scan(zs3.UPLOADS, "", "", "")) == []


@pytest.mark.parametrize("is_moved", [True, False])
@pytest.mark.parametrize("name", ["hello", "find"])
def test_a_member_that_says_hello_from_elsewhere_is_looked_for_there(
    lonely: Lonely, name: str, is_moved: bool
) -> None:
    member = lonely.peer.own._replace(address="127.0.0.1:8") if is_moved else lonely.peer.own
    lonely.node.registers.install([View("0" * 16, 2, 3, (member, lonely.own))])
    lonely.store.internal(signed(lonely.peer, lonely.own, name, pack(GOOD[name])))
    wanted = {lonely.peer.own.address} if is_moved and name == "hello" else set()
    assert lonely.store.seal.misled == wanted


@pytest.mark.parametrize("is_idle", [True, False])
def test_a_node_that_may_give_itself_up_looks_for_whoever_says_hello(
    lonely: Lonely, is_idle: bool
) -> None:
    if not is_idle:
        lonely.store.create_bucket("bucket")
    lonely.store.internal(signed(lonely.peer, lonely.own, "hello", pack(GOOD["hello"])))
    assert lonely.store.seal.misled == ({lonely.peer.own.address} if is_idle else set())


def test_who_is_refused_as_a_peer_is_told_once(
    lonely: Lonely, caplog: pytest.LogCaptureFixture
) -> None:
    other = zs3_dist.Seal(lonely.peer.own, "another secret")
    for client in ("10.0.0.1", "10.0.0.2", "10.0.0.1"):
        request = signed(other, lonely.own, "hello", pack(GOOD["hello"]))
        request.client = client
        assert lonely.store.internal(request).status == 403
    assert [message.split()[3] for message in caplog.messages] == ["10.0.0.1", "10.0.0.2"]
    assert "not sealed by a node of this cluster" in caplog.messages[0]


def test_who_is_silent_is_asked_last(lonely: Lonely, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of its host may take longer to resolve than the answers of all others."""
    contacts = [Contact(number, f"127.0.0.1:{number}") for number in range(1, 4)]
    lonely.peers.fail(contacts[0])
    asked: list[int] = []

    def ask(questions: Any, *_: Any, **named: Any) -> dict[int, Reply]:
        asked.extend(question.to.node for question in questions)
        return {}

    monkeypatch.setattr(lonely.peers, "ask", ask)
    lonely.cluster.tell("hello", GOOD["hello"], [*contacts, contacts[1]])
    assert asked == [2, 3, 1]


@pytest.mark.parametrize(
    ("replies", "code"),
    [({7: Reply(503)}, "InsufficientStorage"), ({7: Reply(0)}, "SlowDown"), ({}, "SlowDown"),
     ({7: Reply(403)}, "SlowDown")],
)  # fmt: skip
def test_a_block_for_which_nobody_has_room_is_told_from_one_that_nobody_answers(
    lonely: Lonely, replies: dict[int, Reply], code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = lonely.peer.own
    lonely.node.registers.install([View("0" * 16, 2, 3, tuple(sorted((lonely.own, other))))])
    monkeypatch.setattr(lonely.peers, "ask", lambda *_: replies)
    with pytest.raises(S3Error) as refused:
        lonely.cluster.store(zs3_dist.block_hash(b"x"), b"x")
    assert refused.value.code == code
    assert (other.address in refused.value.message) == (code == "SlowDown")


def test_a_tombstone_is_not_asked_about_while_an_owner_is_silent(
    lonely: Lonely, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [Contact(number, f"127.0.0.1:{number}") for number in (1, 2)]
    view = View("0" * 16, 2, 3, tuple(sorted((lonely.own, *others))))
    asked: list[int] = []

    def call(name: str, message: Message, to: Contact) -> Message:
        asked.append(to.node)
        return {"buried": [True]}

    monkeypatch.setattr(lonely.cluster, "call", call)
    keep, grave = Housekeeping(lonely.store, 0.0, 0.0), ("bucket", "k", BALLOT)
    assert keep._everywhere(view, [grave]) == [grave] and len(asked) == 3
    lonely.peers.fail(others[1])
    assert keep._everywhere(view, [grave]) == [] and len(asked) == 3


def test_a_file_among_the_blocks_that_is_none_is_left_alone(lonely: Lonely) -> None:
    block = zs3_dist.block_hash(b"x")
    lonely.node.blocks.put(block, b"x")
    for name in ("x.blob", f"{block}.blob.bak", f"{'0' * 63}.blob"):
        (lonely.node.blocks.path(block).parent / name).write_bytes(b"x")
    assert [name for name, _ in lonely.node.blocks.walk()] == [block]


def test_a_peer_that_hangs_costs_a_bounded_number_of_connections() -> None:
    with fake_peers(1, silent=0) as (fakes, peers):
        [question], calls = questions(fakes), []
        for _ in range(zs3_dist.IDLE_LINKS + 2):
            link = zs3_dist.Link(question.to.address)
            calls.append(zs3_dist.Call(question, link, peers.seal, math.inf))
            peers.later(calls[-1])
        closed = [call.link.socket.fileno() < 0 for call in calls]
        assert closed == [True, True] + [False] * zs3_dist.IDLE_LINKS


def test_only_so_many_connections_to_one_peer_are_kept() -> None:
    with fake_peers(1) as (fakes, peers):
        links = [zs3_dist.Link(fakes[0].contact.address) for _ in range(zs3_dist.IDLE_LINKS + 1)]
        for link in links:
            peers.give(fakes[0].contact.address, link)
        closed = [link.socket.fileno() < 0 for link in links]
        assert closed == [False] * zs3_dist.IDLE_LINKS + [True]


def test_an_answer_longer_than_any_message_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_peers(1) as (fakes, peers):
        monkeypatch.setattr(zs3_dist, "MESSAGE_BYTES", -65536)  # with the head, nothing is left
        answers = peers.ask(questions(fakes), lambda raw: len(raw) == 1, 1, 10.0)
        assert answers[0].status == 0


@pytest.mark.parametrize("had_time", [True, False])
def test_a_block_that_is_not_sent_when_another_has_it_is_held_against_who_had_time(
    had_time: bool,
) -> None:
    with fake_peers(1, silent=0) as (fakes, peers):
        to = fakes[0].contact
        exchange = zs3_dist.Exchange(peers, [], 10.0)
        question = zs3_dist.Question(to, f"store/{'0' * 64}", b"x")
        call = zs3_dist.Call(question, zs3_dist.Link(to.address), peers.seal, math.inf)
        call.link.begun -= exchange.patience + 1 if had_time else 0
        exchange.calls[0] = call
        exchange._leave()
        assert peers.skipped(to.node) == had_time


@pytest.mark.parametrize("in_a_cluster", [False, True])
def test_what_is_left_of_uploads_in_a_deleted_bucket_is_removed(
    in_a_cluster: bool, lonely: Lonely, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that was on its way while the bucket was deleted."""
    store: Any = lonely.store if in_a_cluster else zs3.FileStore(str(tmp_path / "data"))
    part_of_an_upload(store)
    store.delete_bucket("bucket")

    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    for expiry, left in ((60.0, 1), (-60.0, 0)):
        with pytest.raises(KeyboardInterrupt):
            zs3.sweep_uploads(store, expiry)
        assert len(list(store.scan(zs3.UPLOADS, "", "", ""))) == left


@pytest.mark.parametrize("in_a_cluster", [False, True])
def test_deleting_a_bucket_leaves_the_uploads_of_one_made_anew_meanwhile(
    in_a_cluster: bool, lonely: Lonely, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Any = lonely.store if in_a_cluster else zs3.FileStore(str(tmp_path / "data"))
    store.create_bucket("bucket")
    old, empty = f"bucket/{'1' * 32}/00001", body_of(b"")
    store.put_object(zs3.UPLOADS, old, empty, {}, zs3.NO_CONDITION)
    delete = store.delete_bucket

    def then_make_anew(bucket: str) -> None:
        delete(bucket)
        part_of_an_upload(store)

    monkeypatch.setattr(store, "delete_bucket", then_make_anew)
    request = zs3.Request("DELETE", "/bucket", "", {}, zs3.Settings({}), bucket="bucket")
    zs3.delete_bucket(store, request)
    left = [info.key for info in store.scan(zs3.UPLOADS, "", "", "")]
    assert left == [f"bucket/{'0' * 32}/00001"]


@pytest.mark.parametrize("in_a_cluster", [False, True])
def test_an_upload_begun_while_its_bucket_is_deleted_is_not_in_the_next_of_that_name(
    in_a_cluster: bool, lonely: Lonely, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Any = lonely.store if in_a_cluster else zs3.FileStore(str(tmp_path / "data"))
    store.create_bucket("bucket")
    request = zs3.Request("POST", "/bucket/k", "uploads", {}, zs3.Settings({}))
    request.bucket, request.key = "bucket", "k"
    request.body = body_of(b"")
    put, delete = store.put_object, store.delete_bucket

    def put_late(*given: Any) -> zs3.ObjectInfo:
        zs3.delete_bucket(store, request)
        return put(*given)

    def delete_late(bucket: str) -> None:
        assert zs3.create_multipart_upload(store, request).status == 200
        delete(bucket)

    with monkeypatch.context() as patch, raises("NoSuchBucket"):
        patch.setattr(store, "put_object", put_late)
        zs3.create_multipart_upload(store, request)
    store.create_bucket("bucket")
    assert zs3.upload_ids(store, "bucket") == set()
    with monkeypatch.context() as patch:
        patch.setattr(store, "delete_bucket", delete_late)
        zs3.delete_bucket(store, request)
    store.create_bucket("bucket")
    assert zs3.upload_ids(store, "bucket") == set()


@pytest.mark.parametrize("deleted", [False, True])
def test_a_complete_that_is_late_does_not_undo_what_came_after_its_upload_ended(
    deleted: bool, lonely: Lonely, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another request may have completed or aborted the upload, and been answered."""
    store: Any = lonely.store
    part, info = part_of_an_upload(store)
    join = store._join

    def late(*given: Any) -> Any:
        done = join(*given)
        zs3.discard_upload(store, "bucket", info.upload_id)
        store.put_object("bucket", "k", body_of(b"new!"), {}, zs3.NO_CONDITION)
        if deleted:
            store.delete_object("bucket", "k", zs3.NO_CONDITION)
        return done

    monkeypatch.setattr(store, "_join", late)
    with raises("InvalidPart"):
        store.concatenate("bucket", [part], info, zs3.NO_CONDITION)
    found = [each.size for each in store.scan("bucket", "", "", "")]
    assert found == ([] if deleted else [4])


def test_every_message_has_a_good_example_and_a_handler(lonely: Lonely) -> None:
    assert set(GOOD) == set(zs3_dist.MESSAGES)
    for name, message in GOOD.items():
        answer = lonely.store.internal(signed(lonely.peer, lonely.own, name, pack(message)))
        assert answer.status == 200, (name, answer)


def test_unsigned_and_foreign_requests_change_nothing(lonely: Lonely) -> None:
    data = b"some block"
    paths = {**{name: pack(m) for name, m in GOOD.items()}}
    paths[f"store/{zs3_dist.block_hash(data)}"] = data
    paths[f"fetch/{zs3_dist.block_hash(data)}"] = b""
    before = lonely.state()
    foreign = zs3_dist.Seal(Contact(7, "127.0.0.1:7"), "another secret")
    other = Contact(9, "127.0.0.1:9")
    for path, body in paths.items():
        requests = [
            peer_request("/_zs3/" + path, {}, body),
            signed(foreign, lonely.own, path, body),
            signed(lonely.peer, other, path, body),  # meant for another node
            *(signed(lonely.peer, lonely.own, path, body) for _ in range(9)),
        ]
        requests[3].path = "/_zs3/store/" + "1" * 64  # sealed for another path
        del requests[4].headers["x-zs3-seal"]
        requests[5].headers["x-zs3-seal"] = "\xe9" * 64
        for request, word in zip(requests[6:], range(6), strict=True):
            words = request.headers["x-zs3-seal"].split(" ")
            words[word] = words[word][:-1] + ("1" if words[word][-1] != "1" else "2")
            request.headers["x-zs3-seal"] = " ".join(words)
        for request in requests:
            answer = lonely.store.internal(request)
            assert 400 <= answer.status < 500, (path, answer)
    assert lonely.state() == before


def test_200_malformed_signed_messages_are_refused_and_change_nothing(lonely: Lonely) -> None:
    pick = random.Random(5)
    wrong: list[Any] = [
        None,
        -1,
        1 << 70,
        "x",
        "\ud800",
        [],
        {},
        [["bucket"]],
        True,
        1.5,
        "0" * 5000,
        {"a": 1},
    ]
    lonely.store.internal(signed(lonely.peer, lonely.own, "hello", pack({"epoch": 1})))
    before = lonely.state()
    refused = 0
    while refused < 200:
        name = pick.choice(list(GOOD))
        message: dict[str, Any] = dict(GOOD[name])
        field = pick.choice(list(message))
        what = pick.random()
        if what < 0.1:
            del message[field]
        elif what < 0.2:
            message["more"] = 1
        else:
            message[field] = pick.choice(wrong)
        body = json.dumps(message).encode() if what < 0.9 else pick.randbytes(50)
        try:
            parse_message(name, body)
        except (ValueError, RecursionError):
            answer = lonely.store.internal(signed(lonely.peer, lonely.own, name, body))
            assert answer.status == 400, (name, body, answer)
            refused += 1
    assert lonely.state() == before


def test_a_block_that_does_not_match_its_name_is_refused(lonely: Lonely) -> None:
    answer = lonely.store.internal(signed(lonely.peer, lonely.own, "store/" + "0" * 64, b"x"))
    assert answer.status == 400
    assert not lonely.node.blocks.has("0" * 64)


def test_a_thousand_fake_pings_change_no_routing_table(lonely: Lonely) -> None:
    for i in range(1000):
        fake = zs3_dist.Seal(Contact(i + 100, f"127.0.0.1:{i + 1}"), "guess")
        assert (
            lonely.store.internal(signed(fake, lonely.own, "hello", pack({"epoch": 0}))).status
            == 403
        )
    assert lonely.node.table.contacts() == []


def test_two_members_of_one_id_are_refused() -> None:
    first, second = (["1" * 40, address] for address in ("a:1", "b:1"))
    assert len(zs3_dist.members_field([first, ["2" * 40, "b:1"]])) == 2
    with pytest.raises(ValueError, match="bad members"):
        zs3_dist.members_field([first, second])


def test_a_body_in_a_record_is_small() -> None:
    for size in (0, zs3_dist.INLINE_BYTES):
        zs3_dist.value_field({**TOMBSTONE, "inline": base64.b64encode(bytes(size)).decode()})
    with pytest.raises(ValueError, match="bad inline"):
        large = base64.b64encode(bytes(zs3_dist.INLINE_BYTES + 1)).decode()
        zs3_dist.value_field({**TOMBSTONE, "inline": large})


def test_a_message_with_another_body_than_was_sealed_changes_nothing(lonely: Lonely) -> None:
    sealed = signed(lonely.peer, lonely.own, "learn", pack(GOOD["learn"]))
    other = pack({**GOOD["learn"], "key": "K"})
    assert lonely.store.internal(peer_request(sealed.path, sealed.headers, other)).status == 400


class FakePeer(socketserver.ThreadingTCPServer):
    """Answers {} to whatever it is asked, or never."""

    daemon_threads = True

    def __init__(self, node: int, silent: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), FakeAnswers)
        self.contact = Contact(node, f"127.0.0.1:{self.server_address[1]}")
        self.seal = zs3_dist.Seal(self.contact, "secret")
        self.silent, self.asked = silent, 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class FakeAnswers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        peer = cast(FakePeer, self.server)
        self.rfile.read(int(self.headers["content-length"]))
        peer.asked += 1
        if not peer.silent:
            mac = self.headers["x-zs3-seal"].rpartition(" ")[2]
            self.send_response(200)
            self.send_header("x-zs3-proof", peer.seal.proof(mac, 200, b"{}"))
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def fake_peers(count: int, silent: int = -1) -> Iterator[tuple[list[FakePeer], zs3_dist.Peers]]:
    """So many, of which one may be silent, and what asks them."""
    peers = zs3_dist.Peers(zs3_dist.Seal(Contact(99, "127.0.0.1:9"), "secret"))
    fakes = [FakePeer(number, number == silent) for number in range(count)]
    try:
        yield fakes, peers
    finally:
        peers.close()
        for fake in fakes:
            fake.shutdown()
            fake.server_close()


def questions(fakes: list[FakePeer]) -> list[zs3_dist.Question]:
    return [zs3_dist.Question(fake.contact, "hello", b"{}") for fake in fakes]


def good(answers: Mapping[int, Reply]) -> int:
    return sum(reply.status == 200 for reply in answers.values())


def test_the_time_that_this_node_takes_meanwhile_is_not_held_against_its_peers() -> None:
    with fake_peers(3) as (fakes, peers):
        answers = peers.ask(
            questions(fakes), lambda raw: good(raw) >= 2, 2, 0.3, meanwhile=lambda: time.sleep(0.5)
        )
        assert good(answers) == 2 and [fake.asked for fake in fakes] == [1, 1, 0]
        assert not any(peers.slow(fake.contact.node) for fake in fakes)


def test_what_holds_this_node_up_is_not_held_against_its_peers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a name service that takes longer than the answers may."""
    with fake_peers(3) as (fakes, peers):
        three, real = questions(fakes), socket.getaddrinfo
        unknown = three[1].to._replace(address="unknown.test:1")

        def slowly(host: str, *rest: Any, **named: Any) -> Any:
            if host == "unknown.test":
                time.sleep(0.6)
                raise socket.gaierror("no answer")
            return real(host, *rest, **named)

        monkeypatch.setattr(socket, "getaddrinfo", slowly)
        three[1] = three[1]._replace(to=unknown)
        answers = peers.ask(three, lambda raw: good(raw) >= 2, 3, 0.3)
        assert answers[0].status == 200
        assert [peers.skipped(fake.contact.node) for fake in fakes] == [False, True, False]


def test_a_sealed_request_is_of_no_bucket_whatever_the_peers_are_called() -> None:
    seal = zs3_dist.Seal(Contact(1, "n1.s3.test:1"), "secret")
    head, _ = seal.request(zs3_dist.Question(Contact(2, "n2.s3.test:2"), "hello", b"{}"))
    method, path, query, _, headers = zs3.parse_head(head)
    request = zs3.Request(method, path, query, headers, zs3.Settings({}, domain="s3.test"))
    request.bucket, request.key = zs3.address(request)
    assert request.internal


def test_connections_to_an_address_that_nobody_has_any_more_are_closed() -> None:
    with fake_peers(2) as (fakes, peers):
        peers.ask(questions(fakes), lambda raw: good(raw) == 2, 2, 2.0)
        kept, left = (peers.take(fake.contact.address) for fake in fakes)
        for fake, link in zip(fakes, (kept, left), strict=True):
            peers.give(fake.contact.address, link)
        peers.keep({fakes[0].contact.address})
        assert kept.socket.fileno() >= 0 and left.socket.fileno() < 0
        assert peers.take(fakes[0].contact.address) is kept


@pytest.mark.parametrize("host", ["a..b", "a" * 64, "a_b"])
def test_a_peer_whose_address_no_resolver_takes_does_not_answer(host: str) -> None:
    with fake_peers(1) as (fakes, peers):
        nowhere = zs3_dist.Question(Contact(9, zs3_dist.address_field(f"{host}:1")), "hello", b"")
        answers = peers.ask([nowhere, *questions(fakes)], lambda raw: len(raw) == 2, 2, 2.0)
        assert answers[9].status == 0 and good(answers) == 1


def test_while_a_slow_copy_is_waited_for_another_takes_its_place() -> None:
    with fake_peers(6, silent=2) as (fakes, peers):
        began = time.monotonic()
        answers = peers.ask(questions(fakes), lambda raw: good(raw) >= 2, 3, 10.0, 5.0)
        assert good(answers) == 3 and [fake.asked for fake in fakes] == [1, 1, 1, 1, 0, 0]
        assert time.monotonic() - began < 3


def test_who_cannot_be_connected_to_is_skipped_and_the_next_one_asked_at_once() -> None:
    with fake_peers(3) as (fakes, peers), socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        dead = fakes[0].contact._replace(address=f"127.0.0.1:{nobody.getsockname()[1]}")
        unknown = fakes[1].contact._replace(address="no-such-host.invalid:1")
        asked = [zs3_dist.Question(contact, "hello", b"{}") for contact in (dead, unknown)]
        began = time.monotonic()
        answers = peers.ask([*asked, *questions(fakes[2:])], lambda raw: good(raw) >= 1, 1, 100.0)
        assert [answers[number].status for number in range(3)] == [0, 0, 200]
        assert time.monotonic() - began < 2.4  # before one more would have been asked anyway
        assert peers.skipped(0) and peers.skipped(1) and not peers.skipped(2)


def test_a_kept_connection_that_broke_is_made_anew_or_the_next_peer_asked() -> None:
    with fake_peers(2) as (fakes, peers):
        peers.ask(questions(fakes), lambda raw: good(raw) >= 2, 2, 10.0)
        [link] = peers._idle[fakes[0].contact.address]
        link.socket.shutdown(socket.SHUT_RDWR)
        answers = peers.ask(questions(fakes[:1]), lambda raw: good(raw) >= 1, 1, 10.0)
        assert good(answers) == 1 and fakes[0].asked == 2
        [link] = peers._idle[fakes[0].contact.address]
        link.socket.shutdown(socket.SHUT_RDWR)
        fakes[0].shutdown()
        fakes[0].server_close()
        answers = peers.ask(questions(fakes), lambda raw: good(raw) >= 1, 1, 100.0)
        assert answers[0].status == 0 and answers[1].status == 200 and peers.skipped(0)


def test_an_accept_whose_kept_connection_broke_is_not_sent_again() -> None:
    """It may have been done: that a second one is refused would not say that it was not."""
    with fake_peers(1) as (fakes, peers):
        peers.ask(questions(fakes), lambda raw: good(raw) >= 1, 1, 10.0)
        [link] = peers._idle[fakes[0].contact.address]
        link.socket.shutdown(socket.SHUT_RDWR)
        accept = zs3_dist.Question(fakes[0].contact, "accept", b"{}")
        answers = peers.ask([accept], lambda raw: good(raw) >= 1, 1, 10.0)
        assert answers[0].status == 0 and fakes[0].asked == 1


def test_a_kept_connection_that_rested_for_so_long_that_its_peer_may_end_it_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An accept that is lost by it is not sent again: the peer would be called silent."""
    with fake_peers(1) as (fakes, peers):
        address, clock = fakes[0].contact.address, time.monotonic
        peers.ask(questions(fakes) * 2, lambda raw: False, 2, 10.0)
        [other, used] = peers._idle[address]
        assert peers.take(address) is used
        peers.give(address, used)
        monkeypatch.setattr(time, "monotonic", lambda: clock() + zs3.SOCKET_SECONDS - 1)
        fresh = peers.take(address)
        assert fresh not in (used, other) and not peers._idle[address]
        assert used.socket.fileno() == other.socket.fileno() == -1
        fresh.close()


def let_late_answers_come(peers: zs3_dist.Peers, fake: FakePeer) -> None:
    """They are looked at by who wants a connection to the same address."""
    deadline = time.monotonic() + 10
    while peers._owed:
        assert time.monotonic() < deadline
        peers.take(fake.contact.address).close()
        time.sleep(0.01)


def test_a_question_not_yet_sent_when_others_are_enough_is_sent_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with fake_peers(1) as (fakes, peers):
        monkeypatch.setattr(zs3_dist.Link, "pump", lambda link: None)  # it is still connecting
        peers.ask(questions(fakes), lambda raw: True, 1, 10.0, meanwhile=monkeypatch.undo)
        let_late_answers_come(peers, fakes[0])
        assert fakes[0].asked == 1 and not peers.skipped(0)


def test_a_late_answer_of_a_stranger_is_not_one_of_the_peer() -> None:
    with fake_peers(1) as (fakes, peers):
        fakes[0].seal = zs3_dist.Seal(fakes[0].contact, "another secret")
        peers.fail(fakes[0].contact)
        peers.ask(questions(fakes), lambda raw: True, 1, 10.0)
        let_late_answers_come(peers, fakes[0])
        assert peers.skipped(0)


def test_who_was_waited_for_in_vain_is_slow_though_it_is_heard_from() -> None:
    with fake_peers(3, silent=2) as (fakes, peers):
        peers.ask(questions(fakes), lambda raw: good(raw) >= 2, 3, 10.0, 0.2)
        node = fakes[2].contact.node
        peers.heard(fakes[2].contact)
        assert peers.slow(node) and not peers.skipped(node)
        assert not peers.slow(fakes[0].contact.node)


def test_that_a_peer_is_silent_and_that_it_is_back_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    peers = zs3_dist.Peers(zs3_dist.Seal(Contact(1, "a:1"), "secret"))
    peer = Contact(2, "b:1")
    for _ in range(2):
        for tell in (peers.heard, peers.fail, peers.fail, peers.heard, peers.heard):
            tell(peer)
    peers.fail(Contact(0, "c:1"))  # an address at which no node is known yet
    told = [record.getMessage().partition(" at ")[2] for record in caplog.records]
    assert told == ["b:1 does not answer", "b:1 answers again"] * 2


def test_an_answer_without_the_cluster_key_is_no_answer() -> None:
    seal = zs3_dist.Seal(Contact(1, "a:1"), "secret")
    call = zs3_dist.Call.__new__(zs3_dist.Call)
    call.question = zs3_dist.Question(Contact(2, "b:1"), "accept", b"{}")
    call.seal, call.mac = seal, "5" * 64
    proof = zs3_dist.Seal(Contact(2, "b:1"), "secret").proof("5" * 64, 200, b"{}")
    assert call.good(Reply(200, b"{}", proof))
    assert not call.good(Reply(200, b'{"done":true}', proof))
    assert not call.good(Reply(200, b"{}", ""))


# --- Blocks ---


def test_a_block_that_was_healed_while_it_was_found_bad_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, good = zs3_dist.Blocks(tmp_path), b"x" * 1000
    name = zs3_dist.block_hash(good)
    blocks.put(name, b"y" * 1000)

    def heals_first(data: bytes) -> str:
        monkeypatch.undo()
        blocks.put(name, good)
        return zs3_dist.block_hash(data)

    monkeypatch.setattr(zs3_dist, "block_hash", heals_first)
    assert blocks.get(name) is None
    assert blocks.get(name) == good and (blocks.count, blocks.total_bytes) == (1, 1000)


def test_with_fsync_a_block_is_flushed_and_then_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, flushed = zs3_dist.block_hash(b"x"), flushes(monkeypatch)
    zs3_dist.Blocks(tmp_path).put(zs3_dist.block_hash(b"y"), b"y")
    assert flushed == []
    blocks = zs3_dist.Blocks(tmp_path, fsync=True)
    blocks.put(block, b"x")
    temporary, *folders = flushed
    assert re.fullmatch(rf"{tmp_path}/{block}\.[0-9a-f]+\.tmp", temporary)
    assert folders == [str(blocks.path(block).parent), str(tmp_path)]


@pytest.mark.parametrize(("fsync", "level"), [(False, 0), (True, 2)])  # OFF and FULL
def test_with_fsync_the_registers_survive_a_loss_of_power(
    tmp_path: Path, fsync: bool, level: int
) -> None:
    registers = Registers(1, str(tmp_path / "registers.db"), fsync)
    assert registers._one("PRAGMA synchronous") == level
    registers.close()


def test_what_a_write_that_was_cut_off_left_is_removed_at_the_start(tmp_path: Path) -> None:
    left = tmp_path / f"{'0' * 64}.12345678.tmp"
    left.write_bytes(b"x")
    zs3_dist.Blocks(tmp_path)
    assert not left.exists()


def test_a_block_for_which_there_is_no_room_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    blocks = zs3_dist.Blocks(tmp_path)
    monkeypatch.setattr(zs3, "write_all", full)
    with pytest.raises(OSError, match="full"):
        blocks.put(zs3_dist.block_hash(b"x"), b"x")
    assert list(tmp_path.iterdir()) == [blocks.bad] and blocks.count == 0


def test_a_block_that_cannot_be_opened_now_is_not_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bytes:
        raise OSError(errno.EMFILE, "too many open files")

    blocks, block = zs3_dist.Blocks(tmp_path), zs3_dist.block_hash(b"x")
    blocks.put(block, b"x")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert blocks.get(block) is None and blocks.has(block)
    monkeypatch.undo()
    assert blocks.get(block) == b"x"


def test_a_block_that_is_there_is_flushed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = zs3_dist.block_hash(b"x")
    zs3_dist.Blocks(tmp_path).put(name, b"x")
    flushed = flushes(monkeypatch)
    blocks = zs3_dist.Blocks(tmp_path, fsync=True)
    blocks.put(name, b"x")
    path = blocks.path(name)
    assert flushed == [str(path), str(path.parent), str(tmp_path)]


def test_blocks_are_verified_set_aside_and_counted(tmp_path: Path) -> None:
    blocks = zs3_dist.Blocks(tmp_path)
    data = b"x" * 5000
    block = zs3_dist.block_hash(data)
    blocks.put(block, data)
    blocks.put(block, data)
    assert (blocks.get(block), blocks.count, blocks.total_bytes) == (data, 1, 5000)
    blocks.path(block).write_bytes(b"y" + data[1:])
    assert blocks.get(block) is None
    assert not blocks.has(block)
    assert (tmp_path / "bad" / block).exists()
    blocks.put(block, data)
    blocks.path(block).write_bytes(data[:100])  # half of it
    blocks.put(block, data)
    assert blocks.get(block) == data
    assert list(blocks.walk()) == [(block, 5000)]


def test_a_block_touched_since_is_not_removed(tmp_path: Path) -> None:
    blocks = zs3_dist.Blocks(tmp_path)
    block = zs3_dist.block_hash(b"x")
    blocks.put(block, b"x")
    touched = blocks.touched(block)
    assert touched is not None
    os.utime(blocks.path(block), (touched, touched + 1))
    assert blocks.remove(block, touched) == 0
    assert blocks.remove(block, touched + 1) == 1
    assert blocks.count == 0


def test_slices_are_the_bytes_of_the_range() -> None:
    pick = random.Random(3)
    size = zs3_dist.BLOCK_BYTES
    for _ in range(300):
        sizes = [
            pick.choice([1, size - 1, size, size + 1, 2 * size, 3 * size + 7])
            for _ in range(pick.randrange(1, 5))
        ]
        segments, layout = [], []
        for number, one in enumerate(sizes):
            count = -(-one // size)
            names = [f"{number * 100 + i:064x}" for i in range(count)]
            segments.append([one, "".join(names)])
            layout += [(names[i], min(size, one - i * size)) for i in range(count)]
        total = sum(sizes)
        start = pick.randrange(total)
        length = pick.randrange(1, total - start + 1)
        expected, position = [], 0
        for name, one in layout:
            low, high = max(start - position, 0), min(start + length - position, one)
            if low < high:
                expected.append((name, low, high))
            position += one
        assert zs3_dist.slices(segments, start, length) == expected


def test_merged_pages_are_the_live_keys_with_the_highest_ballot() -> None:
    pick = random.Random(4)
    for _ in range(300):
        owners: list[Registers] = [Registers(1, ":memory:") for _ in range(2)]
        for owner in owners:
            owner.install([View("0" * 16, 1, 3, (Contact(1, "a:1"),))])
        newest: dict[str, tuple[str, bool]] = {}
        keys = ["".join(pick.choice("ab/") for _ in range(pick.randrange(1, 5))) for _ in range(12)]
        for key in keys:
            for owner in owners:
                ballot = f"{pick.randrange(1, 99):036x}"
                alive = pick.random() < 0.6
                value = value_of("e") if alive else TOMBSTONE
                if pick.random() < 0.8 and ballot not in (newest.get(key, ("",))[0],):
                    owner.offer(1, "bucket", key, ballot, False, {**value, "base": ""})
                    slot = owner.slot("bucket", key)
                    if slot.accepted == ballot:
                        newest[key] = max(newest.get(key, ("", False)), (ballot, alive))
        live_keys = sorted(key for key, (_, alive) in newest.items() if alive)
        delimiter, prefix = pick.choice(["", "/"]), pick.choice(["", "a", "b/"])
        position: str | None = ""
        found: list[str] = []
        while position is not None:
            pages = [owner.page("bucket", prefix, position, delimiter, False) for owner in owners]
            for page in pages:  # as if a page held three
                if len(page["entries"]) > 3:
                    page["entries"], page["more"] = page["entries"][:3], True
            entries, position = zs3_dist.merge_pages(pages, prefix, delimiter)
            found += [key for key, _, _ in entries]
        expected = []
        groups = set()
        for key in live_keys:
            if key.startswith(prefix):
                group = zs3.common_prefix(key, prefix, delimiter)
                if not group or group not in groups:
                    expected.append(key)
                groups.add(group)
        shown = [zs3.common_prefix(k, prefix, delimiter) or k for k in found]
        assert shown == [zs3.common_prefix(k, prefix, delimiter) or k for k in expected]


# --- Real processes ---


QUICK = ("--gossip-interval-ms=300", "--gc-grace=1", "--tombstone-grace=3")
NODES: list[Process] = []


class Process:
    """`python zs3.py --distributed` on a port of its own; with `cwd`, in the folder it chooses."""

    def __init__(
        self, data: Path, *flags: str, bootstrap: Process | None = None, cwd: Path | None = None
    ) -> None:
        self.data, self.flags, self.cwd = data, flags, cwd
        self.join = [f"--bootstrap=127.0.0.1:{bootstrap.port}"] if bootstrap else []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.start()
        NODES.append(self)

    def start(self, *more: str) -> None:
        command = [
            sys.executable,
            str(Path(zs3_dist.__file__).with_name("zs3.py")),
            "--distributed",
        ]
        command += [f"--port={self.port}", "--host=127.0.0.1", "--quiet"]
        folder = [] if self.cwd else [f"--data-dir={self.data}"]
        self.process = subprocess.Popen(
            [*command, *QUICK, *folder, *self.flags, *self.join, *more],
            cwd=self.cwd,
            stderr=open(f"{self.data}.log", "ab"),  # noqa: SIM115
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        signer = Signer(("admin", "minioadmin", "minioadmin"))
        digest = sha256_hex(body)
        raw_path, _, query = path.partition("?")
        headers = {"host": f"127.0.0.1:{self.port}", "x-amz-date": signer.date}
        headers["x-amz-content-sha256"] = digest
        proof = signer.signature(method, raw_path, query, headers, digest)
        headers["authorization"] = signer.authorization(headers, proof)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def ping(self) -> Message:
        return cast(Message, json.loads(self.ask("GET", "/_zs3/ping")[1]))

    def wait(self, what: Callable[[Message], bool], seconds: float = 30.0) -> Message:
        """Until `ping` is as wanted."""
        deadline = time.monotonic() + seconds
        last: Any = None
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                last = self.ping()
                if what(last):
                    return cast(Message, last)
            time.sleep(0.05)
        raise AssertionError(f"{last} {Path(f'{self.data}.log').read_text()[-2000:]}")

    def logs(self, text: str, seconds: float = 30.0) -> None:
        """Until its log has this text."""
        deadline = time.monotonic() + seconds
        while text not in Path(f"{self.data}.log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def members(self, count: int) -> None:
        self.wait(lambda ping: ping["joined"] and ping["members"] == count and not ping["joining"])


def start_cluster(folder: Path, count: int) -> list[Process]:
    nodes = [Process(folder / "0")]
    nodes[0].members(1)
    nodes += [Process(folder / str(number), bootstrap=nodes[0]) for number in range(1, count)]
    for node in nodes:
        node.members(count)
    return nodes


@pytest.fixture(autouse=True)
def no_process_stays() -> Iterator[None]:
    yield
    while NODES:
        node = NODES.pop()
        node.process.send_signal(signal.SIGCONT)
        node.kill()


def test_a_cluster_all_of_whose_nodes_have_new_addresses_finds_together_again(
    tmp_path: Path,
) -> None:
    nodes = start_cluster(tmp_path, 3)
    assert nodes[0].ask("PUT", "/bucket")[0] == 200
    assert nodes[0].ask("PUT", "/bucket/k", b"there")[0] == 200
    for node in nodes:
        node.kill()
    for node in nodes:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            node.port = probe.getsockname()[1]
    addresses = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
    for node in nodes:
        node.join = [f"--bootstrap={addresses}"]
        node.start()
    for node in nodes:
        node.members(3)
        assert node.ask("GET", "/bucket/k") == (200, b"there")


BIG = random.Random(1).randbytes(2_500_000)  # three blocks


def test_a_write_on_any_node_is_read_and_listed_on_every_node_at_once(tmp_path: Path) -> None:
    nodes = start_cluster(tmp_path, 3)
    assert nodes[0].ask("PUT", "/bucket")[0] == 200
    for number, node in enumerate(nodes):
        assert node.ask("PUT", f"/bucket/{number}", BIG[number:])[0] == 200
        for other in nodes:
            assert other.ask("GET", f"/bucket/{number}") == (200, BIG[number:])
            assert f"<Key>{number}</Key>".encode() in other.ask("GET", "/bucket?list-type=2")[1]
    peers = json.loads(nodes[1].ask("GET", "/_zs3/peers")[1])["peers"]
    assert {peer["address"] for peer in peers} >= {f"127.0.0.1:{nodes[0].port}"}
    block = zs3_dist.block_hash(BIG[: 1 << 20])
    for node in nodes:
        assert len(json.loads(node.ask("GET", f"/_zs3/providers/{block}")[1])["providers"]) == 3
    assert not [path for node in nodes for path in node.data.glob(".cas/*.tmp")]


def test_a_hung_and_a_dead_node_cost_one_pause_each(tmp_path: Path) -> None:
    nodes = start_cluster(tmp_path, 3)
    nodes[0].ask("PUT", "/bucket")
    for spoil in (lambda: nodes[2].process.send_signal(signal.SIGSTOP), nodes[2].kill):
        spoil()
        began = time.monotonic()
        for number in range(20):
            assert nodes[0].ask("PUT", f"/bucket/{number}", BIG[: 20_000 + number])[0] == 200
            assert nodes[1].ask("GET", f"/bucket/{number}")[0] == 200
        assert time.monotonic() - began < 10
        nodes[2].process.send_signal(signal.SIGCONT)


def test_of_two_nodes_either_reads_alone_and_a_write_says_what_to_do(tmp_path: Path) -> None:
    first, second = start_cluster(tmp_path, 2)
    first.ask("PUT", "/bucket")
    for node in (first, second):
        assert node.ask("PUT", f"/bucket/{node.port}", BIG)[0] == 200
    node_id = first.ping()["node"]
    first.kill()
    for port in (first.port, second.port):
        assert second.ask("GET", f"/bucket/{port}") == (200, BIG)
    status, text = second.ask("PUT", "/bucket/more", b"x")
    assert status == 503
    assert f"127.0.0.1:{first.port} ({node_id})".encode() in text
    assert b"--forget" in text
    second.kill()
    second.start(f"--forget={node_id}")
    second.members(1)
    assert second.ask("PUT", "/bucket/more", b"x")[0] == 200
    assert second.ask("DELETE", f"/bucket/{first.port}")[0] == 204
    first.join = [f"--bootstrap=127.0.0.1:{second.port}"]
    first.start()
    first.members(2)
    assert first.ask("GET", f"/bucket/{first.port}")[0] == 404  # the others' word
    assert first.ask("GET", "/bucket/more") == (200, b"x")


def test_nodes_started_in_one_directory_have_a_folder_each(tmp_path: Path) -> None:
    first = Process(tmp_path / "log", cwd=tmp_path)
    first.members(1)
    second = Process(tmp_path / "log", bootstrap=first, cwd=tmp_path)
    second.members(2)
    for node in (first, second):
        folder = tmp_path / f"data-{node.port}"
        assert (folder / ".node_id").read_text().strip() == node.ping()["node"]


@pytest.mark.parametrize(
    "flag",
    ["--bootstrap=here", "--bootstrap=a:1,b:0", "--advertise=here", "--advertise=a:65536",
     "--advertise=a b:1", "--forget=abc", f"--forget={'g' * 40}"],
)  # fmt: skip
def test_an_address_or_node_id_that_is_none_is_said_plainly(tmp_path: Path, flag: str) -> None:
    node = Process(tmp_path / "data", flag)
    assert node.process.wait(30) == 1
    last = Path(f"{node.data}.log").read_text().splitlines()[-1]
    assert last.startswith(f"zs3: {flag.partition('=')[0]} wants ")


@pytest.mark.parametrize("junk", [b"", b"zz\n", b"\xff"])
def test_an_identity_that_is_none_is_said_plainly(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / ".index").mkdir()
    registers = Registers(1, str(tmp_path / ".index/registers.db"))
    registers.install([View("0" * 16, 1, 3, (Contact(1, "sim:1"),))])
    registers.close()
    (tmp_path / ".node_id").write_bytes(junk)
    with pytest.raises(SystemExit, match=f"no node's 40 hex digits in {tmp_path}/.node_id"):
        zs3_dist.node_id(tmp_path)


@pytest.mark.parametrize(
    ("host", "interface"),
    [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("192.0.2.7", "0.0.0.0"),
     ("a..b", "0.0.0.0")],
)  # fmt: skip
def test_the_kernel_chooses_the_interface_of_an_address_that_is_elsewhere(
    host: str, interface: str
) -> None:
    assert zs3_dist.interface_of(host) == interface


def test_a_node_that_cannot_be_announced_hears_the_others(
    lonely: Lonely, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mute(socket.socket):
        def sendto(self, *_: object) -> int:
            raise PermissionError(errno.EPERM, "a firewall")

    member = zs3_dist.Membership(lonely.store, [], 3)
    packet = zs3_dist.pack(["f" * 40, "127.0.0.1:10"])
    packet = lonely.peer.mark(packet) + packet
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        zs3_dist.join_group(other, "127.0.0.1")
        monkeypatch.setattr(socket, "socket", Mute)
        job = threading.Thread(target=member.discover)
        job.start()
        deadline = time.monotonic() + 10
        while not member.discovered and job.is_alive() and time.monotonic() < deadline:
            other.sendto(packet, zs3_dist.DISCOVERY_GROUP)
            time.sleep(0.05)
        lonely.store.closing.set()
        job.join()
    assert member.discovered == {"127.0.0.1:10"}


def test_without_a_network_it_is_said_that_others_need_another_address(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(zs3_dist, "DISCOVERY_GROUP", ("256.0.0.1", 9083))
    arguments = zs3.parse_arguments(["--distributed", "--host=0.0.0.0", "--port=9000"])
    assert zs3_dist.advertised(arguments) == "127.0.0.1:9000"
    assert "need an --advertise" in caplog.text


def test_a_job_may_rest_for_longer_than_the_machine_can_wait(lonely: Lonely) -> None:
    done = threading.Event()
    lonely.store.jobs = [(done.set, 1e12)]
    lonely.store.start()
    [thread] = [each for each in threading.enumerate() if each.name == "zs3-set"]
    assert done.wait(5)
    thread.join(0.05)
    assert thread.is_alive()
    lonely.store.closing.set()
    thread.join(5)
    assert not thread.is_alive()


def test_nodes_that_were_all_given_the_same_list_found_one_cluster(tmp_path: Path) -> None:
    nodes = [Process(tmp_path / str(number)) for number in range(3)]
    for node in nodes:
        node.kill()
        shutil.rmtree(node.data, ignore_errors=True)  # it may not have come so far
    listed = ",".join(f"localhost:{node.port}" for node in nodes)  # they call themselves 127.0.0.1
    for node in nodes:
        node.join = [f"--bootstrap={listed}"]
        node.start()
    for node in nodes:
        node.members(3)


def test_a_node_that_was_started_alone_first_joins_by_a_bootstrap_later(tmp_path: Path) -> None:
    """Of two without a bucket, the one that gives itself up may not know the other's address."""
    nodes = [Process(tmp_path / str(number)) for number in range(2)]
    for node in nodes:
        node.members(1)
    first, last = sorted(nodes, key=lambda node: node.ping()["node"])
    first.kill()
    first.join = [f"--bootstrap=127.0.0.1:{last.port}"]
    first.start()
    for node in nodes:
        node.members(2)


def test_two_nodes_that_swapped_addresses_find_together(tmp_path: Path) -> None:
    nodes = start_cluster(tmp_path, 2)
    for node in nodes:
        node.kill()
    nodes[0].port, nodes[1].port = nodes[1].port, nodes[0].port
    for node in nodes:
        node.join = []
        node.start()
    for node in nodes:
        node.members(2)


def test_the_folder_of_a_running_node_is_refused_to_another(tmp_path: Path) -> None:
    first = Process(tmp_path / "data")
    first.members(1)
    second = Process(tmp_path / "data")
    second.logs("waiting for its end")
    second.process.send_signal(signal.SIGTERM)
    assert second.process.wait(30) == 1
    second.logs("give this one its own")
    assert first.ask("PUT", "/bucket")[0] == 200


def test_a_restarted_node_waits_for_the_end_of_the_one_before(tmp_path: Path) -> None:
    first = Process(tmp_path / "data")
    first.members(1)
    node = first.ping()["node"]
    second = Process(tmp_path / "data")
    second.logs("waiting for its end")
    first.kill()
    second.members(1)
    assert second.ping()["node"] == node


def test_a_node_that_lost_its_disk_is_a_new_member(tmp_path: Path) -> None:
    nodes = start_cluster(tmp_path, 3)
    nodes[0].ask("PUT", "/bucket")
    nodes[0].ask("PUT", "/bucket/key", BIG)
    old = nodes[0].ping()["node"]
    nodes[0].kill()
    shutil.rmtree(nodes[0].data)
    nodes[0].join = [f"--bootstrap=127.0.0.1:{nodes[1].port}"]
    nodes[0].start()
    nodes[0].members(3)
    ping = nodes[0].wait(lambda ping: ping["blocks"] == 3)
    assert ping["node"] != old
    nodes[1].kill()
    assert nodes[0].ask("GET", "/bucket/key") == (200, BIG)
    assert nodes[2].ask("PUT", "/bucket/key2", BIG)[0] == 200


def test_the_founder_that_lost_its_disk_comes_back_by_the_command_that_founded(
    tmp_path: Path,
) -> None:
    nodes = start_cluster(tmp_path, 3)
    assert nodes[1].ask("PUT", "/bucket")[0] == 200
    assert nodes[1].ask("PUT", "/bucket/k", b"there")[0] == 200
    old = nodes[0].ping()["node"]
    nodes[0].kill()
    shutil.rmtree(nodes[0].data)
    nodes[0].start()
    nodes[0].wait(lambda ping: ping["joined"])
    assert nodes[0].ask("GET", "/bucket/k") == (200, b"there")  # though it just founded another
    nodes[0].members(3)
    assert nodes[0].ping()["node"] != old


def test_the_copy_of_a_disk_does_not_become_a_second_node_of_one_identity(tmp_path: Path) -> None:
    nodes = start_cluster(tmp_path, 3)
    nodes[2].kill()
    shutil.copytree(nodes[2].data, tmp_path / "copy")
    nodes[2].start()
    nodes[2].members(3)
    epoch = nodes[0].ping()["epoch"]
    copy = Process(tmp_path / "copy", bootstrap=nodes[0])
    copy.logs("has our id: a disk was copied")
    time.sleep(2)
    assert not copy.ping()["joined"] and nodes[0].ping()["epoch"] == epoch
    nodes[2].members(3)
    nodes[2].kill()
    copy.kill()
    copy.start()
    copy.members(3)  # now it is one that has moved
    nodes[2].start()
    nodes[2].logs("has our id: a disk was copied")
    assert not nodes[2].ping()["joined"]
    copy.members(3)


def test_a_member_silent_for_the_grace_is_forgotten_and_comes_back(tmp_path: Path) -> None:
    nodes = start_cluster(tmp_path, 3)
    nodes[0].ask("PUT", "/bucket")
    for number in range(5):
        nodes[0].ask("PUT", f"/bucket/{number}", b"x")
    nodes[2].kill()
    for number in range(5):
        assert nodes[0].ask("DELETE", f"/bucket/{number}")[0] == 204
    nodes[0].members(2)
    nodes[0].wait(lambda ping: ping["buried"] >= 5)  # the tombstones are gone
    nodes[2].start()
    nodes[2].members(3)
    time.sleep(1)
    for node in nodes:
        assert b"<Key>" not in node.ask("GET", "/bucket?list-type=2")[1]
        assert node.ask("GET", "/bucket/0")[0] == 404


def test_a_flipped_byte_is_healed_and_deleting_gives_all_back(tmp_path: Path) -> None:
    nodes = start_cluster(tmp_path, 3)
    nodes[0].ask("PUT", "/bucket")
    for key in "abcde":
        nodes[ord(key) % 3].ask("PUT", f"/bucket/{key}", BIG)
    for node in nodes:
        assert node.wait(lambda ping: ping["blocks"] == 3)["bytes"] == len(BIG)
    for path in nodes[1].data.glob(".cas/*/*.blob"):
        path.write_bytes(b"!" + path.read_bytes()[1:])
    assert nodes[1].ask("GET", "/bucket/a") == (200, BIG)
    for path in nodes[1].data.glob(".cas/??/*.blob"):
        assert zs3_dist.block_hash(path.read_bytes()) == path.stem
    for key in "abcde":
        nodes[0].ask("DELETE", f"/bucket/{key}")
    for node in nodes:
        assert node.wait(lambda ping: ping["blocks"] == 0)["bytes"] == 0


def test_nodes_find_each_other_by_multicast(tmp_path: Path) -> None:
    secret = f"--cluster-secret={tmp_path}"  # not that of another cluster on this machine
    nodes = [Process(tmp_path / str(n), "--discover", secret) for n in range(3)]
    for node in nodes:
        node.members(3)


@pytest.mark.parametrize("deleted", [False, True])
def test_a_list_does_not_show_what_a_get_may_then_not_find(deleted: bool) -> None:
    """A change that only one of three owners has accepted: either LIST settles it for good, or
    does not show it."""
    for seed in range(20):
        net = Net(seed, 3)
        first, _, third = net.nodes
        cluster = net.clusters[first]
        store = zs3_dist.DistributedStore(cluster)
        store.create_bucket("bucket")
        old = {**value_of("old"), "id": "0" * 16}
        cluster.run(cluster.rounds.change("bucket", "key", lambda current, old=old: old))
        ballot = f"{1:08x}{500:012x}{'0' * 16}"
        for node in net.nodes.values():
            assert "accepted" in node.registers.prepare("bucket", "key", ballot)
        new = {**(TOMBSTONE if deleted else value_of("new")), "id": "1" * 16, "base": ""}
        registers = net.nodes[third].registers
        assert registers.accept("bucket", "key", ballot, new, False, None) == {"done": True}
        listed = [info.etag for info in store.scan("bucket", "", "", "")]
        net.down.add(third)
        value, _ = cluster.run(cluster.rounds.read("bucket", "key"))
        assert listed == ([value["info"]["etag"]] if value else [])


# --- Tools ----------------------------------------------------------------------------------------

STYLE_PATH = HERE / "tools" / "style.py"


def load_tool(name: str) -> Any:
    """A module of tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, HERE / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


style = load_tool("style")

GOOD_MODULE = '''\
"""zs3: one line.

A request passes socket -> 3 Command line -> 2 Errors.

    1 Limits         what is bounded
    2 Errors (codes) and their
                     5 statuses
    3  Command line - main
"""

# ==== 1 Limits ====

MAX_KEY_BYTES = 1024

# ---- 2 Errors (codes) ------------

ERRORS = {"NoSuchKey": (404, "The key does not exist."), "SlowDown": (503, "Retry.")}
NAMES: dict[str, int] = {}


class S3Error(Exception):
    """An answer."""

    def __str__(self):
        return "x"

    def __init__(self, code):
        self.code = code
        self.status = ERRORS[code]


class Store(Protocol):
    """What is asked."""

    def scan(self):
        """In order."""


class FileStore:
    """Files."""

    def scan(self):
        return self.scan()

    def _own(self):
        self._own()
        try:
            pass
        except KeyError:
            pass  # S3: deleting what is not there succeeds
        # The other end may have gone.
        with suppress(OSError):
            pass


# ==== 3 Command line


def main():
    """Runs."""
    if MAX_KEY_BYTES:
        raise S3Error("NoSuchKey" if FileStore() else "SlowDown")
    NAMES.clear()
    print(Store)


if __name__ == "__main__":
    main()
'''


def messages(*sources: str) -> list[str]:
    names = ("zs3.py", "zs3_dist.py")
    modules = [style.Module(name, text) for name, text in zip(names, sources, strict=False)]
    return [
        f"{finding.path}:{finding.line}: {finding.message}" for finding in style.findings(modules)
    ]


def only(check: str, source: str, *others: str) -> list[str]:
    names = ("zs3.py", "zs3_dist.py")
    sources = [textwrap.dedent(text) for text in (source, *others)]
    modules = [style.Module(name, text) for name, text in zip(names, sources, strict=False)]
    return [finding.message for finding in getattr(style, "check_" + check)(modules)]


def test_good_code_has_no_findings():
    assert messages(GOOD_MODULE) == []


@pytest.mark.parametrize(
    "old, new, expected",
    [
        (
            "# ==== 3 Command line",
            "# ==== 3 Commands",
            "banner 3 Commands is not in the section map",
        ),
        ("# ==== 3 Command line", "# ==== 3 Commands", "map entry 3 Command line has no banner"),
        ("# ==== 3 Command line", "# ==== 4 Command line", "stands where 3 is due"),
        (
            "# ==== 3 Command line",
            "# === 3 Command line ===\n# === 4 X ===",
            "banner 4 X is not in",
        ),
        ("# ==== 3 Command line", "", "map entry 3 Command line has no banner"),
        (
            "    3  Command line",
            "    4  Command line",
            "map entry 4 Command line stands where 3 is due",
        ),
        ("    1 Limits", "    Limits", "the module docstring has no numbered section map"),
        ("    if MAX_KEY_BYTES:", "    if 1024:", "limit MAX_KEY_BYTES is never read"),
        ("    NAMES.clear()\n", "", "NAMES is never used"),
        ("self._own()", "self", "FileStore._own is never used"),
        ("# S3: deleting what is not there succeeds", "# noqa", "no comment says why"),
        ("        # The other end may have gone.\n", "", "no comment says why"),
        ("except KeyError", "except Exception", "drops exceptions of any kind"),
        ("except KeyError", "except (KeyError, BaseException)", "drops exceptions of any kind"),
        ("except KeyError", "except", "bare except"),
        ('else "SlowDown")', 'else "SlowUp")', "SlowDown is never raised"),
        ('else "SlowDown")', 'else "SlowUp")', "SlowUp is not in ERRORS"),
        ('    """Runs."""\n', "", "main has no docstring"),
        ('    """Files."""\n', "", "FileStore has no docstring"),
        ('        """In order."""\n', "        x = 1\n", "scan has no docstring"),
        ('        return "x"\n', '        x = "x"\n        return x\n', "__str__ has no docstring"),
        ('    """Runs."""\n', '    """Runs."""\n' + "\n" * 46, "main has 52 lines"),
        ('"""Runs."""', '"""Runs."""  #' + "x" * 83, "line of 101 characters"),
    ],
)
def test_a_change_for_the_worse_is_found(old, new, expected):
    assert old in GOOD_MODULE
    found = messages(GOOD_MODULE.replace(old, new))
    assert any(expected in message for message in found), found


def test_a_finding_names_file_and_line():
    assert messages(GOOD_MODULE.replace("except KeyError", "except")) == ["zs3.py:49: bare except"]


def test_a_function_of_50_lines_and_a_line_of_100_characters_are_not_findings():
    body = '    """Runs."""  #' + "ü" * 82 + "\n" * 45
    assert messages(GOOD_MODULE.replace('    """Runs."""\n', body)) == []


@pytest.mark.parametrize(
    "docstring",
    [
        "x.\n\nSections: 1 One - 2 Two words - 3 Version 4\n          4 Four\n",
        "x.\n\n    zs3.py  1 One · 2 Two words (and, others) · 3 Version 4\n            4 Four",
        "x.\n\n1. One\n2. Two words: for 3 people\n3. Version 4   and 5 others\n4. Four.\n\n7 Else",
    ],
)
def test_the_map_may_be_laid_out_in_several_ways(docstring):
    expected = [(1, "One"), (2, "Two words"), (3, "Version 4"), (4, "Four")]
    assert style.map_entries(docstring) == expected


def test_a_banner_is_a_comment_at_the_margin_and_not_a_string():
    source = (
        'x = """\n# ==== 1 One ====\n"""\nif x:\n    # ==== 2 Two ====\n    y = "# == 3 Three =="\n'
    )
    assert style.Module("zs3.py", source).sections == []


def test_what_only_unused_code_uses_is_unused():
    source = """
        def f(n): return f(n - 1)
        def g(): return h()
        def h(): return g() + A
        A = 1
        B: int = 2
        C, D = 3, 4
        class K: pass
        __version__ = D
        """
    assert sorted(only("names", source)) == [f"{name} is never used" for name in "ABCKfgh"]


def test_one_module_may_use_what_the_other_defines():
    zs3 = """
        def a(): pass
        def b(): pass
        def c(): pass
        import zs3_dist
        zs3_dist.open_store()
        """
    dist = """
        from zs3 import a, b as bee
        import zs3
        def open_store(): a(); bee(); zs3.c()
        """
    assert only("names", zs3, dist) == []
    assert only("names", zs3) == ["a is never used", "b is never used", "c is never used"]
    assert only("names", zs3, dist.replace("a(); ", "")) == ["a is never used"]


def test_what_a_decorator_registers_is_used():
    source = """
        def route(path): return {}.setdefault(path)
        @route("/x")
        def x(): return helper()
        def helper(): pass
        @functools.cache
        def y(): pass
        """
    assert only("names", source) == ["y is never used"]


def test_methods_that_a_foreign_base_may_call_are_used():
    source = """
        class A(http.server.BaseHTTPRequestHandler):
            def do_GET(self): pass
        class B(NamedTuple):
            def lonely(self): pass
        class C(B, Generic[T]):
            def also(self): pass
        A, B, C
        sys.modules["zs3"] = A
        """
    assert only("names", source) == ["B.lonely is never used", "C.also is never used"]


def test_a_limit_of_either_module_may_be_read_in_the_other():
    zs3 = "# == 1 Limits ==\nMAX_A = 1\nMAX_B = MAX_C = 2\n# == 2 Rest ==\nprint(MAX_A)"
    dist = "# == 1 Limits ==\nMAX_D = 1\nimport zs3\nfrom zs3 import MAX_B\nprint(MAX_B, zs3.MAX_C)"
    assert only("names", zs3, dist) == ["limit MAX_D is never read"]


@pytest.mark.parametrize(
    "body, dropped",
    [
        ("pass", True),
        ("continue", True),
        ("break", True),
        ("return", True),
        ("return None", False),
        ("...", True),
        ("return False", False),
        ("raise", False),
        ("LOG.info('gone')", False),
        ("pass  # a client that went away is no error", False),
        ("# a client that went away is no error\n        pass", False),
        ("pass  # type: ignore", True),
    ],
)
def test_a_dropped_exception_needs_a_reason(body, dropped):
    source = f"for i in x:\n    try:\n        f()\n    except OSError:\n        {body}\n"
    found = only("exceptions", source)
    assert found == ["drops an exception, and no comment says why"] * dropped


def test_suppress_needs_a_reason_too():
    assert only("exceptions", "with contextlib.suppress(OSError):\n    f()") != []
    assert only("exceptions", "with contextlib.suppress(OSError):  # gone: fine\n    f()") == []
    assert only("exceptions", "with suppress(Exception):  # fine\n    f()") != []


@pytest.mark.parametrize(
    "table",
    [
        'ERRORS = {"A1": (404, "Not there."), "B2": (400, "Wrong.")}',
        'ERRORS: dict[str, Row] = {row.code: row for row in (Row("A1", 404, "No."), Row("B2", 1))}',
        'ERRORS = (("A1", 404, "Not there."), ("B2", 400, "Wrong."))',
    ],
)
def test_error_codes_are_found_in_tables_of_several_forms(table):
    assert only("error_codes", table + '\nraise S3Error("A1")\nCODE = "B2"') == []
    assert only("error_codes", table + '\nraise zs3.S3Error("A1", Key=k)') == ["B2 is never raised"]
    assert only("error_codes", table, 'S3Error("A1" if x else "C3")\n"B2"') == [
        "C3 is not in ERRORS"
    ]


def test_private_names_setters_and_what_a_base_documents_need_no_docstring():
    source = '''
        class A:
            """A."""
            def f(self):
                """F."""
            @x.setter
            def x(self, value): pass
        class B(A):
            """B."""
            def f(self):
                def inner(): pass
            def g(self): pass
        class _C:
            def f(self): pass
        def _d(): pass
        '''
    assert only("docstrings", source) == ["g has no docstring"]


def test_the_command_prints_findings_and_sizes_and_exits_1(tmp_path):
    path = tmp_path / "zs3.py"
    path.write_text(GOOD_MODULE)
    command = [sys.executable, str(STYLE_PATH), "--stats", str(path)]
    good = subprocess.run(command, check=False, capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    assert good.stdout.startswith(
        f"{path}: 68 lines, 6 functions, median 2.5, nine in ten within 9,"
    )
    path.write_text(GOOD_MODULE.replace("except KeyError", "except"))
    bad = subprocess.run(command[:2] + command[3:], check=False, capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (1, f"{path}:49: bare except\n")


@pytest.mark.timeout(300)
def test_a_short_storm_over_a_cluster_breaks_no_promise() -> None:
    assert load_tool("chaos").short() == []


def test_the_checker_of_histories_finds_what_is_wrong_and_nothing_else() -> None:
    assert load_tool("chaos").selftest() == []


def test_the_bugs_that_the_storm_is_tried_on_can_be_put_into_the_code_as_it_is() -> None:
    chaos = load_tool("chaos")
    assert len({chaos.broken(bug) for bug in chaos.PLANTED}) == 3


# --- Agreement -----------------------------------------------------------------------------------


def test_errors_have_the_status_of_the_s3_reference() -> None:
    assert {code: status for code, (status, _) in zs3.ERRORS.items()} == {
        code: STATUS[code] for code in zs3.ERRORS
    }


README = (HERE / "README.md").read_text() if (HERE / "README.md").exists() else ""
UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def readme_rows(*titles: str) -> list[list[str]]:
    """The cells of all tables of the README whose header begins with these titles."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", README, re.M):
        rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in block.splitlines()]
        if rows[0][: len(titles)] == list(titles):
            found += rows[2:]
    return found


def test_the_readme_has_the_operations_of_the_code() -> None:
    written = []
    for name, method, resource, narrowed, permission, *_ in readme_rows("Operation", "Method"):
        subresources = re.search(r"`\?([^`]*)`", narrowed)
        header = re.search("`([^`?]*):`", narrowed)
        names = frozenset(subresources[1].split("&")) if subresources else frozenset()
        written.append((method, resource, names, header[1] if header else "", permission))
        route = next(each for each in zs3.ROUTES if route_row(each) == written[-1])
        function = route.operation.__name__.replace("_", "")
        own = "configuration" not in function and function != "getacl"
        assert not own or function.removesuffix("page") == name.strip("`").lower()
    assert sorted(map(str, written)) == sorted(str(route_row(route)) for route in zs3.ROUTES)


def route_row(route: Any) -> tuple[str, str, frozenset[str], str, str]:
    names = frozenset(route.subresources)
    return route.method, route.resource, names, route.header, route.permission


def test_the_readme_has_the_answers_of_the_probes(disk: Client) -> None:
    disk.put("k", b"x").ok()
    for _, _, resource, narrowed, _, said in readme_rows(
        "Operation", "Method", "Resource", "Sub-resource", "Permission", "Answer"
    ):
        name = narrowed.strip("`?")
        answer = (
            disk.on_bucket("GET", name) if resource == "bucket" else disk.on_key("GET", "k", name)
        )
        words = re.findall("`([^`]+)`", said)
        if answer.status == 200:
            assert words[:1] in ([answer.xml.tag], [] if name == "acl" else None)
            assert set(words[1:]) <= {element.text for element in answer.xml}
        else:
            assert [answer.error] == words


def test_the_readme_has_the_limits_of_the_code() -> None:
    modules = {"zs3": zs3, "zs3_dist": zs3_dist}
    names = set()
    for name, value, *_ in readme_rows("Limit", "Value"):
        module, _, constant = name.strip("`").rpartition(".")
        number, _, unit = value.partition(" ")
        names.add(constant)
        if modules[module or "zs3"]:
            assert getattr(modules[module or "zs3"], constant) == int(number) * UNITS[unit], name
    assert {name for name in vars(zs3) if re.match("(MAX|MIN)_", name)} <= names


def test_the_readme_names_errors_and_flags_that_there_are() -> None:
    words = set(re.findall("`([A-Z][A-Za-z0-9]+)`", README))
    assert words & set(STATUS) <= set(zs3.ERRORS)
    ours = [line for line in README.splitlines() if "aws" not in line and "CLI" not in line]
    commands = "\n".join(line for line in ours if "python zs3.py" in line)
    flags = {*re.findall("`--([a-z-]+)", "\n".join(ours)), *re.findall(" --([a-z-]+)", commands)}
    assert flags <= {option.name for option in zs3.OPTIONS} | {"help", "version"}
    variables = {"ZS3_" + option.name.upper().replace("-", "_") for option in zs3.OPTIONS}
    named = {name.removesuffix("_FILE") for name in re.findall("ZS3_[A-Z_]+", README)}
    assert named <= variables | {"ZS3_"}


def test_the_readmes_boto3_example_runs(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    monkeypatch.chdir(HERE)
    with Server("--bucket=photos", data=folder) as server:
        for _ in range(2):
            exec(
                compile(
                    code.replace("localhost:9000", f"127.0.0.1:{server.port}"), "README.md", "exec"
                ),
                {},
            )
    assert capsys.readouterr().out.strip()
    assert [path for path in (folder / "photos").rglob("*") if path.is_file()]


def test_the_map_of_zs3_is_its_sections() -> None:
    source = (HERE / "zs3.py").read_text()
    listed = re.findall(r"^ +(\d+) ([A-Z].*)$", zs3.__doc__ or "", re.M)
    assert listed == re.findall(r"^# ===== (\d+) (.*) =====$", source, re.M)


def test_every_error_was_provoked_by_some_test(request: pytest.FixtureRequest) -> None:
    """Stands last. Says nothing when only some of the tests were run."""
    ran = {item.name.partition("[")[0] for item in request.session.items}
    if (
        request.session.testsfailed
        or {name for name in globals() if name.startswith("test_")} - ran
    ):
        pytest.skip("not all tests have run and passed")
    assert set(zs3.ERRORS) - PROVOKED == set()
