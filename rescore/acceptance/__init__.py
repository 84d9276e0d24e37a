"""Which draft wins and how many of its tokens are accepted.

`rules` says what a rule is, loads one and has the greedy one, by which the output is the base LM's own. `sampling`
keeps the law of sampled output, `lossy` has the rules whose output is not the base's. `options` is what a user asks
for.

A new rule is a `Rule` with an entry in `rules.RULES`; others register in the group `rescore.acceptance`.
"""

from rescore.acceptance.rules import Greedy, Rule, Verdict, accept, first_difference, load_rule

__all__ = ["Greedy", "Rule", "Verdict", "accept", "first_difference", "load_rule"]
