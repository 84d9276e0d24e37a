"""Options and arguments that records and functions declare (see `lm.options`), and their values from text.

Each is a type with its help, `Annotated[int, "Tokens per step."]`. More texts beside the help may say its name on the
command line (`--task`; a word without dashes, like `CORPUS`: an argument with that name) and what is written for its
values (`<A=B>`). A list is given by repeating its option or with commas. Knows nothing of a command-line library.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import re
import shlex
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NewType, Union, get_args, get_origin, get_type_hints

from lattices.errors import RescoreError, UnknownNameError
from lattices.paths import user_path
from lm.options import Size
from rescore.terminal import CutShortError

Spec = NewType("Spec", str)  # a rescorer as it is given: name, or name:key=value,key=value
Data = Annotated[
    str | None,
    "File with the task's examples: JSON lines, a JSON array, CSV or Parquet; or a folder with TASK.jsonl for each.",
]
Limit = Annotated[int | None, "Only N examples: one of each source (passage, document) before a second one of any."]
TASK_NAMES = (
    "cnn_dailymail, gsm8k, lambada, mt_bench, multi_news, newsroom, qa, rag, samsum, squad, summarization, "
    "superresolution, translation, xsum (rescore tasks shows them), a plug-in's, or a YAML file of your own, like "
    "./mine.yaml"
)
Task = Annotated[str, f"{TASK_NAMES}."]
Tasks = Annotated[Sequence[str], f"{TASK_NAMES}; several. Default: squad, or the task of --trace.", "--task"]
Rescorers = Annotated[
    Sequence[Spec],
    "none, oracle, ngram[:PATH], context-ngram[:PATH], neural-32m, neural-61m, neural-94m, neural:PATH, "
    "ngram-neural[:MODEL], learned-bigram[:PATH], joint[:PATH], medusa-tree[:CHOICES], "
    "eagle2-tree or a plug-in's name; or a drafter, for its own drafts; "
    "several. Settings as in ngram:p=16,alpha=0.5.",
    "--rescorer",
]
Drafters = Annotated[
    Sequence[Spec],
    "What rescorers choose among: heads[:vocabulary=N], lookup, corpus-lookup:DIR, draft-model:NAME, eagle:FOLDER, "
    "hydra:FOLDER, mtp[:FOLDER], trace:FOLDER or a plug-in's name; several are joined. Default: heads (joint: heads, "
    "lookup).",
    "--drafter",
]
Ks = Annotated[Sequence[int], "Tokens of each head that are in the lattice.", "--k"]
Ps = Annotated[Sequence[int], "Drafts that one step verifies; 1,16 runs both.", "--p"]
Nodes = Annotated[
    int | Literal["auto"] | None,
    "Tokens of the tree that joint drafts, the base's own included, instead of a number of drafts (with --p: of it the "
    "p branches that are worth most); auto: as many as are worth their time here (rescore bench costs).",
]
DraftVocabularies = Annotated[
    Sequence[int],
    "Once more with heads that draft from the N most frequent tokens and the prompt's own only, which is cheaper; as "
    "the drafter heads:vocabulary=N does it (rescore build-draft-vocabulary); several.",
    "--draft-vocabulary",
]
Alpha = Annotated[
    float | Literal["tuned"] | None,
    "Weight of the rescorer: a number, or tuned (what rescore tune kept here). Default: its own.",
]
Alphas = Annotated[Sequence[float], "Weights to try; 0 is always among them. Default: nine from 0.1 to 5."]
Verify = Annotated[Literal["tree", "batch"], "Verify p drafts as one prefix tree, or as rows of a batch."]
Peers = Annotated[
    Sequence[Spec],
    "Live: other libraries' own decoders to time in the same turns: transformers (its generate, greedy), "
    "transformers:lookup=10 (with its prompt lookup of 10 tokens) or a plug-in's name; several.",
    "--peer",
]
CostsFile = Annotated[
    str | None,
    "Predict speed-ups by this table of costs, and plan by it with --nodes auto: a file of rescore bench costs --out, "
    "or here, as measured on this machine. Default: with --nodes auto here, else none.",
    "<here|path>",
]
Cached = Annotated[int, "Tokens in the cache."]
Repeats = Annotated[int, "Timed calls of each size; the median counts."]
BootstrapSeed = Annotated[int, "Seed of the bootstrap intervals."]
REQUIRED = inspect.Parameter.empty
LONG_LABEL = 20  # characters: help is a column of its own, and as narrow as labels are long
LISTS = (list, tuple, Sequence, Mapping)


@dataclass(frozen=True)
class Option:
    """One option, or argument.

    name: in Python; spelled: on the command line, more than one where it has aliases.
    kind: a type, that of the items where it is a list: a number, `bool`, `str`, `Path`, `Spec`, a Literal, a number or
    a Literal, or a pair of two of these.
    collects: `tuple` or `dict` where it is a list. default: `REQUIRED` where there is none.
    size: how a number is read that may be given like 4G.
    """

    name: str
    spelled: tuple[str, ...]
    help: str
    kind: Any
    collects: type | None
    is_optional: bool
    size: Size | None
    default: Any
    values: str | None = None

    @classmethod
    def declared(cls, name: str, hint: Any, default: Any) -> Option | None:
        """The option that a type with help declares; None for a type without."""
        hint, optional, extras = _unwrapped(hint)
        hint = _as_given(hint)
        texts = [each for each in extras if isinstance(each, str)]
        helps = [text for text in texts if " " in text]
        if not helps:
            return None
        spelled = tuple(text for text in texts if " " not in text and not text.startswith("<"))
        origin = get_origin(hint)
        collects = None if origin not in LISTS else dict if origin is Mapping else tuple
        kinds = tuple(map(_as_given, get_args(hint)))
        return cls(
            name=name, spelled=spelled or (f"--{name.replace('_', '-')}",), help=helps[0], collects=collects,
            kind=hint if collects is None else types.GenericAlias(tuple, kinds) if collects is dict else kinds[0],
            is_optional=optional, size=next((each for each in extras if isinstance(each, Size)), None), default=default,
            values=next((text.strip("<>") for text in texts if text.startswith("<")), None),
        )  # fmt: skip

    @property
    def is_argument(self) -> bool:
        """Whether it is given by its place, without a name."""
        return not self.spelled[0].startswith("--")

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it may be, if there are some."""
        kinds = [self.kind] if get_origin(self.kind) is Literal else get_args(self.kind)
        return tuple(word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind))

    @property
    def is_number(self) -> bool:
        """Whether it is a number, or a number or a word."""
        kinds = (self.kind, *get_args(self.kind))
        return get_origin(self.kind) is not tuple and any(kind in (int, float) for kind in kinds)

    @property
    def label(self) -> str:
        """What its values are called in help."""
        words = "|".join(("number",) * (self.is_number and bool(self.choices)) + self.choices)
        known = {Path: "path", int: "int", float: "float"}
        long = len(words) > LONG_LABEL
        label = self.values or ("size" if self.size else "word" if long else words or known.get(self.kind, "text"))
        return f"<{label},...>" if self.collects else f"<{label}>"

    @property
    def full_help(self) -> str:
        """The help, with choices that are too long for the label, and whether it must be given."""
        *words, last = self.choices or ("",)
        text = f"{self.help} One of {', '.join(words)} or {last}." if "word" in self.label else self.help
        return f"{text}  [required]" if self.default is REQUIRED else text

    @property
    def shown_default(self) -> list[str] | None:
        """The default as it would be given."""
        if self.default is None or self.default is REQUIRED or self.default in ((), {}):
            return None
        values = self.default if self.collects else [self.default]
        return [self.size.text(value) if self.size else str(value) for value in values]

    def check(self, given: Sequence[str]) -> None:
        """Raises `RescoreError` for a text that is empty, and for a second one of what is no list."""
        name = self.spelled[0]
        if any(not text.strip() for text in given):
            raise RescoreError(f"{name} is empty; give it a value" + ("" if self.is_argument else ", or leave it out"))
        if len(given) > 1 and not self.collects:
            raise RescoreError(f"{name} is there {len(given)} times; give it once")

    def value(self, given: Sequence[str]) -> Any:
        """The value of the texts that were given. Raises `RescoreError` for what is none, and if it is missing."""
        if not given:
            if self.default is REQUIRED:
                what = "argument" if self.is_argument else "option"
                raise RescoreError(f"Missing {what} '{self.spelled[0]}'; rescore COMMAND --help says what it is")
            return self.default
        if self.collects:
            items = [
                self._item(part, text) for text in given for part in ([text] if self.is_argument else self._split(text))
            ]
            keys = [key for key, _ in items] if self.collects is dict else []
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                raise RescoreError(f"{self.spelled[0]} gives {twice} twice; keep one of them")
            return self.collects(items)
        value = self._item(given[0], given[0])
        # Zero is none where another number is the default.
        return None if value == 0 and self.is_optional and self.default else value

    def _split(self, text: str) -> list[str]:
        """What one text lists, with commas or, of numbers, spaces between. A path may hold commas."""
        if self.is_number:
            return re.split(r"\s*,\s*|\s+", text.strip())
        path = re.split("[:=]", text, maxsplit=1)[-1]
        if "," in path and Path(path).exists():
            return [text]
        parts: list[str] = []
        for part in re.split(r",(?![^\[]*\])", text):  # the rule in brackets behind a label may have commas
            if self.kind is Spec and parts and ":" in parts[-1] and re.match("[a-z_]+=", part):
                parts[-1] += f",{part}"  # another setting of the same rescorer
            else:
                parts.append(part)
        if not all(map(str.strip, parts)):
            raise RescoreError(f"{self.spelled[0]} {text}: there is nothing before or after a comma; drop it")
        return parts

    def _item(self, text: str, whole: str) -> Any:
        """One value, of the `whole` text that was given."""
        name = self.spelled[0]
        if self.size:
            return self.size.read(name, text)
        if text in self.choices:
            return text
        if self.is_number:
            return self._number(text, whole)
        if self.choices:
            raise UnknownNameError(name, text, self.choices)
        if get_origin(self.kind) is tuple:
            key, _, value = text.rpartition("=")
            try:
                if key and value:
                    return tuple(kind(part) for kind, part in zip(get_args(self.kind), (key, value), strict=True))
            except ValueError:
                pass
            raise RescoreError(f"{name} {text}: give {self.values}")
        return user_path(text, name) if self.kind is Path else text

    def _number(self, text: str, whole: str) -> float:
        is_whole = int in (self.kind, *get_args(self.kind))
        try:
            return int(text) if is_whole else float(text)
        except ValueError:
            of_list = "numbers with commas between them, like 1,2,4"
            if is_whole:
                what = f"whole {of_list}" if self.collects else "a whole number, like 16"
            else:
                what = of_list if self.collects else "a number, like 0.5"
            raise RescoreError(f"{self.spelled[0]} {whole}: give {', or '.join((what, *self.choices))}") from None


