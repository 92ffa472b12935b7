"""Intervals, tests, power and agreement against scipy, statsmodels, krippendorff, exact enumeration and simulation."""

from __future__ import annotations

import itertools
import math

import krippendorff
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint
from statsmodels.stats.weightstats import ttost_paired

from moonbase.evals import statistics

COUNTS = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(COUNTS, st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_and_beta_agree_with_statsmodels(counts: tuple[int, int], confidence: float) -> None:
    events, n = counts
    found = statistics.wilson(events, n, confidence)
    assert (found.low, found.high) == pytest.approx(
        proportion_confint(events, n, 1 - confidence, method="wilson"), abs=1e-12)
    jeffreys = statistics.beta_interval(events, n, confidence)
    low, high = proportion_confint(events, n, 1 - confidence, method="jeffreys")
    assert jeffreys.low == pytest.approx(0.0 if events == 0 else min(low, events / n), abs=1e-9)
    assert jeffreys.high == pytest.approx(1.0 if events == n else max(high, events / n), abs=1e-9)


@given(COUNTS)
def test_intervals_hold_the_estimate_and_shrink_with_n(counts: tuple[int, int]) -> None:
    events, n = counts
    for interval in (statistics.wilson, statistics.beta_interval):
        once, more = interval(events, n), interval(4 * events, 4 * n)
        assert 0 <= once.low <= events / n <= once.high <= 1
        assert more.high - more.low < once.high - once.low


@pytest.mark.parametrize("interval", [statistics.wilson, statistics.beta_interval])
@pytest.mark.parametrize("n", [10, 49, 200])
def test_coverage_by_exact_enumeration(interval, n: int) -> None:
    """Mean coverage over all rates is that promised, and no rate is badly served (Brown, Cai & DasGupta 2001)."""
    rates = np.linspace(0.005, 0.995, 199)
    ends = np.array([(found.low, found.high) for found in (interval(events, n) for events in range(n + 1))])
    chance = stats.binom.pmf(np.arange(n + 1)[:, None], n, rates)
    covered = (chance * ((ends[:, :1] <= rates) & (rates <= ends[:, 1:]))).sum(0)
    assert 0.94 < covered.mean() < 0.965
    assert covered.min() > 0.83


@given(COUNTS, COUNTS)
def test_newcombe_agrees_with_statsmodels(first: tuple[int, int], second: tuple[int, int]) -> None:
    found = statistics.newcombe(*first, *second)
    low, high = confint_proportions_2indep(*first, *second, compare="diff", method="newcomb")
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


@pytest.mark.parametrize(("pairs", "low", "high"), [
    ((36, 12, 2, 0), 0.0569, 0.3404), ((18, 12, 2, 18), 0.0562, 0.3290), ((53, 0, 0, 1), -0.0729, 0.0729),
    ((0, 30, 0, 0), 0.8395, 1.0)])
def test_newcombe_paired_as_published(pairs: tuple[int, int, int, int], low: float, high: float) -> None:
    """Worked examples of Newcombe 1998 (Statistics in Medicine 17, 2635), method 10."""
    found = statistics.newcombe_paired(*pairs)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)
    turned = statistics.newcombe_paired(pairs[0], pairs[2], pairs[1], pairs[3])
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))


def test_newcombe_paired_coverage_by_exact_enumeration() -> None:
    """Every table of 20 pairs, several true distributions: mean coverage near 95%, never far below."""
    n, tables = 20, []
    for both, one, two in itertools.product(range(21), repeat=3):
        if both + one + two <= n:
            found = statistics.newcombe_paired(both, one, two, n - both - one - two)
            tables.append((both, one, two, n - both - one - two, found.low, found.high))
            assert found.low <= found.value <= found.high
    tables = np.array(tables)
    coverages = []
    for shares in ([0.4, 0.2, 0.2, 0.2], [0.5, 0.4, 0.0, 0.1], [0.85, 0.05, 0.05, 0.05], [0.1, 0.6, 0.1, 0.2],
                   [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.01, 0.19]):
        chance = stats.multinomial.pmf(tables[:, :4].astype(int), n, shares)
        true = shares[1] - shares[2]
        coverages.append(float(chance[(tables[:, 4] <= true) & (true <= tables[:, 5])].sum()))
    assert min(coverages) > 0.92 and 0.94 < np.mean(coverages) < 0.99


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_agrees_with_statsmodels_and_scipy(one: int, two: int) -> None:
    found = statistics.mcnemar_exact(one, two)
    assert found == pytest.approx(mcnemar([[5, one], [two, 5]], exact=True).pvalue if one + two else 1.0, rel=1e-9)
    if one + two:
        assert found == pytest.approx(stats.binomtest(one, one + two).pvalue, rel=1e-9)


