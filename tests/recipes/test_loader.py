from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

import recipes
from recipes import RecipeError

QUICK = "digits-cnn-int8-ptq"


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_that_ships_loads(name: str) -> None:
    assert recipes.load(name).name == name


def test_a_recipe_is_frozen() -> None:
    recipe = recipes.load(QUICK)
    with pytest.raises(ValidationError):
        recipe.model.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("quantise.format=int8", ["quantise: unknown key", "did you mean quantize?"]),
        ("quantize.fromat=int8", ["quantize.fromat: unknown key", "did you mean format?", "algorithm"]),
        ("gate.max_drops=0.1", ["gate.max_drops: unknown key", "did you mean max_drop?"]),
        ("quantize.format=int7", ["quantize.format: 'int7'", "int8, fp8", "w4a8", "did you mean int8?"]),
        ("data.split.test=0", ["data.split.test", "greater than or equal to 1", "got 0"]),
        ("data.split.train=many", ["data.split.train", "'many'"]),
        ("data.source=somewhere", ["data.source: 'somewhere' is no source", "path:", "package:"]),
        ("data.source=python:mine:rows", ["data.source: 'python:mine:rows' is no source; write hub:"]),
        ("model.source=mine", ["model.source: 'mine' is no source", "python:<module>:<function>, modelopt:"]),
        ("model.name=a b", ["model.name", "'a b'"]),
        ("model.tokenizer=hub:org/name", ["hub:org/name is no folder here", "package:NAME/FOLDER"]),
        ("data.image=null", ["needs data.image"]),
        (
            "data.keep=[language, image]",
            ["data.keep: image: every row is kept with its image,", "data.query"],
        ),
        ('data.labels=["0", "1", "0"]', ["labels: 0 is named more than once"]),
        ("gate.floors={label: {10: 0.5}}", ["gate.floors.label: 10 is not among data.labels, 0, 1"]),
        ("gate.floors={lang: {en: 0.5}}", ["gate.floors: 'lang' is not one of label, file; name it in data"]),
        ("data.keep=[label, file]", ["data.keep: file, label: "]),
        ("build.also=[onnxruntime]", ["names the target runtime onnxruntime again"]),
        ("benchmark.batch_sizes=[128]", ["beyond build.max_batch"]),
        ("finetune=null", ["starts from random weights"]),
        ("gate={}", ["no rule is set"]),
        ("gate={max_size_ratio: 0.5}", ["nothing holds the quality"]),
        ("quantize=null", ["nothing is pruned or quantized", "export.precision: fp16"]),
        ("quantize={format: fp8, algorithm: entropy}", ["entropy is not for fp8", "are max"]),
        ("quantize={format: int8, algorithm: awq}", ["awq is not for int8", "max, entropy", "4-bit weights"]),
        ("quantize={format: int4}", ["int4 needs export.opset 21 or newer, not 20"]),
        ("quantize={format: w4a8}", ["w4a8 needs export.opset 21"]),
        ("quantize={format: nvfp4}", ["nvfp4 needs export.opset 23"]),
        ("quantize={format: mxfp8, algorithm: entropy}", ["entropy is not for mxfp8", "are max"]),
        ("quantize={format: nvfp4, block_size: 32}", ["is for int4 and w4a8; with nvfp4 leave it out"]),
        ("quantize={format: nvfp4, embeddings: true}", ["are not for nvfp4; leave them out"]),
        ("quantize={format: mxfp8, effective_bits: 10}", ["are not for mxfp8; leave them out"]),
        ("quantize={format: int8, percentile: 99.0}", ["is for algorithm: percentile"]),
        ("quantize={format: int8, block_size: 64}", ["is for int4 and w4a8"]),
        ("quantize={format: int8, attention: true}", ["attention is for fp8, not int8"]),
        ("export={opset: 18, precision: fp16}", ["fp16 needs export.opset 19"]),
        ("export={opset: 20, precision: bf16}", ["bf16 needs export.opset 22"]),
        ("export={opset: 22, precision: bf16}", ["bf16 has no kernels in ONNX Runtime's CPU"]),
        ("finetune.early_stopping=2", ["looks at the validation loss; set data.split.validation"]),
        ("finetune.distill={}", ["finetune trains the teacher itself"]),
        ("finetune.lora={targets: []}", ["finetune.lora.targets"]),
        ("retrain={epochs: 1, lora: {targets: [x]}}", ["retrain.lora", "lora belongs to finetune"]),
        ("retrain={epochs: 1, distill: {}}", ["retrain.distill is for a recipe with qat"]),
        ("compare_calibrated=true", ["it needs quantize and qat"]),
        ("compare_dense=true", ["it needs sparsify, qat and data.split.validation"]),
        ("finetune.processes=3", ["batch_size (32) is that of all processes", "their number (3)"]),
        ("finetune.shard=fsdp2", ["set processes"]),
        ("finetune.precision=fp8", ["'fp8' is not one of fp32, bf16, fp16"]),
        ("finetune.epochs=.inf", ["finetune.epochs", "finite"]),
        ("task=text-clasification", ["did you mean text-classification?"]),
    ],
)
def test_a_mistake_is_named_with_its_place_and_the_way_out(override: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        recipes.load(QUICK, [override])
    for word in [*words, f"{QUICK}.yaml"]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("{refit: perhaps}", ["build.tensorrt.refit: 'perhaps' is not one of auto, always, never"]),
        ("{levle: 3}", ["build.tensorrt.levle: unknown key (did you mean level?)", "workspace_mb"]),
        ("{level: 6}", ["build.tensorrt.level", "less than or equal to 5"]),
        ("{builds: 0}", ["build.tensorrt.builds"]),
        ("{profiles: [{batch: [8, 1, 64]}]}", ["build.tensorrt.profiles.0", "[min, opt, max] in this order"]),
        ("{profiles: [{batch: [1, 8]}]}", ["build.tensorrt.profiles.0.batch"]),
        ("{profiles: [{batch: [1, 8, 32]}]}", ["build.max_batch is 64", "is 32: make them equal"]),
        (
            "{profiles: [{batch: [1, 8, 64], length: [1, 2, 4]}]}",
            ["images have a batch and no length", "leave length out"],
        ),
        (
            "{profiles: [{batch: [1, 4, 8]}, {batch: [10, 64, 64]}]}",
            ["none holds batch 9", "every batch from 1 to build.max_batch (64)"],
        ),
        ("{version_compatible: true, refit: always}", ["exclude each other", "give up one"]),
        ("{refit: never, individual: [w]}", ["leave it out"]),
        ("{refit: always, max_tax: 0.1}", ["max_tax is for refit: auto"]),
    ],
)
def test_a_mistake_about_tensorrt_is_named_before_anything_is_built(section: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        recipes.load(QUICK, ["build.also=[tensorrt-rtx]", f"build.tensorrt={section}"])
    for word in words:
        assert word in str(caught.value)


def test_a_tensorrt_section_without_tensorrt_is_a_mistake() -> None:
    with pytest.raises(RecipeError, match=r"nothing is built for TensorRT.*build\.also"):
        recipes.load(QUICK, ["build.also=[]", "build.tensorrt={level: 3}"])


def test_profiles_must_hold_every_text(tiny_recipe: Path) -> None:
    narrow = "build.tensorrt={profiles: [{batch: [1, 8, 64], length: [1, 8, 8]}, {batch: [1, 1, 1]}]}"
    with pytest.raises(RecipeError, match=r"none holds batch 2 at length 9;.*data.max_length \(16\)"):
        recipes.load(str(tiny_recipe), ["build.also=[tensorrt-rtx]", narrow])
    whole = narrow.replace("{batch: [1, 1, 1]}", "{batch: [1, 4, 64], length: [9, 16, 16]}")
    found = recipes.load(str(tiny_recipe), ["build.also=[tensorrt-rtx]", whole]).build.tensorrt
    assert found is not None
    assert found.profiles[1].length == (9, 16, 16)
    assert (found.refit, found.sparse, found.timing_cache) == ("auto", None, True)


def test_a_section_survives_being_written_down_and_read_again() -> None:
    said = recipes.load(QUICK, ["build.also=[tensorrt-rtx]", "build.tensorrt={refit: never, level: 2}"])
    assert type(said).model_validate(said.model_dump(mode="json")) == said


@pytest.mark.parametrize(
    ("recipe", "override", "words"),
    [
        (
            "bytes-llama-fp8-ptq",
            "sparsify={}",
            "export.huggingface: ModelOpt writes no quantized weights of a pru",
        ),
        (
            "fashion-clip-int8-ptq",
            "qat={epochs: 1, processes: 2}",
            "qat.processes: an image is compared with the",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(recipe: str, override: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipes.load(recipe, [override])


@pytest.mark.parametrize("format", ["nvfp4", "mxfp8"])
def test_small_blocks_are_not_for_onnx_runtime(format: str) -> None:
    changes = [f"quantize.format={format}", "export.opset=23"]
    with pytest.raises(
        RecipeError, match=f"{format} has no kernels in ONNX Runtime.*build.runtime to tensorrt"
    ):
        recipes.load(QUICK, [*changes, "build.also=[tensorrt-rtx]"])
    target = ["build.runtime=tensorrt", "build.also=[tensorrt-rtx]"]
    assert recipes.load(QUICK, [*changes, *target]).quantize
    with pytest.raises(RecipeError, match="leave onnxruntime out of build.also"):
        recipes.load(QUICK, [*changes, "build.runtime=tensorrt", "build.also=[onnxruntime]"])


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        recipes.load(QUICK, ["quantize.format=int7", "finetune.epochs=-1"])
    assert "quantize.format" in str(caught.value)
    assert "finetune.epochs" in str(caught.value)


def test_overrides_are_yaml_values() -> None:
    recipe = recipes.load(QUICK, ["benchmark.batch_sizes=[1, 2]", "promote=manual", "qat.epochs=0.5"])
    assert recipe.benchmark.batch_sizes == (1, 2)
    assert recipe.promote == "manual"
    assert recipe.qat is not None
    assert recipe.qat.epochs == 0.5


@pytest.mark.parametrize(
    "override", ["novalue", "=3", "task.deeper=1", "gate=[", "gate=: :", "task=2024-02-31"]
)
def test_an_override_that_cannot_be_read_is_an_error(override: str) -> None:
    with pytest.raises(RecipeError, match="--set|not valid"):
        recipes.load(QUICK, [override])


def test_a_merged_key_may_be_overridden(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = (recipes.loader.FOLDER / f"{QUICK}.yaml").read_text()
    text = text.replace("finetune: {", "finetune: &train {") + "qat:\n  <<: *train\n  epochs: 1\n"
    file.write_text(text)
    recipe = recipes.load(str(file))
    assert recipe.qat is not None
    assert recipe.finetune is not None
    assert (recipe.qat.epochs, recipe.qat.batch_size) == (1, recipe.finetune.batch_size)


def test_an_override_leaves_another_use_of_the_anchor_alone(tmp_path: Path) -> None:
    text = (recipes.loader.FOLDER / f"{QUICK}.yaml").read_text()
    (tmp_path / "twice.yaml").write_text(text.replace("\nfinetune: {", "\nfinetune: &t {") + "retrain: *t\n")
    found = recipes.load(str(tmp_path / "twice.yaml"), ["retrain.epochs=1"])
    assert found.retrain is not None
    assert found.finetune is not None
    assert (found.finetune.epochs, found.retrain.epochs) == (12, 1)


def test_no_such_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean digits-cnn-int8-ptq"):
        recipes.load("digits-cnn-int8-pqt")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("task: [", "not valid YAML"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("task: a\ntask: b\n", "stands twice"),
        ("", "a recipe is a mapping"),
        ("task: a\nday: 2024-02-31\n", "not valid YAML: '2024-02-31' at line 2: day is out of range"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=words):
        recipes.load(str(file))


def test_a_recipe_outside_the_folder_takes_its_name_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text((recipes.loader.FOLDER / f"{QUICK}.yaml").read_text())
    assert recipes.load(str(file)).name == "mine"
