#!/usr/bin/env python3
"""zs3: S3-compatible object storage on plain files, in one module of the standard library.

    python zs3.py --port=9000             the server; `python zs3.py --help` is the manual
    data/mybucket/folder/file.txt         is the object `folder/file.txt` of the bucket `mybucket`

The path of a request, by section:

    socket -> head (11) -> Request, its body unread (4) -> signature, from the head alone (5)
           -> route, one row of a table (10) -> role and names checked (10) -> operation (9, 8)
           -> store, which reads the body (6) into a temporary file and renames it once (7)
           -> Response, a value (4) -> socket (11)

Sections:

     1 Limits
     2 Errors
     3 Wire encoding
     4 Requests and responses
     5 Signature Version 4
     6 Request bodies and checksums
     7 Storage
     8 Multipart
     9 Operations
    10 Routes
    11 HTTP server
    12 Command line

On disk, under --data-dir:

    BUCKET/KEY            an object at its literal path, described by one extended attribute
    .keys/BUCKET/NAME     an object whose key no path can spell (`a//b`, `dir/`) or whose path was
                          taken (`a` beside `a/b`), under a spelling of the key that a path can hold
    .meta/BUCKET/         when the bucket was made; descriptions that no attribute can hold
    .uploads/BUCKET/ID/   a multipart upload in progress: 00000 is the upload, 00001 ... its parts
    .tmp/                 files being written: never an object until renamed
    .locks/               empty files that processes sharing the folder lock

Refused, always with an S3 error and without a change: what is not done here (to set versioning,
ACLs, policies, tagging, lifecycle, object lock, encryption, ...) and every declared digest, length,
date or signature that does not hold.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import heapq
import hmac
import http.client
import importlib
import io
import itertools
import json
import logging
import math
import mimetypes
import mmap
import os
import re
import resource
import secrets
import select
import selectors
import signal
import socket
import stat
import struct
import sys
import threading
import time
import zlib
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from email.utils import formatdate, parsedate_to_datetime
from http.server import ThreadingHTTPServer
from queue import SimpleQueue
from socketserver import BaseRequestHandler
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar
from urllib.parse import quote, unquote, unquote_to_bytes
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

VERSION = "1.0.0"
LOG = logging.getLogger("zs3")

# ===== 1 Limits =====

KiB, MiB, GiB = 1024, 1024**2, 1024**3

MAX_HEAD_BYTES = 16 * KiB  # request line and headers; long presigned URLs and 2 KB of metadata fit
MAX_KEY_BYTES = 1024  # of UTF-8; S3 "Object key names"
MIN_BUCKET_CHARS, MAX_BUCKET_CHARS = 3, 63  # S3 "Bucket naming rules"
MAX_METADATA_BYTES = 2 * KiB  # x-amz-meta-*, names and values; S3 "User-defined metadata"
MAX_PUT_BYTES = 5 * GiB  # one PUT or part; S3 "Uploading objects"
MIN_PART_BYTES = 5 * MiB  # every part but the last; S3 "Multipart upload limits"
MAX_PART_NUMBER = 10_000  # S3 "Multipart upload limits"
MAX_DELETE_KEYS = 1000  # of one DeleteObjects; S3 API reference
MAX_PAGE_ITEMS = 1000  # of one listing; a larger max-keys is taken as this
MAX_PAGE_BUCKETS = 10_000  # ListBuckets max-buckets
MAX_DOCUMENT_BYTES = 4 * MiB  # an XML request body: 10,000 parts with checksums fit
MAX_XML_DEPTH = 8  # of a request body: twice what S3's have
MAX_XML_ELEMENTS = 100_000  # and attributes: 10,000 parts with number, ETag and checksums fit
MAX_XML_TAG_BYTES = 16 * KiB  # and the text behind it: a key in which all is escaped fits
MAX_TRAILER_BYTES = 4 * KiB  # everything after the last chunk of a body
MAX_CHUNK_LINE_BYTES = 512  # a chunk's size and signature
MAX_PRESIGNED_SECONDS = 7 * 24 * 3600  # X-Amz-Expires; S3 "Query string authentication"
MAX_SKEW_SECONDS = 15 * 60  # between a request's date and ours; S3 "RequestTimeTooSkewed"
MAX_CONNECTIONS = 1024  # per process; then a silent one has to go, or the next is told SlowDown
BACKLOG = 1024  # connections that were made and wait to be accepted
MAX_FILE_NAME_BYTES = 255  # of a path component, on every file system in use
MAX_CACHED_NAMES = 2_000_000  # directory entries remembered for listings; about 100 bytes each
DIRECTORY_NAMES = 8  # a remembered directory counts as this many names beside its own
BLOCK_BYTES = 512 * KiB  # a body is read, hashed and written in blocks of this
BODY_BLOCKS = 3  # of a body in memory: with two, hashing and receiving wait for each other
CRC_PIECE_BYTES = 256 * KiB  # a CRC in Python holds the interpreter for about 1 ms of these
SMALL_BYTES = 64 * KiB  # up to here a body is sent in one piece with its head, above it by sendfile
LARGE_BYTES = MiB  # beyond this an answer is given a thread before it is sent
SOCKET_SECONDS = 60.0  # without a byte from or to the client, the connection ends
LINGER_SECONDS = 5.0  # a refused upload is read on for this long: its sender shall see the answer
TURN_SECONDS = 0.05  # who takes longer to answer a request is not waited for by the others
EAGER_SECONDS = 0.00005  # a request that comes so soon is not slept for: to wake up takes as long
DELETE_SECONDS = 30.0  # for the keys of one DeleteObjects: its client has not gone yet
OWN_SECONDS = 1.0  # a connection whose request had to wait keeps its thread for so long after it
SPARE_THREADS = 16  # are kept for requests that wait
SHARE_SECONDS = 0.00002  # a worker lets others accept for so long for each busy connection it has
FULL_SECONDS = 0.1  # between two tries to accept a connection at the limit of open files
STOP_SECONDS = 0.01  # between two looks whether all requests are answered after SIGTERM
SHUTDOWN_SECONDS = 20.0  # requests under way may take this long after SIGTERM
TEMP_SECONDS = 3600.0  # an untouched temporary file is older than any live request
RACY_SECONDS = 2.0  # a folder changed just now may change again within one tick of its mtime
DESCRIPTION_SECONDS = 7 * 24 * 3600.0  # without its object, which may come back from a backup
EARLIEST_SECONDS = 11 * 366 * 24 * 3600.0  # after 1970; FAT says 1980 where it is told less
REREADS = 2  # of a folder that changes while it is read
RESPAWN_SECONDS = 1.0  # before a worker that ended is replaced: what ended it may be lasting
SWEEP_SECONDS = 3600.0  # between two looks for stale uploads
STACK_BYTES = MiB  # of a connection's thread: a key of 512 folders is listed by as many generators
RACE_TRIES = 100  # how often to begin anew what someone's deletions beside undid
LOCK_STRIPES = 64  # keys share this many lock files

# ===== 2 Errors =====

# Code -> HTTP status and message. (S3 API reference, "Error responses")
ERRORS: dict[str, tuple[int, str]] = {
    "AccessControlListNotSupported": (400, "The bucket does not allow ACLs."),
    "AccessDenied": (403, "Access Denied."),
    "AccessForbidden": (403, "CORSResponse: This CORS request is not allowed."),
    "AuthorizationHeaderMalformed": (400, "The authorization header is malformed."),
    "AuthorizationQueryParametersError": (400, "The authorization query parameters are malformed."),
    "BadDigest": (400, "The digest you specified did not match the content we received."),
    "BadRequest": (400, "The request is not valid."),
    "BucketNotEmpty": (409, "The bucket you tried to delete is not empty."),
    "EntityTooLarge": (400, "Your proposed upload exceeds the maximum allowed size."),
    "EntityTooSmall": (400, "Your proposed upload is smaller than the minimum allowed size."),
    "HTTPVersionNotSupported": (505, "Only HTTP/1.1 and HTTP/1.0 are spoken here."),
    "IncompleteBody": (400, "The body ended before the number of bytes it declared."),
    "InsufficientStorage": (507, "There is no space left on the server's disk."),
    "InternalError": (500, "We encountered an internal error. Please try again."),
    "InvalidAccessKeyId": (403, "The access key id you provided does not exist in our records."),
    "InvalidArgument": (400, "Invalid argument."),
    "InvalidBucketName": (400, "The specified bucket is not valid."),
    "InvalidChunkSizeError": (400, "A chunk of the body is framed wrongly."),
    "InvalidDigest": (400, "The Content-MD5 or checksum value that you specified is not valid."),
    "InvalidPart": (400, "A part could not be found, or does not match its ETag or checksum."),
    "InvalidPartNumber": (416, "The requested partnumber is not satisfiable."),
    "InvalidPartOrder": (400, "The list of parts was not in ascending order."),
    "InvalidRange": (416, "The requested range is not satisfiable."),
    "InvalidRequest": (400, "The request is not valid."),
    "InvalidStorageClass": (400, "The only storage class here is STANDARD."),
    "InvalidToken": (400, "Session tokens are not issued here, so none is valid."),
    "InvalidURI": (400, "Couldn't parse the specified URI."),
    "KeyTooLongError": (400, "Your key is too long."),
    "MalformedTrailerError": (400, "The trailers are not those that x-amz-trailer announced."),
    "MalformedXML": (400, "The XML you provided was not well-formed or not what is expected."),
    "MetadataTooLarge": (400, "Your metadata headers exceed the maximum allowed metadata size."),
    "MethodNotAllowed": (405, "The specified method is not allowed against this resource."),
    "MissingContentLength": (411, "You must provide the Content-Length HTTP header."),
    "NoSuchBucket": (404, "The specified bucket does not exist."),
    "NoSuchBucketPolicy": (404, "The bucket policy does not exist."),
    "NoSuchCORSConfiguration": (404, "The CORS configuration does not exist."),
    "NoSuchKey": (404, "The specified key does not exist."),
    "NoSuchLifecycleConfiguration": (404, "The lifecycle configuration does not exist."),
    "NoSuchPublicAccessBlockConfiguration": (404, "The public access block does not exist."),
    "NoSuchTagSet": (404, "The TagSet does not exist."),
    "NoSuchUpload": (404, "The specified multipart upload does not exist."),
    "NoSuchVersion": (404, "Versions are not kept here: the only version id is null."),
    "NoSuchWebsiteConfiguration": (404, "The bucket has no website configuration."),
    "NotImplemented": (501, "This functionality is not implemented."),
    "ObjectLockConfigurationNotFoundError": (404, "Object lock is not configured for this bucket."),
    "OwnershipControlsNotFoundError": (404, "The bucket ownership controls were not found."),
    "PreconditionFailed": (412, "At least one of the preconditions you specified did not hold."),
    "ReplicationConfigurationNotFoundError": (404, "The replication configuration was not found."),
    "RequestHeaderSectionTooLarge": (431, "Your request header section is too large."),
    "RequestTimeTooSkewed": (403, "The request time and the server's time differ too much."),
    "RequestTimeout": (400, "Your socket connection was not read from or written to in time."),
    "ServerSideEncryptionConfigurationNotFoundError": (404, "No encryption is configured."),
    "SignatureDoesNotMatch": (403, "The request signature we calculated does not match yours."),
    "SlowDown": (503, "Please reduce your request rate, or try again later."),
    "XAmzContentSHA256Mismatch": (400, "The x-amz-content-sha256 does not match the body."),
}  # fmt: skip

# What the operating system may say of a disk or a limit -> what the client is told.
OS_ERRORS = {
    errno.ENOSPC: "InsufficientStorage",
    errno.EDQUOT: "InsufficientStorage",
    errno.EFBIG: "InsufficientStorage",
    errno.EXDEV: "InternalError",  # a bucket on another file system than the data folder
    errno.EACCES: "AccessDenied",
    errno.EPERM: "AccessDenied",
    errno.EROFS: "AccessDenied",
    errno.EAGAIN: "SlowDown",  # somebody has a lease on the file, as Samba takes them
    errno.ETIMEDOUT: "SlowDown",  # a network file system's server is away
    errno.ESTALE: "SlowDown",  # or another machine has just replaced the file there
    errno.ENAMETOOLONG: "KeyTooLongError",  # for a file system with shorter names than all in use
    errno.EMFILE: "SlowDown",
    errno.ENFILE: "SlowDown",
}


class S3Error(Exception):
    """An answer other than success. `code` is a row of ERRORS; `details` become elements of the
    answer's XML."""

    def __init__(self, code: str, message: str = "", /, **details: object) -> None:
        self.code = code
        self.status, default = ERRORS[code]
        self.message = message or default
        self.details = details
        super().__init__(f"{code}: {self.message}")


class Gone(Exception):
    """The client went away: there is nobody to answer. No OSError: that is of the server's side."""


class Silent(Gone):
    """The client sends or takes nothing for SOCKET_SECONDS."""


def as_s3_error(error: S3Error | OSError, during: str) -> S3Error:
    """What the client is told, and the log of what the system said; raises what only a bug can be.
    """
    if isinstance(error, S3Error):
        return error
    code = OS_ERRORS.get(error.errno or 0)
    if code is None:
        raise error
    LOG.error("%s: %s", during, error)
    whose = "The server may not do this in its own folder: see its log."
    return S3Error(code, whose if code == "AccessDenied" else "")


# ===== 3 Wire encoding =====

TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # a header's name (RFC 9110, 5.6.2)
HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
TARGET = re.compile(r"/[\x21-\x7e]*")
ABSOLUTE = re.compile(r"http://([!-.0->@-~]+)(/[!->@-~]*)?(\?[!-~]*)?", re.I)  # RFC 9112, 3.2.2
BLANKS = re.compile("[ \t]+")
# After BLANKS: with \s* at each place, n blanks would be divided among them in n^3 ways.
RANGE = re.compile(r"bytes ?= ?(\d{0,99}) ?- ?(\d{0,99})", re.ASCII | re.IGNORECASE)
PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")  # a percent sign that encodes nothing
S3_NAMESPACE = ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
# Hosts that no public name server speaks for: short names, reserved domains, addresses.
LOCAL_HOST = re.compile(
    r"[^.]*|.+\.(internal|local|localdomain|localhost|test)|[0-9.]+|\[[0-9a-f:.]+\]"
)
PLAIN_PATH = re.compile(r"[A-Za-z0-9\-_.~/]*")  # nothing to decode or to encode
LONG_TAG = re.compile(rb"<[^<]{%d}" % MAX_XML_TAG_BYTES)
UNSPELLABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")  # what XML text cannot carry


def uri_decode(text: str) -> str:
    """Undo percent-encoding, once: latin-1 text to UTF-8. InvalidURI when it cannot be."""
    if "%" not in text and text.isascii():
        return text
    if PERCENT.search(text):
        raise S3Error("InvalidURI")
    try:
        return unquote_to_bytes(text.encode("latin-1")).decode("utf-8")
    except UnicodeDecodeError:
        raise S3Error("InvalidURI", "The URI is not UTF-8.") from None


def split_query(raw_query: str) -> list[tuple[str, str]]:
    """A query as decoded names and values, in the order sent; "+" is a space, `?x` is `?x=`."""
    pieces = [piece.partition("=") for piece in raw_query.replace("+", "%20").split("&") if piece]
    return [(uri_decode(name), uri_decode(value)) for name, _, value in pieces]


def clamp_date(seconds: int) -> int:
    """The nearest second of the years 1000 to 9999: a file may have any date, a text may not."""
    return min(max(seconds, -30_610_224_000), 253_402_300_799)


@functools.lru_cache(maxsize=4096)
def http_date(seconds: int) -> str:
    """Seconds since the epoch as in headers: Sun, 06 Nov 1994 08:49:37 GMT (RFC 9110, 5.6.7)."""
    return formatdate(clamp_date(seconds), usegmt=True)


def iso_date(seconds: float) -> str:
    """Seconds since the epoch as in XML: 1994-11-06T08:49:37.123Z."""
    whole, milliseconds = divmod(int(seconds * 1000), 1000)
    return f"{iso_second(whole)}.{milliseconds:03d}Z"


@functools.lru_cache(maxsize=4096)
def iso_second(seconds: int) -> str:
    """The part of iso_date up to the seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(clamp_date(seconds)))


def parse_http_date(text: str) -> float | None:
    """Seconds since the epoch; None for what is no date, which RFC 9110 (13.1.3) says to ignore."""
    try:
        parsed = parsedate_to_datetime(text)  # without a zone from asctime's form, which is UTC
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=timezone.utc)).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


class Xml(str):
    """Markup: text that is escaped already."""

    __slots__ = ()


def escape(text: str) -> str:
    """Text for XML. What XML cannot carry becomes a character reference, as in S3."""
    if "&" in text or "<" in text or ">" in text:
        text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    if text.isprintable():
        return text
    return UNSPELLABLE.sub(lambda found: f"&#x{ord(found[0]):x};", text)


def xml(**fields: object) -> Xml:
    """<Name>value</Name> for each field, in order: one for each item of a list, none for None. Text
    is escaped; Xml stands as it is, and so do numbers; True and False in lower case."""
    text = ""
    for name, value in fields.items():
        for item in value if type(value) is list else (value,):
            if type(item) is str:
                text += f"<{name}>{escape(item)}</{name}>"
            elif item is not None:
                text += f"<{name}>{str(item).lower() if type(item) is bool else item}</{name}>"
    return Xml(text)


def parse_xml(document: bytes, root: str) -> Element:
    """The tree of a request body whose root is `root`, without namespaces. MalformedXML for
    anything else, and for a document type declaration, whose entities could grow without end."""
    if LONG_TAG.search(document):  # whose attributes the parser would keep, all at once
        raise S3Error("MalformedXML", "The document has too long a tag.")
    builder = TreeBuilder()
    parser = expat.ParserCreate("utf-8")  # with namespaces, each name would come with a whole one
    depth = elements = 0

    def refuse(*_: object) -> None:
        raise S3Error("MalformedXML", "A document type declaration is not accepted.")

    def begin(name: str, attributes: Mapping[str, str]) -> None:
        nonlocal depth, elements
        depth, elements = depth + 1, elements + 1 + len(attributes)
        if depth > MAX_XML_DEPTH or elements > MAX_XML_ELEMENTS:
            raise S3Error("MalformedXML", "The document has too many elements.")
        builder.start(name.rpartition(":")[2], {})

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(name.rpartition(":")[2])

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = begin
    parser.EndElementHandler = end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(document, True)
    except expat.ExpatError:
        raise S3Error("MalformedXML") from None
    tree = builder.close()
    if tree.tag != root:
        raise S3Error("MalformedXML", f"The root element must be {root}.")
    return tree


def child_texts(node: Element) -> dict[str, str]:
    """Tag -> text of each child. MalformedXML for one that is there twice or has children."""
    texts = {child.tag: child.text or "" for child in node}
    if len(texts) < len(node) or any(map(len, node)):
        raise S3Error("MalformedXML", f"Each element of {node.tag} must be there once, as text.")
    return texts


def parse_range(text: str, size: int) -> tuple[int, int] | None:
    """Start and length of `bytes=0-99`, `bytes=100-` or `bytes=-100`; InvalidRange past the end.
    None for what is to be ignored (RFC 9110, 14.2): another unit, several ranges, no numbers."""
    found = RANGE.fullmatch(BLANKS.sub(" ", text))
    first, last = found.groups() if found else ("", "")
    if not (first or last) or (first and last and int(last) < int(first)):
        return None
    start = int(first) if first else max(size - int(last), 0)
    end = min(int(last), size - 1) if first and last else size - 1
    if start > end:
        raise S3Error("InvalidRange", ActualObjectSize=size, RangeRequested=text)
    return start, end - start + 1


def parse_integer(text: str, name: str, low: int, high: int) -> int:
    """A decimal parameter within [low, high]; InvalidArgument otherwise."""
    if not (text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) <= high):
        message = f"{name} must be an integer between {low} and {high}."
        raise S3Error("InvalidArgument", message, ArgumentName=name, ArgumentValue=text)
    return int(text)


# ===== 4 Requests and responses =====


class Content(Protocol):
    """An object's bytes on their way out: a snapshot, whatever is written meanwhile."""

    def chunks(self, start: int, length: int) -> Iterator[bytes | memoryview]:
        """Exactly the bytes [start, start + length), in order."""

    def close(self) -> None:
        """Give back what it holds."""


HOST_ID = base64.b64encode(secrets.token_bytes(24)).decode()  # x-amz-id-2: which server answered


class Stream(NamedTuple):
    """A body of `length` bytes of `content` from `start`; whoever writes it closes the content. The
    answer to HEAD has none, but the length."""

    content: Content | None
    start: int
    length: int


@dataclass
class Response:
    """What is to be sent. A HEAD request gets the head of it alone."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | Stream = b""
    error: str = ""  # its code, for the log

    @property
    def length(self) -> int:
        """Of the body, in bytes."""
        return len(self.body) if isinstance(self.body, bytes) else self.body.length


def document(root: str, *children: Xml, **fields: object) -> Response:
    """200 with the XML whose root has these fields and then these children."""
    namespace = "" if root == "Error" else S3_NAMESPACE
    start = f'<?xml version="1.0" encoding="UTF-8"?>\n<{root}{namespace}>'
    body = f"{start}{xml(**fields)}{''.join(children)}</{root}>".encode()
    return Response(200, {"Content-Type": "application/xml"}, body)


class Credential(NamedTuple):
    """Who may ask: `role` is admin, writer or reader."""

    role: str
    access: str
    secret: str


Credentials = dict[str, Credential]  # by access key


@dataclass(frozen=True)
class Settings:
    """What the command line decides for every request."""

    credentials: Credentials
    public_read: frozenset[str] = frozenset()  # buckets that anyone may read
    cors_origins: tuple[str, ...] = ()  # "*" for any
    domain: str = ""  # BUCKET.domain is the bucket, too; in lower case
    only_local: bool = False  # no other host: of a name that leads here, a web page could be
    min_part_bytes: int = MIN_PART_BYTES


@dataclass
class Request:
    """A request's head, and its body yet to be read. Header names are in lower case, values latin-1
    as on the wire; `path` and `raw_query` are percent-encoded, as signed."""

    method: str
    path: str
    raw_query: str
    headers: dict[str, str]
    settings: Settings
    version: str = "HTTP/1.1"
    client: str = ""
    id: str = ""
    query: dict[str, str] = field(default_factory=dict)
    bucket: str = ""
    key: str = ""
    credential: Credential | None = None  # None: nobody signed it
    is_probe: bool = False  # of the server's health
    wire: WireBody = field(default_factory=lambda: WireBody(io.BytesIO(), 0))
    body: Body = field(init=False)  # opened once the request is accepted

    def header(self, name: str) -> str:
        """The value, or ""."""
        return self.headers.get(name, "")

    @property
    def internal(self) -> bool:
        """Whether it is none of S3, but below /_zs3/."""
        return self.bucket == "_zs3" and self.path.startswith("/_zs3/")


def parse_head(head: bytes) -> tuple[str, str, str, str, dict[str, str]]:
    """Method, path, query, version and headers of a request's head, which ends with an empty line.
    Repeated headers are joined by commas. Stricter than RFC 9112 wherever two readers could differ
    on the end of it: no folded lines, no blanks around a name, no bare CR or LF, one Host."""
    lines = head[:-4].decode("latin-1").split("\r\n")
    parts = lines[0].split(" ")
    if len(parts) != 3 or not TOKEN.fullmatch(parts[0]):
        raise S3Error("InvalidRequest", "The request line is malformed.")
    method, target, version = parts
    if version not in ("HTTP/1.1", "HTTP/1.0"):
        raise S3Error("HTTPVersionNotSupported")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or not TOKEN.fullmatch(name) or not HEADER_VALUE.fullmatch(value):
            raise S3Error("InvalidRequest", "A header line is malformed.")
        name, value = name.lower(), value.strip(" \t")
        if name in headers:
            if name in ("host", "content-length", "transfer-encoding"):
                raise S3Error("InvalidRequest", f"The header {name} is repeated.")
            value = f"{headers[name]},{value}"
        headers[name] = value
    if version == "HTTP/1.1" and not headers.get("host"):
        raise S3Error("InvalidRequest", "The Host header is missing.")
    if found := ABSOLUTE.fullmatch(target):
        headers["host"], target = found[1], (found[2] or "/") + (found[3] or "")
    if not TARGET.fullmatch(target):
        raise S3Error("InvalidURI")
    path, _, raw_query = target.partition("?")
    return method, path, raw_query, version, headers


def body_length(headers: Mapping[str, str], version: str) -> int | None:
    """How many bytes follow the head; None when they come in HTTP chunks. One way to say it, or an
    error: whoever reads a length differently from us reads the rest as another request."""
    length, encoding = headers.get("content-length"), headers.get("transfer-encoding")
    if encoding is not None:
        if length is not None or version == "HTTP/1.0":
            raise S3Error("InvalidRequest", "Transfer-Encoding with Content-Length or HTTP/1.0.")
        if encoding.lower() != "chunked":
            raise S3Error("NotImplemented", "The only transfer encoding here is chunked.")
        return None
    if length is None:
        return 0
    if not (length.isascii() and length.isdigit() and len(length) < 20):
        raise S3Error("InvalidRequest", "Content-Length is not a number.")
    return int(length)


def host_name(request: Request) -> str:
    """The Host header in lower case, without the port and the dot of a full name."""
    return re.sub(r"\.?(:\d+)?$", "", request.header("host").lower())


def check_host(request: Request) -> None:
    """AccessDenied if only local names are served, and this is another, or the POST of a page. Keys
    that anyone knows are good for any web page: one whose host's name is made to lead here, by DNS
    rebinding, and one that makes its visitor's browser send a POST, for which that asks nobody."""
    if request.settings.only_local:
        host, domain = host_name(request), request.settings.domain
        if not LOCAL_HOST.fullmatch(host) and not (domain and f".{host}".endswith(f".{domain}")):
            text = "The default keys are for local names: set others by --acl, or this by --domain."
            raise S3Error("AccessDenied", text)
        if request.method == "POST" and request.header("origin") and not is_allowed_origin(request):
            raise S3Error("AccessDenied", "The default keys are not for pages: see --cors-origin.")


