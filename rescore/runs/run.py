"""A run: one rescorer with the drafters it chooses among, its number of drafts, its k and its weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lattices.errors import RescoreError, UnknownNameError
from rescore.checks import check_alpha, check_k, check_p
from rescore.drafters import DRAFTERS, HEADS, Drafter, load_drafter
from rescore.drafters.drafting import check_drafters
from rescore.rescorers import JOINT, RESCORERS, TREES, WEIGHT, Rescorer, load_rescorer
from rescore.rescorers.joint_plan import AUTO, PLANNED_NODES
from rescore.runs.records import Alpha, is_oracle
from rescore.specs import format_spec, named, parse_spec

DEFAULT_K = 16
TUNED: Literal["tuned"] = "tuned"  # the alpha that stands for what `rescore tune` kept
NONE = "none"
ORACLE = "oracle"
Choosing = tuple[Rescorer, tuple[Drafter, ...]]  # a rescorer and the drafters that it chooses among
NODES = "nodes"  # the key of a rescorer that drafts trees
OF_DRAFTERS = "drafters"  # the key of a spec that says what a rescorer chooses among: drafters=heads+lookup
OF_SCORES = "scores"  # the key of a tree that says whose scores it is of
OF_ONE_DRAFTER = ("tokens", "least", "most", "first")  # keys that look like a drafter's behind its spec
FIXED = (NONE, ORACLE)  # what rescorers are compared with


def is_drafter(spec: str) -> bool:
    """Whether a spec, or label, stands for a drafter's own drafts."""
    return DRAFTERS.has(spec) and not RESCORERS.has(spec)


def is_heads(drafter: str | Drafter) -> bool:
    """Whether a drafter is the base's block heads, of whatever vocabulary."""
    return name_of(drafter).partition(":")[0] == HEADS


def says_drafters(rescorer: str | Rescorer) -> bool:
    """Whether a spec says itself what is chosen among; an object does not."""
    return isinstance(rescorer, str) and (is_drafter(rescorer) or OF_DRAFTERS in parse_spec(rescorer)[1])


def branches_of(spec: str, arguments: Mapping[str, str]) -> int:
    """How many branches the tree that a spec asks for has at most: its nodes; 0 for none, or as many as drafts."""
    if (name := parse_spec(spec)[0]) in TREES:
        of_tree = {key: value for key, value in arguments.items() if key not in (OF_DRAFTERS, OF_SCORES, WEIGHT)}
        return load_rescorer(format_spec(name, of_tree)).branches
    nodes = arguments.get(NODES, "0")
    return PLANNED_NODES if nodes == AUTO else _whole(spec, nodes)


