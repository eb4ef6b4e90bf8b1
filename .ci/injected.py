"""`python .ci/injected.py executed.ipynb name=value ...`: did papermill's parameters arrive, in known names?"""

import sys

import papermill

path, *expected = sys.argv[1:]
cells = papermill.iorw.load_notebook_node(path).cells
injected = [cell.source for cell in cells if "injected-parameters" in cell.metadata.get("tags", [])]
declared = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
assert len(declared) == 1, f"{path}: expected one cell tagged 'parameters', found {len(declared)}"
assert len(injected) == 1, f"{path}: expected one injected cell, found {len(injected)}; its defaults won"
for pair in expected:
    name, _, value = pair.partition("=")
    assert f"{name} = {value!r}" in injected[0].replace('"', "'"), f"{path}: {pair} was not injected: {injected[0]}"
failed = [cell for cell in cells if any(output.output_type == "error" for output in cell.get("outputs", []))]
assert not failed, f"{path}: {len(failed)} cells failed"
print(f"{path}: {', '.join(expected)} arrived; {len(cells)} cells without an error")