def written(command: str, values: Mapping[str, Any]) -> str:
    """A command line with these options, by their names in Python; one whose value is None is left out."""
    words = [f"--{n.replace('_', '-')} {shlex.quote(str(v))}" for n, v in values.items() if v is not None]
    return " ".join(["rescore", command, *words])


def _unwrapped(hint: Any) -> tuple[Any, bool, list[Any]]:
    """A type, whether None is one of its values, and what is annotated, the outermost first."""
    extras: list[Any] = []
    optional = False
    while True:
        if get_origin(hint) is Annotated:
            hint, *more = get_args(hint)
            extras += reversed(more)
        elif get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint):
            optional = True
            hint = functools.reduce(lambda a, b: a | b, (kind for kind in get_args(hint) if kind is not type(None)))
        else:
            return hint, optional, extras


def _as_given(hint: Any) -> Any:
    """Of what may be an object as well as a path, or one as well as several: several paths."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ()
    several = [kind for kind in kinds if get_origin(kind) in LISTS]
    return several[0] if several else Path if Path in kinds and str not in kinds else hint


def imported(place: str) -> Any:
    """What is at a place, `module:name`."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Source:
    """A record or function by its place, `module:name`, whose options a command has: all of them, `only` some, or all
    `but` some. A parameter that is a record stands for the options of that record."""

    place: str
    only: tuple[str, ...] = ()
    but: tuple[str, ...] = ()

    def has(self, name: str) -> bool:
        """Whether an option is one of these."""
        return (not self.only or name in self.only) and name not in self.but


