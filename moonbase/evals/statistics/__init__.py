"""How sure a number is: intervals, paired tests, power, agreement, as small pure functions.

Every function says its source, works on plain arrays, and returns a small frozen dataclass. A value that is missing is
NaN and is counted in what comes back, never dropped without a word. docs/evaluation.md holds every formula.
"""

from moonbase.evals.statistics.agreement import Agreement, cohen_kappa, krippendorff_alpha, raw_agreement
from moonbase.evals.statistics.bootstrap import hierarchical
from moonbase.evals.statistics.correction import Corrected, corrected_rate
from moonbase.evals.statistics.equivalence import Equivalence, non_inferiority, tost
from moonbase.evals.statistics.intervals import (
    Interval,
    beta_interval,
    clustered_interval,
    mean_interval,
    newcombe,
    newcombe_paired,
    wilson,
)
from moonbase.evals.statistics.multiple import benjamini_hochberg, holm
from moonbase.evals.statistics.paired import Paired, mcnemar_exact, paired_difference
from moonbase.evals.statistics.power import detectable, mcnemar_power, n_needed, power, power_two_level
from moonbase.evals.statistics.repeated import pass_at_k, pass_hat_k
from moonbase.evals.statistics.variance import Contrast, TwoLevel, contrast, design_effect, two_level

__all__ = [
    "Agreement", "Contrast", "Corrected", "Equivalence", "Interval", "Paired", "TwoLevel", "benjamini_hochberg",
    "beta_interval", "clustered_interval", "cohen_kappa", "contrast", "corrected_rate", "design_effect", "detectable",
    "hierarchical", "holm", "krippendorff_alpha", "mcnemar_exact", "mcnemar_power", "mean_interval", "n_needed",
    "newcombe", "newcombe_paired", "non_inferiority", "paired_difference", "pass_at_k", "pass_hat_k", "power",
    "power_two_level", "raw_agreement", "tost", "two_level", "wilson",
]
