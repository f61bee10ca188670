"""The MLflow model behind `models:/NAME@champion`: texts or images in, what the task type answers out.

MLflow runs this file when it loads a version (models from code): no pickle, no torch, no ModelOpt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel

from tasks.errors import InputError
from tasks.predictor import Predictor


class BadInput(InputError, mlflow.MlflowException):
    """What cannot be predicted; MLflow's server answers it with status 400 and these words."""

    def __init__(self, message: str) -> None:
        mlflow.MlflowException.__init__(self, message, error_code=INVALID_PARAMETER_VALUE)


class EngineModel(PythonModel):
    """MLflow's side of a `Predictor`."""

    def load_context(self, context: Any) -> None:
        """Open plan and weights on this machine."""
        folder = Path(context.artifacts["engine"])
        address = json.loads((folder / "engine.json").read_text())["plan_address"]
        self.predictor = Predictor(folder, _plan(folder, address))

    # MLflow warns without a hint, and takes any but an array's for a schema of its own.
    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> list[dict[str, Any]]:
        """One dictionary per input (`{"label", "score"}`); a bad input is named by its place."""
        try:
            return self.predictor.predict(_values(model_input, self.predictor.kind.COLUMN == "pair"))
        except InputError as error:
            raise BadInput(str(error)) from None


def _plan(folder: Path, address: str | None) -> Path:
    """The plan in the version, or the shared one it refers to; opening checks that the weights are of it."""
    if address is None:
        return folder / "plan"
    try:
        return Path(mlflow.artifacts.download_artifacts(address))
    except mlflow.MlflowException as error:
        where = mlflow.get_tracking_uri()
        raise InputError(
            f"this version's plan {address} is not at {where}; set MLFLOW_TRACKING_URI"
        ) from error


def _values(model_input: Any, pairs: bool) -> Sequence[Any]:
    """The values in a list, an array, or a table: of its only column, or of pairs a mapping per row."""
    if pairs and hasattr(model_input, "to_dict"):
        rows = model_input.to_dict("records")
        model_input = [{name: None if _missing(cell) else cell for name, cell in row.items()} for row in rows]
    elif hasattr(model_input, "columns"):
        if len(model_input.columns) != 1:
            raise BadInput(f"expected one column, got {', '.join(map(str, model_input.columns))}")
        model_input = model_input.iloc[:, 0].tolist()
    if isinstance(model_input, str):
        model_input = [model_input]
    values = list(model_input)
    if not values:
        raise BadInput("there is nothing to predict: the input is empty")
    return values


def _missing(cell: Any) -> bool:
    """What a table holds where a row has no value."""
    return cell is None or (isinstance(cell, float) and cell != cell)


set_model(EngineModel())
