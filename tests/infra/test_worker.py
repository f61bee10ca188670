"""Which moved aliases the look beside the worker hands on, and when."""

from __future__ import annotations

from infra.worker import Watch


def test_what_moved_is_handed_on_once_it_stands_still() -> None:
    watch = Watch({"digits": "1"})
    assert watch.moved({"digits": "1"}) == []
    assert watch.moved({"digits": "2"}) == []
    assert watch.moved({"digits": "2"}) == ["digits"]
    watch.handed_on("digits", {"digits": "2"})
    assert watch.moved({"digits": "2"}) == []


def test_what_was_put_back_meanwhile_is_left_alone() -> None:
    watch = Watch({"digits": "1"})
    assert watch.moved({"digits": "3"}) == []
    assert watch.moved({"digits": "1"}) == []
    assert watch.moved({"digits": "1"}) == []


def test_new_models_and_aliases_taken_off_count_as_moved() -> None:
    watch = Watch({"digits": "1"})
    watch.moved({"words": "1"})
    assert watch.moved({"words": "1"}) == ["digits", "words"]
    watch.handed_on("digits", {"words": "1"})
    assert watch.moved({"words": "1"}) == ["words"]


def test_what_could_not_be_handed_on_is_tried_again() -> None:
    watch = Watch({})
    watch.moved({"digits": "1"})
    assert watch.moved({"digits": "1"}) == watch.moved({"digits": "1"}) == ["digits"]
