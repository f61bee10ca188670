"""A tiny text classifier and a small CNN, both real, untrained, each with its data."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from recipes import load as recipe
from recipes.data import Data
from recipes.schema import Model
from tasks import calibrate, load, registry_alias
from tasks.artifacts import Checkpoint, Dataset
from tasks.engines import microscale

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class Case:
    """A dataset and the untrained network for it."""

    dataset: Dataset
    checkpoint: Checkpoint
    model: Model
    data: Data


@pytest.fixture(scope="session")
def text(tiny_recipe: Path) -> Case:
    tiny = recipe(str(tiny_recipe))
    return _case(tiny.model, tiny.data, tiny.task)


@pytest.fixture(scope="session")
def image() -> Case:
    digits = recipe("digits-cnn-int8-ptq")
    return _case(digits.model, digits.data, digits.task)


def _case(model: Model, data: Data, task: str) -> Case:
    dataset = load.load_data.fn(data, task, "content")
    return Case(dataset, load.load_model.fn(model, data, task, "content", 0), model, data)


@pytest.fixture(scope="session")
def mlflow_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables in SQLite, made once: that takes seconds."""
    from mlflow import MlflowClient

    place = tmp_path_factory.mktemp("tables") / "mlflow.db"
    MlflowClient(f"sqlite:///{place}").search_experiments()
    return place


@pytest.fixture
def own_mlflow(
    fresh_home: Path, mlflow_tables: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MlflowClient]:
    """The client of an MLflow of this test's own, with nothing in it."""
    import mlflow

    before = mlflow.get_tracking_uri()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    fresh_home.mkdir()
    shutil.copy(mlflow_tables, fresh_home)
    yield registry_alias.client()
    mlflow.set_tracking_uri(before)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """ModelOpt's kernels for NVFP4 and MXFP8, in NumPy where there is no GPU."""
    import torch
    from modelopt.torch.quantization import tensor_quant

    if torch.cuda.is_available():
        return

    def kernel(inputs: Any, block: int, amax: Any, bits: int, exponent: int, *scale: int) -> Any:
        values = inputs.detach().float().numpy()
        if scale[1] == 8:  # E8M0
            found = microscale.mxfp8_values(*microscale.mxfp8(values))
        else:
            whole = microscale.global_scale(float(amax))
            found = microscale.nvfp4_values(*microscale.nvfp4(values, whole), whole)
        return torch.from_numpy(found).to(inputs.dtype)

    monkeypatch.setattr(tensor_quant, "dynamic_block_quantize_op", kernel)
    monkeypatch.setattr(calibrate, "check_calibration", lambda section: None)
