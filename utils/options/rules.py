"""Rules about options: their ranges, and which of them exclude or need each other. `checks` evaluates them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

#: Upper bound of options that have no other bound.
LARGE = 10**9

#: A condition on a command line.
Test = Callable[[Namespace], object]


class Rules(NamedTuple):
    """Rules for the options of one part (`methods.base.Part.rules`), or for those that all methods share.

    Options are named by their dest. "Given" means not None, False or 0. Messages show an option as `--dest`. Texts may contain the values
    of options in braces, such as "--pod_apply {pod_apply}".

    Attributes:
        ranges: least and greatest value by dest, both inclusive; of every element, where an option takes several.
        exclusive: (text for the first option, whether it is given, the same for the second); both given is refused.
        requires: (dest, text for what it needs, whether that is given); a given dest without it is refused.
        positive: upper bound by dest of values that must be above 0.
        choices: by dest, the values of an option that the parser accepts as free text.
        one_of: (dests, what each of them sets); two of them together are refused.
        idle: (what the options need, whether that is given, dests); a dest that the user gives without it is named in a note and
            does nothing.
        later: dests that step 0 does not read. Runs that differ in them alone can share their step 0.
        for_later: dests that step 0 reads, but that a command line for step 0 alone would not have.
        nothing_at_step_0: by dest, why it does nothing at step 0, as the rest of a sentence that begins with the option. A note says
            so; a command line for step 0 alone is refused, unless it has options of `later` or `for_later` of other rules.
        advice: (what the user should know, when); a note before the start says so, and nothing is refused.
        classes_only: by dest, whether a value needs steps that add classes and a background; refused where steps are domains.
        check: raises UserError for rules that the fields above cannot express.
    """

    ranges: Mapping[str, tuple[float, float]] = {}
    exclusive: Sequence[tuple[str, Test, str, Test]] = ()
    requires: Sequence[tuple[str, str, Test]] = ()
    positive: Mapping[str, float] = {}
    choices: Mapping[str, Sequence[str]] = {}
    one_of: Sequence[tuple[Sequence[str], str]] = ()
    idle: Sequence[tuple[str, Test, Sequence[str]]] = ()
    later: Sequence[str] = ()
    for_later: Sequence[str] = ()
    nothing_at_step_0: Mapping[str, str] = {}
    advice: Sequence[tuple[str, Test]] = ()
    classes_only: Mapping[str, Callable[[Any], bool]] = {}
    check: Callable[[Namespace], object] | None = None
