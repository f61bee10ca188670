"""Bring MLflow's alias, the ledger and the serving folder into agreement; roll back.

    python -m flows promote NAME
    python -m flows rollback NAME [--to V] [--by NAME] [--reason TEXT]

A person moves the alias in MLflow; a webhook or the schedule starts `promote`, which may be run at any time
and as often as one likes: where everything agrees it does nothing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from prefect import flow, task
from prefect.context import FlowRunContext

from flows import history, serving
from flows.serving import Action, Agreement
from tasks import deploy, ledger, registry, registry_alias, verify
from tasks.errors import InputError
from tasks.stage import passing, say
from tasks.verify import Findings

PERSON = "alias in MLflow"
JUDGING = "judging"
"""The tag of a version whose judging was begun: how often."""
TRIES = 3


@flow(name="promote", flow_run_name="{model}", persist_result=False)
def promote(model: str) -> Agreement:
    """One model; what is away meanwhile (MLflow, the database) is waited for."""
    done: Agreement = _agree_on()(model)
    return done


@flow(name="reconcile", persist_result=False)
def reconcile() -> list[Agreement]:
    """Every registered model; one that fails does not keep the others from it."""
    states = [(model, _agree_on()(model, return_state=True)) for model in registry_alias.models()]
    failed = [f"{model}: {state.message}" for model, state in states if not state.is_completed()]
    if failed:
        raise RuntimeError("; ".join(failed))
    return [state.result() for _, state in states]


def _agree_on() -> Any:
    """`agree` as a task that waits while MLflow or the database is away."""
    return task(
        name="agree", retries=20, retry_delay_seconds=6, retry_condition_fn=passing, persist_result=False
    )(agree)


@flow(name="rollback", flow_run_name="{model}", persist_result=False)
def rollback(
    model: str, to: str | None = None, by: str = "rollback flow", reason: str = "rolled back"
) -> Agreement:
    """The champion before this one, or version `to`."""
    return back(model, to, by, reason)


def agree(model: str) -> Agreement:
    """Compare alias, ledger and serving folder, and do what is missing; safe to repeat after any crash."""
    started = time.perf_counter()
    judged = _judge(model)
    with ledger.held(model):
        registry_alias.settle(model)
        known, holder = ledger.lines(model), registry_alias.alias_of(model)
        champion = ledger.champion(known)
        if holder and not known and "gate" not in registry.registered(model, holder).tags:
            done = Agreement(model, "nothing", holder, "this model is not Enginehouse's")
        elif holder == champion:
            done = serving.serve(model, champion)
        elif holder is None:
            done = _withdraw(model, champion)
        else:
            done = _take(model, champion, holder)
    if judged and done.action == "nothing":
        done = replace(judged, champion=done.champion)
    if done.action != "nothing":
        say(f"{model}: {done.action}, champion {done.champion}{f' ({done.reason})' if done.reason else ''}")
        publish(model)
    return Agreement(model, done.action, done.champion, done.reason, time.perf_counter() - started)


def _judge(model: str) -> Agreement | None:
    """Have judged what waits for its gate, and say what came of it; None where nothing does.

    The model is not held meanwhile: judging takes long, and may promote.
    """
    if _asked(model) is None:
        return None
    try:
        with ledger.held(f"{model}, judging", patience=0.01):
            version = _asked(model)
            return gate_pending(model, version) if version else None
    except ledger.Busy:  # another process is at it, or this very one, whose judging ends in an agreement, too
        return None


def _asked(model: str) -> str | None:
    """The version to judge: one that the alias was put on, else one that was begun and can be judged here."""
    holder = registry_alias.alias_of(model)
    if holder and registry.registered(model, holder).tags.get("gate") == "pending":
        return holder
    begun = (registry.registered(model, version) for version in registry_alias.tagged(model, JUDGING))
    return next((found.version for found in begun if not verify.missing(found.tags["runtime"])), None)


def gate_pending(model: str, version: str) -> Agreement | None:
    """Have a version that waits for its gate judged here; refused where it cannot be, with the reason.

    Meanwhile the alias goes back, and a tag says that judging was begun: should the process end, the next
    look goes on. What comes of it is a version of its own, since its engine is one.
    """
    from flows.pending import judge_pending

    registered = registry.registered(model, version)
    begun = _number(registered.tags.get(JUDGING, "0"))
    try:
        _judgeable(registered, begun)
        with _held(model) as champion:
            if not begun and registry_alias.alias_of(model) != version:
                return None
            first = "its gate is pending; it is judged first"
            _refuse(model, champion, version, first, {JUDGING: str(begun + 1)})
        outcome = judge_pending(model, version)
    except InputError as error:
        with _held(model) as champion:
            return _refuse(model, champion, version, str(error), drop=[JUDGING])
    number, verdict = outcome.version.version, outcome.verdict
    told = {"gated_as": number}
    drop = [registry_alias.REFUSED, JUDGING]
    registry_alias.note(model, version, f"Judged as version {number}: {verdict}.", told, drop)
    actions: dict[str, Action] = {"promoted": "promoted", "refused": "refused"}
    reason = "; ".join([f"version {version} was judged as version {number}", *outcome.reasons])
    return Agreement(model, actions.get(verdict, "nothing"), None, reason)


def _number(tag: str) -> int:
    """How often; a tag that a person wrote counts as once."""
    return int(tag) if tag.isdecimal() else 1


def _judgeable(registered: registry.Registered, begun: int) -> None:
    """Raise InputError where this machine cannot judge the version, or has tried often enough."""
    manifest = registry.manifest_of(registered.run_id)
    if why := verify.missing(manifest["engines"]["candidate"]["plan"]["runtime"]):
        raise InputError(f"its gate is pending, and {why}: a worker that has the runtime must judge it first")
    if begun >= TRIES:
        raise InputError(
            f"judging it was begun {begun} times and never finished; "
            "see why in the worker's log, then set the alias on it again"
        )


@contextmanager
def _held(model: str) -> Iterator[str | None]:
    """The model held, with nothing left open: its champion."""
    with ledger.held(model):
        registry_alias.settle(model)
        yield ledger.champion(ledger.lines(model))


def _take(model: str, champion: str | None, version: str) -> Agreement:
    """A person put the alias on this version: promote it, or put the alias back."""
    registered = registry.registered(model, version)
    allowed = ledger.override(ledger.lines(model), version, registered.run_id)
    if not allowed and (against := verify.word(registered)):
        return _refuse(model, champion, version, "; ".join(against))
    findings = verify.verify(model, version)
    problems = findings.damage + (() if allowed else verify.judgement(registered))
    if problems:
        return _refuse(model, champion, version, "; ".join(problems))
    section = findings.recipe.deploy if findings.recipe else None
    try:
        serving.prepare(findings, section)
    except deploy.Unfit as unfit:
        return _refuse(model, champion, version, f"it cannot serve here: {unfit}")
    if (now := registry_alias.alias_of(model)) != version:
        return Agreement(model, "nothing", champion, f"the alias moved on to version {now}; look again")
    actor = allowed.actor if allowed else PERSON
    reason = f"override: {allowed.reason}" if allowed else "the alias was set on it"
    run, facts = findings.registered.run_id, {"digests": findings.digests}
    registry_alias.move(model, champion, version, "promoted", actor, reason, run, facts)
    return serving.switch(findings, section, "promoted")


def _refuse(
    model: str,
    champion: str | None,
    version: str,
    reason: str,
    tags: dict[str, str] | None = None,
    drop: Sequence[str] = (),
) -> Agreement:
    """The reason on the version and in the ledger, then the alias back where it was."""
    words = f"Not promoted ({serving.now()}): {reason}."
    registry_alias.note(model, version, words, {registry_alias.REFUSED: reason, **(tags or {})}, drop)
    run = registry.registered(model, version).run_id
    ledger.append(model, "refused", actor=PERSON, before=champion, after=version, run_id=run, reason=reason)
    if registry_alias.alias_of(model) == version:
        registry_alias.set_alias(model, champion)
    return Agreement(model, "refused", champion, f"version {version}: {reason}")


def _withdraw(model: str, champion: str | None) -> Agreement:
    """A person took the alias off: there is no champion, and what serves goes on serving."""
    reason = "the alias was taken off; what is deployed goes on serving"
    ledger.append(model, "withdrawn", actor=PERSON, before=champion, reason=reason)
    return Agreement(model, "withdrawn", None, reason)


def back(model: str, to: str | None, by: str, reason: str) -> Agreement:
    """Restore alias and engine of an earlier champion; quick while it lies in the serving folder."""
    started = time.perf_counter()
    with ledger.held(model):
        registry_alias.settle(model)
        known = ledger.lines(model)
        champion = ledger.champion(known)
        version = to or _earlier(model, known)
        if version == champion:
            raise InputError(f"version {version} of {model} is champion already")
        findings = _candidate(model, version, known)
        section = findings.recipe.deploy if findings.recipe else None
        try:
            serving.prepare(findings, section)
        except deploy.Unfit as unfit:
            raise InputError(f"version {version} of {model} cannot serve here: {unfit}") from unfit
        run = findings.registered.run_id
        registry_alias.move(model, champion, version, "rolled-back", by, reason, run)
        done = serving.switch(findings, section, "rolled-back")
    publish(model)
    return Agreement(model, done.action, done.champion, done.reason, time.perf_counter() - started)


def _earlier(model: str, known: Sequence[ledger.Line]) -> str:
    earlier = serving.last_champion(model, known, ledger.champion(known))
    if earlier is None:
        raise InputError(f"{model} has had no other champion that is still there; name a version with --to")
    return earlier


def _candidate(model: str, version: str, known: Sequence[ledger.Line]) -> Findings:
    """A version to roll back to: whole, and once champion, passed or overridden."""
    registered = registry.registered(model, version)
    held = ledger.was_champion(known, version, registered.run_id)
    if held:
        digests = verify.expected(registered)
        if deploy.intact(model, version, digests):
            return Findings(registered, registry.recipe_of(registered.run_id), None, digests, ())
    findings = verify.verify(model, version)
    trusted = held or ledger.override(known, version, registered.run_id)
    problems = findings.damage + (() if trusted else verify.judgement(findings.registered))
    if problems:
        raise InputError(f"version {version} of {model} cannot be champion: {'; '.join(problems)}")
    return findings


def override(model: str, version: str, by: str, reason: str) -> ledger.Line:
    """Let a version be promoted though its gate refused it; damage is never overridden."""
    run = registry.registered(model, version).run_id
    champion = ledger.champion(ledger.lines(model))
    return ledger.append(
        model, "override", actor=by, before=champion, after=version, run_id=run, reason=reason
    )


def publish(model: str) -> None:
    """The ledger as a table in Prefect's UI, when this is a flow run there."""
    if FlowRunContext.get() is None:
        return
    from prefect.artifacts import create_table_artifact

    key = re.sub(r"[^a-z0-9]+", "-", f"history-{model}".lower()).strip("-")
    words = f"Every move of {model}'s champion, newest first."
    create_table_artifact(table=history.rows(model), key=key, description=words)
