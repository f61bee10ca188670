from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, stats

from tasks import statistics


def chance(n: int, win: float, loss: float, passed: np.ndarray) -> float:
    """The exact probability of a set of (wins, losses), given as a table of booleans."""
    wins, losses = np.indices(passed.shape)
    same = n - wins - losses
    table = stats.multinomial.pmf(np.stack([wins, losses, same], -1), n, [win, loss, 1 - win - loss])
    return float(table[passed].sum())


def lower_ends(n: int, most: int) -> np.ndarray:
    wins, losses = np.indices((most, most))
    return statistics.tango(wins.ravel(), losses.ravel(), n, 0.95)[0].reshape(most, most)


def test_tango_gives_the_published_interval() -> None:
    """Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014): 1 and 7 of 21 pairs disagree."""
    low, high = statistics.tango(1, 7, 21, 0.95)
    assert (round(float(low[0]), 3), round(float(high[0]), 3)) == (-0.517, -0.026)


def test_tango_inverts_the_test_with_the_likeliest_shares() -> None:
    wins, losses, n = 4, 11, 300
    low, _ = statistics.tango(wins, losses, n, 0.95)
    gap = float(low[0])

    def unlikely(loss: float) -> float:
        win = loss + gap
        return -(wins * np.log(win) + losses * np.log(loss) + (n - wins - losses) * np.log(1 - win - loss))

    loss = optimize.minimize_scalar(unlikely, bounds=(-gap + 1e-9, 0.4), method="bounded").x
    variance = n * (2 * loss + gap - gap**2)
    assert (wins - losses - n * gap) / np.sqrt(variance) == pytest.approx(1.96, abs=2e-3)


def test_without_disagreement_the_interval_has_a_width() -> None:
    low, high = statistics.tango(0, 0, 750, 0.95)
    square = stats.norm.ppf(0.975) ** 2
    assert -low[0] == high[0] == pytest.approx(square / (750 + square))


@pytest.mark.parametrize("drop", [0.01, 0.02])
@pytest.mark.parametrize("discordance", [0.02, 0.03])
@pytest.mark.parametrize("n", [100, 250, 500])
def test_exactly_at_the_limit_few_pass(n: int, discordance: float, drop: float) -> None:
    passed = lower_ends(n, 40) > -drop
    assert chance(n, (discordance - drop) / 2, (discordance + drop) / 2, passed) <= 0.05


def test_a_percentile_bootstrap_would_let_too_many_pass() -> None:
    """Why the score interval decides: at the limit, 250 examples, more than one in twenty."""
    ends = [[statistics.bootstrap_counts(w, c, 250, 0.95, seed=0)[0] for c in range(13)] for w in range(13)]
    assert chance(250, 0.005, 0.015, np.array(ends) > -0.01) > 0.05


def test_the_smallest_drop_is_one_that_an_equal_engine_meets() -> None:
    for disagree, n in ((0, 500), (4, 300), (7, 500), (30, 1000), (200, 2000)):
        least, (low, high) = statistics.smallest_drop_counts(disagree, n, 0.95)
        losses = np.arange(disagree + 1)
        lower, _ = statistics.tango(disagree - losses, losses, n, 0.95)
        shares = stats.binom.pmf(losses, disagree, 0.5)
        assert shares[lower > -least - 1e-9].sum() >= 0.95
        assert shares[lower > -0.9 * least].sum() < 0.95 or disagree == 0
        assert low <= least <= high


