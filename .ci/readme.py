"""README.md from nbs/index.ipynb: `python .ci/readme.py` writes it, `--check` only compares. quarto is not needed.

Between the comments `map` in nbs/index.ipynb stands the map of notebooks, made from their own title cells; between `results`
what the default benchmark found, between `settings` the same of other starts and games, and between `costs` what was won with
fewer real transitions, all made from data/results.
"""

import json
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

from dreamgym.training.benchmark import METHODS, read_benchmark, summarise, table_of
from dreamgym.training.claims import (
    clone_of,
    in_points,
    label_of,
    plot_costs,
    plot_settings,
    table_of_costs,
    table_of_settings,
)
from dreamgym.utils.plots import save_figure

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
BLOCK = re.compile(r"<!-- (map|results|settings|costs) -->\n.*?<!-- /\1 -->", re.S)


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


def interval(found: dict, scale: float = 100, form: str = "+.1f") -> str:
    """Mean and 95 % interval, by default in points."""
    mean, low, high = (found[key] for key in ("mean", "low", "high"))
    return f"{scale * mean:{form}} [{scale * low:{form.lstrip('+')}}, {scale * high:{form.lstrip('+')}}]"


PAIRS = {"dream_minus_bc": "dream PPO − cloning", "real_minus_bc": "real PPO − cloning"}
PAIRS |= {"dream_minus_real": "dream PPO − real PPO", "s2r_minus_real": "S2R − real PPO"}


def spans(seeds: set) -> str:
    """'10 to 14 and 20 to 24'."""
    starts = sorted(seed for seed in seeds if seed - 1 not in seeds)
    ends = sorted(seed for seed in seeds if seed + 1 not in seeds)
    return " and ".join(f"{a} to {b}" if a < b else f"{a}" for a, b in zip(starts, ends, strict=True))


def benchmark_rows() -> list[dict]:
    """All that was found."""
    return read_benchmark(ROOT / "data" / "results" / "benchmark_alfworld.json")["rows"]


def results_table() -> str:
    """The default benchmark at temperature 1: a row for each method on the seeds that all have, differences over all."""
    rows = [row for row in benchmark_rows() if row["setting"] == "preset=cpu"]
    by_method = [{row["seed"] for row in rows if row["method"] == name} for name in METHODS]
    seeds = set.intersection(*filter(None, by_method))
    summary = summarise(shared := [row for row in rows if row["seed"] in seeds])
    lines = ["| method | success | minus cloning (points) | real transitions |", "|---|---|---|---|"]
    names = {method.label: name for name, method in METHODS.items()}
    for line in table_of(shared):
        gain = summary.get(f"{names[line['method']]}_minus_bc")
        success = interval(line | {"mean": line["success"]}, 1, ".3f")
        lines.append(
            f"| {line['method']} | {success} | {interval(gain) if gain else ''} | {line['real_transitions']:,.0f} |"
        )
    games = sorted({row["n"] for row in shared})
    lines += [
        "",
        f"Seeds {spans(seeds)}, {games[0]} games each. Differences in points, and over how many seeds:",
        "",
    ]
    every = summarise(rows)
    return "\n".join(
        lines
        + [f"* {name}: {interval(every[key])}, {every[key]['seeds']}" for key, name in PAIRS.items() if key in every]
    )


def settings_table() -> str:
    """What was won from each start in each kind of game, at temperature 1."""
    differences = ("dream − cloning", "real − cloning", "dream − real")
    lines = [
        "| games | start | cloning | dream PPO − cloning | real PPO − cloning | dream − real |",
        "|---|---|---|---|---|---|",
    ]
    for line in table_of_settings(benchmark_rows()).values():
        found = [
            line["games"],
            line["changes"] or "preset",
            f"{line['start']:.3f}",
            *(in_points(line[key]) for key in differences),
        ]
        lines.append(f"| {' | '.join(found)} |")
    return "\n".join(lines)


def costs() -> list[dict]:
    """The dream of fewer worlds and whatever else was run on its seeds from the same clones."""
    rows = [row for row in benchmark_rows() if clone_of(row["setting"]) == "preset=cpu"]
    seeds = {row["seed"] for row in rows if row["setting"] == "preset=cpu reasoning_model.train_worlds=150"}
    return table_of_costs([row for row in rows if row["seed"] in seeds])


def costs_table() -> str:
    """Real transitions, all counted, and gains at temperature 1 and greedy."""
    lines = ["| method | real transitions | minus cloning (points) | greedy |", "|---|---|---|---|"]
    for cost in costs():
        gains = " | ".join(in_points(cost[key]).rpartition(" (")[0] for key in ("gain", "greedy"))
        lines.append(f"| {label_of(cost['setting'], cost['method'])} | {cost['real transitions']:,} | {gains} |")
    return "\n".join(lines)


def index_notebook() -> dict:
    """nbs/index.ipynb with fresh tables."""
    notebook = json.loads((NBS / "index.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        fresh = BLOCK.sub(lambda m: f"<!-- {m[1]} -->\n{TABLES[m[1]]()}\n<!-- /{m[1]} -->", source)
        cell["source"] = fresh.splitlines(keepends=True)
    return notebook


TABLES = {"map": notebook_map, "results": results_table, "settings": settings_table, "costs": costs_table}
PICTURES = {
    "settings": lambda: plot_settings(table_of_settings(benchmark_rows())),
    "costs": lambda: plot_costs(costs()),
}


def readme_text(notebook: dict) -> str:
    """The notebook as Markdown, with links that start at the project's root."""
    text, _ = MarkdownExporter().from_notebook_node(nbformat.reads(json.dumps(notebook), as_version=4))
    text = re.sub(r"\]\((?![a-z]+:|#|/|\.\./)", "](nbs/", text).replace("](../", "](")
    text = re.sub(r"<!-- /?(map|results|settings|costs) -->\n", "", text)
    return "<!-- Written by .ci/readme.py from nbs/index.ipynb -->\n\n" + text.strip() + "\n"


def main() -> int:
    """Writes nbs/index.ipynb, README.md and its pictures; with --check, exit 1 if one of the texts would change."""
    notebook, readme = index_notebook(), ROOT / "README.md"
    before = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    for name, plot in PICTURES.items() if "--check" not in sys.argv[1:] else ():
        picture = NBS / "images" / f"{name}.png"
        if not picture.is_file() or TABLES[name]() not in before:  # the picture of other numbers
            save_figure(plot(), picture)
    texts = {
        NBS / "index.ipynb": json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n",
        readme: readme_text(notebook),
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
