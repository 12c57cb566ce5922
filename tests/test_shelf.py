import json

import pytest
import yaml
from dsrl_vla import load_recipe
from dsrl_vla.cli import main
from dsrl_vla.errors import DsrlError
from dsrl_vla.first_recipe import first_recipe
from dsrl_vla.hub import shipped_heads
from dsrl_vla.recipes import shipped
from dsrl_vla.shelf import shelf


def test_every_recipe_is_on_the_shelf_with_a_status():
    entries = {entry.name: entry for entry in shelf()}
    assert set(entries) == set(shipped())
    assert {entry.status for entry in entries.values()} <= {"measured", "by reading", "no head ships"}
    assert entries["pi0-libero"].status == "by reading" and entries["gym-hopper"].status == "no head ships"
    for entry in entries.values():
        assert entry.description and bool(entry.figures) == (entry.status == "measured")
    assert entries["nano-metaworld-5"].artefact == "nano:"


def test_figures_are_those_of_the_shipped_evaluation(capsys):
    entries = {entry.name: entry for entry in shelf()}
    result = json.loads((shipped_heads()["drawer-open"] / "eval.json").read_text())
    assert entries["drawer-open"].artefact == "shipped:drawer-open"
    for key in ("base", "steered"):
        assert f"{key} {result[key]['success']:.2f}" in entries["drawer-open"].figures
    assert main(["recipes"]) == 0
    assert entries["drawer-open"].figures in capsys.readouterr().out


def test_a_recipe_that_has_changed_since_is_no_longer_measured(monkeypatch, tmp_path):
    changed = tmp_path / "drawer-open.yaml"
    changed.write_text(shipped()["drawer-open"].read_text().replace("bound: 1.5", "bound: 1.4"))
    monkeypatch.setattr("dsrl_vla.shelf.shipped", lambda: {"drawer-open": changed})
    monkeypatch.setattr("dsrl_vla.recipe.shipped", lambda: {"drawer-open": changed})
    assert [entry.status for entry in shelf()] == ["no head ships"]


def test_preflight_then_a_recipe_then_training(fork_recipe, tmp_path, capsys):
    flags = ["--episodes", "6", "--best-of", "2", "--layouts", "repeat", "chunk", "--bounds", "1.5"]
    flags += ["--noise.columns", "all", "--task.more", "[point:mirror]", "--task.vector", "async"]
    assert main(["preflight", str(fork_recipe), "--out", str(tmp_path), *flags]) == 0
    out = tmp_path / "777.yaml"
    assert main(["init-recipe", str(tmp_path / "preflight.json"), "--out", str(out)]) == 0
    assert f"next: dsrl-vla train {out}" in capsys.readouterr().out
    recipe, report = load_recipe(out), json.loads((tmp_path / "preflight.json").read_text())
    asked = load_recipe(fork_recipe, {"task": {"more": ["point:mirror"], "vector": "async"}})
    assert recipe.name == "777" and recipe.noise.columns == "all" and report["episodes"] == 12
    assert recipe.base == asked.base and recipe.task == asked.task
    assert recipe.noise.layout == report["recommendation"]["layout"]
    assert recipe.noise.bound == report["recommendation"]["bound"]
    text = out.read_text()
    assert text.count("#") > 20 and "base, best of 2" in text
    assert main(["init-recipe", str(tmp_path / "preflight.json"), "--out", str(out)]) == 2
    assert "expected a new file that ends in .yaml, got one that exists" in capsys.readouterr().err
    for command in ("preflight", "search", "train"):
        assert main([command, str(fork_recipe), "--out", str(tmp_path)]) == 2
        assert "expected a new directory, got one that holds a preflight.json" in capsys.readouterr().err


def test_what_is_no_preflight_is_refused(tmp_path):
    with pytest.raises(DsrlError, match="expected the preflight.json that `dsrl-vla preflight` wrote, got no such"):
        first_recipe(tmp_path / "preflight.json", "x")
    no_json, other = "got no JSON: ", "expected a preflight.json of this version"
    texts = {"{": no_json, "{}": other, "[]": other, '{"recipe": {}}': other, yaml.safe_dump({"recipe": {}}): no_json}
    for text, words in texts.items():
        (tmp_path / "preflight.json").write_text(text)
        with pytest.raises(DsrlError, match=words):
            first_recipe(tmp_path / "preflight.json", "x")