@dataclass(frozen=True)
class _Declared:
    """What a record or function declares, by the names of its fields or parameters."""

    declares: Callable[..., Any]
    parts: Mapping[str, Option | _Declared]

    @classmethod
    def of(cls, declares: Callable[..., Any], has: Callable[[str], bool] = lambda _: True) -> _Declared:
        parts: dict[str, Option | _Declared] = {}
        hints = _hints(declares)
        for name, parameter in inspect.signature(declares).parameters.items():
            hint = hints.get(name)
            if is_dataclass(hint) and isinstance(hint, type):
                parts[name] = cls.of(hint, has)
            elif has(name) and (option := Option.declared(name, hint, parameter.default)):
                parts[name] = option
        return cls(declares, parts)

    def options(self) -> list[Option]:
        """All options, those of records among them."""
        return [o for part in self.parts.values() for o in ([part] if isinstance(part, Option) else part.options())]

    def made(self, values: Mapping[str, Any]) -> Any:
        """The record with these values of options, or the function with them as keywords."""
        keywords = {
            name: values[name] if isinstance(part, Option) else part.made(values) for name, part in self.parts.items()
        }
        return self.declares(**keywords) if isinstance(self.declares, type) else partial(self.declares, **keywords)


def _hints(declares: Callable[..., Any]) -> dict[str, Any]:
    """The types of fields or parameters; of a function, without those that are known to type checkers only."""
    if isinstance(declares, type):
        return get_type_hints(declares, include_extras=True)
    hints = {}
    for name, hint in inspect.get_annotations(declares).items():
        with contextlib.suppress(NameError):
            hints[name] = eval(hint, declares.__globals__) if isinstance(hint, str) else hint
    return hints