@dataclass(frozen=True)
class Run:
    """What one result is of, on each task.

    rescorer: its spec (`name` or `name:key=value,...`), or an object; the spec of a drafter stands for its own drafts.
    drafters: what it chooses among, specs or objects; none: what the rescorer says (heads, if nothing else).
    p: drafts that a step verifies; k: lattice entries of a slot.
    alpha: weight of the rescorer; None: its own; `tuned`: what `rescore tune` kept on this machine.
    label: what results call it; by default the spec, or the name of the object's class.
    """

    rescorer: str | Rescorer = "none"
    p: int = 1
    k: int = DEFAULT_K
    alpha: float | Alpha | Literal["tuned"] | None = None
    drafters: tuple[str | Drafter, ...] = ()
    label: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "drafters", tuple(self.drafters))
        if isinstance(self.rescorer, str):
            self._take_drafters(self.rescorer)
        if not self.label:
            object.__setattr__(self, "label", label_of(self.rescorer, self.drafters))
        if self.label in FIXED and (self.rescorer != self.label or self.drafters):
            raise RescoreError(f"{self.label} is the name of another rescorer; give this one another label")
        if isinstance(self.rescorer, str):
            self._take_weight(self.rescorer)
        check_p(self.p)
        check_k(self.k)
        if isinstance(self.alpha, str):
            if self.alpha != TUNED:
                raise RescoreError(f"--alpha {self.alpha}; a rescorer's weight is a number, or {TUNED} (rescore tune)")
        elif self.alpha is not None:
            check_alpha(self.alpha.alpha if isinstance(self.alpha, Alpha) else self.alpha)

    def _take_drafters(self, spec: str) -> None:
        """The drafters that the spec says, or is, are the run's."""
        if is_drafter(spec):
            if self.drafters:
                raise RescoreError(f"{spec} is a drafter, whose own drafts are asked for; leave out the drafters")
            object.__setattr__(self, OF_DRAFTERS, (spec,))
            object.__setattr__(self, "rescorer", NONE)
            if not self.label:
                object.__setattr__(self, "label", spec)
            return
        name, arguments = parse_spec(spec)
        if OF_DRAFTERS in arguments:
            if self.drafters:
                raise RescoreError(f"the drafters of {spec} are given twice; drop one")
            keys = list(arguments)
            after = [key for key in keys[keys.index(OF_DRAFTERS) + 1 :] if key in OF_ONE_DRAFTER]
            specs = _split(arguments.pop(OF_DRAFTERS))
            object.__setattr__(self, OF_DRAFTERS, specs)
            if after and ":" in specs[-1]:
                raise RescoreError(
                    f"{spec}: {after[0]} after a comma would be a setting of {name}; put it before {OF_DRAFTERS}= "
                    "if it is, or give the drafters by --drafter"
                )
            object.__setattr__(self, "rescorer", format_spec(name, arguments))
        if self.drafters == (HEADS,) and name != JOINT:  # these are its own
            object.__setattr__(self, OF_DRAFTERS, ())

    def _take_weight(self, spec: str) -> None:
        name, arguments = parse_spec(spec)
        if WEIGHT in arguments:
            if self.alpha is not None:
                raise RescoreError(f"the weight of {spec} is given twice; drop one")
            text = arguments.pop(WEIGHT)
            try:
                object.__setattr__(self, "alpha", TUNED if text == TUNED else float(text))
            except ValueError:
                raise RescoreError(f"--alpha {text}: give a number, or tuned (what rescore tune kept)") from None
            object.__setattr__(self, "rescorer", format_spec(name, arguments))

    @property
    def key(self) -> tuple[str, int, int]:
        """What no two runs of an evaluation share: label, p, k."""
        return self.label, self.p, self.k

    @property
    def chooses(self) -> str:
        """What takes time in its steps, as tables of costs name it: the label that it has by default, without the
        weight."""
        if self.rescorer == NONE and len(self.drafters) == 1:
            return name_of(self.drafters[0])
        return label_of(self.rescorer, self.drafters)

    @property
    def needs_heads(self) -> bool:
        """Whether it drafts with block heads."""
        return not self.drafters or any(is_heads(drafter) for drafter in self.drafters)

    @property
    def number(self) -> float | None:
        """The weight, if it is given as one."""
        return self.alpha.alpha if isinstance(self.alpha, Alpha) else None if self.alpha == TUNED else self.alpha

    def load(self) -> Rescorer:
        """The rescorer. Raises as `load_rescorer`."""
        if not isinstance(self.rescorer, str):
            return self.rescorer
        if not RESCORERS.has(self.rescorer):
            name = self.rescorer.partition(":")[0]
            raise UnknownNameError("rescorer", name, {*RESCORERS.names(), *DRAFTERS.names()})
        return load_rescorer(self.rescorer)

    def load_drafters(self, rescorer: Rescorer, loaded: dict[object, Any] | None = None) -> tuple[Drafter, ...]:
        """The drafters that the (loaded) rescorer is to choose among; what is `loaded` already is shared.

        Raises as `load_drafter`, and `RescoreError` for one that is there twice.
        """
        loaded = {} if loaded is None else loaded
        for spec in (specs := self.drafters or rescorer.drafters):
            if ("drafter", spec) not in loaded:
                loaded["drafter", spec] = load_drafter(spec) if isinstance(spec, str) else named(spec, name_of(spec))
        drafters = tuple(loaded["drafter", spec] for spec in specs)
        check_drafters(drafters, live=False)
        if rescorer.least_k > self.k:
            raise RescoreError(
                f"{self.label} takes {rescorer.least_k} entries of a slot, and k = {self.k}; give --k "
                f"{rescorer.least_k} or more"
            )
        for drafter in drafters:
            if drafter.held is not None and drafter.held < self.k:
                raise RescoreError(
                    f"k = {self.k}, but {drafter.name} holds the top {drafter.held} of each slot; choose --k from 1 to "
                    f"{drafter.held}"
                )
        return drafters


def load_choosing(runs: Iterable[Run], loaded: dict[object, Any] | None = None) -> dict[str, Choosing]:
    """The rescorers of runs with the drafters that each chooses among, by label; what is `loaded` already, by spec or
    object, is shared.

    Raises `RescoreError` for two of one label, and as `Registry.load`.
    """
    loaded = {} if loaded is None else loaded
    choosing: dict[str, Choosing] = {}
    for run in runs:
        if ("rescorer", run.rescorer) not in loaded:
            loaded["rescorer", run.rescorer] = run.load()
        rescorer = loaded["rescorer", run.rescorer]
        one = rescorer, run.load_drafters(rescorer, loaded)
        if choosing.setdefault(run.label, one) != one:
            raise RescoreError(f"two rescorers are called {run.label}; give one another label")
    return choosing


