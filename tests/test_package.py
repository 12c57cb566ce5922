import ast
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import dsrl_vla
import pytest
from dsrl_vla.errors import UnknownNameError

ROOT = Path(dsrl_vla.__file__).parent


def python(code, *, path=()):
    program = f"import sys; sys.path[:0] = {[str(p) for p in path]!r}\n" + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_importing_the_package_loads_nothing_heavy():
    run = python("""
        import dsrl_vla
        heavy = {"torch", "numpy", "transformers", "gymnasium", "metaworld", "matplotlib"} & set(sys.modules)
        sys.exit(str(heavy) if heavy else 0)
    """)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", dsrl_vla.__all__)
def test_every_public_name_is_there(name):
    assert getattr(dsrl_vla, name) is not None
    assert name in dir(dsrl_vla)


def test_functions_stay_functions_once_their_modules_are_loaded():
    import dsrl_vla.evaluation
    import dsrl_vla.training

    assert callable(dsrl_vla.train) and callable(dsrl_vla.evaluate) and callable(dsrl_vla.preflight)


def test_mapped_packages_import():
    import dsrl_vla.adapters.transformers_pi0
    import dsrl_vla.recipes

    assert "demo" in dsrl_vla.recipes.shipped()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dsrl_vla.nothing  # noqa: B018


def test_no_pickle_and_no_code_from_data():
    sources = [*ROOT.rglob("*.py"), *Path(dsrl_vla.adapters.__path__[0]).rglob("*.py")]
    assert len(sources) > 30
    forbidden_imports = {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
    forbidden_calls, forbidden_names = {"eval", "exec"}, {("torch", "load"), ("numpy", "load"), ("torch", "hub")}
    usual = {"numpy": "np"}  # under other names the calls below would not be found
    unsafe = {("allow_pickle", "True"), ("weights_only", "False")}
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not forbidden_imports & {a.name.split(".")[0] for a in node.names}, path
                for a in node.names:
                    assert a.name not in ("torch", "numpy") or a.asname in (None, usual.get(a.name)), path
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] not in forbidden_imports, path
                assert not forbidden_names & {(node.module, a.name) for a in node.names}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in forbidden_calls | {"yaml.load"}, path
                if called == "torch.load":  # tensors and plain containers only
                    assert "weights_only=True" in ast.unparse(node), path
                if called in ("np.load", "numpy.load"):
                    assert "allow_pickle=False" in ast.unparse(node), path
                assert called != "torch.hub.load", path
                assert not unsafe & {(k.arg, ast.unparse(k.value)) for k in node.keywords}, path
                assert not any(k.arg == "trust_remote_code" and ast.unparse(k.value) != "False" for k in node.keywords)


ADAPTER = """
from dsrl_vla.adapters.flow_mlp import FlowMLP, FlowMLPConfig, FlowMLPModel

def load(source, *, uri="", **options):
    return FlowMLP(FlowMLPModel(FlowMLPConfig(state_dim=3, action_dim=int(source))), uri)
"""


def test_another_distribution_can_add_an_adapter(tmp_path):
    (tmp_path / "thirdparty.py").write_text(ADAPTER)
    info = tmp_path / "thirdparty-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thirdparty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dsrl_vla.adapters]\nthird = thirdparty:load\n")
    run = python("""
        from dsrl_vla import load_base
        from dsrl_vla.bases import adapters
        assert adapters()["third"] == "thirdparty:load"
        base = load_base("third:5")
        assert base.spec.action_dim == 5 and base.spec.uri == "third:5"
        import thirdparty
        thirdparty.load = lambda source, *, dtype, device: None
        try:
            load_base("third:5")
        except ValueError as error:
            assert "the loader of 'third:': expected load(source, *, dtype='float32', device=" in str(error), error
        else:
            raise AssertionError
    """, path=[tmp_path])  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_two_distributions_cannot_claim_one_name(tmp_path):
    info = tmp_path / "rival-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dsrl_vla.adapters]\nnano = rival:load\n")
    run = python("from dsrl_vla import load_base; load_base('nano:')", path=[tmp_path])
    assert "expected one owner" in run.stderr


def test_an_entry_point_that_names_nothing_is_said_in_a_sentence(tmp_path):
    """A slip in somebody's own pyproject."""
    info = tmp_path / "slip-1.0.dist-info"
    info.mkdir()
    (tmp_path / "slip.py").write_text(ADAPTER)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: slip\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dsrl_vla.adapters]\nslip = slip:lod\n")
    run = python("from dsrl_vla import load_base; load_base('slip:5')", path=[tmp_path])
    words = "entry point 'slip' of group 'dsrl_vla.adapters': expected 'slip:lod' to be importable"
    assert words in run.stderr and "DsrlError" in run.stderr


def test_unknown_adapters_are_refused_with_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown adapter 'transformer'. Did you mean 'transformers'"):
        dsrl_vla.load_base("transformer:x")


def test_the_wheel_holds_code_recipes_and_the_embedded_base_and_leaks_nothing(tmp_path):
    source = ROOT.parent
    if not (source / "setup.cfg").exists():
        source = Path(__file__).parents[1]
    copy = tmp_path / "source"
    import shutil

    ignore = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(source, copy, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(copy)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for expected in (
        "dsrl_vla/adapters/transformers_pi0.py", "dsrl_vla/recipes/demo.yaml", "dsrl_vla/nano/base/model.safetensors",
        "dsrl_vla/data/nano_card.md", "dsrl_vla/data/heads/drawer-open/head.safetensors",
        "dsrl_vla/data/metaworld_prompts.yaml", "dsrl_vla/py.typed",
        "dsrl_vla/adapters/openpi/jax_sampler.py", "dsrl_vla/recipes/pi0-libero.yaml",
    ):  # fmt: skip
        assert expected in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dsrl_vla"}