def address(request: Request) -> tuple[str, str]:
    """Bucket and key, "" where there is none, from the path, or from host and path where the host
    is BUCKET.domain. `/b` and `/b/` are both the bucket; a key may begin with slashes."""
    if request.settings.domain:
        host, domain = host_name(request), "." + request.settings.domain
        if host.endswith(domain) and host != domain:
            return host[: -len(domain)], uri_decode(request.path[1:])
    bucket, _, key = request.path[1:].partition("/")
    return uri_decode(bucket), uri_decode(key)


def is_bucket_name(name: str) -> bool:
    """S3 "General purpose bucket naming rules"."""
    return (
        MIN_BUCKET_CHARS <= len(name) <= MAX_BUCKET_CHARS
        and re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", name) is not None
        and ".." not in name
        and re.fullmatch(r"\d+\.\d+\.\d+\.\d+", name) is None
        and not name.startswith(("xn--", "sthree-", "amzn-s3-demo-"))
        and not name.endswith(("-s3alias", "--ol-s3", ".mrap", "--x-s3", "--table-s3"))
    )


def check_key(key: str) -> None:
    """KeyTooLongError; InvalidArgument for what would lead out of the bucket's folder."""
    size = len(key.encode())
    if size > MAX_KEY_BYTES:
        raise S3Error("KeyTooLongError", MaxSizeAllowed=MAX_KEY_BYTES, Size=size)
    if not key or (("." in key) and not {".", ".."}.isdisjoint(key.split("/"))):
        raise S3Error("InvalidArgument", "A key cannot be empty or have a part . or ..", Key=key)


# ===== 5 Signature Version 4 =====
# (S3 API reference, "Authenticating Requests (AWS Signature Version 4)": its steps, its words.)

ALGORITHM = "AWS4-HMAC-SHA256"
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
UNSIGNED_PAYLOAD = "UNSIGNED-PAYLOAD"
SIGNED_CHUNKS = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
SIGNED_CHUNKS_TRAILER = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER"
UNSIGNED_TRAILER = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
STREAMING_PAYLOADS = (SIGNED_CHUNKS, SIGNED_CHUNKS_TRAILER, UNSIGNED_TRAILER)


class Authorization(NamedTuple):
    """What a request says of its signature. `amz_date` is YYYYMMDDTHHMMSSZ, `expires` the seconds
    that a presigned URL holds, None for a signature in the header."""

    access: str
    region: str
    amz_date: str
    signed_headers: str  # lower-case names joined by ";"
    signature: str  # hex
    expires: int | None = None

    @property
    def scope(self) -> str:
        """The credential scope."""
        return f"{self.amz_date[:8]}/{self.region}/s3/aws4_request"


def sha256_hex(data: bytes | bytearray) -> str:
    """The SHA-256 of `data`, in lower-case hex."""
    return hashlib.sha256(data).hexdigest()


def canonical_uri(path: str) -> str:
    """Step 1. The path decoded and encoded anew, since clients differ in what they leave as it is.
    In S3, unlike other services, it is encoded once and `//` and `..` stay."""
    if PLAIN_PATH.fullmatch(path):
        return path
    return quote(unquote_to_bytes(path.encode("latin-1")), safe="/")


def canonical_query(raw_query: str) -> str:
    """Step 1. Names and values encoded (all but A-Z a-z 0-9 - _ . ~), sorted, without signature."""
    sent = [pair for pair in split_query(raw_query) if pair[0] != "X-Amz-Signature"]
    # As pairs: joined by "=", which is above "-", `a=1` would come after `a-b=2`.
    pairs = sorted((quote(name, ""), quote(value, "")) for name, value in sent)
    return "&".join(f"{name}={value}" for name, value in pairs)


def canonical_request(
    method: str, path: str, raw_query: str, headers: Mapping[str, str],
    signed_headers: str, payload: str,
) -> str:
    """Step 1. `headers` by lower-case name; `payload` is what x-amz-content-sha256 says."""
    names = signed_headers.split(";")
    lines = [f"{name}:{BLANKS.sub(' ', headers.get(name, '')).strip(' ')}\n" for name in names]
    query = canonical_query(raw_query) if raw_query else ""
    pieces = (method, canonical_uri(path), query, "".join(lines), signed_headers, payload)
    return "\n".join(pieces)


def string_to_sign(amz_date: str, scope: str, canonical: str) -> str:
    """Step 2. `amz_date` is YYYYMMDDTHHMMSSZ; `scope` is date/region/service/aws4_request."""
    return f"{ALGORITHM}\n{amz_date}\n{scope}\n{sha256_hex(canonical.encode('latin-1'))}"


@functools.lru_cache(maxsize=256)
def signing_key(secret: str, date: str, region: str) -> bytes:
    """Step 3. The key of one day and region, for the service s3. `date` is YYYYMMDD."""
    key = b"AWS4" + secret.encode()
    for message in (date, region, "s3", "aws4_request"):
        key = hmac.digest(key, message.encode(), "sha256")
    return key


def signature(key: bytes, text: str) -> str:
    """Step 4. The HMAC-SHA256 of a string to sign, in hex."""
    return hmac.digest(key, text.encode(), "sha256").hex()


@functools.lru_cache(maxsize=64)
def parse_amz_date(amz_date: str) -> float:
    """Seconds since the epoch of YYYYMMDDTHHMMSSZ; AccessDenied for anything else."""
    with contextlib.suppress(ValueError):  # there is no such day or hour
        if re.fullmatch(r"\d{8}T\d{6}Z", amz_date, re.ASCII):
            return datetime.strptime(amz_date + "+0000", "%Y%m%dT%H%M%SZ%z").timestamp()
    raise S3Error("AccessDenied", "The request needs a date of the form YYYYMMDDTHHMMSSZ.")


def credential_scope(text: str, amz_date: str, code: str) -> tuple[str, str]:
    """Access key and region of `ACCESS/YYYYMMDD/REGION/s3/aws4_request`; or S3Error(code)."""
    pieces = text.rsplit("/", 4)
    if len(pieces) != 5 or pieces[3:] != ["s3", "aws4_request"] or not pieces[0]:
        raise S3Error(code, "The Credential must be ACCESS-KEY/YYYYMMDD/REGION/s3/aws4_request.")
    if pieces[1] != amz_date[:8]:
        raise S3Error(code, "The date of the Credential is not that of the request.")
    return pieces[0], pieces[2]


def authorization_from_header(request: Request) -> Authorization:
    """`Authorization: AWS4-HMAC-SHA256 Credential=..., SignedHeaders=..., Signature=...`"""
    method, _, rest = request.headers["authorization"].partition(" ")
    if method != ALGORITHM:
        raise S3Error("InvalidRequest", f"Please use the authorization mechanism {ALGORITHM}.")
    fields = dict(piece.strip().partition("=")[::2] for piece in rest.split(","))
    if not {"Credential", "SignedHeaders", "Signature"} <= fields.keys():
        raise S3Error("AuthorizationHeaderMalformed")
    amz_date = request.header("x-amz-date")
    if not amz_date:
        amz_date = request.header("date")  # in either form
        if (seconds := parse_http_date(amz_date)) is not None:
            amz_date = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(seconds))
    parse_amz_date(amz_date)  # a malformed date is told before what does not go with it
    scope = credential_scope(fields["Credential"], amz_date, "AuthorizationHeaderMalformed")
    return Authorization(*scope, amz_date, fields["SignedHeaders"], fields["Signature"])


def authorization_from_query(query: Mapping[str, str]) -> Authorization:
    """A presigned URL. (S3 API reference, "Authenticating Requests: Using Query Parameters")"""
    code = "AuthorizationQueryParametersError"
    names = ("Algorithm", "Credential", "Date", "Expires", "SignedHeaders", "Signature")
    values = [query.get(f"X-Amz-{name}", "") for name in names]
    algorithm, credential, amz_date, expires, signed_headers, proof = values
    payload = query.get("X-Amz-Content-Sha256", "")
    if not all(values) or algorithm != ALGORITHM or not (signed_headers + payload).isascii():
        raise S3Error(code, f"A presigned URL needs X-Amz-: {', '.join(names)}; with {ALGORITHM}.")
    seconds = int(expires) if re.fullmatch(r"\d{1,9}", expires, re.ASCII) else 0
    if not 1 <= seconds <= MAX_PRESIGNED_SECONDS:
        raise S3Error(code, f"X-Amz-Expires must be between 1 and {MAX_PRESIGNED_SECONDS} seconds.")
    scope = credential_scope(credential, amz_date, code)
    return Authorization(*scope, amz_date, signed_headers, proof, seconds)


def check_date(auth: Authorization, now: float) -> None:
    """A header's date is 15 minutes from `now` at most; a presigned URL has begun, not expired."""
    signed = parse_amz_date(auth.amz_date)
    if auth.expires is None:
        if abs(now - signed) > MAX_SKEW_SECONDS:
            raise S3Error(
                "RequestTimeTooSkewed", RequestTime=auth.amz_date, ServerTime=iso_date(now),
                MaxAllowedSkewMilliseconds=MAX_SKEW_SECONDS * 1000,
            )
    elif now < signed - MAX_SKEW_SECONDS:
        raise S3Error("AccessDenied", "Request is not valid yet", ServerTime=iso_date(now))
    elif now > signed + auth.expires:
        dates = {"Expires": iso_date(signed + auth.expires), "ServerTime": iso_date(now)}
        raise S3Error("AccessDenied", "Request has expired", **dates)


def check_signed_headers(request: Request, auth: Authorization) -> None:
    """Host and every x-amz-* header must be signed: what is not could have been added by anyone.
    None twice: the canonical request, which an error shows, would repeat its value each time."""
    signed = auth.signed_headers.split(";")
    if len(set(signed)) < len(signed):
        raise S3Error("AccessDenied", "SignedHeaders names a header twice.")
    unsigned = [name for name in request.headers if name[:6] == "x-amz-" and name not in signed]
    if "host" not in signed or unsigned:
        message = "There were headers present in the request which were not signed"
        raise S3Error("AccessDenied", message, HeadersNotSigned=", ".join(unsigned or ["host"]))


# What is only the signature of a presigned URL, or speaks of a body that was not known yet. The
# latter are checked in headers alone, which a web page cannot send to a foreign server unasked: a
# page that knows the keys, as all know the default ones, could else DeleteObjects by a mere POST.
NOT_A_HEADER = re.compile(
    "x-amz-(algorithm|credential|date|expires|signedheaders|signature|content-sha256|trailer"
    "|decoded-content-length|security-token|user-agent|sdk-.*|checksum-(crc|sha).*)"
)


def headers_in_query(query: Mapping[str, str]) -> dict[str, str]:
    """The x-amz-* headers that SDKs move into the query of a presigned URL; InvalidArgument."""
    found = {}
    for parameter, value in query.items():
        name, text = parameter.lower(), value.encode().decode("latin-1").strip(" \t")
        if name.startswith("x-amz-") and not NOT_A_HEADER.fullmatch(name):
            if not TOKEN.fullmatch(name) or not HEADER_VALUE.fullmatch(text):
                raise S3Error("InvalidArgument", f"{name} cannot be a header.")
            found[name] = text
    return found


def payload_hash(request: Request, auth: Authorization) -> str:
    """What the client signed as its payload: a SHA-256 in hex or one of the names above."""
    declared = request.header("x-amz-content-sha256")
    if auth.expires is not None:
        declared = declared or request.query.get("X-Amz-Content-Sha256", UNSIGNED_PAYLOAD)
    if not declared:
        raise S3Error("InvalidRequest", "Missing required header: x-amz-content-sha256")
    return declared


def check_signature(request: Request, auth: Authorization, key: bytes) -> None:
    """SignatureDoesNotMatch, with all it takes to find out why, unless the signature holds."""
    payload = payload_hash(request, auth)
    texts = []
    given = request.header("host")
    for host in dict.fromkeys((given, given.partition(":")[0])):  # git-annex signs no port
        headers = {**request.headers, "host": host}
        line = (request.method, request.path, request.raw_query)
        canonical = canonical_request(*line, headers, auth.signed_headers, payload)
        texts.append((canonical, string_to_sign(auth.amz_date, auth.scope, canonical)))
        if hmac.compare_digest(signature(key, texts[-1][1]).encode(), auth.signature.encode()):
            return
    canonical, text = texts[0]
    raise S3Error(
        "SignatureDoesNotMatch", AWSAccessKeyId=auth.access, StringToSign=text,
        SignatureProvided=auth.signature, StringToSignBytes=text.encode().hex(" "),
        CanonicalRequest=canonical, CanonicalRequestBytes=canonical.encode("latin-1").hex(" "),
    )


def authenticate(request: Request, now: float) -> Authorization | None:
    """Find out whose request this is, by its head alone: None when nobody signed it. `now` is in
    seconds since the epoch. The S3Error of whatever does not hold."""
    in_query = "X-Amz-Algorithm" in request.query or "X-Amz-Signature" in request.query
    if "AWSAccessKeyId" in request.query and not in_query:
        raise S3Error("InvalidRequest", f"Please use the authorization mechanism {ALGORITHM}.")
    in_header = bool(request.header("authorization"))  # an empty one says nothing
    if not in_header and not in_query:
        return None
    if in_header and in_query:
        raise S3Error("InvalidArgument", "Only one auth mechanism allowed: query or Authorization.")
    if in_query:
        auth = authorization_from_query(request.query)
    else:
        auth = authorization_from_header(request)
    credential = request.settings.credentials.get(auth.access)
    if credential is None:
        raise S3Error("InvalidAccessKeyId", AWSAccessKeyId=auth.access)
    if "x-amz-security-token" in request.headers or "X-Amz-Security-Token" in request.query:
        raise S3Error("InvalidToken")
    check_date(auth, now)
    check_signed_headers(request, auth)
    check_signature(request, auth, signing_key(credential.secret, auth.amz_date[:8], auth.region))
    request.credential = credential
    return auth


# ===== 6 Request bodies and checksums =====


class WireBody(io.RawIOBase):
    """The bytes that follow a request's head on a connection, as HTTP frames them: `length` of
    them, or chunks where it is None (RFC 9112, 7.1)."""

    def __init__(
        self, wire: Wire | io.BytesIO, length: int | None, proceed: Callable[[], None] | None = None
    ) -> None:
        self._wire = wire
        self.length = length
        self._left = length or 0  # of the body, or of the current chunk
        self.proceed = proceed  # sends the `100 Continue` that the client waits for, if it does
        self.ended = length == 0

    def readable(self) -> bool:
        """For io.BufferedReader."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as the body goes; 0 at its end. IncompleteBody, RequestTimeout."""
        if self.proceed is not None:
            self.proceed()  # even if nothing follows: some versions of botocore count on it
            self.proceed = None
        if self.ended:
            return 0
        try:
            return self._read(memoryview(buffer).cast("B"))
        except Silent:
            raise S3Error("RequestTimeout") from None

    def _read(self, view: memoryview) -> int:
        if self._left == 0 and not self._next_chunk():
            return 0
        got = self._wire.readinto(view[: self._left])
        if not got:
            raise S3Error("IncompleteBody")
        self._left -= got
        if self._left == 0:
            if self.length is not None:
                self.ended = True
            elif self._wire.readline(3) != b"\r\n":
                raise S3Error("InvalidChunkSizeError")
        return got

    def _next_chunk(self) -> bool:
        """Read a chunk's size; at the last chunk also the trailers, which mean nothing here."""
        line = self._wire.readline(MAX_CHUNK_LINE_BYTES)
        self._left = parse_chunk_size(line)
        if self._left:
            return True
        trailers = 0
        while line != b"\r\n":
            line = self._wire.readline(MAX_TRAILER_BYTES)
            trailers += len(line)
            if not line.endswith(b"\r\n") or trailers > MAX_TRAILER_BYTES:
                raise S3Error("InvalidChunkSizeError")
        self.ended = True
        return False


def parse_chunk_size(line: bytes) -> int:
    """The size in `1f4;extension\\r\\n`. IncompleteBody, InvalidChunkSizeError."""
    if not line:
        raise S3Error("IncompleteBody")
    digits = line[:-2].partition(b";")[0]
    if not line.endswith(b"\r\n") or not re.fullmatch(rb"[0-9a-fA-F]{1,15}", digits):
        raise S3Error("InvalidChunkSizeError")
    return int(digits, 16)


class AwsChunks:
    """Decodes `aws-chunked`: SIZE[;chunk-signature=HEX] CRLF, data, CRLF; after a chunk of size 0
    the trailers as `name:value` lines. `trailer` is what x-amz-trailer announced. With `auth` and
    its signing key, chunks and trailers must be signed. (S3 API reference, "Signature Calculations
    ... Transferring Payload in Multiple Chunks")"""

    def __init__(
        self, source: io.RawIOBase, trailer: str, auth: Authorization | None, key: bytes
    ) -> None:
        self._source = io.BufferedReader(source, SMALL_BYTES)
        self._expected = trailer.strip().lower()
        self._auth, self._key = auth, key
        self._previous = auth.signature if auth else ""  # each signature covers the one before it
        self._left = 0  # of the current chunk
        self._digest = hashlib.sha256()
        self._given = ""
        self._ended = False
        self.trailers: dict[str, str] = {}

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with decoded bytes; 0 at the end. Raises what does not hold."""
        if self._ended or (self._left == 0 and not self._next_chunk()):
            return 0
        view = memoryview(buffer)[: self._left]
        got = self._source.readinto(view)
        if not got:
            raise S3Error("IncompleteBody")
        self._left -= got
        if self._auth is not None:
            self._digest.update(view[:got])
        if self._left == 0:
            if self._source.read(2) != b"\r\n":
                raise S3Error("InvalidChunkSizeError")
            self._check_chunk()
        return got

    def _next_chunk(self) -> bool:
        line = self._source.readline(MAX_CHUNK_LINE_BYTES)
        self._left = parse_chunk_size(line)
        name, _, given = line[:-2].partition(b";")[2].partition(b"=")
        if self._auth is not None and name != b"chunk-signature":
            raise S3Error("InvalidChunkSizeError", "A chunk has no signature.")
        self._given = given.decode("latin-1")
        if self._left:
            return True
        self._check_chunk()
        self._read_trailers()
        self._ended = True
        return False

    def _check_chunk(self) -> None:
        digest = f"{EMPTY_SHA256}\n{self._digest.hexdigest()}"
        self._check_signature("PAYLOAD", digest, self._given)
        self._digest = hashlib.sha256()

    def _check_signature(self, kind: str, digest: str, given: str) -> None:
        if self._auth is None:
            return
        claim = f"{self._auth.amz_date}\n{self._auth.scope}\n{self._previous}"
        text = f"{ALGORITHM}-{kind}\n{claim}\n{digest}"
        self._previous = signature(self._key, text)
        if not hmac.compare_digest(self._previous.encode(), given.encode()):
            raise S3Error("SignatureDoesNotMatch", StringToSign=text, SignatureProvided=given)

    def _read_trailers(self) -> None:
        """What is left of the body: the announced trailer and its signature, and nothing else."""
        rest = self._source.read(MAX_TRAILER_BYTES + 1)
        if len(rest) > MAX_TRAILER_BYTES:
            raise S3Error("InvalidChunkSizeError", "There is too much after the last chunk.")
        for line in rest.decode("latin-1").splitlines():
            name, _, value = line.partition(":")
            if name.strip():
                self.trailers[name.strip().lower()] = value.strip()
        proof = self.trailers.pop("x-amz-trailer-signature", "")
        if self.trailers.keys() - {self._expected} or (self._expected and not self.trailers):
            raise S3Error("MalformedTrailerError")
        if self._expected:
            lines = "".join(f"{name}:{value}\n" for name, value in self.trailers.items())
            self._check_signature("TRAILER", sha256_hex(lines.encode("latin-1")), proof)


class Crc:
    """A reflected CRC of `width` bits, init and xorout all ones, called as zlib.crc32 is.

    A message is a polynomial over GF(2) and its CRC the remainder by P. Reflected, a message is one
    little-endian integer whose bit 0 is the highest power, and `polynomial` is P without x^width.

    A multiple of P with few terms, 1 + y^hop + y^hop + ... (y = 1/x; found by search), leaves the
    remainder as it was: a one at bit j may be cleared if bit j + hop is flipped for each hop. Over
    GF(2) squaring a polynomial doubles its exponents, so hops that are all doubled k times do as
    well, and a few shifts of big integers clear half of a megabyte at once.
    """

    def __init__(self, width: int, polynomial: int, hops: tuple[int, ...]) -> None:
        self.width, self.polynomial, self.hops = width, polynomial, hops
        self.ones = (1 << width) - 1

    def __call__(self, data: bytes | bytearray | memoryview, crc: int = 0) -> int:
        """The CRC of what `crc` covers, then `data`; takes about 5 times the memory of `data`."""
        state = crc ^ self.ones
        if len(data) * 8 > self.hops[-1]:
            data, state = self._fold(int.from_bytes(data, "little") ^ state, len(data) * 8), 0
        table = self._table
        for byte in data:
            state = table[(state ^ byte) & 0xFF] ^ state >> 8
        return state ^ self.ones

    def combine(self, crc_a: int, crc_b: int, length_b: int) -> int:
        """The CRC of A + B from those of A and B, and the length of B in bytes."""
        power, exponent = 1 << (self.width - 2), length_b * 8  # x^1, as the highest bit is x^0
        while exponent:
            if exponent & 1:
                crc_a = self._multiply(crc_a, power)
            power = self._multiply(power, power)
            exponent >>= 1
        return crc_a ^ crc_b

    def _fold(self, bits: int, length: int) -> bytes:
        """At most hops[-1] bits (as whole bytes) with the remainder that the `length` bits have."""
        first, last = self.hops[0], self.hops[-1]
        for k in reversed(range((length // last).bit_length())):
            while (count := min(first << k, length - (last << k))) > 0:
                low, flips = bits & ((1 << count) - 1), 0
                for hop in self.hops:
                    flips ^= low << ((hop - first) << k)
                bits = (bits >> count) ^ (flips << ((first << k) - count))
                length -= count
        padding = -length % 8  # zeros before the highest power change nothing
        return (bits << padding).to_bytes((length + padding) // 8, "little")

    def _multiply(self, a: int, b: int) -> int:
        """a * b modulo P."""
        product = 0
        for i in reversed(range(self.width)):
            product ^= b * (a >> i & 1)
            b = (b >> 1) ^ self.polynomial * (b & 1)
        return product

    @functools.cached_property
    def _table(self) -> list[int]:
        """Each byte times x^8: what it leaves behind when it is shifted out of the state."""
        return [self._multiply(byte, 1 << (self.width - 9)) for byte in range(256)]


CRCS = {
    "CRC32": Crc(32, 0xEDB88320, (718, 765, 832, 887, 895)),
    "CRC32C": Crc(32, 0x82F63B78, (454, 505, 510, 532, 563)),
    "CRC64NVME": Crc(64, 0x9A6C9329AC4BC9B5,
                     (1320, 1395, 1474, 1769, 1882, 1962, 1997, 2164, 2219)),
}


@functools.cache
def crc_function(algorithm: str) -> Callable[..., int]:
    """The fastest f(data, crc=0) for a row of CRCS. Ask when it is needed: awscrt takes 8 MB."""
    if algorithm == "CRC32":
        return zlib.crc32
    function: Callable[..., int] = CRCS[algorithm]
    with contextlib.suppress(ImportError, AttributeError):  # not there, or too old for crc64nvme
        function = getattr(importlib.import_module("awscrt.checksums"), algorithm.lower())
    return function


class CrcDigest:
    """A CRC with the interface of hashlib's objects."""

    def __init__(self, algorithm: str) -> None:
        self._function = crc_function(algorithm)
        self._size = CRCS[algorithm].width // 8
        self._value = 0

    def update(self, data: bytes | memoryview) -> None:
        """Take in more bytes, a piece at a time: each keeps the interpreter busy to its end."""
        for at in range(0, len(data), CRC_PIECE_BYTES):
            self._value = self._function(data[at : at + CRC_PIECE_BYTES], self._value)

    def digest(self) -> bytes:
        """The value of all bytes so far, big-endian."""
        return self._value.to_bytes(self._size, "big")


