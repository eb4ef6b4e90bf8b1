"""Black for export cells: `python .ci/format_cells.py [--check] [notebook ...]`.

Black cannot check the exported modules: nbdev puts one blank line around its cell markers and wraps `__all__` its own way,
and every export would undo what black changed. So black looks at what people write, the cells that are exported, and
pyproject.toml keeps it away from dreamgym/. Directive lines (`#| export`) stay as they are.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import black

ROOT = Path(__file__).resolve().parents[1]
MODE = black.Mode(line_length=120, target_versions={black.TargetVersion.PY311})
EXPORT = re.compile(r"^#\|\s*exports?i?\b")


def format_cell(source: str) -> str:
    """The cell as black writes it, directives first."""
    lines = source.splitlines()
    start = next((i for i, line in enumerate(lines) if not line.startswith("#|")), len(lines))
    body = black.format_str("\n".join(lines[start:]), mode=MODE).strip("\n")
    return "\n".join([*lines[:start], body])


def main() -> int:
    """Prints every cell that differs; rewrites it unless --check. Exit 1 if --check found any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("notebooks", nargs="*", type=Path)
    args = parser.parse_args()
    found = 0
    for path in args.notebooks or sorted((ROOT / "nbs").rglob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        changed = 0
        for cell in notebook["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] != "code" or not EXPORT.match(source):
                continue
            formatted = format_cell(source)
            if formatted != source:
                print(f"{path.name}: {formatted.splitlines()[1][:80]!r} is not formatted as black would")
                cell["source"] = formatted.splitlines(keepends=True)
                changed += 1
        if changed and not args.check:
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
        found += changed
    return 1 if found and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
