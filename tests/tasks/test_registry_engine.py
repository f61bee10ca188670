"""The same artifacts with and without the server that stored them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks import registry_alias


def test_what_our_server_stored_is_read_and_written_without_it(
    fresh_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    before = mlflow.get_tracking_uri()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = registry_alias.client()
    try:
        experiment = client.create_experiment("proxied", artifact_location="mlflow-artifacts:/7")
        run = client.create_run(experiment).info.run_id
        client.log_text(run, "from the server", "words/one.txt")
        assert mlflow.artifacts.load_text(f"runs:/{run}/words/one.txt") == "from the server"
        there = fresh_home / "mlartifacts" / "7" / run / "artifacts" / "words" / "one.txt"
        assert there.read_text() == "from the server"
    finally:
        mlflow.set_tracking_uri(before)