Digest: TypeAlias = "hashlib._Hash | CrcDigest"

# Checksum algorithm, as in x-amz-checksum-algorithm -> a new Digest.
CHECKSUMS: dict[str, Callable[[], Digest]] = {
    **{name: functools.partial(CrcDigest, name) for name in CRCS},
    "SHA1": functools.partial(hashlib.sha1, usedforsecurity=False),
    "SHA256": hashlib.sha256,
}
# What a Body may compute: also the MD5 of an ETag, and the SHA-256 that a client signs.
DIGESTS: dict[str, Callable[[], Digest]] = CHECKSUMS | {
    "MD5": functools.partial(hashlib.md5, usedforsecurity=False), "PAYLOAD": hashlib.sha256,
}


def checksum_header(algorithm: str) -> str:
    """x-amz-checksum-crc32 for CRC32."""
    return f"x-amz-checksum-{algorithm.lower()}"


def decode_digest(text: str, size: int, header: str, code: str = "InvalidRequest") -> bytes:
    """The `size` bytes that base64 `text` of a header or trailer stands for; else S3Error(code)."""
    try:
        value = base64.b64decode(text, validate=True)
    except ValueError:
        value = b""
    if len(value) != size:
        raise S3Error(code, f"Value for {header} header is invalid.")
    return value


@dataclass
class Body:
    """An object's bytes on their way in. Iterate once: blocks of at most BLOCK_BYTES, each valid
    until the next is asked for. The iteration ends only when all that the client declared was
    verified (length, MD5, SHA-256, checksums, signatures) and raises S3Error otherwise. After it,
    `length` is the bytes seen, `md5` their MD5 in hex, `checksums` those to store, in base64."""

    source: WireBody | AwsChunks | ContentReader | io.BytesIO
    size: int | None  # as declared; None when the client did not say
    limit: int = MAX_PUT_BYTES
    length: int = 0
    md5: str = ""
    checksums: dict[str, str] = field(default_factory=dict)
    wanted: set[str] = field(default_factory=lambda: {"MD5"})  # the rows of DIGESTS to compute
    expected: dict[str, bytes] = field(default_factory=dict)  # those whose value was declared
    trailer: str = ""  # the one whose value comes after the data

    def expect(self, name: str, value: bytes) -> None:
        """The value declared for a row of DIGESTS."""
        self.wanted.add(name)
        self.expected[name] = value

    def __iter__(self) -> Iterator[memoryview]:
        """See the class."""
        self._check_length()
        digests = {name: DIGESTS[name]() for name in self.wanted}
        large = self.size is None or self.size > BLOCK_BYTES
        yield from self._large(digests) if large else self._small(digests)
        self._finish(digests)

    def _small(self, digests: Mapping[str, Digest]) -> Iterator[memoryview]:
        block = memoryview(bytearray(self.size or 1))
        while got := self._fill(block):
            for digest in digests.values():
                digest.update(block[:got])
            yield block[:got]

    def _large(self, digests: Mapping[str, Digest]) -> Iterator[memoryview]:
        """Blocks take turns: while one is received, hashed and written here, MD5, the slowest of
        the digests, is busy with those before it in a thread of its own, without the interpreter's
        lock."""
        free: SimpleQueue[memoryview] = SimpleQueue()
        full: SimpleQueue[memoryview] = SimpleQueue()
        for _ in range(BODY_BLOCKS):  # their pages come when bytes do: a silent client costs none
            free.put(memoryview(mmap.mmap(-1, BLOCK_BYTES)))
        md5, others = digests["MD5"], [digests[name] for name in digests if name != "MD5"]

        def hash_blocks() -> None:
            try:
                while block := full.get():
                    md5.update(block)
                    free.put(memoryview(block.obj))
            finally:
                free.put(memoryview(b""))  # nobody is to wait for another

        with ThreadPoolExecutor(1) as thread:
            try:
                hashing = thread.submit(hash_blocks)
            except RuntimeError:  # no thread is to be had
                raise S3Error("SlowDown") from None
            try:
                while got := self._fill(space := free.get()):
                    block = space[:got]
                    full.put(block)
                    for digest in others:
                        digest.update(block)
                    yield block
            finally:
                full.put(memoryview(b""))
            hashing.result()

    def _check_length(self) -> None:
        if max(self.length, self.size or 0) > self.limit:
            proposed = self.size or self.length
            raise S3Error("EntityTooLarge", MaxSizeAllowed=self.limit, ProposedSize=proposed)
        if self.size is not None and self.length > self.size:
            raise S3Error("IncompleteBody", "The body is longer than it declared.")

    def _fill(self, block: memoryview) -> int:
        """Read until the block is full or the body ends."""
        got = 0
        while got < len(block) and (count := self.source.readinto(block[got:])):
            got += count
        self.length += got
        self._check_length()
        return got

    def _finish(self, digests: Mapping[str, Digest]) -> None:
        if self.size is not None and self.length != self.size:
            raise S3Error("IncompleteBody")
        values = {name: digest.digest() for name, digest in digests.items()}
        if self.trailer:
            trailers = self.source.trailers if isinstance(self.source, AwsChunks) else {}
            name = checksum_header(self.trailer)
            size = len(values[self.trailer])
            self.expected[self.trailer] = decode_digest(trailers.get(name, ""), size, name)
        for name, expected in self.expected.items():
            if not hmac.compare_digest(values[name], expected):
                if name == "PAYLOAD":
                    raise S3Error("XAmzContentSHA256Mismatch")
                raise S3Error("BadDigest", f"The {name} you specified did not match the body.")
        self.md5 = values["MD5"].hex()
        self.checksums = {
            name: base64.b64encode(values[name]).decode() for name in values if name in CHECKSUMS
        }

    def read_all(self, limit: int = MAX_DOCUMENT_BYTES) -> bytes:
        """A small document, whole and verified; EntityTooLarge beyond `limit` bytes."""
        self.limit = limit
        return b"".join(bytes(block) for block in self)


class ContentReader:
    """A range of an object as a file, for a Body: how a part is copied from an object."""

    def __init__(self, content: Content, start: int, length: int) -> None:
        self._chunks = content.chunks(start, length)
        self._rest = memoryview(b"")

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the next chunk; 0 at the end."""
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        got = min(len(buffer), len(self._rest))
        buffer[:got] = self._rest[:got]
        self._rest = self._rest[got:]
        return got


def declared_checksums(headers: Mapping[str, str]) -> dict[str, str]:
    """Algorithm -> base64 of every x-amz-checksum-* header that is a value. InvalidRequest for an
    algorithm that is not here: a checksum that cannot be checked is not to be taken on trust."""
    found = {}
    for name, value in headers.items():
        if name.startswith("x-amz-checksum-") and name[15:] not in ("algorithm", "type", "mode"):
            algorithm = name[15:].upper()
            if algorithm not in CHECKSUMS:
                raise S3Error("InvalidRequest", f"{name} is not one of {', '.join(CHECKSUMS)}.")
            found[algorithm] = value
    if len(found) > 1:
        raise S3Error("InvalidRequest", "Expecting a single x-amz-checksum- header.")
    return found


def parse_algorithm(text: str) -> str:
    """A checksum algorithm's name in upper case, "" for none; InvalidRequest for any other."""
    algorithm = text.upper()
    if algorithm and algorithm not in CHECKSUMS:
        known = ", ".join(CHECKSUMS)
        raise S3Error("InvalidRequest", f"The checksum algorithm must be one of {known}.")
    return algorithm


def decoded_length(request: Request) -> int:
    """The length of a body without the framing of aws-chunked."""
    declared = request.header("x-amz-decoded-content-length")
    if not declared:
        raise S3Error("MissingContentLength", "You must provide x-amz-decoded-content-length.")
    return parse_integer(declared, "x-amz-decoded-content-length", 0, 10**18)


def open_chunked_body(request: Request, payload: str, auth: Authorization | None) -> Body:
    """A body in aws-chunked, told by x-amz-content-sha256: minio-go sends no Content-Encoding."""
    key = b""
    if payload == UNSIGNED_TRAILER:
        auth = None
    elif auth is None or request.credential is None:
        raise S3Error("AccessDenied", "Signed chunks need a signed request.")
    else:
        key = signing_key(request.credential.secret, auth.amz_date[:8], auth.region)
    size = decoded_length(request)
    trailer = "" if payload == SIGNED_CHUNKS else request.header("x-amz-trailer")
    return Body(AwsChunks(request.wire, trailer, auth, key), size)


def open_body(request: Request, auth: Authorization | None) -> Body:
    """The body of a request as its headers declare it. Nothing is read yet, no digest is missed."""
    payload = request.header("x-amz-content-sha256") or UNSIGNED_PAYLOAD
    if auth is not None:
        payload = payload_hash(request, auth)
    if payload in STREAMING_PAYLOADS:
        body = open_chunked_body(request, payload, auth)
    else:
        body = Body(request.wire, request.wire.length)
        if payload != UNSIGNED_PAYLOAD:
            if not re.fullmatch("[0-9a-f]{64}", payload):
                known = f"a SHA-256 in hex, {UNSIGNED_PAYLOAD} or {', '.join(STREAMING_PAYLOADS)}"
                raise S3Error("InvalidArgument", f"x-amz-content-sha256 must be {known}.")
            body.expect("PAYLOAD", bytes.fromhex(payload))
        if "x-amz-decoded-content-length" in request.headers:
            size = decoded_length(request)
            if body.size not in (None, size):
                raise S3Error("InvalidRequest", "The decoded length of a body that has no chunks.")
            body.size = size
    if "content-md5" in request.headers:
        md5 = decode_digest(request.headers["content-md5"], 16, "Content-MD5", "InvalidDigest")
        body.expect("MD5", md5)
    return body


def expect_checksums(request: Request) -> None:
    """Have the body checked against the x-amz-checksum-* header or trailer that is there for it (a
    Complete carries the one of the whole object there)."""
    values = declared_checksums(request.headers)
    for algorithm, value in values.items():
        size = len(CHECKSUMS[algorithm]().digest())
        request.body.expect(algorithm, decode_digest(value, size, checksum_header(algorithm)))
    trailer = request.header("x-amz-trailer").strip().lower()
    if trailer:
        algorithm = parse_algorithm(trailer.removeprefix("x-amz-checksum-"))
        chunked = isinstance(request.body.source, AwsChunks)
        if values or checksum_header(algorithm) != trailer or not chunked:
            raise S3Error("InvalidRequest", "x-amz-trailer names a checksum that ends the body.")
        request.body.wanted.add(algorithm)
        request.body.trailer = algorithm
        values = {algorithm: ""}
    announced = parse_algorithm(request.header("x-amz-sdk-checksum-algorithm"))
    if announced and announced not in values:
        raise S3Error("InvalidRequest", "x-amz-sdk-checksum-algorithm without such a checksum.")


# ===== 7 Storage =====

UPLOADS = ".uploads"  # the bucket of uploads in progress, which no client can name


class PartInfo(NamedTuple):
    """One part of a finished multipart object. `checksum` is base64, "" when there is none."""

    size: int
    checksum: str = ""


@dataclass(slots=True)
class ObjectInfo:
    """What is known of an object; not to be changed, but by replace(). `etag` is without quotes;
    `modified` in seconds since the epoch; `headers` are stored headers by lower-case name;
    `checksums` algorithm -> base64 (base64-N for a composite one); `parts` and `upload_id` are
    those of the multipart upload it came from, if any."""

    key: str
    size: int
    etag: str
    modified: float
    headers: dict[str, str] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)
    checksum_type: str = ""  # FULL_OBJECT, COMPOSITE or ""
    parts: tuple[PartInfo, ...] = ()
    upload_id: str = ""

    def record(self) -> dict[str, Any]:
        """All but the key, as JSON can hold it, without what is empty."""
        record = {
            "size": self.size, "etag": self.etag, "modified": self.modified,
            "headers": self.headers, "checksums": self.checksums,
            "checksum_type": self.checksum_type, "parts": [list(part) for part in self.parts],
            "upload_id": self.upload_id,
        }
        return {name: value for name, value in record.items() if value not in ({}, [], "")}

    @classmethod
    def from_record(cls, key: str, record: Mapping[str, Any]) -> ObjectInfo:
        """The inverse of record()."""
        parts = tuple(PartInfo(*part) for part in record.get("parts", ()))
        return cls(
            key, record["size"], record["etag"], record["modified"], record.get("headers", {}),
            record.get("checksums", {}), record.get("checksum_type", ""), parts,
            record.get("upload_id", ""),
        )


class BucketInfo(NamedTuple):
    """`created` is in seconds since the epoch."""

    name: str
    created: float


def etag_matches(header: str, etag: str) -> bool:
    """Whether an If-Match or If-None-Match header names this ETag, or any (RFC 9110, 8.8.3.2)."""
    given = [candidate.strip().removeprefix("W/").strip('"') for candidate in header.split(",")]
    return "*" in given or etag in given


class Condition(NamedTuple):
    """The If-Match and If-None-Match headers of a write, as sent. (S3 "Conditional requests")"""

    if_match: str | None = None
    if_none_match: str | None = None

    def check(self, current: ObjectInfo | None) -> None:
        """Unless the write may replace `current`: NoSuchKey, PreconditionFailed, NotImplemented."""
        if self.if_none_match is not None:
            if self.if_none_match.strip() != "*":
                raise S3Error("NotImplemented", "If-None-Match of a write can only be *.")
            if current is not None:
                raise S3Error("PreconditionFailed", Condition="If-None-Match")
        if self.if_match is not None:
            if current is None:
                raise S3Error("NoSuchKey")
            if not etag_matches(self.if_match, current.etag):
                raise S3Error("PreconditionFailed", Condition="If-Match")


NO_CONDITION = Condition()


def successor(prefix: str) -> str | None:
    """The least string above every string that begins with `prefix`; None if there is none."""
    while prefix:
        code = ord(prefix[-1]) + 1
        if code <= sys.maxunicode:
            return prefix[:-1] + chr(0xE000 if code == 0xD800 else code)  # surrogates are no text
        prefix = prefix[:-1]
    return None


def common_prefix(key: str, prefix: str, delimiter: str) -> str:
    """The part of `key` up to the first delimiter after `prefix`; "" if there is none."""
    at = key.find(delimiter, len(prefix)) if delimiter else -1
    return key[: at + len(delimiter)] if at >= 0 else ""


class Store(Protocol):
    """Where objects are. Names were validated by the caller; all errors are S3Error. The bucket
    UPLOADS is always there and never listed. What a method changes is changed when it returns."""

    waits: bool  # what it does may have to wait, for other machines or for a disk's flush

    def start(self) -> None:
        """Begin whatever runs in the background: the server is about to answer."""

    def list_buckets(self) -> list[BucketInfo]:
        """Sorted by name."""

    def stat_bucket(self, bucket: str) -> BucketInfo:
        """NoSuchBucket."""

    def create_bucket(self, bucket: str) -> None:
        """Nothing happens when it was there."""

    def delete_bucket(self, bucket: str) -> None:
        """NoSuchBucket, BucketNotEmpty."""

    def put_object(
        self, bucket: str, key: str, body: Body, headers: dict[str, str], condition: Condition
    ) -> ObjectInfo:
        """NoSuchBucket, what Condition.check raises, what the body raises."""

    def stat_object(self, bucket: str, key: str) -> ObjectInfo:
        """NoSuchBucket, NoSuchKey."""

    def open_object(self, bucket: str, key: str) -> tuple[ObjectInfo, Content]:
        """The caller closes the content. NoSuchBucket, NoSuchKey."""

    def copy_object(
        self, info: ObjectInfo, content: Content, bucket: str, condition: Condition
    ) -> ObjectInfo:
        """Store `content`, which open_object gave, as the object `info`, but for its `modified`.
        NoSuchBucket, what Condition.check raises."""

    def delete_object(self, bucket: str, key: str, condition: Condition) -> None:
        """Deleting what is not there succeeds. NoSuchBucket, what Condition.check raises."""

    def scan(self, bucket: str, prefix: str, start: str, delimiter: str) -> Iterator[ObjectInfo]:
        """The objects, without `parts`, whose keys begin with `prefix` and are not below `start`,
        in the order of their UTF-8 bytes, which is that of str, lazily. With a delimiter, any one
        key may stand for all that share it up to the first delimiter after the prefix.
        NoSuchBucket."""

    def concatenate(
        self, bucket: str, parts: Sequence[ObjectInfo], info: ObjectInfo, condition: Condition
    ) -> ObjectInfo:
        """Store the objects `parts` of UPLOADS, one after the other, as in copy_object.
        InvalidPart when one has another ETag, NoSuchBucket, what Condition.check raises."""

    def hold(self, bucket: str, key: str) -> contextlib.AbstractContextManager[None]:
        """Make others wait who hold this object, if it is there: see `ending`. It may do
        nothing where the operations themselves decide who comes first."""

    def internal(self, request: Request) -> Response:
        """Answer a request under /_zs3/ that is not for the server itself."""

    def close(self) -> None:
        """End what runs in the background."""


@dataclass
class FileContent:
    """An open file: whatever replaces it, it stays what it was."""

    file: int  # the descriptor
    status: os.stat_result = field(init=False)  # when it was described

    def close(self) -> None:
        os.close(self.file)

    def chunks(self, start: int, length: int) -> Iterator[bytes | memoryview]:
        """Ends early if somebody cuts the file short meanwhile."""
        while length > 0 and (data := os.pread(self.file, min(length, BLOCK_BYTES), start)):
            yield data
            start += len(data)
            length -= len(data)


SPELLED_NAME_CHARS = 200  # of a path component
SPELLED = [
    chr(byte) if 0x30 <= byte <= 0x7D else f"{'+' if byte < 0x30 else '~'}{byte:02X}"
    for byte in range(256)
]  # fmt: skip
# What NFS and FUSE call a file that was deleted while somebody has it open, until that ends.
STILL_OPEN = re.compile(r"\.nfs[0-9a-f]{24}|\.fuse_hidden[0-9a-f]{16,24}")
NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)
UNREADABLE = (*NOTHING_THERE, errno.EACCES)  # a folder that the server may not read has no objects
NOT_TO_BE_HAD = (errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)  # a path
NO_ATTRIBUTE = (  # for this file, on its file system, or for this process
    *UNREADABLE, errno.ENODATA, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EPERM,
)


def spell(key: str) -> str:
    """A key as a path that any file system can hold, in an order that is that of the keys: bytes of
    0-9 : ; < = > ? @ A-Z [ \\ ] ^ _ ` a-z { | } as they are, those below as +XX, those above as
    ~XX; cut after SPELLED_NAME_CHARS into directories, whose names end in "!", the lowest."""
    text = "".join(SPELLED[byte] for byte in key.encode())
    pieces = [text[at : at + SPELLED_NAME_CHARS] for at in range(0, len(text), SPELLED_NAME_CHARS)]
    return "!/".join(pieces)


def unspell(path: str) -> str:
    """The inverse of spell; of what spell never gave, a text that it spells otherwise."""
    text = path.replace("!/", "").replace("%", "%25").replace("+", "%").replace("~", "%")
    return unquote_to_bytes(text).decode(errors="replace")


def record_text(record: Mapping[str, Any]) -> bytes:
    """A description: JSON or, if it says no more, `MTIME SIZE MD5 [ALGORITHM=CHECKSUM]` in base64:
    ext4 keeps 68 bytes in the inode, where more costs a block beside it."""
    said = record.keys() - {"mtime", "size", "etag", "checksums", "checksum_type"}
    if said or record.get("checksum_type", "FULL_OBJECT") != "FULL_OBJECT" or "-" in record["etag"]:
        return json.dumps(record, separators=(",", ":")).encode()
    md5 = base64.b64encode(bytes.fromhex(record["etag"])).decode()
    checksums = [f"{name}={value}" for name, value in record.get("checksums", {}).items()]
    return " ".join([str(record["mtime"]), str(record["size"]), md5, *checksums]).encode()


def parse_record(text: str) -> Any:
    """The inverse. ValueError, RecursionError."""
    if text[:1] == "{":
        return json.loads(text)
    mtime, size, md5, *checksums = text.split(" ")
    etag = base64.b64decode(md5, validate=True).hex()
    record: dict[str, Any] = {"mtime": int(mtime), "size": int(size), "etag": etag}
    if checksums:
        record["checksums"] = dict(each.split("=", 1) for each in checksums)
        record["checksum_type"] = "FULL_OBJECT"
    return record


def file_identity(status: os.stat_result) -> tuple[int, ...]:
    """What tells a file or directory from any other, and from itself once it was changed. The ctime
    too: rsync, cp and tar set an mtime back, but nobody can set that."""
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def read_names(path: str) -> Iterator[str]:
    """The names in a directory that can be part of a key: files, and directories with a "/". A link
    that leads nowhere may lead to either later, without a change of the directory: it is both."""
    with os.scandir(path) as entries:
        for entry in entries:
            try:
                entry.name.encode()
                if STILL_OPEN.fullmatch(entry.name):
                    continue
                if entry.is_dir():
                    yield entry.name + "/"
                elif entry.is_file():
                    yield entry.name
                elif entry.is_symlink():
                    yield from (entry.name, entry.name + "/")
            except (UnicodeEncodeError, OSError):
                continue  # no key can say it; a link that leads to itself


