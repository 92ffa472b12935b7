"""Problems invented on the spot: nobody can have trained on an item that did not exist when the model was made.

`generate` makes one item of a family from a seed, `verify` grades an answer to it. `commitment` binds whoever examines
to the generator and a secret seed before the models are named; `contamination` compares with a public set.
"""

from moonbase.evals.fresh.problem import FAMILIES, Problem, agree, generate, solve_a, solve_b, verify

__all__ = ["FAMILIES", "Problem", "agree", "generate", "solve_a", "solve_b", "verify"]
