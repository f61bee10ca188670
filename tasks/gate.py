"""The gate: from measurements to a verdict, by small pure rules that each explain themselves in a sentence.

`judge` needs nothing but what was logged, so every verdict can be recomputed, byte for byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from recipes.gate import Gate
from tasks import statistics
from tasks.artifacts import Rule, Verdict
from tasks.measurements import (
    BASELINE,
    CANDIDATE,
    CHAMPION,
    UNMEASURED,
    Measured,
    Measurements,
    Rounds,
    check,
    examples,
    latency_summary,
    measurements_from_json,
    measurements_to_json,
    rounded,
    verdict_bytes,
    verdict_from_bytes,
)
from tasks.quality import floors, forgetting, quality
from tasks.sentences import bound, missing, percent, texts

__all__ = [
    "Measured",
    "Measurements",
    "judge",
    "latency_summary",
    "measurements_from_json",
    "measurements_to_json",
    "verdict_bytes",
    "verdict_from_bytes",
]

MIN_ROUNDS = 6  # fewer cannot give a 95 % interval of a median, however they fall


def judge(measurements: Measurements, gate: Gate) -> Verdict:
    """Every rule of the section on these measurements; the same measurements give the same verdict."""
    text = measurements_to_json(measurements)
    measurements = measurements_from_json(text)
    check(measurements, gate.metric)
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    rules = [evidence(measurements.engines[CANDIDATE])]
    if why := measurements.facts.get(UNMEASURED):
        rules.append(missing("champion", "the comparison with the champion", why, gate))
    rules += [
        *quality(measurements, gate, seed),
        *forgetting(measurements, gate, seed),
        *floors(measurements, gate, seed),
        *sizes(measurements, gate),
    ]
    rules += [*latencies(measurements, gate, seed), *shares(measurements, gate)]
    rules += finite(measurements.engines[CANDIDATE])
    rules = [rounded(rule) for rule in rules]
    return Verdict(all(rule.passed for rule in rules), tuple(rules))


def evidence(candidate: Measured) -> Rule:
    """Only what ran here, on its target, can pass."""
    executed = candidate.proved == "executed"
    how = "ran on its target" if executed else f"did not run on its target (only {candidate.proved})"
    return Rule("evidence", executed, f"the candidate {how}", facts={"proved": candidate.proved})


def finite(candidate: Measured) -> Iterator[Rule]:
    """An engine that answers NaN or infinity never passes, whatever `on_missing` says."""
    rows = [row if isinstance(row, (list, tuple)) else (row,) for row in examples(candidate)]
    if bad := sum(None in row for row in rows):
        sentence = f"{bad} of the candidate's {len(rows)} outputs are NaN or infinite"
        yield Rule("finite", False, sentence, float(bad), 0.0)


def sizes(measurements: Measurements, gate: Gate) -> Iterator[Rule]:
    """Bytes on disk and peak memory, of the baseline's."""
    candidate, baseline = measurements.engines[CANDIDATE], measurements.engines[BASELINE]
    wanted = (
        ("size", gate.max_size_ratio, candidate.bytes, baseline.bytes),
        ("memory", gate.max_memory_ratio, candidate.peak_memory_bytes, baseline.peak_memory_bytes),
    )
    for name, limit, ours, theirs in wanted:
        if limit is None:
            continue
        if not ours or not theirs:
            who = CANDIDATE if not ours else BASELINE
            yield missing(name, name, f"the {who}'s was not measured", gate)
            continue
        value = ours / theirs
        sentence = (
            f"{name} is {value:.3f} of the baseline's ({ours:,} of {theirs:,} bytes), at most {limit:g}"
        )
        facts = {**bound(False, "ratio"), "candidate": ours, "baseline": theirs}
        yield Rule(name, value <= limit, sentence, value, limit, facts=facts)


def latencies(measurements: Measurements, gate: Gate, seed: int) -> Iterator[Rule]:
    """Latency in paired rounds, against baseline and champion, at each batch size."""
    if gate.max_latency_ratio is None:
        return
    engines = measurements.engines
    batches = sorted({batch for engine in engines.values() for batch in engine.latency})
    if not batches:
        yield missing("latency", "latency", "no rounds were measured", gate)
    for reference in _references(measurements):
        limit = gate.max_latency_ratio if reference == BASELINE else gate.champion_latency_ratio
        for batch in batches:
            pair = engines[CANDIDATE].latency.get(batch), engines[reference].latency.get(batch)
            yield latency(batch, reference, pair, limit, gate, seed)


def latency(
    batch: int, reference: str, pair: tuple[Rounds | None, Rounds | None], limit: float, gate: Gate, seed: int
) -> Rule:
    """The interval's upper end must be within the limit."""
    name, what = f"latency_vs_{reference}_batch_{batch}", f"latency at batch {batch} against the {reference}"
    if not pair[0] or not pair[1] or len(pair[0]) != len(pair[1]):
        return missing(name, what, "both need the same rounds, side by side", gate)
    if len(pair[0]) < MIN_ROUNDS:
        return missing(name, what, f"{len(pair[0])} rounds are too few, take {MIN_ROUNDS} or more", gate)
    ours, theirs = (np.array([np.median(calls) for calls in rounds]) for rounds in (pair[0], pair[1]))
    value, ends = statistics.bootstrap_rounds(ours, theirs, gate.confidence, seed)
    text = texts([value, *ends, limit], 3)
    interval = f"{percent(gate.confidence)} interval {text[1]} to {text[2]}"
    sentence = f"{what} is {text[0]} times ({interval}), at most {text[3]}"
    if value <= limit < ends[1]:
        seen = ends[1] / ends[0]  # the upper end of an equal engine's interval is below it, but for few
        sentence += f": these rounds can tell {seen:.3f} from noise, take more or longer ones"
    facts = bound(False, "ratio")
    facts |= {"candidate": latency_summary(pair[0], batch), "reference": latency_summary(pair[1], batch)}
    return Rule(name, ends[1] <= limit, sentence, value, limit, ends, facts)


def shares(measurements: Measurements, gate: Gate) -> Iterator[Rule]:
    """Parity with the unlowered reference, and what really runs quantized or sparse."""
    candidate = measurements.engines[CANDIDATE]
    wanted = (
        ("parity", gate.min_parity, candidate.parity, "the engine's worst cosine to its unlowered reference"),
        ("quantized_share", gate.min_quantized_share, candidate.quantized_share, "the quantized share"),
        ("sparse_share", gate.min_sparse_share, candidate.sparse_share, "the sparse share"),
    )
    for name, limit, value, what in wanted:
        if limit is None:
            continue
        if value is None:
            yield missing(name, what, "it was not measured", gate)
        else:
            sentence = f"{what} is {value:.6g}, at least {limit:g}"
            yield Rule(name, value >= limit, sentence, value, limit, facts=bound(True, "value"))


def _references(measurements: Measurements) -> list[str]:
    return [name for name in (BASELINE, CHAMPION) if name in measurements.engines]
