"""A lineage as people look at it: a tree of text, or a graph in the languages of Mermaid and Graphviz."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal

from selfcascade.storage.lineage import Source, Step

Form = Literal["text", "mermaid", "dot"]

MISSING = "missing: deleted, or of another store"


def drawn(steps: Sequence[Step], form: Form) -> str:
    """The lineage of the first of ``steps``, which :func:`selfcascade.storage.lineage.walk` gives; ends with a line break.

    ``text`` shows an artifact that was used twice in full the first time only. Text from outside is escaped for the language.
    """
    lines = {"text": _tree, "mermaid": _mermaid, "dot": _dot}[form](steps)
    return "".join(f"{line}\n" for line in lines)


def _tree(steps: Sequence[Step]) -> Iterator[str]:
    by_prefix = {step.ref.prefix: step for step in steps}
    root = steps[0]
    shown = {root.ref.prefix}
    yield f"{root.ref}  {_counts(root)}".rstrip()
    waiting = _branches(root, "")  # a stack of its own: a dataset may be the thousandth increment of its first version
    while waiting:
        indent, last, source = waiting.pop()
        branch, below = ("└─ ", "   ") if last else ("├─ ", "│  ")
        step = None if source.ref is None else by_prefix[source.ref.prefix]
        again = step is not None and step.ref.prefix in shown
        counts = "" if step is None else f"  {_counts(step)}".rstrip()
        yield f"{indent}{branch}{_plain(source.role)}: {_told(source)}{counts}{' (above)' if again else ''}"
        if step is not None and not again:
            shown.add(step.ref.prefix)
            waiting += _branches(step, indent + below)


def _branches(step: Step, indent: str) -> list[tuple[str, bool, Source]]:
    """Inputs of an artifact, the last one first."""
    return [(indent, place == len(step.sources) - 1, source) for place, source in enumerate(step.sources)][::-1]


def _mermaid(steps: Sequence[Step]) -> Iterator[str]:
    yield "graph LR"
    names = _names(steps)
    for step in steps:
        yield f'  {names[step.ref.prefix]}["{_html(str(step.ref))}<br/>{_html(_counts(step))}"]'
    for node, source in _leaves(steps).items():
        yield f'  {node}["{_html(_told(source))}"]:::{source.state}'
    for tail, head, role in _edges(steps):
        yield f'  {tail} -->|"{_html(role)}"| {head}'
    yield "  classDef missing stroke:#c0392b,stroke-dasharray:4"
    yield "  classDef outside stroke-dasharray:4"


def _dot(steps: Sequence[Step]) -> Iterator[str]:
    yield "digraph lineage {"
    yield '  rankdir="LR"; node [shape="box", fontname="sans-serif"]; edge [fontname="sans-serif"];'
    names = _names(steps)
    for step in steps:
        yield f'  {names[step.ref.prefix]} [label="{_quoted(str(step.ref))}\\n{_quoted(_counts(step))}"];'
    for node, source in _leaves(steps).items():
        style = 'style="dashed", color="#c0392b"' if source.state == "missing" else 'style="dashed"'
        yield f'  {node} [label="{_quoted(_told(source))}", {style}];'
    for tail, head, role in _edges(steps):
        yield f'  {tail} -> {head} [label="{_quoted(role)}"];'
    yield "}"


def _names(steps: Sequence[Step]) -> dict[str, str]:
    return {step.ref.prefix: f"a{number}" for number, step in enumerate(steps)}


def _leaves(steps: Sequence[Step]) -> dict[str, Source]:
    """Inputs that are no artifact of this store, one node for each value, whoever uses it."""
    found = {source.value: source for step in steps for source in step.sources if source.ref is None}
    return {f"x{number}": source for number, source in enumerate(found.values())}


def _edges(steps: Sequence[Step]) -> Iterator[tuple[str, str, str]]:
    """From input to what was made of it."""
    names = _names(steps) | {source.value: node for node, source in _leaves(steps).items()}
    for step in steps:
        for source in step.sources:
            yield names[source.value if source.ref is None else source.ref.prefix], names[step.ref.prefix], _plain(source.role)


def _told(source: Source) -> str:
    if source.ref is not None:
        return str(source.ref)
    short = _plain(re.sub(r"([0-9a-f]{12})[0-9a-f]{28,52}", r"\1", source.value))
    return f"{short} ({MISSING if source.state == 'missing' else 'outside of the store'})"


def _counts(step: Step) -> str:
    """The first few counts of the manifest."""
    return ", ".join(f"{_plain(name)} {_plain(str(value))}" for name, value in list(step.manifest.counts.items())[:4])


def _plain(text: str) -> str:
    """One line without control characters: a terminal obeys these."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _html(text: str) -> str:
    """Mermaid's own escapes, by number: it knows no backslash."""
    return "".join(letter if letter.isalnum() or letter in " @/.:,_-()" else f"#{ord(letter)};" for letter in text)


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
