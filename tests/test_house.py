"""The rules of the house: what holds for every notebook, module and committed file."""

import ast
import configparser
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
NUMBERED = [p for p in NOTEBOOKS if re.match(r"\d+[a-z]?_", p.name)]
RUNS = [p for p in NOTEBOOKS if p.name.startswith("run_")]
MODULES = sorted(p for p in (ROOT / "dreamgym").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
EXPORT = re.compile(r"^#\|\s*exports?i?\b")
TORCH_ROOMS = {
    "core.small_lm",
    "core.language_model",
    "core.generators",
    "models.experience_sft",
    *(
        f"training.{name}"
        for name in ("policy", "rollout", "play", "advantages", "ppo", "grpo", "baselines", "trl_baselines")
    ),
    *(
        f"training.{name}"
        for name in ("preparation", "checkpoints", "scale", "arm_loop", "arms", "trainer", "fine_tuning")
    ),
    *(f"training.{name}" for name in ("train", "evaluate")),
}
PINS = ("nbdev==2.4.14", "execnb==0.1.18", "fastcore==1.14.5", "ghapi==1.1.1")
COMMANDS = (
    "pip install -c .ci/constraints.txt -e . "
    "&& papermill nbs/run_experiment.ipynb runs/alfworld.ipynb -p env alfworld",
    "pip install -c .ci/constraints.txt -e '.[dev]' && CUDA_VISIBLE_DEVICES= nbdev_test --n_workers 2 && pytest -n 2",
)


@cache
def read_notebook(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(path: Path) -> list[str]:
    return ["".join(c["source"]) for c in read_notebook(path)["cells"] if c["cell_type"] == "code"]


def export_cells(path: Path) -> list[str]:
    """Sources of export cells, without their directive lines."""
    cells = [source for source in code_cells(path) if EXPORT.match(source)]
    return ["\n".join(line for line in source.splitlines() if not line.startswith("#|")) for source in cells]


def room(path: Path) -> str | None:
    """'core.errors' for nbs/core/00_errors.ipynb, from its default_exp."""
    found = [m for source in code_cells(path) for m in re.findall(r"^#\|\s*default_exp\s+(\S+)", source, re.M)]
    assert len(found) <= 1, f"{path.name}: {len(found)} default_exp directives"
    return found[0] if found else None


def number(path: Path) -> tuple[int, str]:
    """(11, 'a') for 11a_household_games.ipynb: 11 < 11a < 11b < 12."""
    match = re.match(r"(\d+)([a-z]?)_", path.name)
    assert match, path.name
    return int(match[1]), match[2]


def imported_rooms(source: str) -> set[str]:
    """Rooms that the source imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.removeprefix("dreamgym.") for name in names if name.startswith("dreamgym.")}


def plain_python(source: str) -> str:
    """A cell without magics, so that ast can read it."""
    return "\n".join("pass" if re.match(r"\s*[%!]", line) else line for line in source.splitlines())


def committed_files() -> list[Path]:
    """Files that git knows or would add; without git, everything but generated folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        ignored = {".git", "__pycache__", "runs", "logs", "results", ".ruff_cache", ".mypy_cache", ".pytest_cache"}
        paths = [p for p in ROOT.rglob("*") if not ignored & set(p.relative_to(ROOT).parts)]
        names = [str(p.relative_to(ROOT)) for p in paths if ".egg-info" not in str(p)]
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def settings() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


# ---- notebooks


@pytest.mark.parametrize("path", NUMBERED, ids=lambda p: p.stem)
def test_imports_go_to_lower_numbers(path):
    order = {room(p): number(p) for p in NUMBERED if room(p)}
    for source in code_cells(path):
        used = imported_rooms(plain_python(source)) & set(order)
        late = {name for name in used if order[name] >= number(path) and name != room(path)}
        assert not late, f"{path.name} imports {sorted(late)}, which come later in the reading order"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_export_cells_are_short(path):
    for source in filter(EXPORT.match, code_cells(path)):
        lines = source.strip("\n").splitlines()
        assert len(lines) <= 40, f"{path.name}: export cell of {len(lines)} lines, at most 40: {lines[0]!r}"
        wide = [line for line in lines if len(line) > 120]
        assert not wide, f"{path.name}: a line of {len(wide[0])} characters, at most 120: {wide[0].strip()[:60]!r}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_shown_errors_must_come(path):
    """An example that catches an error says what holds if none is raised: `raise AssertionError`, or an else."""
    for source in code_cells(path):
        tree = ast.parse(plain_python("" if EXPORT.match(source) else source))
        for node in (n for n in ast.walk(tree) if isinstance(n, ast.Try) and n.handlers):
            last = node.body[-1].body[-1] if isinstance(node.body[-1], ast.With) else node.body[-1]
            assert node.orelse or isinstance(last, ast.Raise | ast.Return), ast.unparse(node)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_title_cell(path):
    first = "".join(read_notebook(path)["cells"][0]["source"])
    lines = first.splitlines()
    assert lines[0].startswith("# "), f"{path.name}: the first cell starts with '# Name'"
    summary = next((line for line in lines if line.startswith("> ")), None)
    assert summary, f"{path.name}: the title cell has a line '> one sentence'"
    assert len(summary) <= 116, f"{path.name}: the sentence becomes a docstring line, at most 114 characters"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_kernel_and_outputs(path):
    notebook = read_notebook(path)
    spec = notebook["metadata"]["kernelspec"]
    assert (spec["name"], spec["language"]) == ("python3", "python"), f"{path.name}: kernel {spec}"
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            size = len(json.dumps(output))
            assert size < 50_000, f"{path.name}: an output of {size} bytes, less than 50 kB is kept"
            widget = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
            assert not widget, f"{path.name}: widget outputs hold random ids, store none"
            assert output["output_type"] != "error", f"{path.name}: a stored error output"


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_parameters_are_alive(path):
    papermill = pytest.importorskip("papermill")
    tagged = [c for c in read_notebook(path)["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, f"{path.name}: one cell is tagged 'parameters', not {len(tagged)}"
    source = "".join(tagged[0]["source"])
    assert not re.search(r"^#\|", source, re.M), f"{path.name}: no directive on the parameters cell"
    tree = ast.parse(source).body
    typed = [node.target.id for node in tree if isinstance(node, ast.AnnAssign) and node.value is not None]
    assert len(typed) == len(tree), f"{path.name}: every parameter reads 'name: type = value  # what it is'"
    assert len({node.lineno for node in tree}) == len(tree), f"{path.name}: one parameter per line"
    assert list(papermill.inspect_notebook(str(path))) == typed


# ---- package


def test_no_orphan_modules():
    rooms = [room(p) for p in NOTEBOOKS if room(p)]
    assert len(rooms) == len(set(rooms)), "two notebooks export the same module"
    modules = {".".join(p.relative_to(ROOT / "dreamgym").with_suffix("").parts) for p in MODULES}
    exporting = {room(p) for p in NOTEBOOKS if room(p) and export_cells(p)}
    assert modules == exporting, f"without notebook: {modules - exporting}; not exported: {exporting - modules}"
    folders = {p.parent for p in MODULES}
    assert all((folder / "__init__.py").is_file() for folder in folders)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_no_code_from_text(path):
    """No eval, exec, pickle or shell: hostile files and replies cannot run anything."""
    forbidden_modules = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    forbidden_calls = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {a.name for a in node.names} if isinstance(node, ast.Import) else {node.module or ""}
            assert not {n.split(".")[0] for n in names} & forbidden_modules, f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in forbidden_calls, f"{path.name}:{node.lineno}"
            shell = {k.arg for k in node.keywords} & {"shell", "allow_pickle"}
            assert not shell, f"{path.name}:{node.lineno}: {shell}"


def test_import_is_light():
    """`import dreamgym` and every room without tensors leave torch, transformers and pandas alone."""
    names = [".".join(p.relative_to(ROOT / "dreamgym").with_suffix("").parts) for p in MODULES]
    light = [f"dreamgym.{name}" for name in names if name not in TORCH_ROOMS]
    code = (
        "import importlib, sys\n"
        "heavy = {'torch', 'transformers', 'pandas', 'datasets', 'trl'}\n"
        f"for name in ['dreamgym', *{light!r}]:\n"
        "    importlib.import_module(name)\n"
        "    assert not heavy & set(sys.modules), (name, heavy & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]


# ---- repository


def test_no_machine_paths():
    """Nothing names a folder of the machine it was written on; only conftest.py knows where the test data may be."""
    machine = re.compile(r"(?<![\w.~}-])/(?:work|opt|root|Users|home/\w+)/")
    sibling = "../" + "shared"
    for path in committed_files():
        if path.suffix in (".xz", ".gz", ".zip", ".png", ".parquet") or path == Path(__file__).resolve():
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        found = machine.search(text)
        assert not found, f"{path.relative_to(ROOT)}: {text[max(0, found.start() - 40) : found.end() + 40]!r}"
        assert sibling not in text or path.name == "conftest.py", path


def test_readme_is_in_sync():
    pytest.importorskip("nbconvert")
    git = ["git", "-C", str(ROOT), "status", "--porcelain", "data/results/benchmark_alfworld.json"]
    if subprocess.run(git, capture_output=True, text=True).stdout:
        pytest.skip("data/results/benchmark_alfworld.json has changes; README.md shows the results that are committed")
    done = subprocess.run([sys.executable, ROOT / ".ci" / "readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_shows_the_two_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in COMMANDS:
        assert command in readme
    assert "chen2025dreamgym" in readme


def test_readme_links_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)", readme)
    missing = [link for link in links if not re.match(r"[a-z]+:", link) and not (ROOT / link).exists()]
    assert not missing, f"README links to files that do not exist: {missing}"


def test_requirements_agree():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == settings()["requirements"].split()
    constraints = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in constraints if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), "constraints are name==version"
    assert set(PINS) <= set(pins) and set(PINS) <= set(settings()["dev_requirements"].split())
    names = {re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() for pin in pins}
    wanted = settings()["requirements"].split() + settings()["dev_requirements"].split()
    assert {re.sub(r"[-_.]+", "-", re.split(r"[\[<>=]", w)[0]).lower() for w in wanted} <= names


def test_cleaning_keeps_the_parameters_tag():
    assert settings()["allowed_cell_metadata_keys"] == "tags" and settings()["clear_all"] == "False"


def test_version_is_one():
    lines = (ROOT / "dreamgym" / "__init__.py").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if "version" in line] == [f'__version__ = "{settings()["version"]}"']


def test_threads_do_not_spin_for_long():
    command = [sys.executable, "-c", "import dreamgym, os; print(os.environ['GOMP_SPINCOUNT'])"]
    clean = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    for given, expected in ({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"):
        told = subprocess.run(command, env=clean | given, check=True, capture_output=True, text=True).stdout
        assert told.strip() == expected  # what the user sets stays
