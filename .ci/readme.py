"""README.md from nbs/index.ipynb: `python .ci/readme.py` writes it, `--check` only compares. quarto is not needed."""

import re
import sys
from pathlib import Path

from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]


def readme_text() -> str:
    """The notebook as Markdown, with links that start at the project's root."""
    text, _ = MarkdownExporter().from_filename(str(ROOT / "nbs" / "index.ipynb"))
    text = re.sub(r"\]\((?![a-z]+:|#|/|\.\./)", "](nbs/", text)
    text = text.replace("](../", "](")
    return "<!-- Written by .ci/readme.py from nbs/index.ipynb -->\n\n" + text.strip() + "\n"


def main() -> int:
    """Writes README.md; with --check, exit 1 if it would change."""
    path, text = ROOT / "README.md", readme_text()
    if "--check" not in sys.argv[1:]:
        path.write_text(text, encoding="utf-8")
    elif not path.is_file() or path.read_text(encoding="utf-8") != text:
        print("README.md differs from nbs/index.ipynb: run python .ci/readme.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
