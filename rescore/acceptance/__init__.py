"""Which draft wins and how many of its tokens are accepted.

`greedy` is the rule of every number unless another is named: the output is the base LM's own. `sampling` keeps the law
of sampled output, `lossy` has the rules whose output is not the base's. `rules` says what a rule is, and loads one.
"""

from rescore.acceptance.greedy import Greedy, accept, first_difference
from rescore.acceptance.rules import Rule, Verdict, load_rule

__all__ = ["Greedy", "Rule", "Verdict", "accept", "first_difference", "load_rule"]
