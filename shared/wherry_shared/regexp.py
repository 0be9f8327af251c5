"""Go's regular expressions (RE2 syntax), matched in time linear in the text.

Python's `re` can be made to run for years by a pattern of a dozen characters, and a filter's pattern comes from
whoever may call the service. So the pattern becomes a nondeterministic automaton, and that a deterministic one, state
by state as texts need them; nothing ever backtracks. Only whether there is a match is answered, not where.
Left out: Unicode scripts (`\\p{Greek}`); general categories (`\\pL`, `\\p{Lu}`) are there.
Source: https://github.com/google/re2/wiki/Syntax and the documentation of Go's package regexp/syntax.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from .errors import InvalidArgument, ResourceExhausted
from .regexp_syntax import Alternatives, BadPattern, Look, Node, Repeat, Sequence, Set, is_word, parse

log = logging.getLogger("wherry.filters")

PATTERN_MAX = 1024
PROGRAM_MAX = 2048
"""The most instructions of one pattern; `x{1000}` takes a thousand."""
PROGRAMS_MAX = 2 * PROGRAM_MAX
"""The same of all patterns that share an Effort."""
WORK_MAX = 100_000
"""The most instructions visited for one thing, by all patterns that share an Effort: a tenth of a second. Where a
remembered state helps, sixteen characters count as one."""
REMEMBERED_MAX = 64 << 10
"""The most places and transitions that they remember together: some megabytes."""
_TRANSITION = 8
_END = ""


class Effort:
    """What several patterns take together: whoever may give one may give thousands."""

    __slots__ = ("_automata", "_remembered", "instructions", "work")

    def __init__(self) -> None:
        self.instructions = 0
        self.work = 0  # for the thing in hand: set to 0 for the next
        self._remembered = 0
        self._automata: list[Automaton] = []

    def share(self, automaton: Automaton) -> None:
        self._automata.append(automaton)

    def remember(self, places: int) -> None:
        """Note what one of them remembers; all forget when it is too much."""
        self._remembered += places
        if self._remembered > REMEMBERED_MAX:
            self._remembered = 0
            for automaton in self._automata:
                automaton.forget()


def compile_regexp(pattern: str, effort: Effort | None = None) -> Callable[[str], bool]:
    """Whether a text has a match anywhere. What is no regular expression of Go's is logged and matches nothing.

    effort: of the patterns that it belongs to, if it stands not alone.
    InvalidArgument: the pattern is longer than 1 KiB, or larger than 2048 instructions, or all are than 4096. The
    matcher raises ResourceExhausted when pattern and text together take too long.
    """
    if len(pattern) > PATTERN_MAX:
        raise InvalidArgument(f"the pattern {pattern[:40]!r}... is longer than {PATTERN_MAX} characters")
    try:
        tree = parse(pattern)
    except BadPattern as e:
        log.warning("pattern %r is no regular expression and matches nothing: %s", pattern, e)
        return lambda text: False
    return _plain(tree) or Automaton(pattern, tree, effort).search


def _plain(tree: Node) -> Callable[[str], bool] | None:
    """A matcher of text that stands in the pattern as it is, perhaps at the beginning or the end."""
    nodes = list(tree.nodes) if isinstance(tree, Sequence) else [tree]
    at_begin = bool(nodes) and isinstance(nodes[0], Look) and nodes[0].at == "begin"
    at_end = len(nodes) > at_begin and isinstance(nodes[-1], Look) and nodes[-1].at == "end"
    middle = nodes[at_begin : len(nodes) - at_end]
    text = "".join(node.literal for node in middle if isinstance(node, Set))
    if len(text) != len(middle):
        return None
    if at_begin and at_end:
        return lambda value: value == text
    if at_begin:
        return lambda value: value.startswith(text)
    if at_end:
        return lambda value: value.endswith(text)
    return lambda value: text in value


@dataclass(slots=True)
class _Instruction:
    """One step: over a character of `set`, past a condition, or to either of two others. The last one matches."""

    set: Set | None = None
    look: str = ""
    next: int = 0
    other: int = -1
    work: int = 1


class _State:
    """Instructions to be at, and the character before; where each next character leads, as far as it is known."""

    __slots__ = ("at_end", "before", "next", "places")

    def __init__(self, places: frozenset[int], before: str) -> None:
        self.places = places
        self.before = before
        self.next: dict[str, _State] = {}
        self.at_end: bool | None = None


_MATCHED = _State(frozenset(), "")
_LOST = _State(frozenset(), "")


class Automaton:
    """A compiled pattern."""

    def __init__(self, pattern: str, tree: Node, effort: Effort | None = None) -> None:
        self._pattern = pattern
        self._program: list[_Instruction] = []
        self._alone = effort is None
        self._effort = effort or Effort()
        self._effort.share(self)
        self._compile(tree)
        self._final = self._add(_Instruction())
        self._looks = any(i.look not in ("", "begin", "end") for i in self._program)
        self._anchored = self._program[0].look == "begin"
        self.forget()

    def search(self, text: str) -> bool:
        """Whether the text has a match anywhere."""
        state, effort = self._start, self._effort
        if self._alone:
            effort.work = 0
        effort.work += len(text) >> 4
        if effort.work > WORK_MAX:
            raise self._too_long()
        for character in text:
            follows = state.next.get(character)
            if follows is None:
                follows, done = self._step(state, character)
                effort.work += done
                if effort.work > WORK_MAX:
                    raise self._too_long()
            if follows is _MATCHED:
                return True
            if follows is _LOST:
                return False
            state = follows
        if state.at_end is None:
            state.at_end = self._final in self._reach(state, _END)
        return state.at_end

    def _too_long(self) -> ResourceExhausted:
        return ResourceExhausted(f"the pattern {self._pattern[:80]!r} takes too long: simplify it")

    def forget(self) -> None:
        """Remember no state any more."""
        self._states: dict[tuple[frozenset[int], str], _State] = {}
        self._start = self._state(frozenset((0,)), _END)

    def _state(self, places: frozenset[int], before: str) -> _State:
        state = self._states.get((places, before))
        if state is None:
            state = self._states[places, before] = _State(places, before)
            self._effort.remember(len(places))
        return state

    def _step(self, state: _State, character: str) -> tuple[_State, int]:
        """The state after a character, and how many instructions were visited for it."""
        reached = self._reach(state, character)
        if self._final in reached:
            follows = _MATCHED
        else:
            program = self._program
            places = {program[i].next for i in reached if (s := program[i].set) is not None and s.has(character)}
            if not self._anchored:
                places.add(0)  # a match may begin after any character
            follows = self._state(frozenset(places), self._kind(character)) if places else _LOST
        state.next[character] = follows
        self._effort.remember(_TRANSITION)
        return follows, sum(self._program[i].work for i in reached)

    def _kind(self, character: str) -> str:
        """One character for all that conditions cannot tell from each other."""
        if not self._looks:
            return "-"
        return "\n" if character == "\n" else "w" if is_word(character) else "-"

    def _reach(self, state: _State, character: str) -> set[int]:
        """Every instruction that is reached without another character; `character` comes next, or the end ("")."""
        reached: set[int] = set()
        todo = list(state.places)
        while todo:
            place = todo.pop()
            if place in reached:
                continue
            reached.add(place)
            instruction = self._program[place]
            if instruction.set is not None or place == self._final:
                continue
            if not instruction.look or _holds(instruction.look, state.before, character):
                todo.append(instruction.next)
                if instruction.other >= 0:
                    todo.append(instruction.other)
        return reached

    # ---- from the tree to the program: each piece of it ends by going on to the instruction after it

    def _add(self, instruction: _Instruction) -> int:
        if len(self._program) >= PROGRAM_MAX:
            raise InvalidArgument(f"the pattern {self._pattern[:80]!r} is larger than {PROGRAM_MAX} instructions")
        self._effort.instructions += 1
        if self._effort.instructions > PROGRAMS_MAX:
            raise InvalidArgument(f"the patterns are larger than {PROGRAMS_MAX} instructions together")
        instruction.next = len(self._program) + 1
        self._program.append(instruction)
        return len(self._program) - 1

    def _compile(self, node: Node) -> None:
        if isinstance(node, Set):
            self._add(_Instruction(set=node, work=1 + len(node.ranges) // 8))
        elif isinstance(node, Look):
            self._add(_Instruction(look=node.at))
        elif isinstance(node, Sequence):
            for part in node.nodes:
                self._compile(part)
        elif isinstance(node, Alternatives):
            self._compile_alternatives(node)
        else:
            self._compile_repeat(node)

    def _compile_alternatives(self, node: Alternatives) -> None:
        ends: list[int] = []
        for part in node.nodes[:-1]:
            fork = self._add(_Instruction())
            self._compile(part)
            ends.append(self._add(_Instruction()))
            self._program[fork].other = len(self._program)
        self._compile(node.nodes[-1])
        for end in ends:
            self._program[end].next = len(self._program)

    def _compile_repeat(self, node: Repeat) -> None:
        for _ in range(node.least):
            size = len(self._program)
            self._compile(node.node)
            if len(self._program) == size:
                break  # nothing, a thousand times a thousand times
        if node.most is None:
            fork = self._add(_Instruction())
            self._compile(node.node)
            self._program[self._add(_Instruction())].next = fork
            self._program[fork].other = len(self._program)
            return
        forks = []
        for _ in range(node.most - node.least):
            forks.append(self._add(_Instruction()))
            self._compile(node.node)
        for fork in forks:
            self._program[fork].other = len(self._program)


def _holds(look: str, before: str, after: str) -> bool:
    """Whether a condition holds between two characters; "" stands for the text's begin and end."""
    if look == "begin":
        return before == _END
    if look == "end":
        return after == _END
    if look == "line begin":
        return before in (_END, "\n")
    if look == "line end":
        return after in (_END, "\n")
    return (is_word(before) != is_word(after)) == (look == "boundary")
