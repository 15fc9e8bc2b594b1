"""Fill the list of modules in `docs/architecture.md` from their docstrings: ``python docs/modules.py``."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/architecture.md"
PACKAGES = ("flows", "tasks", "selfcascade")
BEGIN, END = "<!-- modules:begin -->", "<!-- modules:end -->"


def filled(text: str) -> str:
    """The page with its list made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{listing()}\n{END}{after}"


def listing() -> str:
    """A heading for each folder, a line with the first sentence of its docstring for each module."""
    lines: list[str] = []
    for package in PACKAGES:
        for folder in sorted({path.parent for path in (ROOT / package).rglob("*.py")}):
            relative = folder.relative_to(ROOT).as_posix()
            lines += ["", f"### `{relative}/`", "", sentence(folder / "__init__.py"), ""]
            lines += [f"* `{path.name}`: {sentence(path)}" for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
    return "\n".join(lines).strip()


def sentence(path: Path) -> str:
    """The first line of a module's docstring."""
    words = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not words:
        raise ValueError(f"{path.relative_to(ROOT)} has no docstring: say in one sentence what it is for")
    return words.split("\n\n")[0].replace("\n", " ")


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
