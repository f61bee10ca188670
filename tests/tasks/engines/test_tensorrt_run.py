"""Bytes and hosts that a plan must not be opened with: which it is, and what to do."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tasks.engines import tensorrt, tensorrt_proof
from tasks.engines import tensorrt_api as api
from tasks.engines.tensorrt_api import Gpu
from tasks.engines.tensorrt_run import check_host, manifest_of
from tasks.errors import InputError

H100, H200 = Gpu("NVIDIA H100 80GB HBM3", (9, 0)), Gpu("NVIDIA H200", (9, 0))
ADA, TURING = Gpu("NVIDIA L4", (8, 9)), Gpu("NVIDIA T4", (7, 5))
HERE = "linux-x86_64"


def manifest(**changes: Any) -> dict[str, Any]:
    data = b"plan" * 100
    return {
        "runtime": "tensorrt",
        "version": "10.14.1",
        "device": str(H100),
        "capability": [9, 0],
        "platform": HERE,
        "hardware": "none",
        "version_compatible": False,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        **changes,
    }


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    (tmp_path / "engine.plan").write_bytes(b"plan" * 100)
    (tmp_path / "plan.json").write_text(json.dumps(manifest()))
    return tmp_path


def test_good_bytes(plan: Path) -> None:
    assert manifest_of(plan) == manifest()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"plan" * 50, "has 200 bytes, not the 400 built: fetch it again"),
        (b"plan" * 99 + b"plam", "not the bytes that were built"),
        (None, "holds no engine.plan"),
    ],
)
def test_bad_bytes(plan: Path, data: bytes | None, says: str) -> None:
    (plan / "engine.plan").unlink()
    if data is not None:
        (plan / "engine.plan").write_bytes(data)
    with pytest.raises(InputError, match=says):
        manifest_of(plan)


def test_bad_manifest(plan: Path) -> None:
    (plan / "plan.json").write_text("{")
    with pytest.raises(InputError, match=r"plan.json is not JSON"):
        manifest_of(plan)


@pytest.mark.parametrize(
    ("changes", "version", "gpu", "platform", "says"),
    [
        ({}, "10.14.1", None, HERE, "needs an NVIDIA GPU"),
        ({}, "10.14.1", H100, "windows-amd64", "the plan is of linux-x86_64, this is windows-amd64"),
        ({}, None, H100, HERE, "needs tensorrt 10.14.1, which is not installed"),
        (
            {},
            "10.15.0",
            H100,
            HERE,
            r"is of tensorrt 10.14.1, here is 10.15.0: build it again here, or install",
        ),
        ({}, "10.14.1", H200, HERE, r"is of NVIDIA H100 80GB HBM3 \(9.0\) .*; here is NVIDIA H200"),
        ({"hardware": "same_compute_capability"}, "10.14.1", ADA, HERE, "hardware: same_compute"),
        ({"hardware": "ampere_plus"}, "10.14.1", TURING, HERE, "hardware: ampere_plus"),
        ({"version_compatible": True}, "10.13.0", H100, HERE, "opens with tensorrt 10.x from 10.14.1 on"),
        ({"version_compatible": True}, "11.4.0", H100, HERE, "opens with tensorrt 10.x"),
        ({"runtime": "tensorrt_rtx"}, "10.14.1", H100, HERE, "for RTX does not run on NVIDIA H100"),
    ],
)
def test_refused_hosts(
    changes: dict[str, Any], version: str | None, gpu: Gpu | None, platform: str, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        check_host(manifest(**changes), version, gpu, platform)


@pytest.mark.parametrize(
    ("changes", "version", "gpu"),
    [
        ({}, "10.14.1", H100),
        ({"hardware": "same_compute_capability"}, "10.14.1", H200),
        ({"hardware": "ampere_plus"}, "10.14.1", ADA),
        ({"version_compatible": True}, "10.15.2", H100),
        ({"runtime": "tensorrt_rtx", "device": "none", "capability": None}, "10.14.1", ADA),
    ],
)
def test_accepted_hosts(changes: dict[str, Any], version: str, gpu: Gpu) -> None:
    check_host(manifest(**changes), version, gpu, HERE)


def test_the_lean_runtime_opens_compatible_plans_only(plan: Path) -> None:
    with pytest.raises(InputError, match="version compatible plans only"):
        tensorrt.open(plan, None, lean=True)


@pytest.mark.parametrize("compatible", [True, False])
def test_the_lean_runtime_serves_where_it_is_all_there_is(
    plan: Path, monkeypatch: pytest.MonkeyPatch, compatible: bool
) -> None:
    (plan / "plan.json").write_text(json.dumps(manifest(version_compatible=compatible)))
    monkeypatch.setattr(api, "version_of", {"tensorrt_lean": "10.14.1"}.get)
    monkeypatch.setattr(api, "gpu", lambda: H100)
    monkeypatch.setattr(api, "platform_name", lambda: HERE)
    error, says = (
        (ImportError, "tensorrt_lean") if compatible else (InputError, "10.14.1, which is not installed")
    )
    with pytest.raises(error, match=says):
        tensorrt.open(plan, None)


def test_opening_says_what_is_missing(plan: Path) -> None:
    if tensorrt.device() != "none":
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match="needs an NVIDIA GPU"):
        tensorrt.open(plan, None)


def layer(name: str, kind: str, tactic: str = "", **more: Any) -> dict[str, Any]:
    return {"Name": name, "LayerType": kind, "TacticName": tactic, "Inputs": [], **more}


INT8 = "sm80_xmma_fprop_implicit_gemm_i8i8_i8i32_f32_nhwckrsc_nhwc_tilesize64x64x64_stage6"
HALF = "sm80_xmma_gemm_f16f16_f16f16_f16_tn_n_tilesize32x32x64_stage3_warpsize2x1x2"
SPARSE = "sm80_xmma_sparse_gemm_f16f16_f16f16_f16_tn_n_tilesize128x128x64"


def test_proof_reads_the_layers() -> None:
    found = tensorrt_proof.summary(
        [
            layer("q", "Reformat"),
            layer("fc1", "CaskConvolution", INT8),
            layer("fc2", "CaskGemmConvolution", HALF),
            layer("fc3", "CaskGemmMatrixMultiply", SPARSE),
            layer("fc4", "gemm", "", Inputs=[{"Name": "a", "Format/Datatype": "FP8"}]),
            layer("relu", "PointWiseV2"),
        ]
    )
    assert found["matrix_layers"] == 4
    assert found["quantized"] == ["fc1", "fc4"]
    assert found["sparse"] == ["fc3"]
    assert (found["quantized_share"], found["sparse_share"], found["reformats"]) == (0.5, 0.25, 1)
    assert found["tactics"][INT8] == 1


def test_proof_does_not_guess_what_it_cannot_see() -> None:
    found = tensorrt_proof.summary(
        [layer("{ForeignNode[a...b]}", "Myelin"), layer("c", "CaskConvolution", HALF)]
    )
    assert found["quantized_share"] is None
    assert found["opaque"] == ["{ForeignNode[a...b]}"]


def test_inspector_json_with_control_characters() -> None:
    text = '{"Layers": [{"Name": "a\x1e[b\x1e]", "LayerType": "Reformat"}, "plain name"]}'
    assert [found["LayerType"] for found in tensorrt_proof.layers(text)] == ["Reformat", ""]
