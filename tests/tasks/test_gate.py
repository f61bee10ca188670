from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from recipes.gate import Gate
from tasks.artifacts import Rule, Verdict
from tasks.errors import InputError
from tasks.gate import judge
from tasks.measurements import (
    UNMEASURED,
    Measured,
    Measurements,
    latency_summary,
    measurements_from_json,
    measurements_to_json,
    verdict_bytes,
    verdict_from_bytes,
)

N = 2000


def answers(wins: int = 0, losses: int = 0, right: int = 1740, n: int = N) -> tuple[list[float], list[float]]:
    """Scores of candidate and baseline: the baseline has `right`, the two disagree on wins + losses."""
    baseline = np.arange(n) < right
    candidate = baseline.copy()
    candidate[right - losses : right + wins] ^= True
    return candidate.astype(float).tolist(), baseline.astype(float).tolist()


def measured(
    wins: int = 0, losses: int = 0, candidate: dict[str, Any] | None = None, **options: Any
) -> Measurements:
    ours, theirs = answers(wins, losses)
    engines = {
        "candidate": Measured(**{"proved": "executed", "scores": ours, **(candidate or {})}),
        "baseline": Measured("executed", scores=theirs, bytes=100, peak_memory_bytes=1000),
    }
    return Measurements("accuracy", engines, **options)


def rule(verdict: Verdict, name: str) -> Rule:
    (found,) = [rule for rule in verdict.rules if rule.name == name]
    return found


def rounds(times: float, count: int = 12) -> list[list[float]]:
    return [[times * (1 + 0.01 * (i % 3)), times * 1.02, times] for i in range(count)]


