"""What the post-receive hook does: each pushed branch becomes one flow run of `push/commit`.

What is to be told is written to REPOSITORY/enginehouse/ first and removed when Prefect has it, so that a
push made while Prefect is away is told by a process left behind, by the next push, or by
`hooks/post-receive --drain`. Only Python's own library is used, and nothing of Enginehouse is imported.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BUDGET = 5.0  # seconds that a pusher waits at most
PATIENCE = 3.0  # seconds for one answer
PAUSES = (2, 5, 10, 30, 60, 120, 300, 600, 1200)  # seconds between the tries of the process left behind
DEPLOYMENT = "push/commit"
ZEROS = "0" * 40


class Refused(Exception):
    """Prefect did not take it; the words are for the pusher."""


def main(arguments: list[str]) -> int:
    """Spool, hand over, say one line; a hook's exit status cannot undo a push, so it is always 0."""
    spool = Path(os.environ.get("GIT_DIR") or ".").resolve() / "enginehouse"
    if arguments == ["--drain"]:
        return linger(spool)
    try:
        pushes = list(read(sys.stdin.buffer))
        for push in pushes:
            write(spool, push)
        told, problem = drain(spool, time.monotonic() + BUDGET)
        if problem:
            if config("enginehouse.linger") != "false":
                leave_behind()
            say(f"{problem}; the push is kept and will be told later")
        elif told and pushes:
            say("handed over " + ", ".join(f"{show(p['branch'])} @ {p['commit'][:7]}" for p in pushes))
    except Exception as error:
        say(f"this push was not told to Prefect: {type(error).__name__}: {error}")
    return 0


def read(lines: Iterable[bytes]) -> Iterable[dict[str, Any]]:
    """The branches that git says were pushed; tags and deleted branches start nothing."""
    for line in lines:
        before, commit, ref = line.rstrip(b"\n").split(b" ", 2)
        if not ref.startswith(b"refs/heads/") or not commit.strip(b"0"):
            continue
        try:
            branch, name = ref[len("refs/heads/") :].decode(), commit.decode()
        except UnicodeDecodeError:
            say(f"{ref!r}: a branch whose name is not UTF-8 starts nothing")
            continue
        if not re.fullmatch("[0-9a-f]{40}", name):
            say(f"{show(branch)}: SHA-256 repositories are not supported; nothing is started")
            continue
        known = before.decode() if before.strip(b"0") else None
        yield {"repository": repository(), "commit": name, "before": known, "branch": branch}


def write(spool: Path, push: dict[str, Any]) -> None:
    """One file a push, there whole or not at all."""
    spool.mkdir(exist_ok=True)
    name = f"{time.time_ns()}-{push['commit'][:12]}-{uuid.uuid4().hex[:8]}"
    (spool / f".{name}").write_text(json.dumps(push), encoding="utf-8")
    (spool / f".{name}").rename(spool / f"{name}.json")


def drain(spool: Path, until: float) -> tuple[int, str | None]:
    """Tell what is spooled, oldest first; how many were told, and what stopped it."""
    told, api = 0, None
    for file in sorted(spool.glob("*.json")):
        left = until - time.monotonic()
        if left <= 0:
            return told, "Prefect is slow"
        try:
            push = json.loads(file.read_text(encoding="utf-8"))
            api = api or Prefect(min(left, PATIENCE))
            api.start(push)
        except FileNotFoundError:  # told by another push, just now
            continue
        except (OSError, Refused) as error:
            return told, f"Prefect did not take it ({error})"
        file.unlink(missing_ok=True)
        told += 1
    return told, None


