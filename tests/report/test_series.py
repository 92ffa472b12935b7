from __future__ import annotations

import numpy as np
import pytest

from moonbase.report.series import bin_max, first_finite, last_finite, smooth, thin


@pytest.mark.parametrize("n", [1, 5, 600, 601, 12_345])
def test_thin_keeps_ends_extremes_and_order(n):
    y = np.random.default_rng(n).normal(size=n)
    x = np.arange(n) * 3
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) <= 600 and (np.diff(thin_x) > 0).all()
    assert (thin_x[0], thin_x[-1]) == (x[0], x[-1])
    assert thin_y.min() == y.min() and thin_y.max() == y.max()
    np.testing.assert_array_equal(thin_y, y[thin_x // 3])


def test_thin_keeps_a_single_spike_and_a_gap():
    y = np.ones(10_000)
    y[4321] = 99.0
    y[6000:8000] = np.nan
    x, thinned = thin(np.arange(10_000), y)
    assert thinned[x == 4321] == [99.0]
    assert np.isnan(thinned[(x > 6100) & (x < 7900)]).all() and ((x > 6100) & (x < 7900)).any()


def test_smooth_equals_the_plain_mean():
    y = np.random.default_rng(0).normal(size=50)
    y[[3, 20, 21]] = np.nan
    expected = []
    for i in range(50):
        reach = min(4, i, 49 - i)
        window = y[i - reach:i + reach + 1]
        expected.append(np.nanmean(window) if np.isfinite(window).any() else np.nan)
    np.testing.assert_allclose(smooth(y, 4), expected, rtol=1e-12)


def test_smooth_leaves_a_straight_line_straight():
    y = np.linspace(5, 1, 400)
    np.testing.assert_allclose(smooth(y), y, rtol=1e-12)


def test_bin_max():
    values = np.array([[1, 9], [3, np.nan], [2, np.nan], [0, np.nan]], dtype=np.float32)
    starts, maxima = bin_max(values, 2)
    np.testing.assert_array_equal(starts, [0, 2])
    np.testing.assert_array_equal(maxima, [[3, 9], [2, np.nan]])
    starts, maxima = bin_max(values, 100)
    np.testing.assert_array_equal(maxima, values)


def test_first_and_last_finite():
    y = np.array([np.nan, 1.0, np.inf, 2.0, np.nan])
    assert (first_finite(y), last_finite(y)) == (1, 3)
    assert first_finite(np.array([np.nan])) is None and last_finite(np.array([])) is None
