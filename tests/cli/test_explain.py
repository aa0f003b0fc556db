"""sam-export explain on the tiny bundle: table, JSON and page tell the same; what is no bundle ends in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgesam_deploy.bundle import GRAPHS, MANIFEST, NODES
from edgesam_deploy.cli import main
from edgesam_deploy.files import sha256_file


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["explain", *(str(w) for w in words)], prog_name="sam-export")


@pytest.fixture(scope="module")
def answer(built: SimpleNamespace) -> dict[str, Any]:
    result = run(built.bundle, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def rows(text: str, graph: str) -> dict[str, list[str]]:
    """The table of one graph: first cell → the cells after it, which are parted by two blanks or more."""
    lines = iter(text.splitlines())
    next(line for line in lines if line.startswith(f"{graph}: "))
    next(lines)
    found = {}
    for line in lines:
        if not line.strip() or line.startswith(("[", "every node")):
            break
        name, *cells = (cell.strip() for cell in line.split("  ") if cell.strip())
        found[name] = cells
    return found


def test_the_table_has_the_numbers_of_the_json(built: SimpleNamespace, answer: dict[str, Any]) -> None:
    text = run(built.bundle).stdout
    assert [graph["graph"] for graph in answer["graphs"]] == list(GRAPHS)
    for graph in answer["graphs"]:
        table = rows(text, graph["graph"])
        assert list(table) == [block["block"] for block in graph["blocks"]]
        for block in graph["blocks"]:
            nodes, mmacs, share = table[block["block"]][:3]
            assert int(nodes) == block["nodes"]
            assert float(mmacs) == pytest.approx(block["macs"] / 1e6, abs=0.051)
            assert float(share) == pytest.approx(100 * block["macs"] / graph["macs"], abs=0.051)
        assert f"{graph['graph']}: {graph['macs'] / 1e9:.3f} GMACs" in text
        assert sum(s["macs"] for s in graph["shares"]) == graph["macs"] == sum(n["macs"] for n in graph["nodes"])
        assert sum(s["share"] for s in graph["shares"]) == pytest.approx(1.0)


def test_every_node_on_request(built: SimpleNamespace, answer: dict[str, Any]) -> None:
    text = run(built.bundle, "--nodes").stdout
    for graph in answer["graphs"]:
        table = rows(text, graph["graph"])
        assert list(table) == [node["node"] for node in graph["nodes"]]
        for node in graph["nodes"]:
            assert table[node["node"]][:2] == [node["op"], node["precision"]]


def test_what_is_not_int8_says_why(built: SimpleNamespace, answer: dict[str, Any]) -> None:
    text = run(built.bundle).stdout
    for graph in answer["graphs"]:
        assert all(node["reason"] in text for node in graph["not_int8"])
    encoder, decoder = answer["graphs"]
    assert encoder["not_int8"] == []
    assert "every node that multiplies computes in INT8" in text
    assert len(decoder["not_int8"]) == 68


def test_the_page_is_written_and_named(built: SimpleNamespace, answer: dict[str, Any], tmp_path: Path) -> None:
    result = run(built.bundle, "--html", tmp_path / "new" / "page.html", "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (0, answer)
    assert result.stderr == f"page: {tmp_path / 'new' / 'page.html'}\n"
    html = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert all(block["block"] in html for graph in answer["graphs"] for block in graph["blocks"])


def test_a_page_that_cannot_be_written_is_an_error(built: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run(built.bundle, "--html", tmp_path / "file" / "page.html")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1


def replaced(bundle: Path, content: str | None) -> None:
    """Put another ``nodes.json`` into a bundle, with its hash recorded, or none."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    if content is None:
        (bundle / NODES).unlink()
        del manifest["files"][NODES]
    else:
        (bundle / NODES).write_text(content)
        manifest["files"][NODES]["sha256"] = sha256_file(bundle / NODES)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


WRONG = {
    "missing": (None, f"has no {NODES}"),
    "old-schema": ('{"encoder": {"Conv": ["int8", "Conv"]}, "decoder": {}}', "no schema, as older versions wrote it"),
    "cut": ('{"schema": 2, "graphs": {"enc', "is not readable JSON"),
    "garbled": ('{"schema": 2, "graphs": {"encoder": {"nodes": [{"node": "a"}]}}, "search": null}', "garbles an entry"),
}


@pytest.mark.parametrize(("content", "says"), WRONG.values(), ids=WRONG)
def test_a_bundle_without_its_nodes_ends_in_one_line(
    built: SimpleNamespace, tmp_path: Path, content: str | None, says: str
) -> None:
    bundle = Path(shutil.copytree(built.bundle, tmp_path / "bundle"))
    replaced(bundle, content)
    result = run(bundle)
    assert result.exit_code == 1
    assert says in result.stderr
    assert "build the bundle again" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_changed_file_is_found_by_its_hash(built: SimpleNamespace, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(built.bundle, tmp_path / "bundle"))
    (bundle / NODES).write_text("{}")
    result = run(bundle)
    assert (result.exit_code, f"{NODES} has sha256" in result.stderr) == (1, True)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert (result.exit_code, "is not a bundle" in result.stderr) == (1, True)
