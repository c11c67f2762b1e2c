"""Uploaded images: out of a multipart body or a bare one, held to the limits and the whitelists. Nothing is decoded here; the version does that.

A file is taken when its extension, its content type and its first bytes are all of one allowed kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from interlock.errors import InvalidArgument, ResourceExhausted
from interlock.runtime.images import BY_CONTENT_TYPE, BY_EXTENSION, KINDS, kind_of
from interlock_gateway.codec import invalid

FIELDS = frozenset({"model", "version", "id"})
FIELD_BYTES_MAX = 1024
PARTS_MAX = 1024
ANY_TYPE = frozenset({"", "application/octet-stream"})
"""What clients say that do not know: the extension and the bytes then decide."""


@dataclass(slots=True)
class File:
    """One uploaded file."""

    name: str
    content_type: str
    body: bytes


@dataclass(slots=True)
class Upload:
    """Files in their order, and the form's other fields."""

    files: list[File] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)


def is_upload(headers: Mapping[bytes, bytes]) -> bool:
    """True for a form with files, or a bare image."""
    return headers.get(b"content-type", b"").lower().startswith((b"multipart/", b"image/"))


def read(headers: Mapping[bytes, bytes], body: bytes, *, files_max: int) -> Upload:
    """The upload in a body.

    Raises:
        InvalidArgument: `INVALID_REQUEST`: not a form as its header says, unknown fields, no file; `UNSUPPORTED_IMAGE`: another content type.
        ResourceExhausted: `TOO_MANY_FILES`.
    """
    kind, options = parse_options_header(headers.get(b"content-type", b""))
    content_type = kind.decode("latin-1").lower()
    if content_type.startswith("image/"):
        return Upload([File("", content_type, body)])
    if content_type != "multipart/form-data" or not options.get(b"boundary"):
        raise unsupported("content-type", f"multipart/form-data with a boundary, or one of {', '.join(sorted(BY_CONTENT_TYPE))}, is expected")  # fmt: skip
    upload = _Parts(options[b"boundary"]).read(body, files_max)
    unknown = sorted(upload.fields.keys() - FIELDS)
    if unknown:
        raise invalid(unknown[0][:80], f"unknown field; files, {', '.join(sorted(FIELDS))} are known")
    if not upload.files:
        raise invalid("file", "no file in the form: a part needs a filename")
    return upload


class _Parts:
    """The parts of one form. The parser calls back; each callback only takes down what it is told."""

    def __init__(self, boundary: bytes) -> None:
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._headers: dict[bytes, bytes] = {}
        self._chunks: list[bytes] = []
        self._parts: list[tuple[dict[bytes, bytes], bytes]] = []
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                "on_header_end": self._header_end,
                "on_part_data": lambda data, start, end: self._chunks.append(data[start:end]),
                "on_part_end": self._end,
                "on_end": self._finish,
            },
        )

    def _begin(self) -> None:
        self._headers, self._chunks = {}, []
        if len(self._parts) >= PARTS_MAX:
            raise too_many(PARTS_MAX)

    def _header_end(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = (bytearray(), bytearray())

    def _end(self) -> None:
        self._parts.append((self._headers, b"".join(self._chunks)))

    def _finish(self) -> None:
        self._ended = True

    def read(self, body: bytes, files_max: int) -> Upload:
        """Parses the whole body."""
        try:
            self._parser.write(body)
            self._parser.finalize()
        except FormParserError as error:
            raise invalid("body", f"not the multipart form that its header says: {error}") from None
        if not self._ended:
            raise invalid("body", "the multipart form is cut off before its closing boundary")
        upload = Upload()
        for headers, content in self._parts:
            _add(upload, headers, content, files_max)
        return upload


def _add(upload: Upload, headers: Mapping[bytes, bytes], content: bytes, files_max: int) -> None:
    _, options = parse_options_header(headers.get(b"content-disposition", b""))
    name = options.get(b"name", b"").decode("utf-8", "replace")
    if b"filename" in options:
        if len(upload.files) >= files_max:
            raise too_many(files_max)
        filename = PurePosixPath(options[b"filename"].decode("utf-8", "replace").replace("\\", "/")).name[:255]
        kind, _ = parse_options_header(headers.get(b"content-type", b""))
        upload.files.append(File(filename, kind.decode("latin-1").lower(), content))
    elif not name or name in upload.fields or len(content) > FIELD_BYTES_MAX:
        raise invalid(
            name[:80] or "name", f"a form field has a name, comes once, and has at most {FIELD_BYTES_MAX} bytes"
        )
    else:
        upload.fields[name] = content.decode("utf-8", "replace")


def check(file: File, index: int, *, max_bytes: int) -> None:
    """Holds a file to the size limit and the whitelists.

    Raises:
        InvalidArgument: `UNSUPPORTED_IMAGE`, `INVALID_IMAGE` for an empty one; ResourceExhausted: `IMAGE_TOO_LARGE`.
    """
    where = f"file[{index}]"
    if not file.body:
        raise InvalidArgument(f"{where}: {file.name!r} is empty", reason="INVALID_IMAGE", field=where)
    if len(file.body) > max_bytes:
        limit = str(max_bytes >> 20)
        raise ResourceExhausted(
            f"{where}: {file.name!r} has more than {limit} MiB (gateway.max_upload_mb)",
            reason="IMAGE_TOO_LARGE",
            field=where,
            metadata={"limit_mib": limit},
        )
    said = {}
    if file.name:
        extension = PurePosixPath(file.name).suffix.lower()
        said[f"its extension {extension!r}"] = BY_EXTENSION.get(extension)
    if file.content_type not in ANY_TYPE:
        said[f"its content type {file.content_type[:40]!r}"] = BY_CONTENT_TYPE.get(file.content_type)
    for what, kind in said.items():
        if kind is None:
            allowed = f"{', '.join(BY_EXTENSION)} as {', '.join(BY_CONTENT_TYPE)}"
            raise unsupported(where, f"{file.name!r}: {what} is not allowed; {allowed} are")
    actual = kind_of(file.body)
    if actual is None:
        raise unsupported(where, f"{file.name!r}: its first bytes are of none of {', '.join(KINDS)}")
    for what, kind in said.items():
        if kind != actual:
            raise unsupported(where, f"{file.name!r}: {what} says {kind}, its first bytes say {actual}")


def unsupported(where: str, message: str) -> InvalidArgument:
    """The refusal of a kind of file."""
    return InvalidArgument(f"{where}: {message}", reason="UNSUPPORTED_IMAGE", field=where)


def too_many(limit: int) -> ResourceExhausted:
    """The refusal of more files than one request may have."""
    return ResourceExhausted(
        f"file: at most {limit} in one request{'; more go to POST /batch' if limit == 1 else ' (gateway.max_batch_files)'}",
        reason="TOO_MANY_FILES",
        field="file",
        metadata={"limit": str(limit)},
    )
