"""What a push touches, on real repositories with every odd name that git allows."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from tasks import checkout, git
from tasks.errors import InputError
from tasks.repositories import Repository

WATCHING = b"watch: [tasks/**/*.py, 'data/*.csv']\n"
ODD = ['a b"c', "$(touch pwned)", "new\nline", "`x`;ls", "-h", "dots..", "ünïcode", b"\xff\xfe"]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    run("init", "--quiet", "--initial-branch=main", str(folder), folder=tmp_path)
    for name, value in {"user.name": "t", "user.email": "t@example.org", "commit.gpgsign": "false"}.items():
        run("config", name, value, folder=folder)
    return folder


def run(*arguments: str, folder: Path) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=True)
    return done.stdout.decode(errors="replace").strip()


def commit(folder: Path, files: Mapping[Any, bytes | None] = MappingProxyType({})) -> str:
    """Commit files by path; None deletes one."""
    for name, content in files.items():
        place = os.path.join(os.fsencode(folder), os.fsencode(name))
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if content is None:
            os.unlink(place)
        else:
            with open(place, "wb") as file:
                file.write(content)
    run("add", "--all", folder=folder)
    run("commit", "--quiet", "--allow-empty", "-m", "x", folder=folder)
    return run("rev-parse", "HEAD", folder=folder)


def touched(folder: Path, before: str | None, after: str) -> git.Touched:
    return git.touched(folder, git.base(folder, after, before), after)


def test_a_push_touches_what_it_adds_changes_and_renames_and_says_what_it_deletes(work: Path) -> None:
    one = commit(work, {"recipes/a.yaml": b"x: 1\n" * 9, "recipes/b.yaml": b"y", "recipes/c.yaml": b"z"})
    content = (work / "recipes/a.yaml").read_bytes()
    two = commit(
        work,
        {
            "recipes/a.yaml": None,
            "recipes/renamed.yaml": content,
            "recipes/b.yaml": b"yy",
            "recipes/c.yaml": None,
            "recipes/deep/d.yaml": b"",
            "recipes/e.yml": b"",
            "other/f.yaml": b"",
        },
    )
    found = touched(work, one, two)
    assert found.recipes == ("b", "renamed")
    assert found.notes == (
        "a: deleted by this push; nothing is started",
        "c: deleted by this push; nothing is started",
    )


def test_watch_names_what_else_starts_a_recipe(work: Path) -> None:
    one = commit(
        work, {"recipes/w.yaml": WATCHING, "recipes/other.yaml": b"watch: []\n", "tasks/deep/x.py": b""}
    )
    quiet = commit(work, {"data/deep/x.csv": b"", "docs/x.md": b""})
    assert touched(work, one, quiet).recipes == ()
    assert touched(work, quiet, commit(work, {"tasks/deep/x.py": b"1"})).recipes == ("w",)
    before = run("rev-parse", "HEAD", folder=work)
    assert touched(work, before, commit(work, {"tasks/deep/x.py": None})).recipes == ("w",)


@pytest.mark.parametrize(
    "content", [b"watch: {", b"watch: all", b"watch: [1]", b"watch: ['../x']", b"watch: [':x']"]
)
def test_a_watch_that_cannot_be_read_is_said_and_starts_nothing(work: Path, content: bytes) -> None:
    one = commit(work, {"recipes/w.yaml": content})
    found = touched(work, one, commit(work, {"x": b""}))
    assert found.recipes == ()
    assert found.notes == ("w: its `watch` cannot be read; nothing is started",)


@pytest.mark.parametrize("name", ODD)
def test_odd_file_names_are_names_and_nothing_else(work: Path, name: str | bytes) -> None:
    one = commit(work, {"readme": b""})
    file = b"recipes/" + os.fsencode(name) + b".yaml"
    found = touched(work, one, commit(work, {file: WATCHING}))
    assert len(found.recipes) == 1
    found.recipes[0].encode()  # JSON and Prefect take it
    watched = touched(work, run("rev-parse", "HEAD", folder=work), commit(work, {"tasks/y.py": b""}))
    assert watched.recipes == found.recipes
    assert not list(work.rglob("pwned"))


def test_a_force_push_is_compared_with_where_the_histories_part(work: Path) -> None:
    commit(work, {"recipes/a.yaml": b"", "recipes/b.yaml": b""})
    old = commit(work, {"recipes/a.yaml": b"old"})
    run("reset", "--quiet", "--hard", "HEAD~1", folder=work)
    new = commit(work, {"recipes/b.yaml": b"new"})
    assert touched(work, old, new).recipes == ("b",)
    assert touched(work, new, run("rev-parse", "HEAD~1", folder=work)).recipes == ()  # a rewind adds nothing
    assert touched(work, "1" * 40, new).recipes == ("b",)  # the old commit is unknown


def test_a_root_an_empty_push_and_an_unrelated_history(work: Path) -> None:
    root = commit(work, {"recipes/a.yaml": b""})
    assert touched(work, None, root).recipes == ("a",)
    assert touched(work, root, root).recipes == ()
    assert touched(work, root, commit(work)).recipes == ()
    run("checkout", "--quiet", "--orphan", "other", folder=work)
    assert touched(work, root, commit(work, {"recipes/z.yaml": b""})).recipes == ("a", "z")


def test_a_huge_push(work: Path) -> None:
    one = commit(work, {"recipes/w.yaml": WATCHING})
    two = commit(work, {f"data/{k}.csv": b"%d" % k for k in range(5000)} | {"recipes/b.yaml": b""})
    assert touched(work, one, two).recipes == ("b", "w")


def test_which_commits_left_a_recipe_alone(work: Path) -> None:
    base = commit(work, {"recipes/w.yaml": WATCHING, "recipes/b.yaml": b""})
    one = commit(work, {"tasks/x.py": b"1"})
    two = commit(work, {"recipes/b.yaml": b"2"})
    three = commit(work, {"docs/x": b"3"})
    assert git.untouched_since(work, base, three, "w") == [two, one]
    assert git.untouched_since(work, base, three, "b") == [two]


@pytest.mark.parametrize(
    "text", ["", "abc", "HEAD", "A" * 40, "g" * 40, "a" * 41, "a" * 64, "a" * 40 + "\n", "-" * 40]
)
def test_anything_but_40_hex_digits_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="40 hex digits"):
        git.commit_id(text)


NAMES = [
    *(
        "main",
        "a/b",
        "$(touch x)",
        "a'b\"c",
        "-x",
        "@",
        "ü",
        "a b",
        "a\nb",
        "a..b",
        "../a",
        "a/.b",
        "a.lock",
        "a/",
    ),
    *("a//b", "", "a~", "a^", "a:b", "a?", "a*", "a[", "a\\b", "a@{b", "a.", "/a", "a\x7f", "a.lock/b"),
]


@pytest.mark.parametrize("name", NAMES)
def test_branch_names_are_judged_as_git_judges_them(name: str) -> None:
    done = subprocess.run(["git", "check-ref-format", f"refs/heads/{name}"], check=False)
    try:
        assert git.branch_name(name) == name
    except InputError:
        assert done.returncode != 0
    else:
        assert done.returncode == 0


def test_a_surrounding_hooks_environment_does_not_matter(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = commit(work, {"recipes/a.yaml": b""})
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    monkeypatch.setenv("GIT_INDEX_FILE", "/nowhere")
    assert touched(work, None, one).recipes == ("a",)


def test_a_host_that_is_away_is_told_from_a_mistake_and_credentials_are_not_told() -> None:
    with pytest.raises(git.Unreachable) as caught:
        checkout.heads("http://me:secret@127.0.0.1:9/x.git")
    assert "secret" not in str(caught.value)
    with pytest.raises(git.GitError) as missing:
        git.git("cat-file", "blob", "0" * 40, folder=Path("/"))
    assert not isinstance(missing.value, ConnectionError)


@pytest.fixture
def pushed(work: Path, fresh_home: Path) -> Callable[..., tuple[Path, str]]:
    """Commit on a branch of the repository, and mirror it."""

    def push(**files: bytes) -> tuple[Path, str]:
        found = commit(work, {"flows/__main__.py": b"", **files})
        return checkout.mirror(Repository(name="zoo", url=str(work))), found

    return push


def test_a_checkout_is_the_commit_and_is_made_again_when_it_is_not(
    pushed: Callable[..., tuple[Path, str]],
) -> None:
    mirror, first = pushed(a=b"1")
    _, second = pushed(a=b"2")
    with checkout.checkout(mirror, first) as folder:
        assert (folder / "a").read_bytes() == b"1"
        (folder / "a").write_bytes(b"altered")
        (folder / "new").write_bytes(b"")
    with checkout.checkout(mirror, second) as folder:
        assert (folder / "a").read_bytes() == b"2"
    with checkout.checkout(mirror, first) as folder:
        assert (folder / "a").read_bytes() == b"1"
        assert not (folder / "new").exists()
        assert run("rev-parse", "HEAD", folder=folder) == first
        made = folder.stat().st_ino
    with checkout.checkout(mirror, first) as folder:
        assert folder.stat().st_ino == made


def test_only_the_newest_checkouts_are_kept_and_none_in_use_goes(
    pushed: Callable[..., tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINEHOUSE_CHECKOUTS", "2")
    found = [pushed(x=b"%d" % k) for k in range(4)]
    with checkout.checkout(*found[0]) as oldest:
        for mirror, each in found[1:]:
            with checkout.checkout(mirror, each):
                pass
        assert oldest.is_dir()
        kept = {p.name for p in oldest.parent.iterdir() if p.is_dir()}
        assert kept == {oldest.name, found[2][1], found[3][1]}


def test_a_mirror_follows_force_pushes_and_deletions(work: Path, fresh_home: Path) -> None:
    repository = Repository(name="zoo", url=str(work))
    commit(work, {"x": b"1"})
    old = commit(work, {"x": b"2"})
    place = checkout.mirror(repository)
    assert checkout.holds(place, "main", old)
    run("reset", "--quiet", "--hard", "HEAD~1", folder=work)
    run("branch", "gone", folder=work)
    checkout.mirror(repository)
    new = commit(work, {"x": b"3"})
    run("branch", "-D", "gone", folder=work)
    checkout.mirror(repository)
    assert not checkout.holds(place, "main", old)
    assert checkout.holds(place, "main", new)
    assert not checkout.holds(place, "gone", f"{new}")
    assert checkout.heads(str(work)) == {"main": new}
    assert checkout.default(str(work)) == "main"


def test_a_new_branch_is_compared_with_the_default_one(work: Path, fresh_home: Path) -> None:
    repository = Repository(name="zoo", url=str(work))
    first = commit(work, {"recipes/a.yaml": b""})
    run("checkout", "--quiet", "-b", "topic", folder=work)
    middle = commit(work, {"recipes/b.yaml": b""})
    tip = commit(work, {"recipes/c.yaml": b""})
    place = checkout.mirror(repository)
    run("checkout", "--quiet", "main", folder=work)
    assert checkout.base(place, repository, tip, None, "topic") == first
    assert checkout.base(place, repository, tip, middle, "topic") == middle
    assert checkout.base(place, repository, first, None, "main") == git.EMPTY_TREE


def test_a_commit_without_our_code_is_told_in_words(work: Path, fresh_home: Path) -> None:
    found = commit(work, {"x": b""})
    place = checkout.mirror(Repository(name="zoo", url=str(work)))
    with pytest.raises(InputError, match="push a clone of Enginehouse"), checkout.checkout(place, found):
        pass
    assert not (fresh_home / "checkouts" / found).exists()