@pytest.mark.parametrize("discordance", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("n", [250, 1000])
def test_equal_engines_are_refused_as_seldom_as_declared(n: int, discordance: float) -> None:
    """Exact, over every possible count: by the interval, for either reason, without a word of coarseness."""
    rates = np.zeros((3, 3))
    limits = np.array([0.01, 0.02, 0.03])
    for disagree in range(int(n * discordance + 6 * np.sqrt(n * discordance)) + 6):
        losses = np.arange(disagree + 1)
        share = stats.binom.pmf(disagree, n, discordance) * stats.binom.pmf(losses, disagree, 0.5)
        low = statistics.tango(disagree - losses, losses, n, 0.95)[0]
        value, ends = statistics.smallest_drop_counts(disagree, n, 0.95)
        fails = low <= -limits[:, None]
        coarse = (ends[0] > limits)[:, None] | np.zeros_like(fails)
        rates += [x @ share for x in (fails, fails | coarse, fails & (value <= limits)[:, None])]
    for refused, either, unexplained in rates.T:
        assert unexplained <= 0.05
        assert either <= refused + 0.0005 or refused > 0.05


def test_it_agrees_with_the_formula_for_many_examples() -> None:
    error = float(np.sqrt(0.03 / 10_000))
    expected = (1.96 + 1.645) * error
    value, (low, high) = statistics.smallest_drop_counts(300, 10_000, 0.95)
    assert value == pytest.approx(expected, rel=0.03)
    assert (low / value, high / value) == pytest.approx((1 - 0.095, 1 + 0.095), abs=0.01)
    ends = (-1.96 * error, 1.96 * error)
    value, (low, high) = statistics.smallest_drop(0.0, ends, error, 10_000, 0.95)
    assert value == pytest.approx(expected, rel=1e-3)
    assert (low / value, high / value) == pytest.approx((1 - 0.023, 1 + 0.023), abs=1e-3)


def test_mcnemar_is_exact() -> None:
    assert statistics.mcnemar(1, 7) == pytest.approx(0.0703125)
    assert statistics.mcnemar(7, 1) == pytest.approx(0.0703125)
    assert statistics.mcnemar(0, 0) == 1.0


def test_bootstrap_of_counts_is_the_bootstrap_of_the_examples() -> None:
    low, high = statistics.bootstrap_counts(40, 60, 1000, 0.95, seed=1)
    error = np.sqrt((0.1 - 0.02**2) / 1000)
    assert low == pytest.approx(-0.02 - 1.96 * error, abs=1.1e-3)
    assert high == pytest.approx(-0.02 + 1.96 * error, abs=1.1e-3)


def test_studentized_bootstrap_covers_a_skewed_mean_where_a_percentile_one_does_not() -> None:
    generator, true = np.random.default_rng(0), np.exp(0.5)
    above = 0
    for seed in range(200):
        _, high = statistics.bootstrap_mean(generator.lognormal(0, 1, 80), 0.95, seed, span=1e9)
        above += high < true
    assert above / 200 <= 0.07


def test_few_values_with_a_long_tail_are_not_overconfident() -> None:
    generator, true = np.random.default_rng(1), -np.exp(1.125)
    passed = plain = 0
    for seed in range(300):
        losses = -generator.lognormal(0.0, 1.5, 100)
        passed += statistics.bootstrap_mean(losses, 0.95, seed, span=1e9)[0] > true
        plain += statistics.studentized(losses, 0.95, seed)[0] > true
    assert passed / 300 <= 0.05 < plain / 300


def test_few_values_that_differ_leave_a_finite_interval() -> None:
    values = np.zeros(300)
    values[:3] = -0.5
    low, high = statistics.bootstrap_mean(values, 0.95, 0, span=1.0)
    assert -0.03 < low < -0.005 < high < 0.03


def test_effective_counts_the_values_that_carry_the_spread() -> None:
    values = np.zeros(1000)
    values[:7] = 1.0
    assert statistics.effective(values) == pytest.approx(7, rel=0.05)
    assert statistics.effective(np.random.default_rng(0).normal(size=9000)) == pytest.approx(4500, rel=0.1)


def test_a_mean_without_spread_keeps_a_width() -> None:
    low, high = statistics.bootstrap_mean(np.zeros(100), 0.95, 0, span=2.0)
    assert low == -high == pytest.approx(-2 * 3.8415 / 103.8415, rel=1e-3)


def test_scores_choose_their_method() -> None:
    generator = np.random.default_rng(0)
    right = (generator.random(500) < 0.8).astype(float)
    assert "Tango" in statistics.compare_scores(right, right[::-1], 0.95, 0).facts["method"]
    cosine = generator.uniform(0.9, 1, 500)
    found = statistics.compare_scores(cosine - 0.01, cosine + 0.001 * generator.standard_normal(500), 0.95, 0)
    assert "studentized" in found.facts["method"]
    assert found.difference[0] < -0.01 < found.difference[1] < -0.0098
    assert found.ratio[0] < 0.94 / 0.95 < found.ratio[1]
    assert found.detectable[0] == pytest.approx(3.605 * 0.001 / np.sqrt(500), rel=0.1)
    assert found.detectable[1][0] < found.detectable[0] < found.detectable[1][1]


def test_a_statistic_that_never_changes_keeps_a_width() -> None:
    found = statistics.compare_statistic(lambda rows: 0.5, lambda rows: 0.5, 200, 0, 0.95, 0)
    assert found.difference[0] < 0 < found.difference[1]
    assert found.detectable[0] > 0


def test_a_difference_within_rounding_is_none() -> None:
    noise = np.random.default_rng(0).choice([-1.1e-16, 0.0, 1.1e-16], 20)
    found = statistics.compare_statistic(
        lambda rows: 1 + noise[rows].sum(), lambda rows: 1.0, 20, 20, 0.95, 0
    )
    assert found.difference == pytest.approx(statistics.nothing_differs(0.0, 20, 1.0, 0.95))
    assert found.detectable[0] > 0.1


def test_one_draw_that_is_undefined_leaves_no_bounds() -> None:
    def share(rows: np.ndarray) -> float:
        return float((rows == 0).mean()) if (rows < 5).any() else float("nan")

    ends, error = statistics.bootstrap_statistic(share, 2000, 0.95, 0)
    assert ends == (-np.inf, np.inf)
    assert error == np.inf
    found = statistics.compare_statistic(share, lambda rows: 0.0, 2000, 2000, 0.95, 0)
    assert not found.bounded
    assert found.detectable == (np.inf, (np.inf, np.inf))


def test_a_statistic_of_a_slice_that_never_changes_keeps_a_width() -> None:
    value, ends = statistics.statistic_interval(lambda rows: 1.0, 5, 0.95, 0)
    assert value == 1.0
    assert ends[0] < 0.7


def test_few_differences_are_not_overconfident() -> None:
    values = np.zeros(1000)
    values[:6] = -1.0
    few, many = (
        statistics.compare_statistic(lambda rows: values[rows].mean(), lambda rows: 0.0, 1000, k, 0.95, 0)
        for k in (6, 1000)
    )
    assert few.difference[0] < many.difference[0] < -0.006


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(3).normal(size=300)
    first, again, other = (statistics.bootstrap_mean(values, 0.95, seed, 9.0) for seed in (5, 5, 6))
    assert first == again != other


def test_rounds_cancel_drift_and_keep_hiccups_harmless() -> None:
    generator = np.random.default_rng(0)
    drift, noise = np.linspace(1, 2, 20), lambda: 1 + 0.005 * generator.standard_normal(20)
    reference, candidate = drift * noise(), 1.05 * drift * noise()
    candidate[4] *= 10
    ratio, (low, high) = statistics.bootstrap_rounds(candidate, reference, 0.95, 0)
    assert ratio == pytest.approx(1.05, abs=0.004)
    assert 1.04 < low < 1.05 < high < 1.06


@pytest.mark.parametrize("count", [6, 12])
def test_few_rounds_are_not_overconfident(count: int) -> None:
    generator, below = np.random.default_rng(1), 0
    for seed in range(200):
        pair = np.exp(0.02 * generator.standard_normal((2, count)))
        below += statistics.bootstrap_rounds(pair[0], pair[1], 0.95, seed)[1][1] < 1
    assert below / 200 <= 0.05
