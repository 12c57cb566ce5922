import pytest
import torch
import yaml
from dsrl_vla import load_base, load_recipe, train
from dsrl_vla.bases import adapters
from dsrl_vla.errors import DsrlError, UnknownNameError
from dsrl_vla.latent_sac import SACConfig
from dsrl_vla.pretraining import load_pretrain_recipe
from dsrl_vla.recipe import EvalConfig, Recipe
from dsrl_vla.recipes import shipped


@pytest.fixture
def write(tmp_path):
    def make(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return make


def test_where_a_learner_may_be():
    assert load_recipe("push", {"train": {"device": "cuda:1"}}).train.device == "cuda:1"
    with pytest.raises(DsrlError, match=r"train.device: expected cpu, cuda or cuda:<n>, got 'gpu'"):
        load_recipe("push", {"train": {"device": "gpu"}})
    with pytest.raises(DsrlError, match="train.device: expected cpu for na-exact"):
        load_recipe("push", {"train": {"device": "cuda"}, "algorithm": "na-exact"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(DsrlError, match="train.device: expected a device that this build .* got 'cuda'"):
        train(load_recipe("push", {"train": {"device": "cuda"}}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_recipe_loads_and_says_what_it_is(name):
    recipe = (load_pretrain_recipe if name.startswith("nano-") else load_recipe)(name)
    assert recipe.description


def test_a_recipe_survives_its_own_yaml(tmp_path):
    recipe = load_recipe("peg-insert-side", {"sac": {"gamma": 0.98}, "head": {"cameras": ["behindGripper"]}})
    path = tmp_path / "resolved.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe


def test_overrides_and_extends_apply_in_order(write):
    write("name: parent\nsac: {gamma: 0.9, tau: 0.5}\n", "parent.yaml")
    child = write("extends: parent.yaml\nsac: {gamma: 0.8}\n", "child.yaml")
    recipe = load_recipe(child, {"train": {"seed": 7}})
    assert (recipe.sac.gamma, recipe.sac.tau, recipe.train.seed) == (0.8, 0.5, 7)


def test_a_number_in_scientific_notation_is_a_number(write):
    assert load_recipe(write("sac: {actor_lr: 3e-4, critic_lr: 1}")).sac.actor_lr == 3e-4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sac: {gama: 0.9}", "unknown recipe key 'sac.gama'. Did you mean 'sac.gamma'"),
        ("trian: {seed: 1}", "unknown recipe key 'trian'. Did you mean 'train'"),
        ("head: {network: {widht: 1}}", "Did you mean 'head.network.width'"),
        ("train: {seed: one}", "train.seed: expected int, got 'one'"),
        ("train: {seed: true}", "train.seed: expected int, got True"),
        ("sac: {gamma: high}", "sac.gamma: expected a number, got 'high'"),
        ("train: {gradient_steps: .nan}", "train.gradient_steps: expected a number, got nan"),
        ("train: {gradient_steps: .inf}", "train.gradient_steps: expected above 0, and finite, got inf"),
        ("noise: {bound: nan}", "noise.bound: expected a number, got 'nan'"),
        ("sac: {gamma: 1.5}", "sac.gamma: expected above 0 and below 1, got 1.5"),
        ("train: {tracker: mlflow}", "train.tracker: expected none or tensorboard or wandb or trackio"),
        ("train: {stop_at: 1.5}", "train.stop_at: expected above 0 and at most 1"),
        ("train: {env_steps: 0}", "train.env_steps: expected 1 or more"),
        ("{train: {replay_capacity: 200}, sac: {n_step: 10}}", "replay_capacity: expected 220 or more, for returns"),
        ("head: {cameras: front}", "head.cameras: expected a list"),
        ("sac: 3", "sac: expected a mapping with keys"),
        ("- a", "expected a mapping of sections, got list"),
        ("a: [", "expected YAML in UTF-8"),
        ("", "expected a mapping of sections, got an empty file"),
        ("noise: {columns: some}", "noise.columns: expected live or all"),
        ("task: {num_envs: 0}", "task.num_envs: expected 1 or more"),
        ("eval: {episodes: 0}", "eval.episodes: expected 1 or more"),
        ("extends: nothing", "unknown recipe 'nothing'"),
    ],
)
def test_each_fault_is_one_line_that_names_the_field(write, text, message):
    with pytest.raises(DsrlError, match=message) as caught:
        load_recipe(write(text))
    assert "\n" not in str(caught.value)


def test_a_recipe_that_an_editor_saved_as_utf16_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: demo", encoding="utf-16")
    with pytest.raises(DsrlError, match="expected YAML in UTF-8, got 'utf-8' codec can't decode"):
        load_recipe(tmp_path / "a.yaml")


def test_unknown_recipes_and_circles_are_refused(write):
    with pytest.raises(UnknownNameError, match="unknown recipe 'demmo'. Did you mean 'demo'"):
        load_recipe("demmo")
    with pytest.raises(DsrlError, match="expected an existing YAML file"):
        load_recipe("no/such.yaml")
    write("extends: b.yaml", "a.yaml")
    with pytest.raises(DsrlError, match="do not extend each other in a circle"):
        load_recipe(write("extends: a.yaml", "b.yaml"))


def test_choices_are_checked_also_where_a_recipe_is_built_in_python():
    """Else a misspelt one falls through to another behaviour."""
    with pytest.raises(DsrlError, match="sac.discount: expected step or chunk, got 'steps'"):
        Recipe(sac=SACConfig(discount="steps"))
    with pytest.raises(DsrlError, match="algorithm: expected sac or na or na-exact, got 'nna'"):
        Recipe(algorithm="nna")
    with pytest.raises(DsrlError, match=r"eval.baselines\[0\]: expected ticket or best-of-k, got 'tickets'"):
        Recipe(eval=EvalConfig(baselines=("tickets",)))


def test_the_resolved_recipe_writes_every_field_out():
    tree = yaml.safe_load(load_recipe("demo").to_yaml())
    assert set(tree) == {
        "name", "description", "base", "task", "noise", "head", "critic", "algorithm", "sac", "na", "offline", "train",
        "rollout", "eval",
    }  # fmt: skip
    assert tree["critic"]["network"]["width"] > 0


@pytest.mark.parametrize("task", ["hopper", "walker2d", "halfcheetah"])
def test_the_reference_recipes_set_the_reference_s_choices(task):
    recipe, ours = load_recipe(f"gym-{task}-reference"), load_recipe(f"gym-{task}")
    sac, network = recipe.sac, recipe.critic.network
    assert (recipe.task, recipe.base, recipe.train.env_steps) == (ours.task, ours.base, ours.train.env_steps)
    assert (sac.discount, sac.timeouts, sac.backup_entropy, sac.n_step) == ("chunk", "terminal", True, 1)
    assert (sac.target_entropy, sac.alpha_init, sac.actor_average, recipe.train.gradient_steps) == (0.0, 1.0, 0.0, 2.5)
    assert (network.kind, network.activation, network.norm) == ("mlp", "tanh", True) and recipe.noise.bound == 1.0
    assert recipe.head.network == network and recipe.algorithm == "na-exact"


def test_an_adapters_own_options_are_part_of_a_recipe(write):
    """In a file, on the command line and in what is written down; the adapter is given them."""
    from dsrl_vla.cli.options import read_recipe
    from dsrl_vla.recipe import differing

    path = write("base: {uri: 'nano:', options: {cameras: {front: corner}}}")
    recipe = load_recipe(path)
    assert recipe.base.options == {"cameras": {"front": "corner"}}
    assert load_recipe(write(recipe.to_yaml(), "again.yaml")) == recipe
    named = read_recipe(str(path), ["--base.options.cameras.front-cam=side", "--train.env-steps=9000"])
    assert named.base.options["cameras"]["front-cam"] == "side" and named.train.env_steps == 9000
    changed = read_recipe(str(path), ["--base.options.cameras.front=side"])
    assert changed.base.options == {"cameras": {"front": "side"}}
    assert differing(changed, recipe) == ["base.options.cameras.front"]
    without = differing(load_recipe(write("{}", "plain.yaml")), recipe)
    assert set(without) == {"base.options", "base.options.cameras.front"}
    with pytest.raises(UnknownNameError, match="option of the adapter 'nano:' 'cameras'.*Known: device, dtype"):
        recipe.base.load()
    child = write(f"extends: {path}\nbase: {{uri: 'remote:ws://gpu:8000', options: {{}}}}", "child.yaml")
    assert load_recipe(child).base.options == {}
    assert read_recipe(str(path), ["--base.options={}"]).base.options == {}
    assert read_recipe(str(path), ["--base.options={config: {num_steps: 2}}"]).base.options["config"] == {
        "num_steps": 2
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("dtype: bfloat16", "expected no 'dtype', which the other fields of base say"),
        ("source: there", "expected no 'source'"),
        ("api_key: secret", "expected no secrets.*Set DSRL_VLA_API_KEY"),
    ],
)
def test_what_is_no_adapters_option_is_refused(write, options, words):
    with pytest.raises(DsrlError, match=f"base.options: {words}"):
        load_recipe(write(f"base: {{options: {{{options}}}}}"))


@pytest.mark.parametrize("adapter", sorted(adapters()))
def test_an_option_that_an_adapter_does_not_have_is_named(adapter):
    with pytest.raises(UnknownNameError, match=f"unknown option of the adapter '{adapter}:' 'num_stps'"):
        load_base(f"{adapter}:x", num_stps=5)