def clustered_data(seed: int, clusters: int = 30) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 8, clusters)
    groups = np.repeat(np.arange(clusters), sizes)
    return random.normal(size=clusters)[groups] + random.normal(size=len(groups)), groups


@pytest.mark.parametrize("seed", range(5))
def test_clustered_error_agrees_with_statsmodels(seed: int) -> None:
    values, groups = clustered_data(seed)
    # Its default factor is G/(G-1) · (n-1)/(n-k); the second part is for regressors, of which a mean has one.
    oracle = OLS(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds={"groups": groups})
    found = statistics.clustered_interval(values, groups)
    assert found.standard_error == pytest.approx(float(oracle.bse[0]), rel=1e-9)
    plain = statistics.mean_interval(values)
    assert (plain.low, plain.high) == pytest.approx(
        stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values)))
    effect = statistics.design_effect(values, groups)
    assert effect == pytest.approx(float(oracle.bse[0]) ** 2 / stats.sem(values) ** 2)


def test_clustered_rates_cover_where_plain_ones_do_not() -> None:
    """40 items asked 5 times: Wilson on 200 answers is far too sure, the clustered one is not."""
    random, true, hits = np.random.default_rng(1), 0.3, {"plain": 0, "clustered": 0}
    groups = np.repeat(np.arange(40), 5)
    for _ in range(600):
        values = (random.random(200) < random.beta(0.6, 1.4, 40)[groups]).astype(float)
        for name, found in (("plain", statistics.wilson(values.sum(), 200)),
                            ("clustered", statistics.clustered_interval(values, groups))):
            hits[name] += found.low <= true <= found.high
    assert hits["plain"] / 600 < 0.85
    assert hits["clustered"] / 600 > 0.93


