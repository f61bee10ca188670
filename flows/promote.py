"""STUB."""

from __future__ import annotations

from prefect import flow


@flow(name="promote", flow_run_name="{model}", persist_result=False)
def promote(model: str) -> None:
    """Stub."""


@flow(name="reconcile", persist_result=False)
def reconcile() -> None:
    """Stub."""
