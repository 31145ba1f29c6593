"""The client's half of Signature Version 4, of the steps in zs3.py: for the tools beside."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import zs3


def sign_headers(
    method: str,
    path: str,
    raw_query: str,
    headers: Mapping[str, str],
    payload: str,
    credential: tuple[str, str],
    amz_date: str,
    region: str = "us-east-1",
) -> dict[str, str]:
    """The headers of a signed request: `headers` (lower-case names, with host) and what signing
    adds. `path` is percent-encoded; `credential` is access key and secret."""
    access, secret = credential
    signed = {**headers, "x-amz-date": amz_date, "x-amz-content-sha256": payload}
    names = ";".join(sorted(signed))
    scope = f"{amz_date[:8]}/{region}/s3/aws4_request"
    canonical = zs3.canonical_request(method, path, raw_query, signed, names, payload)
    text = zs3.string_to_sign(amz_date, scope, canonical)
    proof = zs3.signature(zs3.signing_key(secret, amz_date[:8], region), text)
    claim = f"{zs3.ALGORITHM} Credential={access}/{scope}, SignedHeaders={names}, Signature={proof}"
    return signed | {"authorization": claim}