@given(st.lists(st.sampled_from([0.0, 1.0, math.nan, None]), min_size=1, max_size=60), st.integers(1, 7))
def test_missing_values_are_counted(values: list[float | None], size: int) -> None:
    array = np.array([math.nan if value is None else value for value in values])
    found = statistics.clustered_interval(array, np.arange(len(array)) // size)
    there = [value for value in values if value in (0.0, 1.0)]
    assert (found.n, found.missing) == (len(there), len(values) - len(there))
    if there:
        assert found.value == pytest.approx(sum(there) / len(there))
        assert 0 <= found.low <= found.value <= found.high <= 1 and found.low < found.high


@given(st.integers(2, 30), st.integers(1, 6))
def test_no_event_never_has_an_empty_interval(clusters: int, size: int) -> None:
    groups = np.repeat(np.arange(clusters), size)
    none = statistics.clustered_interval(np.zeros(len(groups)), groups)
    assert none.low == 0.0 and none.high == pytest.approx(statistics.wilson(0, clusters).high)
    # 0.1 leaves rounding errors, which are no variance.
    for value in (0.5, 0.1):
        equal = statistics.clustered_interval(np.full(len(groups), value), groups)
        assert equal.low < value - 1e-3 and value + 1e-3 < equal.high
        same = statistics.paired_difference(np.full(clusters, value), np.full(clusters, 0.3))
        assert same.low < value - 0.3 - 1e-3 and value - 0.3 + 1e-3 < same.high


@pytest.mark.parametrize("seed", range(5))
def test_paired_difference_is_the_paired_t_test(seed: int) -> None:
    random = np.random.default_rng(seed)
    first, second = random.random(40), random.random(40)
    found = statistics.paired_difference(first, second)
    oracle = stats.ttest_rel(first, second)
    assert found.p_value == pytest.approx(oracle.pvalue) and found.degrees == 39
    assert (found.low, found.high) == pytest.approx(tuple(oracle.confidence_interval()))


@pytest.mark.parametrize("seed", range(5))
def test_contrast_agrees_with_clustered_regression(seed: int) -> None:
    """A difference in differences over shared clusters: the interaction of a saturated regression, clustered."""
    random = np.random.default_rng(seed)
    n = 200
    cells, groups = random.integers(0, 4, n), random.integers(0, 25, n)
    values = random.normal(size=n) + random.normal(size=25)[groups] + 0.3 * (cells == 3)
    found = statistics.contrast(values, cells, groups, (1, -1, -1, 1))
    fit = OLS(values, np.eye(4)[cells]).fit(
        cov_type="cluster", cov_kwds={"groups": groups, "use_correction": False})
    test = fit.t_test([1, -1, -1, 1])
    assert found.value == pytest.approx(float(np.ravel(test.effect)[0]))
    count = len(np.unique(groups))
    assert found.clusters == count
    assert found.standard_error == pytest.approx(float(np.ravel(test.sd)[0]) * math.sqrt(count / (count - 1)))


@pytest.mark.parametrize(("value", "clusters"), [(0.0, 8), (0.5, 8), (1.0, 8), (0.25, 30)])
def test_a_contrast_without_variance_reaches_as_far_as_it_may(value: float, clusters: int) -> None:
    """Every cluster differs by `value`: the largest share of others that leaves a 2.5% chance of not seeing one (q, of
    (1 - q)^G = 2.5%), each at the far end of what scores in [0, 1] allow, moves the mean difference this far."""
    first, second = np.full(clusters, value), np.zeros(clusters)
    found = statistics.contrast(np.concatenate([first, second]), np.repeat([0, 1], clusters),
                                np.tile(np.arange(clusters), 2), (1.0, -1.0), span=1.0)
    share = next(q for q in np.linspace(0, 1, 100_001) if (1 - q) ** clusters <= 0.025)
    # Of a difference in [-1, 1] the far end is -1: the share of others takes value to (1 - q) value - q.
    assert found.low == pytest.approx((1 - share) * value - share, abs=2e-5)
    assert found.high - found.value == pytest.approx(found.value - found.low)


@pytest.mark.parametrize("seed", range(3))
def test_two_level_agrees_with_a_mixed_model(seed: int) -> None:
    import statsmodels.api as sm

    random = np.random.default_rng(seed)
    items = np.repeat(np.arange(60), 4)
    values = random.normal(0, 2, 60)[items] + random.normal(0, 1, 240)
    found = statistics.two_level(values, items)
    oracle = sm.MixedLM(values, np.ones((240, 1)), groups=items).fit(reml=True)
    assert found.within == pytest.approx(oracle.scale, rel=1e-3)
    assert found.between == pytest.approx(float(np.ravel(oracle.cov_re)[0]), rel=1e-3)
    assert found.standard_error == pytest.approx(found.standard_error_at(60, 4), rel=1e-9)
    assert found.standard_error_at(60, 1e9) == pytest.approx(math.sqrt(found.between / 60))


@given(st.floats(0.02, 0.5), st.floats(0.1, 1.0), st.integers(5, 3000), st.sampled_from([0.01, 0.05]))
def test_power_agrees_with_statsmodels(difference: float, spread: float, n: int, alpha: float) -> None:
    found = statistics.power(difference, spread, n, alpha)
    assert found == pytest.approx(NormalIndPower().power(difference / spread, n, alpha, ratio=0), abs=1e-9)


@given(st.floats(0.02, 0.5), st.floats(0.1, 1.0))
def test_n_needed_is_the_smallest(difference: float, spread: float) -> None:
    n = statistics.n_needed(difference, spread)
    assert statistics.power(difference, spread, n) >= 0.8 - 1e-9
    assert n == 1 or statistics.power(difference, spread, n - 1) < 0.8
    assert statistics.power(statistics.detectable(spread / math.sqrt(n)), spread, n) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize(("one", "two", "n"), [(0.3, 0.1, 25), (0.4, 0.0, 12), (0.2, 0.2, 30), (0.6, 0.4, 9)])
def test_mcnemar_power_by_enumeration(one: float, two: float, n: int) -> None:
    total = 0.0
    for first in range(n + 1):
        for second in range(n + 1 - first):
            if stats.binomtest(first, first + second).pvalue <= 0.05 if first + second else False:
                total += stats.multinomial.pmf([first, second, n - first - second], n, [one, two, 1 - one - two])
    assert statistics.mcnemar_power(one, two, n) == pytest.approx(float(total), abs=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_equivalence_agrees_with_statsmodels(seed: int) -> None:
    random = np.random.default_rng(seed)
    first, second = random.normal(0.02, 0.3, 50), random.normal(0, 0.3, 50)
    paired = statistics.paired_difference(first, second, span=None)
    found = statistics.tost(paired.difference, paired.standard_error, 0.15, degrees=paired.degrees)
    oracle = ttost_paired(first, second, -0.15, 0.15)
    assert found.p_value == pytest.approx(oracle[0])
    assert found.shown == (-0.15 < found.low and found.high < 0.15)
    worse = statistics.non_inferiority(paired.difference, paired.standard_error, 0.15, degrees=paired.degrees)
    assert worse.p_value == pytest.approx(stats.ttest_1samp(first - second, -0.15, alternative="greater").pvalue)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_corrections_by_their_definitions(p_values: list[float]) -> None:
    """Holm by its sequential rule at every level; Benjamini-Hochberg as scipy has it."""
    adjusted = statistics.holm(p_values)
    for alpha in (0.01, 0.05, 0.3):
        rejected, left = set(), sorted(range(len(p_values)), key=p_values.__getitem__)
        while left and p_values[left[0]] * len(left) <= alpha:
            rejected.add(left.pop(0))
        assert {place for place, value in enumerate(adjusted) if value <= alpha} == rejected
    assert statistics.benjamini_hochberg(p_values) == pytest.approx(stats.false_discovery_control(p_values).tolist())
    # A test that could not be made counts in the family and stays without a p-value.
    with_none = statistics.holm([*p_values, None])
    assert with_none[-1] is None and with_none[:-1] == statistics.holm([*p_values, 1.0])[:-1]


def test_corrections_agree_with_statsmodels() -> None:
    p_values = [0.011, 0.04, 0.0004, 0.3, 0.011, 0.9]
    for method, found in (("holm", statistics.holm), ("fdr_bh", statistics.benjamini_hochberg)):
        assert found(p_values) == pytest.approx(list(multipletests(p_values, method=method)[1]))


@pytest.mark.parametrize(("n", "correct", "k"), [(5, 2, 1), (5, 2, 3), (6, 6, 4), (6, 0, 2), (7, 4, 7), (4, 1, 4)])
def test_repeated_tries_by_enumeration(n: int, correct: int, k: int) -> None:
    draws = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
    any_right, all_right = np.mean([any(draw) for draw in draws]), np.mean([all(draw) for draw in draws])
    assert statistics.pass_at_k(np.array([correct]), np.array([n]), k).values_I[0] == pytest.approx(any_right)
    assert statistics.pass_hat_k(np.array([correct]), np.array([n]), k).values_I[0] == pytest.approx(all_right)


def test_too_few_tries_are_counted() -> None:
    found = statistics.pass_at_k(np.array([1, 2]), np.array([2, 8]), 4)
    assert found.too_few == 1 and math.isnan(found.values_I[0])


VOTES = st.integers(2, 4).flatmap(lambda judges: st.lists(
    st.lists(st.integers(-1, 3), min_size=judges, max_size=judges), min_size=2, max_size=25))


@given(VOTES)
def test_krippendorff_agrees_with_the_package(votes: list[list[int]]) -> None:
    array = np.array(votes).T
    found = statistics.krippendorff_alpha(array, resamples=50)
    used = {vote for unit in votes for vote in unit if sum(other >= 0 for other in unit) >= 2 and vote >= 0}
    if len(used) < 2:
        assert found.value is None
        return
    oracle = krippendorff.alpha(reliability_data=np.where(array < 0, np.nan, array), level_of_measurement="nominal")
    assert found.value == pytest.approx(oracle, abs=1e-9)
    assert found.abstained == sum(vote < 0 for unit in votes for vote in unit)
    if found.low is not None:
        assert found.low <= found.value <= found.high


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=5, max_size=60))
def test_kappa_agrees_with_statsmodels(votes: list[tuple[int, int]]) -> None:
    first, second = np.array(votes).T
    found = statistics.cohen_kappa(first, second)
    if found.value is None:
        assert len({vote for pair in votes for vote in pair}) == 1
        return
    counts = np.zeros((4, 4))
    np.add.at(counts, (first, second), 1)
    oracle = cohens_kappa(counts)
    assert found.value == pytest.approx(oracle.kappa, abs=1e-12)
    assert found.standard_error == pytest.approx(math.sqrt(max(oracle.var_kappa, 0)), abs=2e-7)


def test_krippendorff_interval_covers() -> None:
    """Two judges that repeat the truth with known errors: 95% intervals hold the value of a huge sample."""
    random = np.random.default_rng(2)

    def votes(n: int) -> np.ndarray:
        truth = random.integers(0, 2, n)
        return np.array([np.where(random.random(n) < 0.15, 1 - truth, truth) for _ in range(3)])

    true = krippendorff.alpha(reliability_data=votes(400_000), level_of_measurement="nominal")
    found = [statistics.krippendorff_alpha(votes(80), seed=seed, resamples=300) for seed in range(200)]
    assert 0.9 < np.mean([one.low <= true <= one.high for one in found]) < 0.99