class DirectoryCache:
    """Sorted names of directories, trusted as long as the directory's mtime stays what it was. At
    most MAX_CACHED_NAMES names, the directories that were read longest ago going first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the two below
        self._entries: OrderedDict[str, tuple[tuple[int, ...], list[str]]] = OrderedDict()
        self._names = 0

    def names(self, path: str) -> list[str]:
        """What read_names yields, sorted, perhaps with what is gone by now; [] for a directory that
        is not there. The "/" gives the order of the keys: "a-b" (0x2d) comes before what is under
        "a/" (0x2f)."""
        try:
            status = os.stat(path)
            identity = file_identity(status)
            with self._lock:
                entry = self._entries.get(path)
                if entry is not None and entry[0] == identity:
                    self._entries.move_to_end(path)
                    return entry[1]
            settled = time.time() - max(status.st_mtime, status.st_ctime) > RACY_SECONDS
            names = sorted(read_names(path))
            # On tmpfs, which has no device of its own, a read misses what is replaced meanwhile.
            for _ in range(REREADS if os.major(status.st_dev) == 0 else 0):
                if (latest := file_identity(os.stat(path))) == identity:
                    break
                identity, settled = latest, False
                names = sorted({*names, *read_names(path)})
        except OSError as error:
            if error.errno not in UNREADABLE:
                raise
            return []
        if settled:
            self._remember(path, identity, names)
        return names

    def _remember(self, path: str, identity: tuple[int, ...], names: list[str]) -> None:
        with self._lock:
            if replaced := self._entries.pop(path, None):
                self._names -= len(replaced[1]) + DIRECTORY_NAMES
            self._entries[path] = (identity, names)
            self._names += len(names) + DIRECTORY_NAMES
            while self._names > MAX_CACHED_NAMES:
                _, (_, dropped) = self._entries.popitem(last=False)
                self._names -= len(dropped) + DIRECTORY_NAMES


# For reading, without waiting for the writer of a FIFO.
open_file = functools.partial(os.open, flags=os.O_RDONLY | os.O_NONBLOCK)


def find_file(path: str, look: Callable[[str], Any]) -> Any:
    """look(path), with FileNotFoundError for whatever means that no file is there."""
    try:
        return look(path)
    except OSError as error:
        if error.errno in NOTHING_THERE:
            raise FileNotFoundError(path) from None
        raise


def file_status(file: str | int) -> os.stat_result:
    """The status of a regular file, by path or open. FileNotFoundError for anything else."""
    status: os.stat_result = find_file(file, os.stat) if isinstance(file, str) else os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise FileNotFoundError(file)
    return status


Found = tuple[str, str]  # by a walk: the part of a path that is or spells a key, and the path


@dataclass
class Walk:
    """Finds files below a folder in the order of their names: those that begin with `prefix` and
    are not below `start`, which may be moved on meanwhile. If `grouped`, a folder beyond the prefix
    is found instead of its files, with a "/" at its end. None is entered that has more than
    `longest` characters."""

    directories: DirectoryCache
    prefix: str
    start: str
    grouped: bool = False
    longest: int = sys.maxsize

    def below(self, folder: str, base: str = "") -> Iterator[Found]:
        """What is below `folder`, which ends with "/", and is called `base`."""
        names = self.directories.names(folder)
        prefix, start, at = self.prefix, "", 0
        while at < len(names):
            if start != self.start:
                start = self.start
                if start > base:
                    if not start.startswith(base):
                        return
                    head, slash, _ = start[len(base) :].partition("/")
                    at = bisect_left(names, head + slash, at)
                    continue
            name = base + names[at]
            path = folder + names[at]
            at += 1
            if not name.startswith(prefix) and not prefix.startswith(name):
                if name > prefix:
                    return
            elif not name.endswith("/"):
                if name.startswith(prefix):
                    yield name, path
            elif self.grouped and len(name) > len(prefix) and not start.startswith(name):
                yield name, path
            elif len(name) <= self.longest:
                yield from self.below(path, name)


def any_file(folder: str, base: str) -> Iterator[Found]:
    """Files at or below a folder called `base`, in no order, without reading more of it than asked
    for."""
    try:
        for name in read_names(folder):
            if not name.endswith("/"):
                yield base + name, folder + name
            elif len(base) <= MAX_KEY_BYTES:
                yield from any_file(folder + name, base + name)
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise  # else it was removed meanwhile, or is lost+found


def make_own_folders(root: str) -> None:
    """Those of the server itself, which begin with a dot, as no bucket can. OSError."""
    for folder in (".keys", ".locks", ".meta", ".tmp", UPLOADS):
        os.makedirs(os.path.join(root, folder), exist_ok=True)


@contextlib.contextmanager
def flocked(path: str, flags: int) -> Iterator[None]:
    """Hold a file against other threads and processes. It is opened for each holder: flock lets all
    in together who share what one open() gave."""
    file = os.open(path, os.O_RDWR | flags, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


class FileStore:
    """The Store on plain files. Every object is one file, made in .tmp, described by an attribute,
    and then renamed into place: bytes and description appear, and are replaced, together."""

    XATTR = "user.zs3"

    def __init__(self, root: str, fsync: bool = False) -> None:
        self._root = os.path.abspath(root)
        self.waits = self._fsync = fsync
        make_own_folders(self._root)
        self._directories = DirectoryCache()
        self._temp_prefix = f"{self._root}/.tmp/{secrets.token_hex(8)}"
        self._temp_count = itertools.count()

    def start(self) -> None:
        """Remove what earlier servers left half-written, now and then."""
        threading.Thread(target=self._keep_house, name="sweep", daemon=True).start()

    def close(self) -> None:
        """Nothing is held from one request to the next."""

    def internal(self, request: Request) -> Response:
        """Nothing: peers are for distributed mode."""
        raise S3Error("NoSuchKey", Key=request.path)

    def _lock(self, bucket: str, key: str = "") -> contextlib.AbstractContextManager[None]:
        """Hold the lock of a key, or that of all buckets, against other threads and the processes
        that share the folder. It guards the decision what an object is: the check of a condition,
        the rename, and what goes with it. Keys share stripes: no thread may hold two."""
        stripe = zlib.crc32(f"{bucket}/{key}".encode()) % LOCK_STRIPES
        name = f"key-{stripe:02x}" if key else "bucket"
        return flocked(f"{self._root}/.locks/{name}", os.O_CREAT)

    # --- Buckets ---

    def list_buckets(self) -> list[BucketInfo]:
        """A directory of the data folder that has a bucket's name is a bucket."""
        found = []
        for name in self._directories.names(self._root):
            if name.endswith("/") and is_bucket_name(name[:-1]):
                with contextlib.suppress(S3Error):  # deleted meanwhile
                    found.append(self.stat_bucket(name[:-1]))
        return sorted(found)

    def stat_bucket(self, bucket: str) -> BucketInfo:
        """A bucket made by hand was created when it was last changed."""
        self._require_bucket(bucket)
        for path in (self._created_path(bucket), f"{self._root}/{bucket}"):
            with contextlib.suppress(FileNotFoundError):  # made by hand
                return BucketInfo(bucket, os.stat(path).st_mtime)
        raise S3Error("NoSuchBucket", BucketName=bucket)

    def create_bucket(self, bucket: str) -> None:
        make_own_folders(self._root)  # somebody may have removed everything, to begin anew
        with self._lock(bucket):
            try:
                os.mkdir(f"{self._root}/{bucket}")
            except FileExistsError:
                self._require_bucket(bucket)  # it might be a file
                return
            os.makedirs(os.path.dirname(self._created_path(bucket)), exist_ok=True)
            with open(self._created_path(bucket), "w", encoding="utf-8"):
                pass  # its mtime is what it says
            self._sync_folder(self._root)

    def delete_bucket(self, bucket: str) -> None:
        """Nothing but empty directories is ever removed, so no race can lose an object. What a PUT
        has just described stays described: the bucket may be made anew before its rename."""
        for _ in self.scan(bucket, "", "", "/"):
            raise S3Error("BucketNotEmpty", BucketName=bucket)
        with self._lock(bucket):
            self._require_bucket(bucket)
            try:  # the bucket's folder last: while it is there, so may be objects
                remove_empty_folders(f"{self._root}/.keys/{bucket}")
                remove_empty_folders(f"{self._root}/{bucket}")
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                LOG.warning("%s", error)  # what is there is no object: a link, or a file in .keys
                raise S3Error("BucketNotEmpty", BucketName=bucket) from None
            with contextlib.suppress(OSError):  # made by hand, or the sweep will do it
                os.unlink(self._created_path(bucket))
                remove_empty_folders(f"{self._root}/.meta/{bucket}")
            self._sync_folder(self._root)

    def _created_path(self, bucket: str) -> str:
        return f"{self._root}/.meta/{bucket}/created"

    def _require_bucket(self, bucket: str) -> None:
        if not os.path.isdir(f"{self._root}/{bucket}"):
            raise S3Error("NoSuchBucket", BucketName=bucket)

    # --- Paths ---

    def _literal_path(self, bucket: str, key: str) -> str:
        """Where an ordinary key's file is; "" for a key that no path can spell."""
        if key[0] == "/" or key[-1] == "/" or "//" in key or "\0" in key:
            return ""
        if (key[0] == "." or "/." in key) and any(map(STILL_OPEN.fullmatch, key.split("/"))):
            return ""
        if len(key) > MAX_FILE_NAME_BYTES // 4:  # a character has at most 4 bytes
            longest = max(len(name.encode()) for name in key.split("/"))
            if longest > MAX_FILE_NAME_BYTES:
                return ""
        return f"{self._root}/{bucket}/{key}"

    def _special_path(self, bucket: str, key: str) -> str:
        """Where the file of any other key is."""
        return f"{self._root}/.keys/{bucket}/{spell(key)}"

    def _paths(self, bucket: str, key: str) -> Iterator[str]:
        """Where the key's file may be. The literal path wins: it is the one people see."""
        if literal := self._literal_path(bucket, key):
            yield literal
        yield self._special_path(bucket, key)

    # --- Descriptions ---

    def _side_path(self, bucket: str, key: str, status: os.stat_result) -> str:
        """The file that describes a file which cannot describe itself. Its name holds the size and
        mtime it is true for, so that it can be written before the object is renamed into place."""
        digest = sha256_hex(key.encode())
        name = f"{digest}-{status.st_mtime_ns:x}-{status.st_size:x}"
        return f"{self._root}/.meta/{bucket}/{digest[:2]}/{name}"

    def _write_record(self, file: int, bucket: str, info: ObjectInfo) -> ObjectInfo:
        """Describe a finished temporary file by an extended attribute or, where the file system has
        none or no room in it, by a side file. Returns `info` with the file's time."""
        # Our own clock: finer than the kernel's, and a network file system sets it when it likes.
        for now in itertools.count(time.time_ns(), 10**9):
            os.utime(file, ns=(now, now))
            status = os.fstat(file)
            record = info.record() | {"mtime": status.st_mtime_ns}
            del record["modified"]  # it is the file's
            try:
                os.setxattr(file, self.XATTR, record_text(record))
                break
            except (AttributeError, OSError):  # no such call, not supported, or too large
                path = self._side_path(bucket, info.key, status)
                with contextlib.suppress(FileExistsError):  # another's, in the same tick
                    self._write_side(path, json.dumps(record | {"key": info.key}).encode())
                    break
        return replace(info, modified=status.st_mtime_ns / 1e9)

    def _write_side(self, path: str, text: bytes) -> None:
        for _ in range(RACE_TRIES):
            self._make_folders(os.path.dirname(path))
            with contextlib.suppress(FileNotFoundError):  # deleted with its bucket: the rename says
                with open(path, "xb") as side:
                    side.write(text)
                    side.flush()
                    if self._fsync:
                        os.fsync(side.fileno())
                self._sync_folder(os.path.dirname(path))
                return
        raise S3Error("SlowDown")

    def _read_record(self, file: int | str, bucket: str, key: str, status: os.stat_result) -> Any:
        """What _write_record wrote for a file, by path or open; {} if somebody copied it in."""
        try:
            text = os.getxattr(file, self.XATTR)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in NO_ATTRIBUTE:
                raise  # that it cannot be read just now does not mean that there is none
            try:
                with open(self._side_path(bucket, key, status), "rb") as side:
                    text = side.read()
            except FileNotFoundError:
                return {}
        try:
            record = parse_record(text.decode())
        except (ValueError, RecursionError):
            record = None  # somebody else's attribute
        return record if isinstance(record, dict) else {}

    def _describe(
        self, file: str | int, bucket: str, key: str, status: os.stat_result
    ) -> tuple[ObjectInfo, bool]:
        """The ObjectInfo of a file, by path or open, and whether its record holds. If it was not
        written for what is there, somebody edited the file: its ETag is then made of its size and
        mtime, with a dash, lest a client take it for an MD5."""
        record = self._read_record(file, bucket, key, status)
        modified = status.st_mtime_ns / 1e9
        if record.get("mtime") == status.st_mtime_ns and record.get("size") == status.st_size:
            return ObjectInfo.from_record(key, record | {"modified": modified}), True
        etag = f"{status.st_mtime_ns:016x}{status.st_size:016x}-0"
        return ObjectInfo(key, status.st_size, etag, modified, record.get("headers", {})), False

    def _stat(self, path: str, bucket: str, key: str) -> ObjectInfo:
        """The object at a path. Two calls by path may meet two files, one replacing the other: then
        look again through one open file. FileNotFoundError."""
        status = file_status(path)
        info, holds = self._describe(path, bucket, key, status)
        if not holds and file_identity(file_status(path)) != file_identity(status):
            with contextlib.suppress(PermissionError):  # it cannot be read, but it is there
                info, content = self._open(path, bucket, key)
                content.close()
        return info

    def _open(self, path: str, bucket: str, key: str) -> tuple[ObjectInfo, FileContent]:
        """The object at a path. A file that is deleted or replaced while we look may be without its
        record already: then look again at the path. Here the inode tells, which nobody else gets
        while we hold the file open. FileNotFoundError."""
        for _ in range(RACE_TRIES):
            content = FileContent(find_file(path, open_file))
            try:
                content.status = file_status(content.file)
                info, holds = self._describe(content.file, bucket, key, content.status)
                if holds or os.path.samestat(file_status(path), content.status):
                    return info, content
            except BaseException:
                content.close()
                raise
            content.close()
        raise S3Error("SlowDown")

    # --- Reading ---

    def stat_object(self, bucket: str, key: str) -> ObjectInfo:
        info = self._current(bucket, key)
        if info is None:
            self._require_bucket(bucket)
            raise S3Error("NoSuchKey", Key=key)
        return info

    def _current(self, bucket: str, key: str) -> ObjectInfo | None:
        for path in self._paths(bucket, key):
            with contextlib.suppress(FileNotFoundError):  # try the next
                return self._stat(path, bucket, key)
        return None

    def open_object(self, bucket: str, key: str) -> tuple[ObjectInfo, FileContent]:
        for path in self._paths(bucket, key):
            with contextlib.suppress(FileNotFoundError):  # try the next
                return self._open(path, bucket, key)
        self._require_bucket(bucket)
        raise S3Error("NoSuchKey", Key=key)

    def scan(self, bucket: str, prefix: str, start: str, delimiter: str) -> Iterator[ObjectInfo]:
        """A directory is one group of keys when the delimiter is "/": one file in it will do."""
        self._require_bucket(bucket)
        start = max(start, prefix)
        special = Walk(self._directories, spell(prefix), spell(start))
        spelled = special.below(f"{self._root}/.keys/{bucket}/")
        keys = ((unspell(name), name, path) for name, path in spelled)
        # A name that spell never gives, like that of somebody's .DS_Store, is no object's.
        found = ((key, path) for key, name, path in keys if spell(key) == name)
        literal = Walk(self._directories, prefix, start, delimiter == "/", MAX_KEY_BYTES)
        # Of two with one key the literal comes first, which hides the other.
        entries = literal.below(f"{self._root}/{bucket}/")
        both = heapq.merge(entries, found, key=lambda each: each[0])
        last = ""
        for key, path in both:
            if key == last or key < literal.start:
                continue  # hidden, or found before the walks moved on
            info = self._stat_any(path, bucket, key)
            if info is None:
                continue
            yield replace(info, parts=()) if info.parts else info  # 10,000 of each take 1 MB
            last = key
            # The walks go on behind its group: nobody looks at the other files of that, nor reads a
            # busy folder again for each of its groups.
            if group := common_prefix(info.key, prefix, delimiter):
                following = successor(group)
                if following is None:
                    return
                literal.start, special.start = following, spell(following)

    def _stat_any(self, path: str, bucket: str, key: str) -> ObjectInfo | None:
        """The object that a walk found; of a folder, the first that is there."""
        for name, file in any_file(path, key) if path[-1] == "/" else ((key, path),):
            if len(name) > MAX_KEY_BYTES // 4 and len(name.encode()) > MAX_KEY_BYTES:
                continue  # a file that somebody put too deep for a key
            try:
                return self._stat(file, bucket, name)
            except (FileNotFoundError, PermissionError):
                continue  # deleted meanwhile; in a folder that may be read but not entered
        return None

    # --- Writing ---

    def put_object(
        self, bucket: str, key: str, body: Body, headers: dict[str, str], condition: Condition
    ) -> ObjectInfo:
        with self._temporary(bucket, key, condition) as (file, temp):
            for block in body:
                write_all(file, block)
            full = "FULL_OBJECT" if body.checksums else ""
            info = ObjectInfo(key, body.length, body.md5, 0.0, headers, body.checksums, full)
            return self._publish(file, temp, bucket, info, condition)

    def copy_object(
        self, info: ObjectInfo, content: Content, bucket: str, condition: Condition
    ) -> ObjectInfo:
        assert isinstance(content, FileContent)
        with self._temporary(bucket, info.key, condition) as (file, temp):
            self._append(file, content, info.size)
            return self._publish(file, temp, bucket, info, condition)

    def concatenate(
        self, bucket: str, parts: Sequence[ObjectInfo], info: ObjectInfo, condition: Condition
    ) -> ObjectInfo:
        """The parts stay until the caller deletes them: a crash on the way loses nothing."""
        with self._temporary(bucket, info.key, condition) as (file, temp):
            for part in parts:
                try:
                    current, content = self.open_object(UPLOADS, part.key)
                except S3Error:
                    raise S3Error("InvalidPart") from None
                with contextlib.closing(content):
                    if current.etag != part.etag:
                        raise S3Error("InvalidPart")
                    self._append(file, content, part.size)
            return self._publish(file, temp, bucket, info, condition)

    @contextlib.contextmanager
    def hold(self, bucket: str, key: str) -> Iterator[None]:
        """By a lock on its file. Whoever gets it has yet to see whether it is still there."""
        path = self._literal_path(bucket, key)
        try:
            with contextlib.ExitStack() as stack:
                with contextlib.suppress(FileNotFoundError):  # or it is not there any more
                    stack.enter_context(flocked(path, 0))
                yield
        finally:
            with contextlib.suppress(OSError):  # NFS kept in it what was deleted, until it closed
                os.rmdir(os.path.dirname(path))

    def delete_object(self, bucket: str, key: str, condition: Condition) -> None:
        """Directories that become empty go too."""
        self._require_bucket(bucket)
        with self._lock(bucket, key):
            self._check(condition, bucket, key)
            self._remove(self._special_path(bucket, key), bucket, key)
            if literal := self._literal_path(bucket, key):  # it hides the other, so it is the last
                self._remove(literal, bucket, key)

    def _remove(self, path: str, bucket: str, key: str) -> None:
        """Unlink the file there, if any, what describes it, and the directories it leaves empty."""
        try:
            status = file_status(path)
            os.unlink(path)
        except FileNotFoundError:
            return  # nothing is there
        self._remove_side(bucket, key, status)
        folder = os.path.dirname(path)
        self._sync_folder(folder)
        top = {f"{self._root}/{bucket}", f"{self._root}/.keys"}
        while folder not in top:
            try:
                os.rmdir(folder)
            except OSError:
                return  # not empty, or gone already
            folder = os.path.dirname(folder)

    def _remove_side(self, bucket: str, key: str, status: os.stat_result) -> None:
        """Remove the side file of what had this status, if there was one; unless what is there now
        has the same: as many bytes, within one tick of the file system's clock."""
        path = self._side_path(bucket, key, status)
        if os.path.exists(path) and not self._side_in_use(bucket, path):
            with contextlib.suppress(FileNotFoundError):  # the sweep was faster
                os.unlink(path)

    def _check(self, condition: Condition, bucket: str, key: str) -> None:
        if condition != NO_CONDITION:
            condition.check(self._current(bucket, key))

    @contextlib.contextmanager
    def _temporary(self, bucket: str, key: str, condition: Condition) -> Iterator[tuple[int, str]]:
        """A new file in .tmp for an object, open for writing, and its path; it goes unless it is
        renamed. What would be refused already is, before the body is read."""
        self._require_bucket(bucket)
        self._check(condition, bucket, key)
        path = f"{self._temp_prefix}-{next(self._temp_count)}"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            yield file, path
        except BaseException:
            with contextlib.suppress(FileNotFoundError):  # renamed already
                os.unlink(path)
            raise
        finally:
            os.close(file)

    def _append(self, file: int, content: FileContent, size: int) -> None:
        """Copy `size` bytes to the end of a file, inside the kernel where it can. SlowDown if
        somebody edits them meanwhile: they may not be what the ETag says."""
        copied = 0
        try:
            while copied < size and (
                count := os.copy_file_range(content.file, file, min(size - copied, GiB), copied)
            ):
                copied += count
        except (AttributeError, OSError):
            if copied:
                raise
        for data in content.chunks(0, 0 if copied else size):  # no such call, or not here
            write_all(file, memoryview(data))
            copied += len(data)
        then, now = content.status, os.fstat(content.file)
        if copied < size or (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
            raise S3Error("SlowDown", "The source was changed while it was copied.")

    def _publish(
        self, file: int, temp: str, bucket: str, info: ObjectInfo, condition: Condition
    ) -> ObjectInfo:
        """Make a finished temporary file the object `info.key`: only here do objects appear."""
        info = self._write_record(file, bucket, info)
        try:
            if self._fsync:
                os.fsync(file)
            os.close(os.dup(file))  # a network file system may say only now that its disk is full
            with self._lock(bucket, info.key):
                self._check(condition, bucket, info.key)
                self._place(temp, bucket, info.key)
        except BaseException:
            with contextlib.suppress(OSError):  # then the sweep will remove it
                self._remove_side(bucket, info.key, os.fstat(file))
            raise
        return info

    def _place(self, temp: str, bucket: str, key: str) -> None:
        """Rename a temporary file to where its key is, or is to be. Under the key's lock."""
        literal, special = self._literal_path(bucket, key), self._special_path(bucket, key)
        # A listing could miss a key that moves: one stays where it is until it is deleted.
        is_special = os.path.isfile(special)
        stays = is_special and not os.path.isfile(literal)
        if literal and not stays and self._rename(temp, literal, bucket, key):
            if is_special:  # hidden by a file that was copied in
                self._remove(special, bucket, key)
            return
        # The bucket's own folder may stay empty by this: the lock keeps delete_bucket from it.
        with self._lock(bucket):
            self._require_bucket(bucket)
            if not self._rename(temp, special, bucket, key):
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), special)

    def _rename(self, temp: str, path: str, bucket: str, key: str) -> bool:
        """Rename into place, making directories. False when the path is taken: it is a directory,
        or a part of it is a file, which both stand for other keys. NoSuchBucket."""
        replaced = None
        for _ in range(RACE_TRIES):
            try:
                with contextlib.suppress(FileNotFoundError):  # nothing to replace
                    replaced = os.stat(path)
                    if stat.S_ISDIR(replaced.st_mode):
                        return False  # also a link to one, which rename would replace
                os.rename(temp, path)
            except FileNotFoundError:
                if not os.path.exists(temp):  # untouched for TEMP_SECONDS, and swept by a server
                    raise S3Error("RequestTimeout") from None
                self._require_bucket(bucket)
                if not self._make_folders(os.path.dirname(path)):
                    return False
            except OSError as error:
                if error.errno not in NOT_TO_BE_HAD:
                    raise
                return False
            else:
                if replaced is not None:
                    self._remove_side(bucket, key, replaced)
                self._sync_folder(os.path.dirname(path))
                return True
        raise S3Error("SlowDown")

    def _make_folders(self, folder: str) -> bool:
        """Make a folder and those above it, but for a bucket's own; False: a file is in the way. A
        deletion of the last object beside may remove them again: the caller tries until it can."""
        top, *names = folder[len(self._root) + 1 :].split("/")
        path = f"{self._root}/{top}"  # a bucket, .keys or .meta
        for name in names:
            path = f"{path}/{name}"
            try:
                os.mkdir(path)
                self._sync_folder(os.path.dirname(path))
            except FileExistsError:
                if not os.path.isdir(path) and os.path.lexists(path):
                    return False
            except FileNotFoundError:
                return True  # removed again
            except OSError as error:
                if error.errno not in NOT_TO_BE_HAD:
                    raise
                return False
        return True

    def _sync_folder(self, folder: str) -> None:
        """With --fsync, have a rename or removal in this folder survive a loss of power."""
        while self._fsync:
            # Pruned meanwhile, perhaps for a file of its name: its own removal is what counts.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                return sync(f"{folder}/")
            folder = os.path.dirname(folder)

    # --- Housekeeping ---

    def _keep_house(self) -> None:
        while True:
            try:
                self._sweep()
            except OSError as error:
                LOG.warning("could not look for leftovers: %s", error)  # next time, then
            time.sleep(SWEEP_SECONDS)

    def _sweep(self) -> None:
        """Remove temporary files that no server writes any more, and descriptions that are without
        their object for long. One that is so for the first time gets the mtime 0, and so a ctime
        from which that counts."""
        now = time.time()
        for path in files_below(f"{self._root}/.tmp"):
            self._remove_if_old(path, now - TEMP_SECONDS)
        for bucket in os.listdir(f"{self._root}/.meta"):
            for path in files_below(f"{self._root}/.meta/{bucket}"):
                if not path.endswith("/created"):
                    self._sweep_side(bucket, path, now - DESCRIPTION_SECONDS)

    def _sweep_side(self, bucket: str, path: str, horizon: float) -> None:
        with contextlib.suppress(FileNotFoundError, PermissionError):  # swept, or somebody else's
            was_missed = os.stat(path).st_mtime < EARLIEST_SECONDS
            is_missed = not self._side_in_use(bucket, path)
            if was_missed != is_missed:
                os.utime(path, (0, 0) if is_missed else None)
            elif is_missed:
                self._remove_if_old(path, horizon)

    def _remove_if_old(self, path: str, horizon: float) -> None:
        with contextlib.suppress(FileNotFoundError):  # another server sweeps too
            if os.stat(path).st_ctime < horizon:  # tar and rsync set an mtime back
                os.unlink(path)
                LOG.info("removed %s, left by an earlier server", path)

    def _side_in_use(self, bucket: str, path: str) -> bool:
        """Whether a side file describes an object as it is now."""
        try:
            with open(path, "rb") as side:
                key = str(json.loads(side.read())["key"])
            key.encode()  # JSON may hold half a character
        except (FileNotFoundError, ValueError, LookupError, TypeError, RecursionError):
            return False  # gone, torn by a crash before its object appeared, or somebody else's
        for candidate in self._paths(bucket, key) if key else ():
            with contextlib.suppress(FileNotFoundError):  # try the next
                if self._side_path(bucket, key, file_status(candidate)) == path:
                    return True
        return False


