"""The repositories whose pushes may start runs: an allow list, since a pushed commit's code is executed.

HOME/services/repositories.yaml (or the file that ENGINEHOUSE_REPOSITORIES names); see docs/git.md.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import re
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from tasks import store
from tasks.errors import InputError

SCP = re.compile(r"(?:[\w.-]+@)?([\w.-]+):(?!/)(.+)")  # git@host:owner/name.git


class Place(NamedTuple):
    """A repository on a git host: the host's address for browsers, and owner/name there."""

    site: str
    name: str


class Repository(BaseModel):
    """Where a repository is fetched from, the other addresses it is pushed to, and the branches that run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    url: str = Field(min_length=1)
    also: tuple[str, ...] = ()
    branches: tuple[str, ...] = Field(("main",), min_length=1)
    status: Literal["github", "gitea"] | None = None
    api: str | None = None

    @model_validator(mode="after")
    def _named_on_its_host(self) -> Self:
        if self.status and not self.place:
            raise ValueError(
                f"status: {self.status} needs the repository's OWNER/NAME, which neither url nor also has; "
                "add its address there to also: [https://HOST/OWNER/NAME]"
            )
        return self

    @property
    def place(self) -> Place | None:
        """Where it is on its git host, by the first of `url` and `also` that says so; None by paths alone."""
        return next(filter(None, map(_place, (self.url, *self.also))), None)

    def allows(self, branch: str) -> bool:
        """Whether pushes to the branch start runs; a pattern's `*` also matches slashes."""
        return any(fnmatch.fnmatchcase(branch, pattern) for pattern in self.branches)

    def known_as(self, address: str) -> bool:
        """Whether the address, however it is spelled, is this repository."""
        names = {_plain(each) for each in (self.name, self.url, *self.also)}
        return _plain(address) in names


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
_Entries = TypeAdapter(dict[Name, dict[str, object]])


def file() -> Path:
    """Where the allow list stands."""
    return Path(os.environ.get("ENGINEHOUSE_REPOSITORIES") or store.home() / "services" / "repositories.yaml")


def configured() -> tuple[Repository, ...]:
    """Every allowed repository; none where there is no file."""
    if not file().is_file():
        return ()
    return _read(file(), file().stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _read(file: Path, _changed: int) -> tuple[Repository, ...]:
    try:
        entries = _Entries.validate_python(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
        return tuple(Repository.model_validate({**entry, "name": name}) for name, entry in entries.items())
    except (yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
        raise InputError(f"{file}: not a list of repositories ({error}); docs/git.md shows one") from None


def find(address: str) -> Repository:
    """The repository of this name or address; InputError says how to allow one that is not there."""
    for repository in configured():
        if repository.known_as(address):
            return repository
    raise InputError(
        f"{address[:200]!r} may not start runs here; add it to {file()} (docs/git.md): a pushed commit's "
        "code is executed, so only what stands there is"
    )


def _place(address: str) -> Place | None:
    """Where an address of a git host leads, ssh's by https; None for a path of this or another machine."""
    parts, scp = urlsplit(address.strip()), SCP.fullmatch(address.strip())
    host, path = (scp[1], scp[2]) if scp else (parts.netloc.rpartition("@")[2], parts.path)
    found = re.fullmatch(r"/*(?:(.+)/)?([^/]+/[^/]+?)(?:\.git)?/*", path)
    if not host or not found:
        return None
    above, name = found.groups()
    if parts.scheme in ("http", "https"):
        return Place(f"{parts.scheme}://{host}" + (f"/{above}" if above else ""), name)
    ssh = scp or parts.scheme == "ssh"
    return Place("https://" + re.sub(r":\d+$", "", host), name) if ssh and not above else None


def _plain(address: str) -> str:
    """One spelling: without scheme, user, port of the scheme, `.git` and trailing slash; `host/path`."""
    text = re.sub(r"^file://", "", address.strip())
    if scp := SCP.fullmatch(text):
        text = f"{scp[1]}/{scp[2]}"
    text = re.sub(r"^\w+://(?:[^/@]*@)?", "", text)
    return text.rstrip("/").removesuffix(".git").rstrip("/").lower()