def linger(spool: Path) -> int:
    """Try again and again, for most of an hour; one process does it, whoever else is asked to."""
    spool.mkdir(exist_ok=True)
    with (spool / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        for pause in (0, *PAUSES):
            time.sleep(pause)
            _, problem = drain(spool, time.monotonic() + 60)
            if problem is None:
                return 0
    say(str(problem))
    return 1


def leave_behind() -> None:
    """A process that goes on trying; git does not wait for it, since it holds none of git's streams."""
    null = subprocess.DEVNULL
    subprocess.Popen(
        [sys.executable, "-I", __file__, "--drain"],
        stdin=null,
        stdout=null,
        stderr=null,
        start_new_session=True,
    )


class Prefect:
    """As much of Prefect's API as it takes to create a flow run."""

    def __init__(self, patience: float) -> None:
        settings = environment()
        self.url = settings.get("PREFECT_API_URL", "").rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise Refused(
                "PREFECT_API_URL is not set: `git config enginehouse.env FILE` names a file with it"
            )
        self.patience = patience
        self.headers = {"Content-Type": "application/json", **credentials(settings)}
        flow, name = DEPLOYMENT.split("/")
        self.deployment = self.call("GET", f"/deployments/name/{flow}/{name}")["id"]

    def start(self, push: dict[str, Any]) -> None:
        """Create the run, or find the one that this push has."""
        key = "push:{repository}:{branch}:{before}:{commit}".format(
            **{**push, "before": push["before"] or ZEROS}
        )
        body = {
            "parameters": push,
            "idempotency_key": key,
            "tags": ["push", f"branch:{push['branch']}", f"commit:{push['commit'][:7]}"],
        }
        self.call("POST", f"/deployments/{self.deployment}/create_flow_run", body)

    def call(
        self, method: str, path: str, body: dict[str, Any] | None = None, again: bool = True, tries: int = 10
    ) -> Any:
        """The answer's JSON; where the server wants a CSRF token, it gets one."""
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + path, data, self.headers, method=method)
        try:
            # Prefect is on this machine or network: a proxy for the web has no business here.
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(request, timeout=self.patience) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            words = error.read(500).decode(errors="replace")
            if tries and error.code == 503:  # Prefect on SQLite, when two write at once
                time.sleep(0.1)
                return self.call(method, path, body, again, tries - 1)
            if again and error.code == 403 and "CSRF" in words.upper():
                client = str(uuid.uuid4())
                token = self.call("GET", f"/csrf-token?client={client}", again=False)["token"]
                self.headers.update({"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": client})
                return self.call(method, path, body, again=False)
            hint = {401: "wrong password", 404: f"it does not know {DEPLOYMENT}; make up applies it"}
            raise Refused(f"HTTP {error.code}: {hint.get(error.code, words[:120])}") from None
        except urllib.error.URLError as error:
            raise Refused(f"no answer: {error.reason}") from None


def environment() -> dict[str, str]:
    """Where Prefect is: a file of NAME=VALUE lines, and what the environment says, which wins."""
    home = os.environ.get("ENGINEHOUSE_HOME") or "~/.enginehouse"
    file = Path(config("enginehouse.env") or f"{home}/services/client.env").expanduser()
    found: dict[str, str] = {}
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            name, equals, value = line.strip().partition("=")
            if equals and not name.startswith("#"):
                found[name.strip()] = value.strip().strip("\"'")
    return {**found, **os.environ}


def credentials(settings: dict[str, str]) -> dict[str, str]:
    """The header that says who we are, where one is configured."""
    if settings.get("PREFECT_API_AUTH_STRING"):
        return {
            "Authorization": "Basic "
            + base64.b64encode(settings["PREFECT_API_AUTH_STRING"].encode()).decode()
        }
    if settings.get("PREFECT_API_KEY"):
        return {"Authorization": f"Bearer {settings['PREFECT_API_KEY']}"}
    return {}


def repository() -> str:
    """The name that the allow list knows this repository by: configured, or its folder."""
    return config("enginehouse.repository") or str(Path(os.environ.get("GIT_DIR") or ".").resolve())


def config(name: str) -> str:
    """The repository's own setting, or nothing."""
    done = subprocess.run(["git", "config", "--get", name], stdout=subprocess.PIPE, check=False)
    return done.stdout.decode(errors="replace").strip()


def show(text: str) -> str:
    """In one line, whatever is in it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)[:100]


def say(line: str) -> None:
    """One line to the pusher."""
    print(f"enginehouse: {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
