"""README.md from nbs/index.ipynb: `python .ci/readme.py` writes it, `--check` only compares. quarto is not needed.

The map of notebooks in nbs/index.ipynb, between its two `map` comments, is made from the notebooks' own title cells.
"""

import json
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
MAP = re.compile(r"(<!-- map -->\n).*?(<!-- /map -->)", re.S)


def reading_order(path: Path) -> tuple:
    """The main jobs first, then by number (11 < 11a < 12), then tutorials."""
    match = re.match(r"(\d+)([a-z]?)_", path.name)
    if path.name.startswith("run_"):
        return (0, 0, "", path.name)
    return (1, int(match[1]), match[2], "") if match else (2, 0, "", str(path))


def notebook_map() -> str:
    """A table row for each notebook: link and the sentence of its title cell."""
    rows = ["| notebook | what it is |", "|---|---|"]
    paths = (p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts and p.name != "index.ipynb")
    for path in sorted(paths, key=reading_order):
        title = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]).splitlines()
        sentence = next((line[2:] for line in title if line.startswith("> ")), "")
        name = path.relative_to(NBS).as_posix()
        rows.append(f"| [{name.removesuffix('.ipynb')}]({name}) | {sentence} |")
    return "\n".join(rows)


def index_notebook() -> dict:
    """nbs/index.ipynb with a fresh map."""
    notebook = json.loads((NBS / "index.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if MAP.search(source):
            table = notebook_map()
            cell["source"] = MAP.sub(lambda m: f"{m[1]}{table}\n{m[2]}", source).splitlines(keepends=True)
    return notebook


def readme_text(notebook: dict) -> str:
    """The notebook as Markdown, with links that start at the project's root."""
    text, _ = MarkdownExporter().from_notebook_node(nbformat.reads(json.dumps(notebook), as_version=4))
    text = re.sub(r"\]\((?![a-z]+:|#|/|\.\./)", "](nbs/", text).replace("](../", "](")
    text = re.sub(r"<!-- /?map -->\n", "", text)
    return "<!-- Written by .ci/readme.py from nbs/index.ipynb -->\n\n" + text.strip() + "\n"


def main() -> int:
    """Writes nbs/index.ipynb and README.md; with --check, exit 1 if one of them would change."""
    notebook = index_notebook()
    texts = {
        NBS / "index.ipynb": json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n",
        ROOT / "README.md": readme_text(notebook),
    }
    stale = [path for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if "--check" in sys.argv[1:]:
            print(f"{path.name} is out of date: run python .ci/readme.py")
        else:
            path.write_text(texts[path], encoding="utf-8")
    return 1 if stale and "--check" in sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())