@pytest.mark.parametrize(
    "section", [{}, {"metric": "f1", "confidence": 0.9}, {"max_dorp": 0.1}, {"max_drop": 0}]
)
def test_a_section_without_a_rule_or_with_a_wrong_one_is_an_error(section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Gate(**section)


def test_a_floor_may_be_of_a_number() -> None:
    assert Gate.model_validate({"floors": {"label": {1: 0.5}}}).floors == {"label": {"1": 0.5}}
    with pytest.raises(ValidationError, match="no value under label"):
        Gate(floors={"label": {}})


def test_the_sentence_of_a_drop() -> None:
    found = rule(judge(measured(wins=12, losses=28), Gate(max_drop=0.005)), "accuracy_vs_baseline")
    assert found.sentence == (
        "accuracy fell 0.8 points against the baseline (95 % interval -1.5 to -0.2), allowed 0.5"
    )
    assert not found.passed
    assert found.value == pytest.approx(-0.008)
    assert found.limit == -0.005
    assert found.facts["mcnemar_p"] == pytest.approx(0.0166, abs=1e-4)
    low, high = found.facts["bootstrap_interval"]
    assert low < -0.008 < high < 0


def test_the_intervals_end_decides_not_the_value() -> None:
    sides = [
        rule(judge(measured(12, 28), Gate(max_drop=x)), "accuracy_vs_baseline").passed for x in (0.014, 0.015)
    ]
    assert sides == [False, True]


def test_numbers_that_differ_are_not_written_alike() -> None:
    sentence = rule(judge(measured(12, 28), Gate(max_drop=0.0146)), "accuracy_vs_baseline").sentence
    low, allowed = sentence.split("interval ")[1].split(" to ")[0], sentence.split("allowed ")[1]
    assert low.removeprefix("-") != allowed


def test_small_numbers_are_not_written_as_zero() -> None:
    """Cosines to the reference of a candidate that is all but equal to it."""
    cosines = (1 - 2e-5 * (1 + 0.1 * np.sin(np.arange(N)))).tolist()
    found = measured(candidate={"scores": cosines})
    engines = found.engines | {"baseline": replace(found.engines["baseline"], scores=[1.0] * N)}
    verdict = judge(replace(found, metric="cosine", engines=engines), Gate(metric="cosine", max_drop=0.02))
    sentence = rule(verdict, "cosine_vs_baseline").sentence
    assert sentence.startswith(
        "cosine fell 0.00002 against the baseline (95 % interval -0.00002 to -0.00002)"
    )
    assert " 0.00000 to 0.00000 " not in rule(verdict, "cosine_sensitivity_vs_baseline").sentence


def test_what_gets_worse_by_growing_is_said_to_rise() -> None:
    losses = np.linspace(1, 2, N)
    engines = {
        "candidate": Measured("executed", scores=(losses + 0.001).tolist()),
        "baseline": Measured("executed", scores=losses.tolist()),
    }
    verdict = judge(Measurements("mae", engines), Gate(metric="mae", max_drop=0.02))
    assert "can tell a rise of " in rule(verdict, "mae_sensitivity_vs_baseline").sentence


def test_equal_engines_pass_but_not_with_certainty() -> None:
    found = rule(judge(measured(), Gate(max_drop=0.01)), "accuracy_vs_baseline")
    assert found.passed
    assert found.interval is not None
    assert found.interval[0] < 0 < found.interval[1]
    assert "accuracy is unchanged against the baseline" in found.sentence


@pytest.mark.parametrize(("on_coarse", "passed"), [("refuse", False), ("warn", True)])
def test_a_set_too_coarse_says_so(on_coarse: Any, passed: bool) -> None:
    verdict = judge(measured(30, 30), Gate(max_drop=0.01, on_coarse=on_coarse))
    found = rule(verdict, "accuracy_sensitivity_vs_baseline")
    assert rule(verdict, "accuracy_vs_baseline").passed
    assert found.passed is verdict.passed is passed
    told = "2000 examples can tell a drop of 1.2 to 1.7 points of accuracy from noise, allowed 1.0"
    assert found.sentence.startswith(f"{told}: too coarse")


def sensitive(wins: int, losses: int, allowed: float) -> tuple[bool, Rule]:
    """Whether the drop passed, and what the examples can tell."""
    verdict = judge(measured(wins, losses), Gate(max_drop=allowed))
    return rule(verdict, "accuracy_vs_baseline").passed, rule(verdict, "accuracy_sensitivity_vs_baseline")


def test_near_the_limit_coarseness_explains_a_refusal_and_leaves_a_pass_alone() -> None:
    passed, found = sensitive(30, 30, 0.0135)
    assert passed
    assert found.passed
    assert found.sentence.endswith(", allowed 1.35: hardly fine enough")
    passed, found = sensitive(20, 40, 0.0135)
    assert not passed
    assert not found.passed
    assert found.facts["coarse"]


@pytest.mark.parametrize(("wins", "losses"), [(90, 30), (20, 110)])
def test_a_difference_beyond_doubt_is_no_excuse_for_a_coarse_set(wins: int, losses: int) -> None:
    passed, found = sensitive(wins, losses, 0.01)
    assert passed is (wins > losses)
    assert not found.passed
    assert found.interval is not None
    assert found.interval[0] > 0.01


def test_only_what_was_executed_passes() -> None:
    sizes = {"bytes": 10}
    assert judge(measured(candidate=sizes), Gate(max_size_ratio=0.5)).passed
    for proved in ("built", "checked"):
        verdict = judge(measured(candidate={**sizes, "proved": proved}), Gate(max_size_ratio=0.5))
        assert verdict.reasons == (f"the candidate did not run on its target (only {proved})",)


def test_a_champion_is_a_second_reference_and_none_is_no_failure() -> None:
    alone = measured()
    assert judge(alone, Gate(max_drop=0.01)).passed
    better = Measured("executed", scores=[1.0] * N)
    verdict = judge(replace(alone, engines={**alone.engines, "champion": better}), Gate(max_drop=0.01))
    assert rule(verdict, "accuracy_vs_baseline").passed
    assert not rule(verdict, "accuracy_vs_champion").passed


@pytest.mark.parametrize(("on_missing", "passed"), [("refuse", False), ("pass", True)])
def test_what_was_not_measured_is_said(on_missing: Any, passed: bool) -> None:
    section = Gate(
        max_drop=0.01,
        min_ratio=0.9,
        floors={"topic": {"film": 0.5}},
        max_size_ratio=1,
        max_memory_ratio=1,
        max_latency_ratio=1,
        min_parity=0.9,
        min_quantized_share=0.5,
        min_sparse_share=0.5,
        on_missing=on_missing,
    )
    verdict = judge(measured(candidate={"scores": None}), section)
    missing = [found for found in verdict.rules if found.facts.get("missing")]
    assert {found.name for found in missing} == {
        "accuracy_vs_baseline",
        "floor_topic_film",
        "size",
        "memory",
        "latency",
        "parity",
        "quantized_share",
        "sparse_share",
    }
    assert all("could not be evaluated" in found.sentence for found in missing)
    assert verdict.passed is passed


def test_scores_that_are_not_finite_are_not_evaluated() -> None:
    scores = [float("nan"), float("inf"), *answers()[0][2:]]
    verdict = judge(measured(candidate={"scores": scores}), Gate(max_drop=0.01))
    assert "2 of the candidate's 2000 results are not finite" in verdict.reasons[0]


def test_ratio_of_the_metric() -> None:
    found = rule(judge(measured(wins=10, losses=10), Gate(min_ratio=0.99)), "accuracy_ratio_vs_baseline")
    assert found.value == 1
    assert found.interval is not None
    assert found.passed is (found.interval[0] > 0.99)
    tighter = rule(judge(measured(10, 10), Gate(min_ratio=0.999)), "accuracy_ratio_vs_baseline")
    assert not tighter.passed


def test_a_ratio_that_falls_below_zero_is_refused_not_missing() -> None:
    ours, theirs = [0.1, -0.1, 0.2, 0.05] * 5, [1.0, 0.9, 1.1, 0.8] * 5
    engines = {"candidate": Measured("executed", ours), "baseline": Measured("executed", theirs)}
    section = Gate(metric="cosine", min_ratio=0.9, on_missing="pass")
    assert not rule(judge(Measurements("cosine", engines), section), "cosine_ratio_vs_baseline").passed


def test_lower_is_better_for_perplexity() -> None:
    losses, tokens = np.random.default_rng(0).uniform(10, 30, 400), [10] * 400
    engines = {
        "candidate": Measured("executed", predictions=losses * 1.02),
        "baseline": Measured("executed", predictions=losses),
    }
    found = Measurements("perplexity", engines, references=tokens)
    tight, wide = (judge(found, Gate(metric="perplexity", max_drop=x)) for x in (0.1, 2.0))
    assert rule(tight, "perplexity_vs_baseline").sentence.startswith("perplexity rose 0.3")
    assert [v.passed for v in (tight, wide)] == [False, True]
    ratio = rule(judge(found, Gate(metric="perplexity", min_ratio=0.9)), "perplexity_ratio_vs_baseline")
    assert ratio.value is not None
    assert ratio.value < 1
    assert ratio.passed


def test_a_metric_of_the_whole_set_and_its_floor() -> None:
    truth = np.arange(600) % 3
    base = np.where(np.arange(600) % 20 == 0, 0, truth)
    ours = np.where(np.arange(600) % 21 == 0, 1, base)
    engines = {
        "candidate": Measured("executed", predictions=ours),
        "baseline": Measured("executed", predictions=base),
    }
    found = Measurements("f1", engines, {"half": ["a", "b"] * 300}, references=truth)
    verdict = judge(found, Gate(metric="f1", max_drop=0.08, floors={"half": {"a": 0.8, "b": 0.99}}))
    names = ("f1_vs_baseline", "f1_sensitivity_vs_baseline", "floor_half_a", "floor_half_b")
    assert [rule(verdict, name).passed for name in names] == [True, True, True, False]


WORD = "python_own_area_area"
AREA = """
import numpy as np

def area(predictions, references):
    scores, positive = np.asarray(predictions)[:, 1], np.asarray(references) == 1
    if positive.all() or not positive.any():
        return undefined()
    above = (scores[positive][:, None] > scores[~positive]).mean()
    return above + (scores[positive][:, None] == scores[~positive]).mean() / 2

area.takes, area.points = "probability", True
"""


@pytest.fixture(params=["float('nan')", "int('no score')", "1 // 0"])
def area(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An area under the curve that one class alone leaves undefined, as scikit-learn's several ways do."""
    (tmp_path / "own_area.py").write_text(f"{AREA}\ndef undefined():\n    return {request.param}\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "python:own_area:area"
    sys.modules.pop("own_area", None)


def ranked(name: str, positives: int, n: int, noise: float = 0.0) -> Measurements:
    """Two engines that rank like noise lets them; without any both separate the classes wholly."""
    truth, generator = (np.arange(n) < positives).astype(int), np.random.default_rng(1)
    engines = {}
    for engine in ("candidate", "baseline"):
        second = 0.1 + 0.8 * truth + noise * generator.standard_normal(n)
        engines[engine] = Measured("executed", predictions=np.stack([1 - second, second], axis=1))
    return Measurements(name, engines, references=truth, facts={"labels": ["common", "rare"]})


@pytest.mark.parametrize("on_coarse", ["refuse", "warn"])
def test_too_few_of_a_class_to_resample_pass_nothing_and_say_so(area: str, on_coarse: Any) -> None:
    section = Gate(metric=area, max_drop=0.5, min_ratio=0.1, on_coarse=on_coarse)
    verdict = judge(ranked(area, 4, 200, noise=0.3), section)
    assert [(rule.name, rule.passed) for rule in verdict.rules[1:]] == [
        (f"{WORD}_vs_baseline", False),
        (f"{WORD}_ratio_vs_baseline", False),
        (f"{WORD}_sensitivity_vs_baseline", on_coarse == "warn"),
    ]
    assert "interval without bounds" in verdict.rules[1].sentence
    assert verdict.rules[3].sentence.startswith(
        f"200 examples can tell no drop of {area} from noise: too coarse, it is undefined on some random "
        "samples of them, of which only 4 are of class 'rare': take more of these, or another metric"
    )
    assert verdict_from_bytes(verdict_bytes(verdict)).rules[3] == verdict.rules[3]


@pytest.mark.parametrize("area", ["float('nan')"], indirect=True)
def test_enough_of_each_class_are_judged_as_ever(area: str) -> None:
    found = rule(judge(ranked(area, 60, 200), Gate(metric=area, max_drop=0.05)), f"{WORD}_vs_baseline")
    assert found.passed
    assert found.interval == pytest.approx((-0.0189, 0.0189), abs=1e-3)


@pytest.mark.parametrize("on_coarse", ["refuse", "warn"])
@pytest.mark.parametrize("area", ["float('nan')"], indirect=True)
def test_a_difference_that_rests_on_few_of_a_class_says_so(area: str, on_coarse: Any) -> None:
    """At a limit of 3.5 points 9 of 100 such candidates passed that were worse by as much."""
    section = Gate(metric=area, max_drop=0.5, on_coarse=on_coarse)
    for positives, told in ((30, False), (49, False), (50, True)):
        verdict = judge(ranked(area, positives, 400, noise=0.4), section)
        assert rule(verdict, f"{WORD}_vs_baseline").interval is not None
        sensitivity = rule(verdict, f"{WORD}_sensitivity_vs_baseline")
        assert sensitivity.passed == (told or on_coarse == "warn")
        if not told:
            assert sensitivity.sentence.startswith(
                f"400 examples can tell no drop of {area} from noise: too coarse, it rests on "
                f"the {positives} of class 'rare': take at least 50 of these, or another metric"
            )
        assert b"nfinity" not in verdict_bytes(verdict)


@pytest.mark.parametrize("area", ["float('nan')"], indirect=True)
def test_few_of_a_class_that_nothing_tells_apart_leave_a_width(area: str) -> None:
    found = rule(judge(ranked(area, 20, 2000), Gate(metric=area, max_drop=0.05)), f"{WORD}_vs_baseline")
    assert found.interval == pytest.approx((-0.1611, 0.1611), abs=1e-3)


def test_few_of_a_class_do_not_matter_where_the_metric_does_not_rest_on_them() -> None:
    found = judge(ranked("neg_log_loss", 10, 2000, noise=0.02), Gate(metric="neg_log_loss", max_drop=0.05))
    assert rule(found, "neg_log_loss_sensitivity_vs_baseline").passed


@pytest.mark.parametrize("area", ["float('nan')"], indirect=True)
def test_a_metric_without_a_value_is_missing(area: str) -> None:
    found = replace(ranked(area, 0, 50), slices={"file": ["x"] * 50})
    verdict = judge(found, Gate(metric=area, max_drop=0.5, floors={"file": {"x": 0.1}}))
    assert [reason.split(": ", 1)[1][:20] for reason in verdict.reasons] == ["it has no finite val"] * 2


def test_floors_look_at_their_slice_alone() -> None:
    slices = {"label": ["good"] * 1700 + ["bad"] * 300}
    section = Gate(floors={"label": {"good": 0.99, "bad": 0.2}})
    verdict = judge(measured(slices=slices), section)
    assert rule(verdict, "floor_label_good").passed
    low = rule(verdict, "floor_label_bad")
    assert low.value == pytest.approx(40 / 300)
    assert "accuracy where label is bad is 0.133 on 300 examples" in low.sentence
    assert not low.passed


def test_size_memory_and_shares() -> None:
    candidate = {
        "bytes": 51,
        "peak_memory_bytes": 400,
        "parity": 0.998,
        "quantized_share": 0.8,
        "sparse_share": 0.0,
    }
    section = Gate(
        max_size_ratio=0.5,
        max_memory_ratio=0.5,
        min_parity=0.99,
        min_quantized_share=0.9,
        min_sparse_share=0.0,
    )
    verdict = judge(measured(candidate=candidate), section)
    names = ("size", "memory", "parity", "quantized_share", "sparse_share")
    assert [rule(verdict, name).passed for name in names] == [False, True, True, False, True]
    assert "size is 0.510 of the baseline's (51 of 100 bytes), at most 0.5" in verdict.reasons


def timed(candidate: Any, baseline: Any, champion: Any = None) -> Measurements:
    engines = {
        "candidate": Measured("executed", latency=candidate),
        "baseline": Measured("executed", latency=baseline),
    }
    engines |= {} if champion is None else {"champion": Measured("executed", latency=champion)}
    return Measurements("accuracy", engines)


def test_latency_at_every_batch_size() -> None:
    slow = {1: rounds(0.010), 8: rounds(0.050)}
    verdict = judge(timed({1: rounds(0.004), 8: rounds(0.048)}, slow), Gate(max_latency_ratio=0.9))
    first, second = (rule(verdict, f"latency_vs_baseline_batch_{size}") for size in (1, 8))
    assert first.passed
    assert first.value == pytest.approx(0.4)
    assert not second.passed
    assert "latency at batch 8 against the baseline is 0.960 times" in second.sentence


def test_rounds_too_noisy_say_so() -> None:
    noisy = [[x] for x in np.exp(0.2 * np.random.default_rng(0).standard_normal(12))]
    (reason,) = judge(timed({1: noisy}, {1: [[1.0]] * 12}), Gate(max_latency_ratio=1.1)).reasons
    assert float(reason.split("these rounds can tell ")[1].split()[0]) > 1.1


def test_the_champion_may_be_as_fast_but_not_faster() -> None:
    section, slow = Gate(max_latency_ratio=0.5), {1: rounds(0.010)}
    fast = {1: rounds(0.004)}
    assert judge(timed(fast, slow, fast), section).passed
    assert not judge(timed(fast, slow, {1: rounds(0.0037)}), section).passed


def test_rounds_are_paired() -> None:
    drift = np.linspace(1, 3, 12)[:, None]
    ours, theirs = (np.array(rounds(x)) * drift for x in (0.0098, 0.010))
    assert judge(timed({1: ours}, {1: theirs}), Gate(max_latency_ratio=0.99)).passed
    assert not judge(timed({1: ours[::-1]}, {1: theirs}), Gate(max_latency_ratio=0.99)).passed


@pytest.mark.parametrize("ours", [{1: rounds(1, 5)}, {1: rounds(1, 11)}, {2: rounds(1)}])
def test_rounds_that_do_not_match_or_are_few_are_missing(ours: Any) -> None:
    baseline = {1: rounds(9, 5 if len(ours.get(1, ())) == 5 else 12)}
    verdict = judge(timed(ours, baseline), Gate(max_latency_ratio=1.0))
    assert not verdict.passed
    assert all("could not be evaluated" in reason for reason in verdict.reasons)


def test_latency_summary_keeps_outliers() -> None:
    seen = latency_summary([[0.001] * 50, [0.001] * 48 + [0.1, 0.1]], batch=4)
    assert seen["p50"] == 0.001
    assert seen["p99"] > 0.05
    assert seen["throughput"] == pytest.approx(400 / 0.298)
    assert seen["rounds"] == 2


def everything() -> Measurements:
    candidate = {"bytes": 7, "parity": 1 / 3, "latency": {16: rounds(0.1 + 0.2), 2: rounds(1e-3)}}
    return measured(3, 5, candidate, slices={"label": ["ä", 1] * 1000}, facts={"threads": 2, "load": [0.1]})


def test_measurements_survive_json_exactly() -> None:
    text = measurements_to_json(everything())
    again = measurements_from_json(text)
    assert again.engines["candidate"].latency[16][1][1] == (0.1 + 0.2) * 1.02
    assert again.engines["candidate"].scores == everything().engines["candidate"].scores
    assert measurements_to_json(again) == text
    assert json.loads(text)["slices"]["label"][0] == "ä"


def test_arrays_are_as_good_as_lists() -> None:
    ours, theirs = answers(3, 5)
    plain = measured(3, 5)
    arrays = replace(
        plain,
        engines={
            "candidate": replace(plain.engines["candidate"], scores=np.array(ours, dtype=np.float32)),
            "baseline": replace(plain.engines["baseline"], scores=np.array(theirs)),
        },
    )
    assert measurements_to_json(arrays) == measurements_to_json(plain)


def test_a_verdict_is_recomputed_to_the_same_bytes_in_another_process(tmp_path: Any) -> None:
    section = Gate(
        max_drop=0.02, min_ratio=0.9, floors={"label": {"ä": 0.5}}, max_size_ratio=0.5, min_parity=0.3
    )
    verdict = judge(everything(), section)
    data = verdict_bytes(verdict)
    assert verdict_bytes(verdict_from_bytes(data)) == data
    (tmp_path / "measurements.json").write_text(measurements_to_json(everything()), encoding="utf-8")
    code = (
        "import sys; from recipes.gate import Gate; from tasks.gate import *\n"
        "text = open(sys.argv[1], encoding='utf-8').read()\n"
        "gate = Gate.model_validate_json(sys.argv[2])\n"
        "sys.stdout.buffer.write(verdict_bytes(judge(measurements_from_json(text), gate)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "measurements.json"), section.model_dump_json()]
    assert subprocess.run(command, capture_output=True, check=True).stdout == data


def test_the_gate_needs_neither_torch_nor_mlflow() -> None:
    code = "import sys, tasks.gate; print(*{'torch', 'mlflow', 'sklearn', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b""


def test_measurements_that_do_not_fit_are_the_users_to_fix() -> None:
    good = measured()
    with pytest.raises(InputError, match="asks for 'f1'"):
        judge(good, Gate(metric="f1", max_drop=0.1))
    with pytest.raises(InputError, match="no baseline"):
        judge(replace(good, engines={"candidate": good.engines["candidate"]}), Gate(max_drop=0.1))
    with pytest.raises(InputError, match="not of the same examples"):
        judge(replace(good, slices={"label": ["x"]}), Gate(max_drop=0.1))


def remembered(wins: int, losses: int, n: int = 1500) -> Measurements:
    """A champion like the baseline, and other rows on which the candidate wins and loses."""
    here = measured(5, 5)
    champion = here.engines["baseline"]
    ours, theirs = answers(wins, losses, right=1200, n=n)
    engines = {"candidate": Measured("executed", ours), "champion": Measured("executed", theirs)}
    return replace(
        here,
        engines={**here.engines, "champion": champion},
        previous=Measurements("accuracy", engines),
    )


FORGETTING = Gate(max_drop=0.01, max_forgetting=0.02)


def test_what_was_forgotten_is_judged_on_the_previous_rows() -> None:
    found = rule(judge(remembered(3, 6), FORGETTING), "forgetting")
    assert found.sentence == (
        "accuracy on the previous held-out rows fell 0.2 points against the champion "
        "(95 % interval -0.7 to 0.2), allowed 2.0"
    )
    assert found.passed
    verdict = judge(remembered(3, 33), FORGETTING)
    assert not rule(verdict, "forgetting").passed
    assert rule(verdict, "accuracy_vs_champion").passed
    assert not verdict.passed


def test_forgetting_has_its_own_sensitivity() -> None:
    verdict = judge(remembered(60, 60), FORGETTING)
    found = rule(verdict, "forgetting_sensitivity")
    assert not found.passed
    assert found.sentence.startswith("1500 previous examples can tell a drop of 2.")
    assert rule(verdict, "accuracy_sensitivity_vs_champion").passed


def test_without_a_champion_nothing_is_forgotten() -> None:
    found = rule(judge(measured(5, 5), FORGETTING), "forgetting")
    assert found.passed
    assert found.sentence == "no other champion yet, nothing to forget"


@pytest.mark.parametrize(("on_missing", "passed"), [("refuse", False), ("pass", True)])
def test_previous_rows_that_were_not_measured_are_said(on_missing: Any, passed: bool) -> None:
    section = FORGETTING.model_copy(update={"on_missing": on_missing})
    here = remembered(3, 3)
    assert here.previous is not None
    alone = replace(here.previous, engines={"candidate": here.previous.engines["candidate"]})
    gone = replace(here, engines={k: v for k, v in here.engines.items() if k != "champion"})
    cases = {
        "they were not measured": replace(here, previous=None),
        "the champion was not measured": replace(here, previous=alone),
        "its file is gone": replace(gone, previous=None, facts={UNMEASURED: "its file is gone"}),
    }
    for why, found in cases.items():
        verdict = judge(found, section)
        assert f"previous held-out rows could not be evaluated: {why}" in rule(verdict, "forgetting").sentence
        assert verdict.passed is passed


def test_forgetting_takes_the_previous_rows_own_references() -> None:
    truth = np.arange(900) % 3
    worse = np.where(np.arange(900) % 10 == 0, 0, truth)
    engines = {"baseline": Measured("executed", predictions=truth[:600])}
    engines |= {name: Measured("executed", predictions=truth[:600]) for name in ("candidate", "champion")}
    before = {
        "candidate": Measured("executed", predictions=worse),
        "champion": Measured("executed", predictions=truth),
    }
    found = Measurements("f1", engines, references=truth[:600])
    found = replace(found, previous=Measurements("f1", before, references=truth))
    verdict = judge(found, Gate(metric="f1", max_forgetting=0.03))
    assert rule(verdict, "forgetting").value == pytest.approx(-0.066, abs=0.01)
    assert not rule(verdict, "forgetting").passed


def test_previous_rows_survive_json_and_their_absence_leaves_no_trace() -> None:
    text = measurements_to_json(remembered(3, 5))
    again = measurements_from_json(text)
    assert measurements_to_json(again) == text
    assert verdict_bytes(judge(again, FORGETTING)) == verdict_bytes(judge(remembered(3, 5), FORGETTING))
    assert "previous" not in measurements_to_json(measured(3, 5))


def test_what_was_logged_before_there_were_previous_rows_gives_its_old_bytes() -> None:
    engine = (
        '{"bytes":7,"latency":{"2":[[0.001,0.30000000000000004]]},"parity":null,"peak_memory_bytes":null,'
        '"predictions":null,"proved":"executed","quantized_share":null,"scores":[1.0,0.0],"sparse_share":null}'
    )
    text = (
        f'{{"engines":{{"baseline":{engine},"candidate":{engine}}},"facts":{{"load":[0.1]}},'
        '"metric":"accuracy","references":null,"slices":{"label":["ä",1]}}'
    )
    assert measurements_to_json(measurements_from_json(text)) == text


def test_previous_rows_of_another_metric_or_length_do_not_fit() -> None:
    here = remembered(3, 5)
    assert here.previous is not None
    with pytest.raises(InputError, match="are of 'f1'"):
        judge(replace(here, previous=replace(here.previous, metric="f1")), FORGETTING)
    with pytest.raises(InputError, match="not of the same examples"):
        judge(replace(here, previous=replace(here.previous, slices={"label": ["x"]})), FORGETTING)