def sync(*paths: str | os.PathLike[str]) -> None:
    """Make files' bytes, and what was renamed in folders, survive a loss of power."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def write_all(file: int, data: memoryview) -> None:
    """Write every byte: a write to a nearly full disk may take only some."""
    while data:
        data = data[os.write(file, data) :]


def files_below(folder: str) -> list[str]:
    """The paths of all files below a folder; [] if it is not there."""
    return [f"{path}/{name}" for path, _, names in os.walk(folder) for name in names]


def remove_empty_folders(folder: str) -> None:
    """Remove a folder that holds nothing but folders; OSError (ENOTEMPTY) if there is a file."""
    below = (path for path, _, _ in os.walk(folder, topdown=False))
    for path in itertools.chain(below, [folder]):  # which is silent of a folder it cannot read
        with contextlib.suppress(FileNotFoundError):  # a deletion beside pruned it
            os.rmdir(path)


# ===== 8 Multipart =====
# An upload is objects of the bucket UPLOADS: BUCKET/ID/00000 is the upload itself, whose headers
# say what the finished object shall be, and BUCKET/ID/00001 to BUCKET/ID/10000 are its parts.

COMPOSITE, FULL_OBJECT = "COMPOSITE", "FULL_OBJECT"
# Checksum algorithm -> the types it can have, its default first. (S3 "Checking object integrity")
CHECKSUM_TYPES = {
    "CRC32": (COMPOSITE, FULL_OBJECT),
    "CRC32C": (COMPOSITE, FULL_OBJECT),
    "CRC64NVME": (FULL_OBJECT,),
    "SHA1": (COMPOSITE,),
    "SHA256": (COMPOSITE,),
}
UPLOAD_ID = re.compile("[0-9a-f]{32}")
UPLOAD_HEADERS = ("zs3-key", "zs3-algorithm", "zs3-checksum-type")  # beside the future object's


class Upload(NamedTuple):
    """A multipart upload in progress. `initiated` is in seconds since the epoch; `algorithm` and
    `checksum_type` are "" when no checksum was asked for; `headers` are the future object's."""

    id: str
    bucket: str
    key: str
    initiated: float
    algorithm: str
    checksum_type: str
    headers: dict[str, str]

    def part_key(self, number: int) -> str:
        """The key in UPLOADS of a part; of the upload itself for 0."""
        return f"{self.bucket}/{self.id}/{number:05d}"


def find_upload(store: Store, bucket: str, upload_id: str) -> Upload | None:
    """As create_multipart_upload recorded it; None if there is none, or no longer."""
    try:
        info = store.stat_object(UPLOADS, f"{bucket}/{upload_id}/00000")
    except S3Error as error:
        if error.code != "NoSuchKey":
            raise
        return None
    headers = dict(info.headers)
    key, algorithm, kind = (headers.pop(name, "") for name in UPLOAD_HEADERS)
    if not key:
        return None  # its description was lost, as by a copy of the folder without attributes
    return Upload(upload_id, bucket, key, info.modified, algorithm, kind, headers)


def requested_upload(store: Store, request: Request) -> Upload:
    """The upload of its bucket and key that a request names; NoSuchUpload."""
    bucket, upload_id = request.bucket, request.query["uploadId"]
    if UPLOAD_ID.fullmatch(upload_id):
        upload = find_upload(store, bucket, upload_id)
        if upload is not None and upload.key == request.key:
            return upload
    store.stat_bucket(bucket)
    raise S3Error("NoSuchUpload", UploadId=upload_id)


def upload_ids(store: Store, bucket: str) -> set[str]:
    """The ids of all uploads in a bucket, also of those whose record is gone."""
    return {info.key.split("/")[1] for info in store.scan(UPLOADS, f"{bucket}/", "", "/")}


def list_parts(store: Store, upload: Upload, after: int = 0) -> Iterator[tuple[int, ObjectInfo]]:
    """Number and object of each part above number `after`, in order."""
    prefix = upload.part_key(0)[:-5]
    for info in store.scan(UPLOADS, prefix, upload.part_key(after + 1), ""):
        if re.fullmatch("[0-9]{5}", number := info.key[len(prefix) :]):  # else somebody's own file
            yield int(number), info


def ending(store: Store, bucket: str, upload_id: str) -> contextlib.AbstractContextManager[None]:
    """Hold an upload against others that complete, abort or discard it, from before it is looked at
    until it is discarded. Else an Abort could be answered before the object appears, and a Complete
    that was repeated, as it took long, do its work again over what was written after the first."""
    if not UPLOAD_ID.fullmatch(upload_id):
        return contextlib.nullcontext()  # there is no such upload
    return store.hold(UPLOADS, f"{bucket}/{upload_id}/00000")


def discard_upload(store: Store, bucket: str, upload_id: str) -> None:
    """Delete an upload's parts and then the upload, so that a crash leaves something to abort; and
    what was stored meanwhile by a client that found the upload still there."""
    for _ in range(2):
        for info in reversed(list(store.scan(UPLOADS, f"{bucket}/{upload_id}/", "", ""))):
            store.delete_object(UPLOADS, info.key, NO_CONDITION)


def expire_uploads(store: Store, bucket: str, horizon: float) -> None:
    """Delete what is left of uploads in which nothing was written after `horizon`, in seconds since
    the epoch; also of those whose record is gone."""
    for upload_id in upload_ids(store, bucket):
        with ending(store, bucket, upload_id):
            left = store.scan(UPLOADS, f"{bucket}/{upload_id}/", "", "")
            if max((info.modified for info in left), default=math.inf) < horizon:
                discard_upload(store, bucket, upload_id)
                LOG.info("removed a stale upload of %s", bucket)


class ListedPart(NamedTuple):
    """One part as CompleteMultipartUpload lists it."""

    number: int
    etag: str
    checksums: dict[str, str]


def parse_part_list(document: bytes) -> list[ListedPart]:
    """The parts of a CompleteMultipartUpload body. MalformedXML, InvalidPartOrder."""
    parts = []
    for node in parse_xml(document, "CompleteMultipartUpload").findall("Part"):
        fields = {tag: text.strip() for tag, text in child_texts(node).items()}
        number = fields.get("PartNumber", "")
        if not re.fullmatch(r"\d{1,9}", number, re.ASCII) or not fields.get("ETag"):
            raise S3Error("MalformedXML", "Each Part needs a PartNumber and an ETag.")
        checksums = {name[8:]: text for name, text in fields.items() if name.startswith("Checksum")}
        parts.append(ListedPart(int(number), fields["ETag"].strip('"'), checksums))
    if not parts or len(parts) > MAX_PART_NUMBER:
        raise S3Error("MalformedXML", f"You must list 1 to {MAX_PART_NUMBER} parts.")
    if any(one.number >= two.number for one, two in itertools.pairwise(parts)):
        raise S3Error("InvalidPartOrder")
    return parts


def multipart_etag(parts: Sequence[ObjectInfo | ListedPart]) -> str:
    """The MD5 of the parts' MD5s, a dash and their number."""
    digest = hashlib.md5(usedforsecurity=False)
    for etag in (part.etag for part in parts):
        digest.update(bytes.fromhex(etag) if re.fullmatch("[0-9a-f]{32}", etag) else etag.encode())
    return f"{digest.hexdigest()}-{len(parts)}"


def match_parts(
    store: Store, upload: Upload, listed: Sequence[ListedPart], min_bytes: int
) -> list[ObjectInfo]:
    """The stored parts that the list names. InvalidPart, EntityTooSmall."""
    stored = dict(list_parts(store, upload))
    parts = []
    for number, etag, checksums in listed:
        info = stored.get(number)
        if info is None or info.etag != etag or checksums.items() - info.checksums.items():
            raise S3Error("InvalidPart", UploadId=upload.id, PartNumber=number, ETag=etag)
        parts.append(info)
    for (number, etag, _), info in zip(listed[:-1], parts, strict=False):
        if info.size < min_bytes:
            sizes = {"ProposedSize": info.size, "MinSizeAllowed": min_bytes}
            raise S3Error("EntityTooSmall", PartNumber=number, ETag=etag, **sizes)
    return parts


