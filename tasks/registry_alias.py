"""Aliases in MLflow and what stands on a version: they follow the ledger.

python -m flows optimize RECIPE     (stage `promote`)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefect import task

from tasks import ledger, store
from tasks.artifacts import Facts, Version
from tasks.errors import InputError
from tasks.registry_engine import default_uri, read_our_servers_artifacts
from tasks.stage import NETWORK

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
REFUSED = "promotion_refused"
PIPELINE = "pipeline"
GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # not there, as against not answering


def client(room: bool = True) -> MlflowClient:
    """MLflow's client, on MLFLOW_TRACKING_URI or else on SQLite below the state folder, which must have room
    unless told otherwise.
    """
    import mlflow

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        store.prepare(room)
        uri = default_uri()
    mlflow.set_tracking_uri(uri)
    read_our_servers_artifacts()
    return mlflow.MlflowClient()


@task(name="promote", persist_result=False, **NETWORK)
def promote(version: Version, judged_against: str | None) -> Version:
    """Give the version the champion alias; it must have passed the gate, against today's champion."""
    assert version.gate == "passed", f"version {version.version} has gate={version.gate}"
    model = version.model
    with ledger.held(model):
        settle(model)
        known, now = ledger.lines(model), alias_of(model)
        before = ledger.champion(known) if known else now
        for holder in (now, before):
            if holder not in (judged_against, version.version):
                raise InputError(
                    f"{model} version {version.version} passed against champion {judged_against}, and "
                    f"version {holder} took the alias meanwhile; run again to be judged against it"
                )
        if not now == ledger.champion(known) == version.version:
            move(model, before, version.version, "promoted", PIPELINE, "passed its gate", version.run_id)
    return Version(model, version.version, version.run_id, version.gate, CHAMPION, version.manifest)


def move(
    model: str,
    before: str | None,
    after: str | None,
    event: str,
    actor: str,
    reason: str,
    run_id: str | None = None,
    facts: Facts | None = None,
) -> ledger.Line:
    """Make a version champion: the intent in the ledger, the alias, then the `event` in the ledger.

    The caller holds the model. Should the process end in between, `settle` finishes it.
    """
    known = ledger.champion(ledger.lines(model))

    def unchanged(lines: Sequence[ledger.Line]) -> None:
        if ledger.champion(lines) != known:
            raise InputError(
                f"{model}: version {ledger.champion(lines)} became champion meanwhile; run again"
            )

    ledger.append(
        model,
        "promoting",
        actor=actor,
        before=before,
        after=after,
        run_id=run_id,
        reason=reason,
        facts={**(facts or {}), "as": event},
        check=unchanged,
    )
    set_alias(model, after)
    return _settled(model)


def settle(model: str) -> ledger.Line | None:
    """Finish a move whose process ended before the alias was set; the caller holds the model.

    Given up where a person has put the alias on a third version since, or the version is gone.
    """
    intent = ledger.unsettled(ledger.lines(model))
    if intent is None:
        return None
    now = alias_of(model)
    if now in (intent.before, intent.after) and (intent.after is None or exists(model, intent.after)):
        set_alias(model, intent.after)
        return _settled(model)
    return ledger.append(
        model,
        "abandoned",
        actor=intent.actor,
        before=intent.after,
        after=intent.before,
        reason=f"line {intent.number} was not finished, and the alias is on version {now} now",
    )


def _settled(model: str) -> ledger.Line:
    """The line that ends the open `promoting`."""
    intent = ledger.unsettled(ledger.lines(model))
    assert intent is not None
    facts = {name: value for name, value in intent.facts.items() if name != "as"}
    return ledger.append(
        model,
        intent.facts["as"],
        actor=intent.actor,
        before=intent.before,
        after=intent.after,
        run_id=intent.run_id,
        reason=intent.reason,
        facts=facts,
    )


def models() -> list[str]:
    """Every registered model."""
    names, token = [], None
    while True:
        page = client().search_registered_models(page_token=token)
        names += [model.name for model in page]
        token = page.token
        if not token:
            return sorted(names)


def check_model(model: str) -> None:
    """Raise InputError for a name that MLflow does not know."""
    known = models()
    if model not in known:
        raise InputError(f"no model is registered as {model!r}; there are: {', '.join(known) or 'none'}")


def alias_of(model: str) -> str | None:
    """The version that carries the champion alias in MLflow."""
    found = aliased(client(), model, CHAMPION)
    return str(found.version) if found else None


def set_alias(model: str, version: str | None) -> None:
    """Put the champion alias on a version; None takes it off."""
    if alias_of(model) == version:
        return
    if version is None:
        client().delete_registered_model_alias(model, CHAMPION)
    elif not exists(model, version):
        raise InputError(f"there is no version {version} of {model}")
    else:
        client().set_registered_model_alias(model, CHAMPION, version)


def exists(model: str, version: str) -> bool:
    """Whether MLflow has this version."""
    from mlflow.exceptions import MlflowException

    try:
        client().get_model_version(model, version)
    except MlflowException as error:
        if error.error_code in GONE:
            return False
        raise
    return True


def tagged(model: str, tag: str) -> list[str]:
    """The versions that have a tag."""
    found = client().search_model_versions(f"name = '{model}' and tags.{tag} LIKE '%'")
    return [str(version.version) for version in found]


def note(model: str, version: str, words: str, tags: dict[str, str], drop: Sequence[str] = ()) -> None:
    """Write tags on a version, and `words` under the gate's own in its description."""
    mlflow = client()
    found = mlflow.get_model_version(model, version)
    gate = (found.description or "").split("\n\n")[0]
    mlflow.update_model_version(model, version, description=f"{gate}\n\n{words}"[:5000])
    for name, value in tags.items():
        mlflow.set_model_version_tag(model, version, name, value[:5000])
    for name in set(drop) & set(found.tags):
        mlflow.delete_model_version_tag(model, version, name)


def aliased(mlflow: MlflowClient, model: str, alias: str) -> ModelVersion | None:
    """The version with this alias; None where there is no such alias, or no such model."""
    from mlflow.exceptions import MlflowException

    try:
        return mlflow.get_model_version_by_alias(model, alias)
    except MlflowException as error:
        if error.error_code in GONE:
            return None
        raise