def with_options(body: Callable[..., None], sources: Mapping[str, Source]) -> tuple[list[Option], Callable[..., None]]:
    """The options of a command, in the order of its parameters, and what runs it with the texts that are given.

    A parameter is an option itself, or one of `sources` stands for the options of a record, which is then made of them,
    or of a function, which then has them as keywords (a `partial`). Raises `CutShortError` for Ctrl-C and a pipe that
    breaks.
    """
    found = {name: _Declared.of(imported(source.place), source.has) for name, source in sources.items()}
    own = _Declared.of(body).parts
    options: list[Option] = []
    for name in inspect.signature(body).parameters:
        of_source = found[name].options() if name in found else []
        options += [option for option in of_source if option.name not in own]
        options += [part for part in (own.get(name),) if isinstance(part, Option)]

    def run(**given: Any) -> None:
        texts = {name: [each] if isinstance(each, str) else each or [] for name, each in given.items()}
        flags = {option.name for option in options if option.kind is bool}
        for option in options:  # all of them before the first missing one is reported
            if option.name not in flags:
                option.check(texts[option.name])
        values = {o.name: bool(given[o.name]) if o.name in flags else o.value(texts[o.name]) for o in options}
        made = {name: declared.made(values) for name, declared in found.items()}
        try:
            body(**{name: values[name] for name in own}, **made)
        except (BrokenPipeError, KeyboardInterrupt) as error:
            raise CutShortError from error

    return options, run