def combine_checksums(upload: Upload, parts: Sequence[ObjectInfo]) -> dict[str, str]:
    """The checksum of the whole from those of its parts: COMPOSITE is the checksum of their
    checksums with their number behind it, FULL_OBJECT the one of all their bytes."""
    if not upload.algorithm:
        return {}
    values = [base64.b64decode(part.checksums[upload.algorithm]) for part in parts]
    if upload.checksum_type == COMPOSITE:
        digest = CHECKSUMS[upload.algorithm]()
        digest.update(b"".join(values))
        return {upload.algorithm: f"{base64.b64encode(digest.digest()).decode()}-{len(parts)}"}
    crc = CRCS[upload.algorithm]
    whole = 0
    for value, part in zip(values, parts, strict=True):
        whole = crc.combine(whole, int.from_bytes(value, "big"), part.size)
    return {upload.algorithm: base64.b64encode(whole.to_bytes(crc.width // 8, "big")).decode()}


def finished_info(upload: Upload, parts: Sequence[ObjectInfo]) -> ObjectInfo:
    """What the object of these parts is, but for the time."""
    kept = (PartInfo(part.size, part.checksums.get(upload.algorithm, "")) for part in parts)
    return ObjectInfo(
        upload.key, sum(part.size for part in parts), multipart_etag(parts), 0.0, upload.headers,
        combine_checksums(upload, parts), upload.checksum_type, tuple(kept), upload.id,
    )


# ===== 9 Operations =====
# Each is operation(store, request) -> Response, named as in the S3 API reference.

REGION = "us-east-1"  # of every bucket; in a signature any other will do
OWNER = xml(ID=hashlib.sha256(b"zs3").hexdigest(), DisplayName="zs3")  # of every bucket and object
STORED_HEADERS = (
    "cache-control", "content-disposition", "content-encoding", "content-language", "content-type",
    "expires",
)
MIME_TYPES = mimetypes.MimeTypes()  # by a name's ending; the same on every machine
# Request headers that ask for what is not here: the values that ask for nothing, and the error.
REFUSED_HEADERS: dict[str, tuple[tuple[str, ...], str]] = {
    "content-range": ((), "NotImplemented"),  # a part of an object cannot be put (RFC 9110, 14.5)
    "x-amz-acl": (("private", "bucket-owner-full-control"), "AccessControlListNotSupported"),
    "x-amz-bucket-object-lock-enabled": (("false",), "NotImplemented"),
    "x-amz-object-ownership": (("BucketOwnerEnforced",), "AccessControlListNotSupported"),
    "x-amz-storage-class": (("STANDARD",), "InvalidStorageClass"),
    "x-amz-tagging": (("",), "NotImplemented"),
    "x-amz-website-redirect-location": ((), "NotImplemented"),
}
REFUSED_PREFIXES = {
    "x-amz-grant-": "AccessControlListNotSupported",
    "x-amz-object-lock-": "NotImplemented",
    "x-amz-server-side-encryption": "NotImplemented",
    "x-amz-copy-source-server-side-encryption": "NotImplemented",
    "x-amz-write-offset-bytes": "NotImplemented",
    "x-amz-if-match-": "NotImplemented",
}


def quoted(etag: str) -> str:
    """An ETag as it is shown."""
    return f'"{etag}"'


def refuse_headers(headers: Mapping[str, str]) -> None:
    """An error for a header that asks for what is not done here: silence would pass for consent."""
    for name, value in headers.items():
        harmless, code = REFUSED_HEADERS.get(name, ((value,), ""))
        if value not in harmless:
            raise S3Error(code, f"{name}: {value} is not supported here.")
        for prefix, code in REFUSED_PREFIXES.items():
            if name.startswith(prefix):
                raise S3Error(code, f"{name} is not supported here.")


def stored_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of a request that its object keeps: x-amz-meta-*, and those of STORED_HEADERS
    that say anything (browsers send an empty Content-Type with a file of unknown type), without
    `aws-chunked`, which was the encoding of the request. MetadataTooLarge."""
    kept = {name: headers[name] for name in STORED_HEADERS if headers.get(name)}
    codings = [coding.strip() for coding in kept.pop("content-encoding", "").split(",")]
    if rest := ", ".join(coding for coding in codings if coding not in ("", "aws-chunked")):
        kept["content-encoding"] = rest
    metadata = {name: value for name, value in headers.items() if name.startswith("x-amz-meta-")}
    size = sum(len(name) - len("x-amz-meta-") + len(value) for name, value in metadata.items())
    if size > MAX_METADATA_BYTES:
        raise S3Error("MetadataTooLarge", Size=size, MaxSizeAllowed=MAX_METADATA_BYTES)
    return kept | metadata


def kept_headers(info: ObjectInfo) -> dict[str, str]:
    """The headers an object keeps; a copied-in file has the type of its name, unless packed."""
    if not info.etag.endswith("-0"):
        return info.headers
    kind, packed = MIME_TYPES.guess_type("./" + info.key)  # "./": no name is taken for a URL
    return ({"content-type": kind} if kind and not packed else {}) | info.headers


def write_condition(request: Request) -> Condition:
    """The condition of a write, from its headers. NotImplemented for one by date, lest the write be
    done as if there were none (RFC 9110, 13.1.4; a write ignores If-Modified-Since, by 13.1.3)."""
    if "if-unmodified-since" in request.headers:
        raise S3Error("NotImplemented", "A write cannot depend on a date, only on an ETag.")
    return Condition(request.headers.get("if-match"), request.headers.get("if-none-match"))


def checksum_headers(info: ObjectInfo) -> dict[str, str]:
    """The x-amz-checksum-* headers of an object; a part has no type."""
    found = {checksum_header(name): value for name, value in info.checksums.items()}
    return found | ({"x-amz-checksum-type": info.checksum_type} if info.checksum_type else {})


def checksum_fields(info: ObjectInfo) -> dict[str, object]:
    """The same as fields of a document."""
    found: dict[str, object] = {f"Checksum{name}": value for name, value in info.checksums.items()}
    return found | {"ChecksumType": info.checksum_type or None}


# --- Service and buckets ---


def list_buckets(store: Store, request: Request) -> Response:
    """GET /."""
    query = request.query
    asked = query.get("max-buckets", str(MAX_PAGE_BUCKETS))
    limit = parse_integer(asked, "max-buckets", 1, MAX_PAGE_BUCKETS)
    prefix, after = query.get("prefix", ""), decode_token(query.get("continuation-token", ""))
    found = [
        info for info in store.list_buckets() if info.name.startswith(prefix) and info.name >= after
    ]
    shown = [
        xml(Name=info.name, CreationDate=iso_date(info.created), BucketRegion=REGION)
        for info in found[:limit]
    ]
    return document(
        "ListAllMyBucketsResult", Owner=OWNER, Buckets=xml(Bucket=shown),
        ContinuationToken=encode_token(found[limit].name) if len(found) > limit else None,
        Prefix=prefix or None,
    )


def create_bucket(store: Store, request: Request) -> Response:
    """PUT /bucket. Its owner may do so again, as in us-east-1. Any location constraint is taken."""
    refuse_headers(request.headers)
    expect_checksums(request)
    wanted = request.body.read_all()
    if wanted.strip():
        parse_xml(wanted, "CreateBucketConfiguration")
    store.create_bucket(request.bucket)
    return Response(200, {"Location": f"/{request.bucket}"})


def head_bucket(store: Store, request: Request) -> Response:
    """HEAD /bucket."""
    store.stat_bucket(request.bucket)
    return Response(200, {"x-amz-bucket-region": REGION})


def delete_bucket(store: Store, request: Request) -> Response:
    """DELETE /bucket. Its uploads in progress go with it; not those of one made anew meanwhile."""
    uploads = upload_ids(store, request.bucket)
    store.delete_bucket(request.bucket)
    with contextlib.suppress(S3Error):  # what began meanwhile is else left to --upload-expiry
        late = upload_ids(store, request.bucket)
        if request.bucket not in {info.name for info in store.list_buckets()}:
            uploads |= late
    for upload_id in uploads:
        with ending(store, request.bucket, upload_id):
            discard_upload(store, request.bucket, upload_id)
    return Response(204)


GRANTEE = Xml(
    '<Grantee xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xsi:type="CanonicalUser">'
    f"{OWNER}</Grantee>"
)
GRANT = xml(Grant=Xml(GRANTEE + xml(Permission="FULL_CONTROL")))  # to the owner, none to others
# Sub-resource -> what GET answers where nothing is configured: an error, `CODE` or `CODE: MESSAGE`,
# or root and fields.
Configuration = str | tuple[str, dict[str, object]]
ACL: Configuration = ("AccessControlPolicy", {"Owner": OWNER, "AccessControlList": GRANT})
BUCKET_CONFIGURATIONS: dict[str, Configuration] = {
    "accelerate": ("AccelerateConfiguration", {}),
    "acl": ACL,
    "cors": "NoSuchCORSConfiguration",
    "encryption": "ServerSideEncryptionConfigurationNotFoundError",
    "lifecycle": "NoSuchLifecycleConfiguration",
    "location": ("LocationConstraint", {}),  # empty: us-east-1
    "logging": ("BucketLoggingStatus", {}),
    "notification": ("NotificationConfiguration", {}),
    "object-lock": "ObjectLockConfigurationNotFoundError",
    "ownershipControls": "OwnershipControlsNotFoundError",
    "policy": "NoSuchBucketPolicy",
    "policyStatus": "NoSuchBucketPolicy",
    "publicAccessBlock": "NoSuchPublicAccessBlockConfiguration",
    "replication": "ReplicationConfigurationNotFoundError",
    "requestPayment": ("RequestPaymentConfiguration", {"Payer": "BucketOwner"}),
    "tagging": "NoSuchTagSet",
    "versioning": ("VersioningConfiguration", {}),
    "website": "NoSuchWebsiteConfiguration",
}
OBJECT_CONFIGURATIONS: dict[str, Configuration] = {
    "acl": ACL,
    "legal-hold": "InvalidRequest: Bucket is missing Object Lock Configuration",
    "retention": "InvalidRequest: Bucket is missing Object Lock Configuration",
    "tagging": ("Tagging", {"TagSet": Xml()}),
}


def get_configuration(store: Store, request: Request) -> Response:
    """GET ?location, ?acl and the like: what S3 says of a bucket or object that has none of it."""
    if request.key:
        store.stat_object(request.bucket, request.key)
    else:
        store.stat_bucket(request.bucket)
    table = OBJECT_CONFIGURATIONS if request.key else BUCKET_CONFIGURATIONS
    answer = next(answer for name, answer in table.items() if name in request.query)
    if isinstance(answer, str):
        code, _, message = answer.partition(": ")
        raise S3Error(code, message, BucketName=request.bucket)
    root, fields = answer
    return document(root, **fields)


# --- Listing ---


class Page(NamedTuple):
    """A page of a listing. `next_start` is where the next one begins, None on the last page; `last`
    is the last key or common prefix shown."""

    contents: list[ObjectInfo]
    prefixes: list[str]
    next_start: str | None
    last: str


def start_after(marker: str, prefix: str, delimiter: str) -> str | None:
    """Where a listing begins that continues after a key or a common prefix; None at the end."""
    if marker and marker.startswith(prefix) and common_prefix(marker, prefix, delimiter) == marker:
        return successor(marker)
    return marker + "\0" if marker else ""


def list_page(
    scan: Callable[[str], Iterator[ObjectInfo]],
    prefix: str, delimiter: str, start: str | None, limit: int,
) -> Page:
    """The first `limit` keys and common prefixes that are not below `start`. `scan` is Store.scan
    with the start yet to be given. It begins anew only where it shows a group of keys twice."""
    contents: list[ObjectInfo] = []
    prefixes: list[str] = []
    last, position = "", start
    while position is not None and limit:
        for info in scan(position):
            group = common_prefix(info.key, prefix, delimiter)
            if group and prefixes and group == prefixes[-1]:
                break
            if len(contents) + len(prefixes) == limit:
                return Page(contents, prefixes, position, last)
            if group:
                prefixes.append(group)
                last, position = group, successor(group)
            else:
                contents.append(info)
                last, position = info.key, info.key + "\0"
        else:
            break
    return Page(contents, prefixes, None, last)


def encode_token(start: str) -> str:
    """A continuation token: a position in the order of keys, unreadable lest anyone rely on it."""
    return base64.urlsafe_b64encode(start.encode()).decode()


def decode_token(token: str) -> str:
    """The inverse; "" for "". InvalidArgument for what is no token."""
    try:
        return base64.b64decode(token, b"-_", validate=True).decode()
    except ValueError:
        raise S3Error("InvalidArgument", "The continuation token provided is incorrect") from None


class ListQuery:
    """The parameters that all listings share. `show` is how they show a key: percent-encoded with
    encoding-type=url. InvalidArgument for what is malformed."""

    def __init__(self, request: Request, limit_name: str) -> None:
        query = request.query
        self.bucket = request.bucket
        self.prefix, self.delimiter = query.get("prefix", ""), query.get("delimiter", "")
        self.limit = page_limit(query.get(limit_name, ""), limit_name)
        encoding = query.get("encoding-type", "")
        if encoding not in ("", "url"):
            raise S3Error("InvalidArgument", "Invalid Encoding Method specified in Request")
        self.show: Callable[[str], str] = quote if encoding else str
        self.fields: dict[str, object] = {
            "Prefix": self.show(self.prefix), "Delimiter": self.show(self.delimiter) or None,
            "EncodingType": encoding or None,
        }

    def page(self, store: Store, marker: str, token: str | None = None) -> Page:
        """The page of objects from a token, if there is one, or after a marker. NoSuchBucket."""
        start = decode_token(token) if token else start_after(marker, self.prefix, self.delimiter)
        store.stat_bucket(self.bucket)
        scan = functools.partial(store.scan, self.bucket, self.prefix, delimiter=self.delimiter)
        return list_page(scan, self.prefix, self.delimiter, start, self.limit)


def page_limit(text: str, name: str) -> int:
    """max-keys and its like: at most MAX_PAGE_ITEMS, whatever is asked for."""
    return min(parse_integer(text or str(MAX_PAGE_ITEMS), name, 0, 2**31 - 1), MAX_PAGE_ITEMS)


def list_objects(store: Store, request: Request) -> Response:
    """GET /bucket: version 1, in which a page continues after a marker."""
    query = ListQuery(request, "max-keys")
    marker = request.query.get("marker", "")
    page = query.page(store, marker)
    following = query.show(page.last) if page.next_start is not None and query.delimiter else None
    return listing(query, page, OWNER, Marker=query.show(marker), NextMarker=following)


def list_objects_v2(store: Store, request: Request) -> Response:
    """GET /bucket?list-type=2, in which a page continues at a token."""
    if request.query["list-type"] != "2":
        raise S3Error("InvalidArgument", "list-type can only be 2.")
    query = ListQuery(request, "max-keys")
    after, token = request.query.get("start-after", ""), request.query.get("continuation-token")
    if token == "":
        raise S3Error("InvalidArgument", "The continuation token provided is incorrect")
    page = query.page(store, after, token)
    following = encode_token(page.next_start) if page.next_start is not None else None
    owner = OWNER if request.query.get("fetch-owner") == "true" else None
    return listing(
        query, page, owner, KeyCount=len(page.contents) + len(page.prefixes),
        StartAfter=query.show(after) or None, ContinuationToken=token,
        NextContinuationToken=following,
    )


def listing(
    query: ListQuery, page: Page, owner: Xml | None, versions: bool = False, **fields: object
) -> Response:
    """A page of keys, each as its one version if asked for. davix wants all else before them."""
    root, each = ("ListVersionsResult", "Version") if versions else ("ListBucketResult", "Contents")
    version = {"VersionId": "null", "IsLatest": True} if versions else {}
    contents = [
        xml(
            Key=query.show(info.key), **version, LastModified=iso_date(info.modified),
            ETag=quoted(info.etag), ChecksumAlgorithm=list(info.checksums),
            ChecksumType=info.checksum_type or None, Size=info.size, Owner=owner,
            StorageClass="STANDARD",
        )
        for info in page.contents
    ]
    return document(
        root, Name=query.bucket, **query.fields, **fields, MaxKeys=query.limit,
        IsTruncated=page.next_start is not None, **{each: contents},
        CommonPrefixes=[xml(Prefix=query.show(prefix)) for prefix in page.prefixes],
    )


def list_object_versions(store: Store, request: Request) -> Response:
    """GET /bucket?versions: each key has one, called null. Tools that empty a bucket ask so."""
    query = ListQuery(request, "max-keys")
    marker = request.query.get("key-marker", "")
    page = query.page(store, marker)
    following = None if page.next_start is None else query.show(page.last)
    return listing(
        query, page, OWNER, versions=True, KeyMarker=query.show(marker), VersionIdMarker="",
        NextKeyMarker=following, NextVersionIdMarker=following and "null",
    )


# --- Objects ---


def put_object(store: Store, request: Request) -> Response:
    """PUT /bucket/key."""
    check_upload(request)
    headers, condition = stored_headers(request.headers), write_condition(request)
    info = store.put_object(request.bucket, request.key, request.body, headers, condition)
    return Response(200, {"ETag": quoted(info.etag)} | checksum_headers(info))


def check_upload(request: Request) -> None:
    """What PutObject and UploadPart need: a length, checksums, nothing that is not here."""
    refuse_headers(request.headers)
    if "content-length" not in request.headers and "transfer-encoding" not in request.headers:
        raise S3Error("MissingContentLength")
    expect_checksums(request)


def get_object(store: Store, request: Request) -> Response:
    """GET /bucket/key."""
    info, content = store.open_object(request.bucket, request.key)
    try:
        return object_response(request, info, content)
    except BaseException:
        content.close()
        raise


def head_object(store: Store, request: Request) -> Response:
    """HEAD /bucket/key: the head that GET would have."""
    return object_response(request, store.stat_object(request.bucket, request.key), None)


def object_response(request: Request, info: ObjectInfo, content: Content | None) -> Response:
    """The answer to GET, or to HEAD, for which no content was opened."""
    headers = object_headers(request, info)
    if not_modified(request.headers, info):
        return Response(304, headers, Stream(content, 0, 0))
    chosen = chosen_range(request, info)
    with_checksums = request.header("x-amz-checksum-mode").upper() == "ENABLED"
    if chosen is None:
        headers |= checksum_headers(info) if with_checksums else {}
        return Response(200, headers, Stream(content, 0, info.size))
    start, length = chosen
    if length:
        headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{info.size}"
    if "partNumber" in request.query:
        headers |= part_headers(info, int(request.query["partNumber"]), with_checksums)
    return Response(206, headers, Stream(content, start, length))


def part_headers(info: ObjectInfo, number: int, with_checksums: bool) -> dict[str, str]:
    """What GET and HEAD of one part say beside: how many there are, and its own checksum (there is
    none of a part where the object's is of all its bytes)."""
    if not info.parts:
        return checksum_headers(info) if with_checksums else {}
    headers = {"x-amz-mp-parts-count": str(len(info.parts))}
    if with_checksums and (info.checksum_type == COMPOSITE or len(info.parts) == 1):
        own = dict.fromkeys(info.checksums, info.parts[number - 1].checksum)
        headers |= checksum_headers(replace(info, checksums=own))
    return headers


def object_headers(request: Request, info: ObjectInfo) -> dict[str, str]:
    """What GET and HEAD say of an object. `response-*` parameters replace stored headers."""
    headers = {
        "Last-Modified": http_date(int(info.modified)), "ETag": quoted(info.etag),
        "Accept-Ranges": "bytes", "content-type": "binary/octet-stream", **kept_headers(info),
    }
    for name in STORED_HEADERS if request.query else ():
        if (value := request.query.get(f"response-{name}")) is not None:
            if request.credential is None:
                raise S3Error("InvalidRequest", f"response-{name} cannot be used anonymously.")
            if re.search("[\r\n\0]", value):
                raise S3Error("InvalidArgument", f"response-{name} cannot hold a line break.")
            headers[name] = value.encode().decode("latin-1")
    return headers


def not_modified(headers: Mapping[str, str], info: ObjectInfo) -> bool:
    """Whether the answer is 304; PreconditionFailed for 412. (RFC 9110, 13.2.2)"""
    modified = int(info.modified)
    if "if-match" in headers:
        if not etag_matches(headers["if-match"], info.etag):
            raise S3Error("PreconditionFailed", Condition="If-Match")
    elif "if-unmodified-since" in headers:
        since = parse_http_date(headers["if-unmodified-since"])
        if since is not None and modified > since:
            raise S3Error("PreconditionFailed", Condition="If-Unmodified-Since")
    if "if-none-match" in headers:
        return etag_matches(headers["if-none-match"], info.etag)
    since = parse_http_date(headers.get("if-modified-since", ""))
    return since is not None and modified <= since


def chosen_range(request: Request, info: ObjectInfo) -> tuple[int, int] | None:
    """Start and length by Range or partNumber, None for all. InvalidRange, InvalidPartNumber."""
    text, number = request.headers.get("range"), request.query.get("partNumber")
    if number is None:
        # If-Range: a range of another state of the object is of no use. (RFC 9110, 13.1.5)
        if text and request.headers.get("if-range") in (
            None, quoted(info.etag), http_date(int(info.modified))
        ):
            return parse_range(text, info.size)
        return None
    if text is not None:
        raise S3Error("InvalidRequest", "Cannot specify both Range and partNumber.")
    wanted = parse_integer(number, "partNumber", 1, MAX_PART_NUMBER)
    sizes = [part.size for part in info.parts] or [info.size]
    if wanted > len(sizes):
        raise S3Error("InvalidPartNumber", ActualPartCount=len(sizes), PartNumberRequested=wanted)
    return sum(sizes[: wanted - 1]), sizes[wanted - 1]


def delete_object(store: Store, request: Request) -> Response:
    """DELETE /bucket/key."""
    refuse_headers(request.headers)
    store.delete_object(request.bucket, request.key, write_condition(request))
    return Response(204)


def delete_objects(store: Store, request: Request) -> Response:
    """POST /bucket?delete: up to 1,000 keys, each with its own outcome."""
    headers = request.headers
    if not (headers.keys() & {"content-md5", "x-amz-trailer"} or declared_checksums(headers)):
        raise S3Error("InvalidRequest", "Missing required header: Content-MD5 or a checksum")
    expect_checksums(request)
    tree = parse_xml(request.body.read_all(), "Delete")
    wanted = [child_texts(node) for node in tree.findall("Object")]
    if not 1 <= len(wanted) <= MAX_DELETE_KEYS:
        raise S3Error("MalformedXML", f"You must name 1 to {MAX_DELETE_KEYS} objects.")
    if not all(fields.get("Key") for fields in wanted):
        raise S3Error("MalformedXML", "Each Object needs a Key.")
    store.stat_bucket(request.bucket)
    until = time.monotonic() + DELETE_SECONDS
    results = [delete_one(store, request, fields, until) for fields in wanted]
    if (tree.findtext("Quiet") or "").strip().lower() == "true":
        results = [result for result in results if result.startswith("<Error>")]
    return document("DeleteResult", *results)


def delete_one(store: Store, request: Request, fields: Mapping[str, str], until: float) -> Xml:
    """Delete what an Object element names, whose children `fields` are, if it is not later than
    `until` on the monotonic clock; <Deleted> or <Error>."""
    key = fields["Key"]
    try:
        if time.monotonic() > until:
            raise S3Error("SlowDown", "The keys before this one took too long.")
        check_key(key)
        if (fields.get("VersionId") or "null") != "null":
            raise S3Error("NoSuchVersion")
        if fields.keys() & {"Size", "LastModifiedTime"}:
            raise S3Error("NotImplemented", "The only condition of a deletion here is an ETag.")
        store.delete_object(request.bucket, key, Condition(if_match=fields.get("ETag")))
    except (S3Error, OSError) as raised:
        error = as_s3_error(raised, f"request {request.id}")
        return xml(Error=xml(Key=key, Code=error.code, Message=error.message))
    return xml(Deleted=xml(Key=key))


def get_object_attributes(store: Store, request: Request) -> Response:
    """GET /bucket/key?attributes: those that x-amz-object-attributes names."""
    wanted = {name.strip() for name in request.header("x-amz-object-attributes").split(",")}
    info = store.stat_object(request.bucket, request.key)
    parts = object_parts(request, info) if "ObjectParts" in wanted and info.parts else None
    bare = {name: value.partition("-")[0] for name, value in info.checksums.items()}
    checksum = xml(**checksum_fields(replace(info, checksums=bare)))  # without the number of parts
    attributes = {
        "ETag": info.etag, "Checksum": checksum or None, "ObjectParts": parts,
        "StorageClass": "STANDARD", "ObjectSize": info.size,
    }
    if not wanted <= attributes.keys():
        names = ", ".join(attributes)
        raise S3Error("InvalidArgument", f"x-amz-object-attributes must name some of {names}.")
    shown = {name: value for name, value in attributes.items() if name in wanted}
    response = document("GetObjectAttributesResponse", **shown)
    response.headers["Last-Modified"] = http_date(int(info.modified))
    return response


def object_parts(request: Request, info: ObjectInfo) -> Xml:
    """What <ObjectParts> holds. As in S3, the parts themselves only where they have checksums."""
    limit = page_limit(request.header("x-amz-max-parts"), "x-amz-max-parts")
    marker = request.header("x-amz-part-number-marker") or "0"
    after = parse_integer(marker, "x-amz-part-number-marker", 0, 2**31 - 1)
    algorithm = next(iter(info.checksums), "")
    shown = [
        xml(PartNumber=number, Size=part.size, **{f"Checksum{algorithm}": part.checksum})
        for number, part in enumerate(info.parts, 1)
        if part.checksum and after < number <= after + limit
    ]
    return xml(
        PartsCount=len(info.parts), PartNumberMarker=after,
        NextPartNumberMarker=min(after + limit, len(info.parts)), MaxParts=limit,
        IsTruncated=after + limit < len(info.parts), Part=shown,
    )


# --- Copies ---


def copy_source(request: Request) -> tuple[str, str]:
    """Bucket and key of x-amz-copy-source: `b/k`, `/b/k` or `b%2Fk`, percent-encoded once."""
    raw, _, version = request.headers["x-amz-copy-source"].partition("?versionId=")
    if version not in ("", "null"):
        raise S3Error("NoSuchVersion")
    bucket, _, key = uri_decode(raw.replace("+", "%20")).removeprefix("/").partition("/")
    if not is_bucket_name(bucket) or not key:
        raise S3Error("InvalidArgument", "x-amz-copy-source must be BUCKET/KEY.")
    check_key(key)
    return bucket, key


@contextlib.contextmanager
def open_copy_source(store: Store, request: Request) -> Iterator[tuple[ObjectInfo, Content]]:
    """The source of a copy. PreconditionFailed unless x-amz-copy-source-if-* hold for it."""
    prefix = "x-amz-copy-source-"
    headers = {k[len(prefix) :]: v for k, v in request.headers.items() if k.startswith(prefix)}
    info, content = store.open_object(*copy_source(request))
    with contextlib.closing(content):
        if not_modified(headers, info):
            raise S3Error("PreconditionFailed", Condition="x-amz-copy-source-if-none-match")
        yield info, content


def copied_info(request: Request, info: ObjectInfo) -> ObjectInfo:
    """What the copy of `info` shall be: x-amz-metadata-directive decides whose headers it has."""
    # Without an upload, lest its Complete, repeated, succeed at the copy's key.
    info = replace(info, key=request.key, headers=kept_headers(info), upload_id="")
    directive = request.header("x-amz-metadata-directive") or "COPY"
    if directive not in ("COPY", "REPLACE"):
        raise S3Error("InvalidArgument", "x-amz-metadata-directive must be COPY or REPLACE.")
    if directive == "REPLACE":
        return replace(info, headers=stored_headers(request.headers))
    to_itself = copy_source(request) == (request.bucket, request.key)
    if to_itself and "x-amz-storage-class" not in request.headers:
        raise S3Error("InvalidRequest", "A copy of an object to itself must change its metadata.")
    return info


def copy_object(store: Store, request: Request) -> Response:
    """PUT /bucket/key with x-amz-copy-source. Bytes are read only for a checksum it lacks, or where
    the ETag, ending in -0, is not of them, since somebody copied the file in."""
    refuse_headers(request.headers)
    if "x-amz-copy-source-range" in request.headers:
        raise S3Error("InvalidRequest", "Only UploadPartCopy copies a range.")
    algorithm = parse_algorithm(request.header("x-amz-checksum-algorithm"))
    request.body.read_all(0)
    with open_copy_source(store, request) as (source, content):
        wanted, condition = copied_info(request, source), write_condition(request)
        lacking = {algorithm} - {"", *source.checksums}
        if lacking or source.etag.endswith("-0"):
            body = Body(ContentReader(content, 0, source.size), source.size, source.size)
            body.wanted |= lacking
            info = store.put_object(request.bucket, request.key, body, wanted.headers, condition)
        else:
            info = store.copy_object(wanted, content, request.bucket, condition)
    return copy_result("CopyObjectResult", info)


def copy_result(root: str, info: ObjectInfo) -> Response:
    """CopyObjectResult or CopyPartResult."""
    modified = iso_date(info.modified)
    return document(root, LastModified=modified, ETag=quoted(info.etag), **checksum_fields(info))


# --- Multipart uploads ---


def create_multipart_upload(store: Store, request: Request) -> Response:
    """POST /bucket/key?uploads."""
    refuse_headers(request.headers)
    request.body.read_all(0)
    store.stat_bucket(request.bucket)
    algorithm = parse_algorithm(request.header("x-amz-checksum-algorithm"))
    kinds = CHECKSUM_TYPES.get(algorithm, ("",))
    kind = request.header("x-amz-checksum-type").upper() or kinds[0]
    if kind not in kinds:
        raise S3Error("InvalidRequest", f"The type {kind} does not go with {algorithm or 'none'}.")
    described = dict(zip(UPLOAD_HEADERS, (request.key, algorithm, kind), strict=True))
    upload_id = f"{time.time_ns():016x}{secrets.token_hex(8)}"  # in the order of time
    key, headers = f"{request.bucket}/{upload_id}/00000", stored_headers(request.headers)
    store.put_object(UPLOADS, key, Body(io.BytesIO(), 0), headers | described, NO_CONDITION)
    try:
        store.stat_bucket(request.bucket)
    except S3Error:  # deleted meanwhile: the next bucket of its name is not to have the upload
        discard_upload(store, request.bucket, upload_id)
        raise
    names = {"Bucket": request.bucket, "Key": request.key, "UploadId": upload_id}
    response = document("InitiateMultipartUploadResult", **names)
    if algorithm:
        response.headers["x-amz-checksum-algorithm"] = algorithm
        response.headers["x-amz-checksum-type"] = kind
    return response


def put_part(store: Store, request: Request, upload: Upload, body: Body) -> ObjectInfo:
    """Store the part that a request names. NoSuchUpload, and no part, if the upload has ended."""
    number = parse_integer(request.query["partNumber"], "partNumber", 1, MAX_PART_NUMBER)
    key = upload.part_key(number)
    if upload.algorithm:
        body.wanted.add(upload.algorithm)
    info = store.put_object(UPLOADS, key, body, {}, NO_CONDITION)
    if find_upload(store, upload.bucket, upload.id) is None:
        store.delete_object(UPLOADS, key, NO_CONDITION)
        raise S3Error("NoSuchUpload", UploadId=upload.id)
    return replace(info, checksum_type="")  # that is for whole objects


def upload_part(store: Store, request: Request) -> Response:
    """PUT /bucket/key?partNumber&uploadId."""
    check_upload(request)
    upload = requested_upload(store, request)
    given = CHECKSUMS.keys() & request.body.wanted - {upload.algorithm}
    if upload.algorithm and given:
        expected = f"expected checksum Type: {upload.algorithm}, actual: {', '.join(given)}"
        raise S3Error("InvalidRequest", f"Checksum Type mismatch occurred, {expected}")
    info = put_part(store, request, upload, request.body)
    return Response(200, {"ETag": quoted(info.etag)} | checksum_headers(info))


def upload_part_copy(store: Store, request: Request) -> Response:
    """PUT /bucket/key?partNumber&uploadId with x-amz-copy-source."""
    refuse_headers(request.headers)
    request.body.read_all(0)
    upload = requested_upload(store, request)
    with open_copy_source(store, request) as (source, content):
        start, length = copied_range(request, source)
        body = Body(ContentReader(content, start, length), length)
        info = put_part(store, request, upload, body)
    return copy_result("CopyPartResult", info)


def copied_range(request: Request, source: ObjectInfo) -> tuple[int, int]:
    """x-amz-copy-source-range, `bytes=first-last` within the source, as start and length."""
    text = request.headers.get("x-amz-copy-source-range")
    if text is None:
        return 0, source.size
    found = re.fullmatch(r"bytes=(\d{1,15})-(\d{1,15})", text, re.ASCII)
    if found is None or not int(found[1]) <= int(found[2]) < source.size:
        what = f"bytes=first-last within {source.size} bytes"
        raise S3Error("InvalidArgument", f"The x-amz-copy-source-range value must be {what}.")
    return int(found[1]), int(found[2]) - int(found[1]) + 1


def upload_fields(upload: Upload) -> dict[str, object]:
    """What listings of uploads and of parts say of an upload."""
    return {
        "UploadId": upload.id, "Initiator": OWNER, "Owner": OWNER, "StorageClass": "STANDARD",
        "ChecksumAlgorithm": upload.algorithm or None, "ChecksumType": upload.checksum_type or None,
    }


def list_parts_page(store: Store, request: Request) -> Response:
    """GET /bucket/key?uploadId."""
    upload = requested_upload(store, request)
    query = ListQuery(request, "max-parts")
    marker = request.query.get("part-number-marker", "") or "0"
    after = parse_integer(marker, "part-number-marker", 0, 2**31 - 1)
    parts = list_parts(store, upload, min(after, MAX_PART_NUMBER))
    found = list(itertools.islice(parts, query.limit + 1))
    shown = [
        xml(PartNumber=number, LastModified=iso_date(info.modified), ETag=quoted(info.etag),
            Size=info.size, **checksum_fields(replace(info, checksum_type="")))
        for number, info in found[: query.limit]
    ]
    return document(
        "ListPartsResult", Bucket=request.bucket, Key=query.show(request.key),
        **upload_fields(upload), PartNumberMarker=after,
        NextPartNumberMarker=found[len(shown) - 1][0] if shown else after,
        MaxParts=query.limit, EncodingType=query.fields["EncodingType"],
        IsTruncated=len(found) > query.limit > 0, Part=shown,
    )


def complete_multipart_upload(store: Store, request: Request) -> Response:
    """POST /bucket/key?uploadId. Done a second time with the same list, it succeeds again."""
    if "x-amz-trailer" in request.headers:  # it is of the list; a header is of the whole object
        expect_checksums(request)
    listed = parse_part_list(request.body.read_all())
    with ending(store, request.bucket, request.query["uploadId"]):
        try:
            upload = requested_upload(store, request)
            parts = match_parts(store, upload, listed, request.settings.min_part_bytes)
            info, condition = finished_info(upload, parts), write_condition(request)
            check_whole_object(request, info)
            info = store.concatenate(request.bucket, parts, info, condition)
            # By this part others see that it was done, however long it takes to discard the rest.
            store.delete_object(UPLOADS, parts[0].key, NO_CONDITION)
        except S3Error as error:
            if error.code not in ("NoSuchUpload", "InvalidPart", "PreconditionFailed"):
                raise
            info = already_completed(store, request, listed, error)
        discard_upload(store, request.bucket, info.upload_id)
    return document(
        "CompleteMultipartUploadResult", Location=f"http://{request.header('host')}{request.path}",
        Bucket=request.bucket, Key=request.key, ETag=quoted(info.etag), **checksum_fields(info),
    )


def check_whole_object(request: Request, info: ObjectInfo) -> None:
    """x-amz-mp-object-size and the x-amz-checksum-* of the whole object, where they are given."""
    size, whole = info.size, info.checksums
    declared = request.headers.get("x-amz-mp-object-size", str(size))
    if parse_integer(declared, "x-amz-mp-object-size", 0, 2**63) != size:
        raise S3Error("InvalidRequest", f"The parts have {size} bytes, not x-amz-mp-object-size.")
    kind = request.header("x-amz-checksum-type").upper()
    if kind and kind != info.checksum_type:
        created = info.checksum_type or "null"
        raise S3Error("InvalidRequest", f"The upload was created with the checksum type {created}.")
    for name, value in declared_checksums(request.headers).items():
        if name not in whole or value not in (whole[name], whole[name].partition("-")[0]):
            raise S3Error("BadDigest", f"The {name} you specified did not match what we received.")


def already_completed(
    store: Store, request: Request, listed: Sequence[ListedPart], error: S3Error
) -> ObjectInfo:
    """The object that an earlier Complete with the same list made; else raises `error`."""
    try:
        info = store.stat_object(request.bucket, request.key)
    except S3Error as other:  # there is no object: it was another's upload, or aborted
        raise error if other.code in ("NoSuchKey", "NoSuchBucket") else other from None
    made = info.upload_id and (info.upload_id, info.etag)
    if made != (request.query["uploadId"], multipart_etag(listed)):
        raise error
    check_whole_object(request, info)
    return info


def abort_multipart_upload(store: Store, request: Request) -> Response:
    """DELETE /bucket/key?uploadId."""
    refuse_headers(request.headers)
    with ending(store, request.bucket, request.query["uploadId"]):
        upload = requested_upload(store, request)
        discard_upload(store, upload.bucket, upload.id)
    return Response(204)


def list_multipart_uploads(store: Store, request: Request) -> Response:
    """GET /bucket?uploads."""
    query = ListQuery(request, "max-uploads")
    key_marker = request.query.get("key-marker", "")
    id_marker = request.query.get("upload-id-marker", "")
    store.stat_bucket(request.bucket)
    marker = (key_marker, id_marker or "g") if key_marker else ("", "")  # "g" is above every id
    shown, prefixes, following = uploads_page(store, query, marker)
    uploads = [
        xml(Key=query.show(each.key), Initiated=iso_date(each.initiated), **upload_fields(each))
        for each in shown
    ]
    return document(
        "ListMultipartUploadsResult", Bucket=request.bucket, KeyMarker=query.show(key_marker),
        UploadIdMarker=id_marker, NextKeyMarker=query.show(following[0]) if following else None,
        NextUploadIdMarker=following[1] if following else None, **query.fields,
        MaxUploads=query.limit, IsTruncated=following is not None, Upload=uploads,
        CommonPrefixes=[xml(Prefix=query.show(prefix)) for prefix in prefixes],
    )


def uploads_page(
    store: Store, query: ListQuery, marker: tuple[str, str]
) -> tuple[list[Upload], list[str], tuple[str, str] | None]:
    """Uploads, by key and then by time of initiation, and common prefixes above `marker`, a key or
    common prefix and an upload id, and the marker of the next page, None on the last."""
    places: dict[tuple[str, str], Upload] = {}
    for upload_id in upload_ids(store, query.bucket):
        upload = find_upload(store, query.bucket, upload_id)
        if upload is not None and upload.key.startswith(query.prefix):
            group = common_prefix(upload.key, query.prefix, query.delimiter)
            places[(group, "") if group else (upload.key, upload.id)] = upload
    above = sorted(place for place in places if place > marker)
    page = above[: query.limit]
    shown = [places[place] for place in page if place[1]]
    prefixes = [group for group, upload_id in page if not upload_id]
    return shown, prefixes, page[-1] if page and page != above else None


# ===== 10 Routes =====

SERVICE, BUCKET, OBJECT = "service", "bucket", "object"
PUBLIC, READ, WRITE, ADMIN = "public", "read", "write", "admin"  # PUBLIC: see --public-read
ROLES = {"admin": {PUBLIC, READ, WRITE, ADMIN}, "writer": {PUBLIC, READ, WRITE},
         "reader": {PUBLIC, READ}}


class Route(NamedTuple):
    """One row: a request with this method, this kind of resource, exactly these sub-resources in
    its query, and this header if one is named, is this operation and needs this permission."""

    method: str
    resource: str
    subresources: tuple[str, ...]
    operation: Callable[[Store, Request], Response]
    permission: str
    header: str = ""


# The first row that matches is taken, so the narrower stands above.
ROUTES = (
    Route("GET", SERVICE, (), list_buckets, READ),
    Route("PUT", BUCKET, (), create_bucket, ADMIN),
    Route("HEAD", BUCKET, (), head_bucket, PUBLIC),
    Route("DELETE", BUCKET, (), delete_bucket, ADMIN),
    Route("GET", BUCKET, ("list-type",), list_objects_v2, PUBLIC),
    Route("GET", BUCKET, (), list_objects, PUBLIC),
    Route("GET", BUCKET, ("versions",), list_object_versions, READ),
    Route("GET", BUCKET, ("uploads",), list_multipart_uploads, READ),
    *(Route("GET", BUCKET, (name,), get_configuration, READ) for name in BUCKET_CONFIGURATIONS),
    Route("POST", BUCKET, ("delete",), delete_objects, WRITE),
    Route("GET", OBJECT, ("attributes",), get_object_attributes, READ),
    *(Route("GET", OBJECT, (name,), get_configuration, READ) for name in OBJECT_CONFIGURATIONS),
    Route("GET", OBJECT, ("uploadId",), list_parts_page, READ),
    Route("GET", OBJECT, ("partNumber",), get_object, PUBLIC),
    Route("GET", OBJECT, (), get_object, PUBLIC),
    Route("HEAD", OBJECT, ("partNumber",), head_object, PUBLIC),
    Route("HEAD", OBJECT, (), head_object, PUBLIC),
    Route("PUT", OBJECT, ("partNumber", "uploadId"), upload_part_copy, WRITE, "x-amz-copy-source"),
    Route("PUT", OBJECT, ("partNumber", "uploadId"), upload_part, WRITE),
    Route("PUT", OBJECT, (), copy_object, WRITE, "x-amz-copy-source"),
    Route("PUT", OBJECT, (), put_object, WRITE),
    Route("POST", OBJECT, ("uploads",), create_multipart_upload, WRITE),
    Route("POST", OBJECT, ("uploadId",), complete_multipart_upload, WRITE),
    Route("DELETE", OBJECT, ("uploadId",), abort_multipart_upload, WRITE),
    Route("DELETE", OBJECT, (), delete_object, WRITE),
)  # fmt: skip
ROUTES_OF: dict[tuple[str, str, frozenset[str]], list[Route]] = {}
for _route in ROUTES:
    _asked = (_route.method, _route.resource, frozenset(_route.subresources))
    ROUTES_OF.setdefault(_asked, []).append(_route)
METHODS = {route.method for route in ROUTES}

# Query parameters that say how an operation is done. Any other without a value is a sub-resource of
# who signed the request, but not of a reader of public objects, to whose links pages add anything.
PARAMETERS = {f"response-{name}" for name in STORED_HEADERS} | {
    "prefix", "delimiter", "marker", "max-keys", "encoding-type", "start-after", "x-id",
    "continuation-token", "fetch-owner", "key-marker", "upload-id-marker", "max-uploads",
    "max-parts", "part-number-marker", "max-buckets", "bucket-region", "versionId",
    "version-id-marker",
}  # fmt: skip
# Sub-resources that may have a value.
SUBRESOURCES = {name for route in ROUTES for name in route.subresources} | {
    "analytics", "intelligent-tiering", "inventory", "metrics", "restore", "select", "session",
    "torrent",
}  # fmt: skip


def find_route(request: Request) -> Route:
    """The row of ROUTES for a request: NotImplemented, MethodNotAllowed, NoSuchVersion."""
    resource = OBJECT if request.key else BUCKET if request.bucket else SERVICE
    asked = {
        name for name, value in request.query.items() if name in SUBRESOURCES
        or not (value or request.credential is None or name in PARAMETERS
                or name.lower().startswith("x-amz-"))
    }
    if request.query.get("versionId", "null") not in ("", "null"):
        raise S3Error("NoSuchVersion")
    for route in ROUTES_OF.get((request.method, resource, frozenset(asked)), ()):
        if not route.header or route.header in request.headers:
            return route
    if request.method in METHODS and asked:
        names = "&".join(sorted(asked))
        raise S3Error("NotImplemented", f"{request.method} of ?{names} is not implemented.")
    raise S3Error("MethodNotAllowed", Method=request.method)


def check_permission(request: Request, permission: str) -> None:
    """AccessDenied unless the role has it, or it is PUBLIC in a bucket that anyone may read."""
    if request.credential is not None:
        allowed = permission in ROLES[request.credential.role]
    else:
        allowed = permission == PUBLIC and request.bucket in request.settings.public_read
    if not allowed:
        raise S3Error("AccessDenied")


HEALTH_PATHS = ("/_zs3/health", "/minio/health/live", "/minio/health/ready")


@dataclass
class Service:
    """Answers requests: everything between a parsed head and a Response."""

    store: Store
    settings: Settings
    ready: bool = False  # for health checks: what was to be done at the start is done

    def waits(self, request: Request) -> bool:
        """Whether the answer may take long, or wait for others; what peers ask does neither."""
        sealed = request.method == "POST" and "x-zs3-seal" in request.headers
        if sealed and request.path.startswith("/_zs3/"):
            return False
        abort = request.method == "DELETE" and "uploadId" in request.raw_query
        long = request.method == "POST" or "x-amz-copy-source" in request.headers
        return abort or long or self.store.waits

    def respond(self, request: Request) -> Response:
        """The answer, an error too. Only a bug raises."""
        try:
            return self._serve(request)
        except (S3Error, OSError) as error:
            return error_response(request, as_s3_error(error, f"request {request.id}"))

    def _serve(self, request: Request) -> Response:
        request.query = dict(split_query(request.raw_query)) if request.raw_query else {}
        if request.method == "OPTIONS":
            return preflight(request)
        request.bucket, request.key = address(request)
        anonymous = not (request.header("authorization") or request.query)
        if anonymous and request.path in HEALTH_PATHS and request.method in ("GET", "HEAD"):
            request.is_probe = True
            if not self.ready:
                raise S3Error("SlowDown", "The buckets of --bucket are not made yet.")
            return Response(200, {"Content-Type": "application/json"}, b'{"status":"ok"}\n')
        if request.internal:
            return self.store.internal(request)
        check_host(request)
        auth = authenticate(request, time.time())
        if auth is not None and auth.expires is not None:
            request.headers = headers_in_query(request.query) | request.headers
        if request.credential is None:
            check_permission(request, PUBLIC if request.method in ("GET", "HEAD") else WRITE)
        route = find_route(request)
        check_permission(request, route.permission)
        if (request.bucket or request.key) and not is_bucket_name(request.bucket):
            raise S3Error("InvalidBucketName", BucketName=request.bucket)
        if request.key:
            check_key(request.key)
        request.body = open_body(request, auth)
        if request.method == "DELETE":  # its body means nothing, but what is declared has to hold
            if "uploadId" not in request.query:  # an Abort may carry the object's checksum
                expect_checksums(request)
            request.body.read_all()
        return route.operation(self.store, request)


def error_response(request: Request, error: S3Error) -> Response:
    """The XML of an error. (S3 API reference, "REST error responses")"""
    response = document(
        "Error", Code=error.code, Message=error.message, **error.details, Resource=request.path,
        RequestId=request.id, HostId=HOST_ID,
    )
    if "RangeRequested" in error.details:  # RFC 9110, 15.5.17
        response.headers["Content-Range"] = f"bytes */{error.details['ActualObjectSize']}"
    return Response(error.status, response.headers, response.body, error.code)


def is_allowed_origin(request: Request) -> bool:
    """Whether it comes from a page of --cors-origin."""
    allowed, origin = request.settings.cors_origins, request.header("origin")
    return bool(origin) and ("*" in allowed or origin in allowed)


def cors_headers(request: Request) -> dict[str, str]:
    """What lets a page from an origin of --cors-origin read the answer; nothing for any other."""
    if not is_allowed_origin(request):
        return {"Vary": "Origin"} if request.settings.cors_origins else {}
    return {
        "Access-Control-Allow-Origin": request.header("origin"),
        "Access-Control-Expose-Headers": "*, ETag, Content-Range, x-amz-request-id, x-amz-meta-*",
        "Vary": "Origin",
    }


def preflight(request: Request) -> Response:
    """OPTIONS: a browser asks, unsigned, whether a page may send a request; AccessForbidden."""
    for name in ("Origin", "Access-Control-Request-Method"):
        if not request.header(name.lower()):
            raise S3Error("BadRequest", f"A preflight request needs the header {name}.")
    if not is_allowed_origin(request):
        raise S3Error("AccessForbidden")
    return Response(200, {
        "Access-Control-Allow-Methods": "GET, HEAD, PUT, POST, DELETE",
        "Access-Control-Allow-Headers": request.header("access-control-request-headers") or "*",
        "Access-Control-Max-Age": "3600",
    })


# ===== 11 HTTP server =====


class Wire:
    """The incoming bytes of a connection. `patiently` calls what it is given, twice if need be."""

    def __init__(self, connection: socket.socket, patiently: Callable[..., Any]) -> None:
        self._connection, self._patiently = connection, patiently
        self._rest = b""  # received, not yet read

    def read_head(self) -> bytes | None:
        """A request's head with its final empty line; None if the rest of it is yet to come, b"" if
        the client has gone. Waits for nothing. RequestHeaderSectionTooLarge."""
        while not self.has_head():
            try:
                received = self._connection.recv(MAX_HEAD_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            except (ConnectionError, TimeoutError):
                raise Gone from None
            if not received:
                return b""
            self._rest += received
            if self._rest[:1] == b"\x16":
                raise S3Error("InvalidRequest", "This is TLS, but only http:// is spoken here.")
        end = self._rest.find(b"\r\n\r\n")
        if end < 0 or end + 4 > MAX_HEAD_BYTES:
            raise S3Error("RequestHeaderSectionTooLarge", MaxSizeAllowed=MAX_HEAD_BYTES)
        head, self._rest = self._rest[: end + 4], self._rest[end + 4 :]
        return head

    def has_head(self) -> bool:
        """Whether the head of a next request has come, or more than one may have."""
        self._rest = self._rest.lstrip(b"\r\n")  # RFC 9112, 2.2
        return b"\r\n\r\n" in self._rest or len(self._rest) > MAX_HEAD_BYTES

    def buffered(self) -> int:
        """How many bytes of a next request have come."""
        return len(self._rest.lstrip(b"\r\n"))

    def readinto(self, view: memoryview) -> int:
        """Fill `view` with what has come, waiting for the first byte; 0 if the client has gone."""
        if not self._rest:
            return int(self._patiently(self._connection.recv_into, view))
        got = min(len(view), len(self._rest))
        view[:got] = self._rest[:got]
        self._rest = self._rest[got:]
        return got

    def readline(self, limit: int) -> bytes:
        """Up to and with the next LF, `limit` bytes at most; less if the client has gone."""
        while b"\n" not in self._rest[:limit] and len(self._rest) < limit:
            received = self._patiently(self._connection.recv, SMALL_BYTES)
            if not received:
                break
            self._rest += received
        end = self._rest.find(b"\n", 0, limit) + 1 or limit
        line, self._rest = self._rest[:end], self._rest[end:]
        return line


def write_line(text: str) -> None:
    """A line to standard error, in one piece."""
    with contextlib.suppress(OSError):  # a full or closed log is no reason to fail a request
        os.write(2, text.encode("utf-8", "replace") + b"\n")


def logged_target(request: Request) -> str:
    """Path and query without the signature of a presigned URL, which is as good as a password."""
    pieces = [piece.partition("=") for piece in request.raw_query.split("&")]
    shown = [name + equals + ("..." if "ignature" in unquote(name) else value)
             for name, equals, value in pieces]
    query = "&".join(shown)
    return (f"{request.path}?{query}" if query else request.path).replace('"', "%22")


def log_text(request: Request, response: Response, length: int, seconds: float) -> str:
    """The combined format of web servers; behind it seconds, request id and an error's code."""
    now = time.strftime("%d/%b/%Y:%H:%M:%S +0000", time.gmtime())
    who = request.credential.access if request.credential else "-"
    agent = re.sub(r"[^ -!#-\[\]-~]", "?", request.header("user-agent")) or "-"
    line = f"{request.method} {logged_target(request)} {request.version}"
    told = f'"{line}" {response.status} {length} "-" "{agent}" {seconds:.6f} {request.id}'
    return f"{request.client} - {who} [{now}] {told} {response.error}".rstrip()


def log_json(request: Request, response: Response, length: int, seconds: float) -> str:
    """The same as JSON."""
    entry = {
        "time": iso_date(time.time()), "client": request.client,
        "access_key": request.credential.access if request.credential else None,
        "method": request.method, "target": logged_target(request), "status": response.status,
        "error": response.error or None, "bytes": length, "seconds": round(seconds, 6),
        "agent": request.header("user-agent"), "request_id": request.id,
    }
    return json.dumps(entry)


# --log-format -> the line that a request leaves on standard error, from bytes sent and seconds.
LogFormat = Callable[[Request, Response, int, float], str]
LOG_FORMATS: dict[str, LogFormat] = {"text": log_text, "json": log_json}


def render_head(request: Request, response: Response, keep: bool) -> bytes:
    """Status line and headers. `keep`: whether the connection stays open."""
    lines = [
        f"HTTP/1.1 {response.status} {http.client.responses.get(response.status, '')}",
        f"Server: zs3/{VERSION}",
        f"Date: {http_date(int(time.time()))}",
        f"x-amz-request-id: {request.id}",
        f"x-amz-id-2: {HOST_ID}",
    ]
    headers = response.headers | cors_headers(request)
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if response.status not in (204, 304):  # of 304 it would be the object's (RFC 9110, 8.6)
        lines.append(f"Content-Length: {response.length}")
    if not keep:
        lines.append("Connection: close")
    elif request.version == "HTTP/1.0":
        lines.append("Connection: keep-alive")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def has_come(those: Iterable[Connection | Server], seconds: float = 0.0) -> bool:
    """Whether one of these has, within `seconds`, what nobody has read or accepted."""
    poller = select.poll()
    try:
        for each in those:
            poller.register(each.socket, select.POLLIN)
    except ValueError:
        return True  # one has just been closed: look again
    return bool(poller.poll(seconds * 1000))


T = TypeVar("T")


def eagerly(look: Callable[[float], T], seconds: float, eager: float) -> T:
    """What look(seconds) finds, which waits for it. For the first `eager` seconds without going to
    sleep; whoever can compute meanwhile, does."""
    until = time.monotonic() + min(seconds, eager)
    while time.monotonic() < until:
        if found := look(0.0):
            return found
        os.sched_yield()
    return look(seconds)


class Connection(BaseRequestHandler):
    """A client's connection, on which it sends one request after another. Requests are not parsed
    by http.server: its parser takes several times as long, squeezes slashes that a signature
    covers, and takes heads that can be read two ways."""

    server: Server
    patient: bool  # does its thread wait where it has to?
    waited = 0.0  # monotonic; when it last had to
    busy = False  # with a request, from before it is read until it is answered

    def setup(self) -> None:
        """Prepare to read it, at first without waiting. Later, time-outs are the kernel's, which
        saves a poll a call."""
        self.socket: socket.socket = self.request
        self.enter()
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        form = "qq" if socket.SO_RCVTIMEO == 66 else "ll"  # 32 bits, but 64 of time
        limit = struct.pack(form, int(SOCKET_SECONDS), int(SOCKET_SECONDS % 1 * 1e6))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self.wire = Wire(self.socket, self._patiently)
        self.waits_since = time.monotonic()  # for its next head, or its end; infinity: it does not

    def answer_next(self) -> bool:
        """Answer a request, once its head has come. Whether the connection is good for another."""
        self.busy = True
        is_new = not self.wire.buffered()
        try:
            good = self._answer_next()
            if is_new and self.wire.buffered():
                self.waits_since = time.monotonic()  # for the rest of its head
            return good
        except Gone:
            LOG.debug("%s went away", self.client_address[0])
        except BaseException:  # a panic of a library, too
            self.server.handle_error(self.request, self.client_address)
        finally:
            if self.waits_since == math.inf:
                self.waits_since = time.monotonic()
            self.busy = False
        return False

    def end(self) -> None:
        """Have it closed by whoever waits for its next request; it is silent no more."""
        self.waits_since = math.inf
        with contextlib.suppress(OSError):  # it is closed already
            self.socket.shutdown(socket.SHUT_RDWR)

    def has_more(self) -> bool:
        """Whether another request comes soon after one that had to wait."""
        left = self.waited + OWN_SECONDS - time.monotonic()
        return self.wire.has_head() or (left > 0 and has_come([self], left))

    def wait(self) -> bool:
        """From here on this thread waits, for the client or others. False: it did so, in vain."""
        self.waited = time.monotonic()
        if self.patient:
            return False
        self.server.leave(self)
        self.patient = self.socket.getblocking()
        return self.patient

    def _patiently(self, call: Callable[..., Any], *given: Any) -> Any:
        """What cannot be done without waiting is tried once more, and then it waits. Gone, and
        Silent when the kernel's time-out has run out, which is a BlockingIOError, too."""
        try:
            try:
                return call(*given)
            except BlockingIOError:
                if not self.wait():
                    raise
                return call(*given)
        except BlockingIOError:
            raise Silent from None
        except (ConnectionError, TimeoutError):
            raise Gone from None

    def enter(self) -> None:
        """The thread that sees to all is to answer the next request."""
        self.patient = False
        self.socket.setblocking(False)

    def _answer_next(self) -> bool:
        began = time.monotonic()
        try:
            head = self.wire.read_head()
            if head is None:
                return True
            self.waits_since = math.inf
            if not head:
                return False
            began = time.monotonic()
            request = self._parse(head)
        except S3Error as error:  # nobody knows where the next request begins
            request = Request(
                "-", "-", "", {}, self.server.service.settings, client=self.client_address[0],
                id=self.server.new_id(), wire=WireBody(self.wire, None),
            )
            return self._finish(request, error_response(request, error), began)
        length = request.wire.length
        if self.server.service.waits(request) or length is None or length > SMALL_BYTES:
            self.wait()
        return self._finish(request, self._respond(request), began)

    def _parse(self, head: bytes) -> Request:
        method, path, raw_query, version, headers = parse_head(head)
        length = body_length(headers, version)
        proceed = None
        if (expected := headers.get("expect")) and version == "HTTP/1.1":
            if expected.lower() != "100-continue":
                raise S3Error("InvalidRequest", "The only expectation understood is 100-continue.")
            proceed = functools.partial(self._write, b"HTTP/1.1 100 Continue\r\n\r\n")
        return Request(
            method, path, raw_query, headers, self.server.service.settings, version,
            self.client_address[0], self.server.new_id(), wire=WireBody(self.wire, length, proceed),
        )

    def _respond(self, request: Request) -> Response:
        try:
            return self.server.service.respond(request)
        except Gone:
            raise
        except Exception:
            LOG.exception("%s %s (request %s)", request.method, request.path, request.id)
            request.wire.ended = False  # whatever is left of it: the connection is closed
            return error_response(request, S3Error("InternalError"))

    def _finish(self, request: Request, response: Response, began: float) -> bool:
        """Send the answer, log it, and get rid of a body that nobody read. Whether to go on."""
        asked, length = request.header("connection").lower(), 0
        content = response.body.content if isinstance(response.body, Stream) else None
        keep = (
            request.wire.ended and not request.wire.proceed
            and (asked == "keep-alive" if request.version == "HTTP/1.0" else "close" not in asked)
            and not self.server.stopping
        )
        try:
            length = self._send(request, response, keep)
        except S3Error as error:  # no byte of the object could be had
            response = error_response(request, error)
            length = self._send(request, response, keep)
        finally:
            if content is not None:
                content.close()
            is_news = response.status != 200 if request.is_probe else not request.internal
            if self.server.log and is_news:
                seconds = time.monotonic() - began
                write_line(self.server.log(request, response, length, seconds))
        if not keep and (not request.wire.ended or self._has_unread()):
            self._linger()
        return keep

    def _send(self, request: Request, response: Response, keep: bool) -> int:
        """Write head and body; the number of bytes of the body."""
        head = render_head(request, response, keep)
        if request.method == "HEAD" or response.status in (204, 304):
            self._write(head)
            return 0
        if isinstance(response.body, bytes):
            self._write(head + response.body)
        else:
            self._send_stream(head, response.body)
        return response.length

    def _write(self, data: bytes | memoryview, flags: int = 0) -> None:
        """Send all of it."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._patiently(self.socket.send, rest, flags) :]

    def _send_stream(self, head: bytes, body: Stream) -> None:
        """Write an object's bytes: small ones in one piece with the head, a file by sendfile."""
        content, start, left = body
        assert content is not None
        if left > LARGE_BYTES:
            self.wait()
        if isinstance(content, FileContent) and left > SMALL_BYTES and hasattr(os, "sendfile"):
            self._write(head, getattr(socket, "MSG_MORE", 0))
            send = functools.partial(self._patiently, os.sendfile, self.socket.fileno())
            while left and (count := send(content.file, start, min(left, GiB))):
                start += count
                left -= count
        else:
            chunks = content.chunks(start, left)
            data = next(chunks, b"")  # an error so early is an answer; a later one ends this one
            self._write(head + data)
            left -= len(data)
            try:
                for data in chunks:
                    self._write(data)
                    left -= len(data)
            except S3Error as error:
                LOG.warning("%s", error)
        if left:
            LOG.warning("an object was cut short while it was sent")
            raise Gone  # the client is to see a connection that ended too early

    def _has_unread(self) -> bool:
        """Whether the client has sent what nobody will read: with it, closing is a reset."""
        with contextlib.suppress(OSError):  # nothing has come, or the client has gone
            return bool(self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        return False

    def _linger(self) -> None:
        """Read on for a while what a client is still sending, lest it see a reset connection and
        not our answer. (RFC 9112, 9.6) It counts as silent, lest such clients keep others out."""
        self.waits_since = time.monotonic()
        self.wait()
        deadline = time.monotonic() + LINGER_SECONDS
        waste = bytearray(SMALL_BYTES)
        with contextlib.suppress(OSError):  # the client has gone, or does not stop
            self.socket.shutdown(socket.SHUT_WR)
            while (left := deadline - time.monotonic()) > 0:
                self.socket.settimeout(left)
                if not self.socket.recv_into(waste):
                    return


class Turn:
    """A thread's time to see to all connections that have none of their own. It ends when a request
    is going to wait for somebody, or lasts for too long."""

    connection: Connection | None = None  # whose request is being answered
    ends = 0.0  # monotonic; when that has lasted for too long


class Server(ThreadingHTTPServer):
    """Answers requests one after the other, in one thread, as long as none of them has to wait:
    threads that compute beside each other hand on the interpreter's lock at each system call, which
    takes half of the throughput with 50 connections. A request that waits for its client, for peers
    or for a disk's flush, or that lasts TURN_SECONDS, keeps the thread that it is in for itself and
    for what its connection asks next, and another thread sees to the rest."""

    def __init__(
        self, listener: socket.socket, service: Service, log: LogFormat | None, shared: bool = False
    ) -> None:
        super().__init__(listener.getsockname()[:2], Connection, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        listener.setblocking(False)  # another process may take the connection first
        self.service = service
        self.log = log
        self.shared = shared  # the listening socket, with other processes
        self._request_ids = itertools.count(secrets.randbits(64))
        self.stopping = self._closed = False
        self._selector = selectors.DefaultSelector()  # connections without a thread of their own
        self._lock = threading.Lock()  # guards what follows
        self._connections: set[Connection] = set()
        self._turn = Turn()
        self._spare = 0  # threads that could take a turn
        self._needed = threading.Semaphore(0)  # so many of them shall
        self._looked = 0.0  # monotonic; for silent connections
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # answers need some, too
        self._most = MAX_CONNECTIONS if files < 0 else min(MAX_CONNECTIONS, files // 2)

    def serve_forever(self, poll_interval: float = TURN_SECONDS) -> None:
        """Accept connections, until shutdown()."""
        with self._lock:
            if not self._has_spare():
                raise OSError(errno.EAGAIN, "no thread is to be had")
            self._pass_on()
        while not self.stopping:
            if has_come([self], poll_interval):
                self._accept()
            self.service_actions()

    def _has_spare(self) -> bool:
        """Whether there is a thread that can take the next turn. One is started if need be."""
        if not self._spare:
            try:
                threading.Thread(target=self._take_turns, name="answer", daemon=True).start()
            except RuntimeError as error:
                LOG.error("%s", error)
                return False
            self._spare = 1
        return True

    def _pass_on(self) -> None:
        """Have such a thread take it."""
        self._turn = Turn()
        self._spare -= 1
        self._needed.release()

    def _take_turns(self) -> None:
        while True:
            self._needed.acquire()
            turn = self._turn
            while self._turn is turn and not self._closed:
                try:
                    self._answer(turn)
                except Exception:  # a bug, or no memory: nobody else would see to the connections
                    LOG.exception("answering")
            with self._lock:
                if self._closed or self._spare >= SPARE_THREADS:
                    return
                self._spare += 1

    def _answer(self, turn: Turn) -> None:
        """Answer the requests that have come, as long as the turn lasts."""
        eager = 0.0 if self.service.store.waits else EAGER_SECONDS  # nodes leave the core to others
        for key, _ in eagerly(self._selector.select, 1.0, eager):
            connection = key.data
            turn.ends = time.monotonic() + TURN_SECONDS
            turn.connection = connection
            good = connection.answer_next()
            while good and connection.wire.has_head() and not self.leave(connection):
                good = connection.answer_next()  # for want of a thread; else the others come first
            with self._lock:
                turn.connection = None
                over = self._turn is not turn
            if over:
                self._answer_alone(connection, good)
                return
            if not good:
                self._selector.unregister(connection.socket)
                self._close(connection)

    def _answer_alone(self, connection: Connection, good: bool) -> None:
        """Go on with the connection that ended the turn, as long as its requests have to wait."""
        connection.wait()
        while good and connection.has_more():
            good = connection.answer_next()
        if good:
            connection.enter()
            self._selector.register(connection.socket, selectors.EVENT_READ, connection)
        else:
            self._close(connection)

    def leave(self, connection: Connection) -> bool:
        """This connection's request is going to wait: end its turn. False: no thread can go on."""
        with self._lock:
            if self._turn.connection is connection:
                if not self._has_spare():
                    return False
                self._selector.unregister(connection.socket)
                connection.socket.setblocking(True)
                self._pass_on()
            return True

    def _close(self, connection: Connection) -> None:
        with self._lock:
            self._connections.discard(connection)
        self.shutdown_request(connection.socket)

    def service_actions(self) -> None:
        """End a turn that lasts for too long, and connections that are silent for too long."""
        busy, now = self._turn.connection, time.monotonic()
        if busy is not None and now > self._turn.ends:
            self.leave(busy)
        if now - self._looked > SOCKET_SECONDS / 10:
            self._looked = now
            for connection in list(self._connections):
                if now - connection.waits_since > SOCKET_SECONDS:
                    connection.end()

    def _accept(self) -> None:
        """Take the next connection, if it is still there."""
        try:
            connection, address = self.get_request()
        except OSError:
            return  # another process has taken it, or its client has gone
        try:
            self.process_request(connection, address)
        except Exception:  # it broke at once, or a bug
            self.handle_error(connection, address)
            self.shutdown_request(connection)

    def get_request(self) -> Any:
        """The next connection. At the limit of open files there is none to be had, however often
        one asks: then others have to end."""
        if self.shared:  # who is less busy comes first
            since = time.monotonic() - OWN_SECONDS
            busy = sum(each.waits_since > since for each in list(self._connections))
            time.sleep(SHARE_SECONDS * busy)
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._make_room()
                time.sleep(FULL_SECONDS)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """With too many connections, a silent one has to go, or this one is told SlowDown."""
        if len(self._connections) >= self._most and not self._make_room():
            return self._refuse(request)
        connection = Connection(request, client_address, self)
        with self._lock:
            self._selector.register(request, selectors.EVENT_READ, connection)
            self._connections.add(connection)

    def _make_room(self) -> bool:
        """Have the connection end that has been silent for longest, if one is."""
        silent = min(list(self._connections), key=lambda each: each.waits_since, default=None)
        if silent is None or time.monotonic() - silent.waits_since < OWN_SECONDS:
            return False
        if not silent.busy and has_come([silent]):  # it is not silent, but waits for its turn
            return False
        silent.end()
        return True

    def _refuse(self, connection: socket.socket) -> None:
        refused = Request("GET", "/", "", {}, self.service.settings, id=self.new_id())
        response = error_response(refused, S3Error("SlowDown", "Too many connections."))
        assert isinstance(response.body, bytes)
        with contextlib.suppress(OSError):  # it may be gone already
            connection.sendall(render_head(refused, response, keep=False) + response.body)
        self.shutdown_request(connection)

    def new_id(self) -> str:
        """16 hex digits that are unique among the requests of all servers."""
        return f"{next(self._request_ids) % 2**64:016X}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """An exception that no connection should raise."""
        LOG.exception("connection from %s", client_address[0])

    def shutdown(self) -> None:
        """Make serve_forever return; safe in a signal handler."""
        self.stopping = True

    def finish(self) -> None:
        """Accept what connections were made, answer what has come; for SHUTDOWN_SECONDS at most."""
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        for _ in range(BACKLOG):
            if has_come([self]) and time.monotonic() < deadline:
                self._accept()
        self.server_close()
        patience = time.monotonic() + OWN_SECONDS  # with heads of which only a part has come
        while self._is_busy() and time.monotonic() < deadline:
            self.service_actions()
            for connection in list(self._connections) if time.monotonic() > patience else ():
                if connection.waits_since < math.inf and not has_come([connection]):
                    connection.end()
            time.sleep(STOP_SECONDS)
        self._closed = True

    def _is_busy(self) -> bool:
        """Whether any request has come that is not answered yet. Looked at in the order in which
        it passes: on the wire, received, read by a connection that is busy before it reads."""
        connections = list(self._connections)
        if has_come(connections):
            return True
        return any(each.wire.buffered() or each.busy for each in connections)


# ===== 12 Command line =====

DEFAULT_SECRET = "minioadmin"
EPILOG = """\
Each option can be given by an environment variable, too: --data-dir by ZS3_DATA_DIR, --quiet by
ZS3_QUIET=1; or by a file, --acl by that which ZS3_ACL_FILE names. MINIO_ROOT_USER and
MINIO_ROOT_PASSWORD (or their _FILE) are the admin's keys where there is no --acl.
Durations are seconds, or a number with s, m, h or d behind it: 45s, 30m, 12h, 7d.

Roles: a reader may get and list; a writer may also put and delete objects; an admin may also create
and delete buckets. GET /_zs3/health answers 200 to anyone (as do /minio/health/live and .../ready).
"""


def parse_duration(text: str) -> float:
    """Seconds: `90`, `45s`, `30m`, `12h`, `7d`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration such as 45s, 30m, 12h or 7d")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def parse_names(
    text: str, is_right: Callable[[str], object] = bool, what: str = "name"
) -> list[str]:
    """Words separated by commas, each of them right."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if wrong := [name for name in names if not is_right(name)]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is no {what}")
    return names


parse_buckets = functools.partial(parse_names, is_right=is_bucket_name, what="valid bucket name")
parse_origins = functools.partial(
    parse_names, is_right=re.compile(r"\*|null|[^/]+://[^/]+").fullmatch,  # as browsers send them
    what="origin such as https://example.com",
)


def parse_domain(text: str) -> str:
    """A host's name, or ""."""
    name = text.lower()
    if not re.fullmatch(r"([a-z0-9_-]+\.)*[a-z0-9_-]+|", name):
        raise argparse.ArgumentTypeError(f"{text!r} is no domain such as s3.example.com")
    return name


def parse_acl(text: str) -> Credentials:
    """`role:access:secret,...`; a secret may hold colons but no comma."""
    credentials: Credentials = {}
    for entry in parse_names(text):
        pieces = entry.split(":", 2)
        if len(pieces) < 3 or not all(pieces) or pieces[0] not in ROLES:
            roles = ", ".join(ROLES)
            raise argparse.ArgumentTypeError(f"{entry!r} is no ROLE:ACCESS:SECRET; roles: {roles}")
        if pieces[1] in credentials:
            raise argparse.ArgumentTypeError("an access key stands there twice")
        credentials[pieces[1]] = Credential(*pieces)
    return credentials


def parse_log_format(text: str) -> LogFormat:
    """A row of LOG_FORMATS."""
    if text not in LOG_FORMATS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither text nor json")
    return LOG_FORMATS[text]


def bounded(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: an integer within [low, high]."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,15}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer between {low} and {high}")
        return int(text)

    return parse


def odd(text: str) -> int:
    """An argparse type: an odd number up to 19. A majority of an even one bears no more losses."""
    if text.isdigit() and int(text) % 2 == 0:
        raise argparse.ArgumentTypeError(f"{text} is not an odd number")
    return bounded(1, 19)(text)


class Option(NamedTuple):
    """A row of the command line. A `kind` of bool is a switch; any other parses the text."""

    group: str
    name: str
    default: str
    metavar: str
    kind: Callable[[str], Any]
    help: str


SERVER, CLUSTER = "server", "distributed mode"
PORT = 9000
OPTIONS = (
    Option(SERVER, "port", str(PORT), "PORT", bounded(0, 65535),
           "port to listen on; 0: a free one"),
    Option(SERVER, "host", "", "ADDRESS", str,
           "address to listen on (127.0.0.1 with the default keys, else 0.0.0.0)"),
    Option(SERVER, "data-dir", "", "PATH", str,
           "folder of the data, made if it is not there (data; of a node not on 9000: data-PORT)"),
    Option(SERVER, "acl", "", "ROLE:ACCESS:SECRET,...", parse_acl,
           "who may do what (admin:minioadmin:minioadmin)"),
    Option(SERVER, "public-read", "", "BUCKET,...", parse_buckets, "buckets anyone may read"),
    Option(SERVER, "bucket", "", "BUCKET,...", parse_buckets, "buckets to make at the start"),
    Option(SERVER, "cors-origin", "", "ORIGIN,...", parse_origins,
           "origins whose pages may use the server, * for any"),
    Option(SERVER, "domain", "", "DOMAIN", parse_domain,
           "serve the host BUCKET.DOMAIN as the bucket, too"),
    Option(SERVER, "workers", "1", "N", bounded(1, 64), "processes that share the port"),
    Option(SERVER, "fsync", "", "", bool,
           "flush every write to the disk before answering, against loss of power"),
    Option(SERVER, "min-part-size", str(MIN_PART_BYTES), "BYTES", bounded(1, MAX_PUT_BYTES),
           "least size of a part but the last"),
    Option(SERVER, "upload-expiry", "7d", "DURATION", parse_duration,
           "age at which an unfinished multipart upload is removed"),
    Option(SERVER, "log-format", "text", "text|json", parse_log_format, "how a request is logged"),
    Option(SERVER, "quiet", "", "", bool, "no line for each request"),
    Option(SERVER, "check", "", "", bool, "ask a running server for its health; exit 0 or 1"),
    Option(CLUSTER, "distributed", "", "", bool, "be a node of a cluster (needs blake3)"),
    Option(CLUSTER, "bootstrap", "", "HOST:PORT,...", parse_names,
           "nodes of the cluster to join; the first of a new one is started without"),
    Option(CLUSTER, "discover", "", "", bool, "find nodes by multicast on the local network"),
    Option(CLUSTER, "advertise", "", "HOST:PORT", str, "where other nodes reach this one"),
    Option(CLUSTER, "cluster-secret", "", "SECRET", str,
           "proves that a node belongs to the cluster (made from the admin's secret)"),
    Option(CLUSTER, "replicas", "3", "N", odd,
           "nodes that hold each record and block, an odd number"),
    Option(CLUSTER, "gossip-interval-ms", "30000", "N", bounded(50, 10**9),
           "milliseconds between two rounds of background work"),
    Option(CLUSTER, "gc-grace", "10m", "DURATION", parse_duration,
           "age at which a block that no object refers to is removed"),
    Option(CLUSTER, "tombstone-grace", "24h", "DURATION", parse_duration,
           "least time for which a deletion is remembered"),
    Option(CLUSTER, "forget", "", "NODE_ID", str, "this node is gone for good: tell the cluster"),
)


def environment(name: str) -> str | None:
    """What a variable of the environment says; or, as containers are given secrets, the file that
    NAME_FILE names, by its path or in /run/secrets."""
    given, path = os.environ.get(name), os.environ.get(f"{name}_FILE")
    if given is not None or not path:
        return given
    try:
        with open(os.path.join("/run/secrets", path), encoding="utf-8") as file:
            return file.read().strip() or sys.exit(f"zs3: {name}_FILE: {path} is empty")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"zs3: {name}_FILE: {error}")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, and the environment for what is not there; with its `credentials`."""
    parser = argparse.ArgumentParser(
        prog="zs3", description="S3-compatible object storage on plain files.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"zs3 {VERSION}")
    groups = {title: parser.add_argument_group(title) for title in (SERVER, CLUSTER)}
    for option in OPTIONS:
        group, flag = groups[option.group], f"--{option.name}"
        given = environment("ZS3_" + option.name.upper().replace("-", "_"))
        if option.name == "port" and given and given.startswith("tcp://"):
            given = None  # Kubernetes says so, wherever a service is called zs3
        if option.kind is bool:
            if given not in (None, "", "0", "1"):
                parser.error(f"the environment variable of {flag} must be 0 or 1")
            group.add_argument(flag, action="store_true", default=given == "1", help=option.help)
        else:
            shown = f"{option.help} ({option.default})" if option.default else option.help
            default = option.default if given is None else given
            group.add_argument(
                flag, default=default, metavar=option.metavar, type=option.kind, help=shown
            )
    args = parser.parse_args(argv)
    if args.distributed and args.workers > 1:
        parser.error("--workers does not go with --distributed: start more nodes instead")
    flags = {word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    for option in OPTIONS:
        if option.group == CLUSTER and f"--{option.name}" in flags and not args.distributed:
            parser.error(f"--{option.name} needs --distributed")
    if not args.acl and ("--acl" in flags or environment("ZS3_ACL") is not None):
        parser.error("--acl names nobody")
    # The nodes of one machine, started in one directory, get a folder each.
    beside = args.distributed and args.port != PORT
    args.data_dir = args.data_dir or (f"data-{args.port}" if beside else "data")
    access = environment("MINIO_ROOT_USER") or "minioadmin"
    secret = environment("MINIO_ROOT_PASSWORD") or DEFAULT_SECRET
    args.credentials = args.acl or {access: Credential("admin", access, secret)}
    return args


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine alone."""
    return host.startswith("127.") or host == "::1"


def well_known(credentials: Credentials) -> list[str]:
    """The access keys whose secret anyone could know, since it is the default one."""
    return [each.access for each in credentials.values() if each.secret == DEFAULT_SECRET]


def open_store(args: argparse.Namespace) -> Store:
    """The store that the command line asks for."""
    if args.distributed:
        try:
            import zs3_dist  # noqa: PLC0415 - copying zs3.py alone gives a standalone server
        except ImportError as error:
            beside = "distributed mode needs zs3_dist.py beside zs3.py"
            sys.exit(f"zs3: {beside if error.name == 'zs3_dist' else error}")
        return zs3_dist.open_store(args)
    return FileStore(args.data_dir, args.fsync)


def check_health(args: argparse.Namespace) -> int:
    """--check: 0 if a server answers at --host and --port, else 1."""
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(args.host, args.host)
    with contextlib.closing(http.client.HTTPConnection(host, args.port, timeout=5)) as connection:
        try:
            connection.request("GET", "/_zs3/health")
            answer = connection.getresponse()
            if answer.status == 200:
                return 0
            text = answer.read1(SMALL_BYTES).decode(errors="replace")
            print(f"zs3: {host}:{args.port} answers {answer.status}: {text}", file=sys.stderr)
        except (OSError, http.client.HTTPException) as error:
            print(f"zs3: no answer from {host}:{args.port}: {error}", file=sys.stderr)
        return 1


def print_banner(args: argparse.Namespace) -> None:
    """What a newcomer needs to know, on standard error."""
    host = f"[{args.host}]" if ":" in args.host else args.host
    lines = [f"zs3 {VERSION} at http://{host}:{args.port}", f"data in {args.data_dir}"]
    if known := ", ".join(well_known(args.credentials)):
        lines.append(f"access key {known}, secret {DEFAULT_SECRET}; set others by --acl")
        if not is_loopback(args.host):
            lines.append("WARNING: whoever reaches this port can use these well-known keys")
    else:
        keys = ", ".join(f"{each.access} ({each.role})" for each in args.credentials.values())
        lines.append(f"access keys: {keys}")
    write_line("\n".join(lines))


def is_slow_down(error: S3Error | OSError) -> bool:
    """Whether it says that other nodes are missing, who may come."""
    return isinstance(error, S3Error) and error.code == "SlowDown"


def sweep_uploads(store: Store, expiry: float) -> None:
    """Remove stale uploads now and then, for as long as the server runs."""
    while True:
        try:
            # Not of list_buckets: an upload may have outlived its bucket.
            for bucket in {info.key.split("/")[0] for info in store.scan(UPLOADS, "", "", "/")}:
                expire_uploads(store, bucket, time.time() - expiry)
        except (S3Error, OSError) as error:  # next time, then
            level = logging.DEBUG if is_slow_down(error) else logging.WARNING
            LOG.log(level, "stale uploads: %s", error)
        time.sleep(min(SWEEP_SECONDS, max(expiry / 2, 1.0)))


def serve(args: argparse.Namespace, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, and finish what is under way."""
    store = open_store(args)
    settings = Settings(
        args.credentials, frozenset(args.public_read), tuple(args.cors_origin), args.domain,
        bool(well_known(args.credentials)) and is_loopback(args.host), args.min_part_size,
    )
    service = Service(store, settings)
    log = None if args.quiet else args.log_format
    server = Server(listener, service, log, shared=args.workers > 1)
    store.start()
    threading.Thread(target=prepare, args=(args, service), name="prepare", daemon=True).start()
    handle_signals(server.shutdown)
    server.serve_forever()
    server.finish()
    store.close()


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
PR_SET_PDEATHSIG = 1  # the signal that a process gets when its parent has ended; linux/prctl.h


def handle_signals(stop: Callable[[], None]) -> None:
    """Have SIGTERM and SIGINT call `stop`, also one that came while main() held them back."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: stop())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def prepare(args: argparse.Namespace, service: Service) -> None:
    """Make the buckets of --bucket, then keep house. Beside the server, which answers already: the
    nodes of a cluster need one another's answers for it, and try until enough of them are there."""
    for bucket in args.bucket:
        while True:
            try:
                service.store.create_bucket(bucket)
                break
            except (S3Error, OSError) as error:
                slow = is_slow_down(error)
                if not slow:
                    LOG.error("cannot make the bucket %s yet: %s", bucket, error)
                time.sleep(0.5 if slow else 5.0)
    service.ready = True
    sweep_uploads(service.store, args.upload_expiry)


def start_worker(args: argparse.Namespace, listener: socket.socket) -> int | None:
    """The id of a new process that serves; None if there is no room for one."""
    parent = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:
        LOG.error("cannot start a worker: %s", error.strerror)
        return None
    if pid == 0:
        with contextlib.suppress(AttributeError):  # there is no such call elsewhere
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == parent:  # else it has ended already
            serve(args, listener)
        os._exit(0)
    return pid


def serve_workers(args: argparse.Namespace, listener: socket.socket) -> None:
    """--workers: processes that accept from one socket and share the data folder. One that dies is
    replaced; SIGTERM and SIGINT end all, and on Linux so does kill -9 of their parent."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever started us may have ignored it
    workers: set[int] = set()
    stopping = False

    def stop() -> None:
        nonlocal stopping
        stopping = True
        listener.close()  # else, who comes now would be kept waiting
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, signal.SIGTERM)

    while workers or not stopping:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # none is lost on a worker yet to be
        while not stopping and len(workers) < args.workers:
            pid = start_worker(args, listener)
            if pid is None:
                break
            workers.add(pid)
        handle_signals(stop)
        if workers and (stopping or len(workers) == args.workers):
            pid, status = os.wait()
            workers.discard(pid)
            if stopping:
                continue
            LOG.error("worker %d ended with status %d", pid, status)
        time.sleep(RESPAWN_SECONDS)


def prepare_folder(args: argparse.Namespace) -> None:
    """Make the data folder, if need be. OSError unless it is of this mode, and may be written or is
    that of a standalone server on a file system that can only be read."""
    temp = os.path.join(args.data_dir, ".tmp")
    os.makedirs(temp, exist_ok=True)
    names = os.listdir(args.data_dir)
    if ".node_id" in names and not args.distributed:
        raise OSError(errno.EEXIST, "it is that of a node, which needs --distributed")
    for name in names if args.distributed and ".node_id" not in names else ():
        if is_bucket_name(name) and os.path.isdir(os.path.join(args.data_dir, name)):
            raise OSError(errno.EEXIST, "it has the buckets of a standalone server")
    effective = os.access in os.supports_effective_ids
    for folder in (args.data_dir, temp):
        may_write = os.access(folder, os.R_OK | os.W_OK | os.X_OK, effective_ids=effective)
        read_only = not args.distributed and os.statvfs(folder).f_flag & os.ST_RDONLY
        if not (may_write or read_only):
            raise PermissionError(errno.EACCES, f"no permission to read and write in {folder}")
    if not args.distributed:
        make_own_folders(args.data_dir)


def raise_limits() -> None:
    """Let every connection have the files open that a copy needs beside its socket."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 6 * MAX_CONNECTIONS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server; the exit status."""
    args = parse_arguments(argv)
    if args.check:
        return check_health(args)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="zs3: %(message)s")
    with contextlib.suppress(OSError):  # there is no such device
        while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass  # whoever started us has closed it; no file or client shall get what is logged
        os.close(null)
    host = args.host or ("127.0.0.1" if well_known(args.credentials) else "0.0.0.0")
    threading.stack_size(STACK_BYTES)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()  # every address, those of IPv4 too
    try:
        what = f"listen on {host}:{args.port}"
        listener = socket.create_server(
            (host, args.port), family=family, backlog=BACKLOG, dualstack_ipv6=both
        )
        what = f"use the folder {args.data_dir}"
        prepare_folder(args)
    except OSError as error:
        # Python names the address once more behind it.
        print(f"zs3: cannot {what}: {str(error.strerror).partition(' (')[0]}", file=sys.stderr)
        return 1
    args.host, args.port = listener.getsockname()[:2]
    args.data_dir = os.path.abspath(args.data_dir)
    raise_limits()
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)  # gives back what compiling this module took, about 5 MB
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until there is something to stop
    print_banner(args)
    run = serve_workers if args.workers > 1 else serve
    with listener:
        run(args, listener)
    return 0


if __name__ == "__main__":
    # Start over as the module zs3, whatever this file is called: the interpreter keeps a script's
    # syntax tree, 9 MB of this one, for as long as it runs, but not a module's; and zs3_dist shall
    # import this, not a second copy. UTF-8 whatever the locale, since names of files are keys.
    # _exit, since what was to be waited for has been: not for threads that still ask a dead peer.
    start = (
        "import os, sys; file = sys.argv.pop(1); "
        "sys.path = [os.path.dirname(file), *filter(None, sys.path)]; "  # not the working directory
        "from importlib import machinery, util; "
        "spec = util.spec_from_loader('zs3', machinery.SourceFileLoader('zs3', file)); "
        "zs3 = sys.modules['zs3'] = util.module_from_spec(spec); "
        "spec.loader.exec_module(zs3); os._exit(zs3.main())"
    )
    flags = [flag for flag in sys.orig_argv[1 : -len(sys.argv)] if flag != "-m"]
    file = os.path.realpath(__file__)
    command = [sys.executable, *flags, "-X", "utf8", "-c", start, file, *sys.argv[1:]]
    os.execv(sys.executable, command)
