"""Check a version, and that ledger, alias and serving folder agree on it.

python -m flows verify NAME@champion      (or NAME@3)
"""

from __future__ import annotations

from tasks import deploy, ledger, registry, registry_alias, verify
from tasks.errors import InputError

Check = tuple[str, str | None]  # what was checked; what is wrong


def report(address: str) -> tuple[list[str], bool]:
    """A line for each check, and whether all hold."""
    model, _, which = address.partition("@")
    known = ledger.lines(model)
    alias = registry_alias.alias_of(model)
    version = alias if which in ("", registry.CHAMPION) else which
    if version is None:
        raise InputError(f"{model} has no champion; name a version: {model}@3")
    findings = verify.verify(model, version)
    checks: list[Check] = [(f"digest of {name}: {digest}", None) for name, digest in findings.digests.items()]
    checks += [(what, what) for what in findings.damage]
    checks += _ledger(model, known, findings)
    override = ledger.override(known, version, findings.registered.run_id)
    against = verify.judgement(findings.registered)
    if not against:
        checks.append(("the verdict, judged again from the measurements, is the one that was logged", None))
    for what in against:
        told = f"{what} (override by {override.actor}: {override.reason})" if override else what
        checks.append((told, None if override else what))
    if version == alias:
        checks += _agreement(findings, known)
    lines = [f"  {'FAIL' if problem else 'pass'}  {words}" for words, problem in checks]
    return [f"{model} version {version}", *lines], not any(problem for _, problem in checks)


def _ledger(model: str, known: list[ledger.Line], findings: verify.Findings) -> list[Check]:
    broken = ledger.broken(known)
    checks: list[Check] = [(broken or f"the ledger's {len(known)} lines are a whole chain", broken)]
    number, _, digest = findings.registered.tags.get("ledger", "").partition(" ")
    if number:  # written on the version when it was promoted: shows a ledger cut short
        held = any((line.number, line.sha256) == (int(number), digest) for line in known)
        words = f"the ledger {'holds' if held else 'does not hold'} line {number}, which the version names"
        checks.append((words, None if held else words))
    return checks


def _agreement(findings: verify.Findings, known: list[ledger.Line]) -> list[Check]:
    model, version = findings.registered.model, findings.registered.version
    champion, serving = ledger.champion(known), deploy.current(model)
    words = f"the ledger's champion is version {champion}, the alias is on version {version}"
    checks: list[Check] = [(words, None if champion == version else words)]
    if serving is None:
        return [*checks, (f"nothing is deployed in {deploy.root()}", None)]
    words = f"version {serving} serves from {deploy.root() / model}"
    checks.append((words, None if serving == version else words))
    if problem := verify.served(findings):
        checks.append((problem, problem))
    return checks