def label_of(rescorer: str | Rescorer, drafters: Sequence[str | Drafter] = ()) -> str:
    """The spec itself, or the name of a rescorer's class, with the drafters where they are given."""
    label = rescorer if isinstance(rescorer, str) else type(rescorer).__name__
    if not drafters:
        return label
    names = "+".join(map(name_of, drafters))
    return f"{label}{',' if ':' in label else ':'}{OF_DRAFTERS}={names}"


def name_of(drafter: str | Drafter) -> str:
    """What a drafter is called: its spec; an object without a name by its class."""
    return drafter if isinstance(drafter, str) else drafter.name or type(drafter).__name__


def runs_of(
    specs: Iterable[str | Run | Rescorer],
    *,
    ps: Sequence[int] = (),
    ks: Sequence[int] = (),
    alpha: float | Literal["tuned"] | None = None,
    drafters: Sequence[str | Drafter] = (),
    nodes: int | Literal["auto"] | None = None,
) -> list[Run]:
    """Every rescorer with each p (none: 1) and k (none: `DEFAULT_K`), but for what its spec says itself
    (`ngram:p=16,alpha=0.5`).

    drafters: what rescorers choose among, but for those that say it themselves, and drafters' own drafts.
    nodes: of the trees that `joint` drafts, all their branches unless p, the most of them, is given; `auto`: by their
        cost.
    The oracle knows which draft is best: it is run with p = 1 only. Raises `RescoreError` for what makes no sense, and
    for p, k, alpha or drafters that every spec says itself.
    """
    if isinstance(nodes, int) and nodes < 1:
        raise RescoreError(f"--nodes {nodes}; a tree has the base's own token at least (--nodes 64)")
    runs: dict[Run, None] = {}
    asked = (("p", ps), ("k", ks), (WEIGHT, alpha is not None), (OF_DRAFTERS, drafters), (NODES, nodes is not None))
    unused = {name for name, given in asked if given}
    for spec in specs:
        if isinstance(spec, Run):
            runs[spec] = None
            unused.clear()  # nothing of it is the caller's to say
            continue
        own: dict[str, str] = {}
        rescorer, weight, says = spec, alpha, False
        if isinstance(spec, str):
            name, arguments = parse_spec(spec)
            own = {key: arguments.pop(key) for key in ("p", "k") if key in arguments}
            if name == JOINT and nodes is not None:
                unused.discard(NODES)
                arguments.setdefault(NODES, str(nodes))
            if not ps and (most := branches_of(spec, arguments)) > 0:
                own.setdefault("p", str(most))
            rescorer = format_spec(name, arguments)
            weight = None if WEIGHT in arguments else alpha
            says = says_drafters(spec)
            unused &= {*own, *arguments, NODES, *([OF_DRAFTERS] if says else [])}
        else:
            unused.clear()
        own_ps = (1,) if isinstance(rescorer, str) and is_oracle(rescorer) else ps or (1,)
        for k in [_whole(spec, own["k"])] if "k" in own else ks or (DEFAULT_K,):
            for p in [_whole(spec, own["p"])] if "p" in own else own_ps:
                runs[Run(rescorer, p=p, k=k, alpha=weight, drafters=() if says else tuple(drafters))] = None
    if runs and unused:
        of_joint = [spec for spec in specs if isinstance(spec, str) and parse_spec(spec)[0] == JOINT]
        if (option := min(unused)) == NODES and not of_joint:
            raise RescoreError(f"--{NODES} is used by no --rescorer but {JOINT}, and there is none; drop it")
        name = OF_DRAFTERS.removesuffix("s") if option == OF_DRAFTERS else option
        raise RescoreError(f"--{name} is used by no --rescorer, each of which says its own {option}; drop it")
    return list(runs)


def _split(text: str) -> tuple[str, ...]:
    """The specs of `heads+lookup`; what follows a plus and is no drafter's name belongs to the value before: a path may
    have them in it."""
    specs: list[str] = []
    for part in text.split("+"):
        if specs and ":" in specs[-1] and not DRAFTERS.has(part):
            specs[-1] += f"+{part}"
        else:
            specs.append(part)
    return tuple(specs)


def _whole(spec: object, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise RescoreError(f"--rescorer {spec}: {text!r} is no whole number") from None
