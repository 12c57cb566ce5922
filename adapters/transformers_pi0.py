"""``transformers:<repo or folder>[@revision]``: π0 as `transformers` ships it (``PI0ForConditionalGeneration``).

One prefix pass per decision, any number of noises behind it; on a GPU each is one CUDA graph. Loads safetensors only
and never runs a repository's code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from dsrl_vla.errors import bad, first_line, missing_extra
from dsrl_vla.linear import quicken
from dsrl_vla.noise import NoiseSpace
from dsrl_vla.observation import Observations, ObservationSpec
from dsrl_vla.plain import read_object
from dsrl_vla.policy import Encoding, FrozenPolicy, PolicySpec
from dsrl_vla.recorded import Recorded

from . import pi0_sampling
from .pi0_processing import IMAGE, Pi0Processing, Pi0Statistics
from .refusals import refuse_unsteerable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_OLD, _NEW = "vision_tower.vision_model.", "vision_tower."
"""What transformers 5.5 and 5.23 call the same weights; a checkpoint may come from either."""
_RENAMED = ({r"vision_tower\.(?!vision_model\.)": _OLD}, {r"vision_tower\.vision_model\.": _NEW})
_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")


def _weight(model: Any) -> torch.Tensor:
    return model.action_out_proj.weight


def _sample(model: Any, steps: int, held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A context and noise to the normalised chunk."""
    return {"chunk": pi0_sampling.denoise(model, held, held["noise"], steps)}


class TransformersPi0(FrozenPolicy):
    """A frozen ``PI0ForConditionalGeneration`` with its processing."""

    def __init__(self, model: Any, processing: Pi0Processing, *, uri: str, repo_id: str = "", revision: str = ""):
        self.model = model
        self.processing = processing
        config, stats = model.config, processing.statistics
        actions = len(stats.actions_mean)
        self.spec = PolicySpec(
            uri=uri,
            adapter="transformers",
            noise=NoiseSpace(
                config.chunk_size,
                config.max_action_dim,
                live=tuple(column < actions for column in range(config.max_action_dim)),
            ),
            observation=ObservationSpec(len(stats.state_mean), dict.fromkeys(stats.cameras), prompt=True),
            action_dim=actions,
            executed_steps=config.chunk_size if stats.executed_steps is None else stats.executed_steps,
            sampler_steps=config.num_inference_steps,
            feature_dim=config.vlm_config.text_config.hidden_size,
            dtype=str(model.dtype).removeprefix("torch."),
            repo_id=repo_id,
            revision=revision,
        )

    @property
    def model(self) -> Any:
        """The ``PI0ForConditionalGeneration``. Another one may be put in its place."""
        return self._model

    @model.setter
    def model(self, model: Any) -> None:
        self._model = model.eval().requires_grad_(False)
        quicken(model)
        self._fingerprint = None  # another model is another base
        weight, steps = partial(_weight, model), model.config.num_inference_steps
        whose = f"of transformers {version('transformers')}"  # some of which wait for the GPU in between
        self._look = Recorded(partial(pi0_sampling.look, model), f"π0's prefix {whose}", weight)
        self._sampler = Recorded(partial(_sample, model, steps), f"π0's sampler {whose}", weight)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def _encode(self, observations: Observations, batch: int) -> Encoding:
        inputs = self.processing(observations, self.model.device, self.model.dtype)
        context = self._look(inputs)
        feature = pi0_sampling.pool(context.pop("hidden"), inputs["attention_mask"])
        return Encoding(batch, feature, context | {name: inputs[name] for name in pi0_sampling.READ_BY_EXPERT})

    def _denoise(self, encoding: Encoding, noise: torch.Tensor) -> torch.Tensor:
        chunk = self._sampler(encoding.context | {"noise": noise.to(self.model.device)})["chunk"]
        return self.processing.actions(chunk)

    def pack(self, encoding: Encoding) -> dict[str, torch.Tensor]:
        return encoding.context

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> Encoding:
        return Encoding(len(tensors["state"]), None, {k: v.to(self.model.device) for k, v in tensors.items()})

    def processors(self) -> dict[str, Any]:
        tokenizer = self.processing.tokenizer
        return self.processing.statistics.facts() | {"tokenizer": tokenizer.get_vocab()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights, by the names of transformers 5.23, so that a base hashes alike under any."""
        return {name.replace(_OLD, _NEW): weight for name, weight in self.model.state_dict().items()}


def load(
    source: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    statistics: dict[str, Any] | None = None,
    uri: str = "",
) -> TransformersPi0:
    """Load from a folder, or from the Hub as ``repo/name`` or ``repo/name@revision``.

    Args:
        dtype: float32 or bfloat16.
        statistics: keys of `Pi0Statistics` that the checkpoint's own ``processor_config.json`` lacks.

    Raises:
        NotSteerableError: the checkpoint is of a policy that cannot be steered.
        DsrlError: no such folder or repository, unknown dtype, missing statistics.
        MissingExtraError: transformers is not installed, or older than 5.4.
    """
    if dtype not in DTYPES:
        raise bad("base.dtype", " or ".join(DTYPES), f"'{dtype}'")
    folder, repo_id, revision = resolve(source)
    config = _read_config(folder, source)
    refuse_unsteerable(source, config)
    if config.get("model_type") != "pi0":
        raise bad(f"{source}/config.json", "model_type 'pi0'", f"'{config.get('model_type')}'")
    try:
        from transformers import AutoTokenizer, PI0ForConditionalGeneration
    except ImportError as error:
        raise missing_extra("transformers>=5.4", "transformers", "the adapter 'transformers:'") from error
    with _quiet():
        model = _load_whole(PI0ForConditionalGeneration, folder, DTYPES[dtype], source)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    _prepare(tokenizer, model.config.vlm_config.image_token_id)
    processing = Pi0Processing(Pi0Statistics.load(folder, statistics), tokenizer, model.config.max_state_dim)
    return TransformersPi0(
        model.to(device), processing, uri=uri or f"transformers:{source}", repo_id=repo_id, revision=revision
    )


def _prepare(tokenizer: Any, image_token: int) -> None:
    """As `PI0Processor` does: image tokens come first, and the one <bos> is written out after them.

    Raises:
        DsrlError: its image token is not the model's.
    """
    if IMAGE not in tokenizer.get_vocab():
        from transformers import AddedToken

        tokenizer.add_tokens([AddedToken(IMAGE, normalized=False, special=True)], special_tokens=True)
    tokenizer.add_bos_token = tokenizer.add_eos_token = False
    if (found := tokenizer.convert_tokens_to_ids(IMAGE)) != image_token:
        raise bad(f"tokenizer: {IMAGE}", f"the model's token, {image_token}", found)


def _load_whole(kind: Any, folder: Path, dtype: torch.dtype, source: str) -> Any:
    """Load a model with every weight from the checkpoint: transformers fills in random ones and only warns.

    Raises:
        DsrlError: a weight is missing, or is one that this model does not have.
    """
    wrong: list[str] = []
    for mapping in (None, *_RENAMED):
        model, info = kind.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, key_mapping=mapping
        )
        found = sorted({*info["missing_keys"], *info["unexpected_keys"]})
        if not found:
            return model
        wrong = wrong or found
    raise bad(
        f"{source}: weights", "the model's own, all of them", f"{len(wrong)} missing or unknown, such as {wrong[0]}"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar for a load that takes a moment; the user's own setting is put back."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what is missing is refused below, not warned of
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def resolve(source: str, what: str = "base") -> tuple[Path, str, str]:
    """Return (folder, repo id, resolved revision); downloads from the Hub when `source` is not a folder.

    Raises:
        DsrlError: neither; says so of `what`.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder, "", ""
    repo_id, _, revision = source.partition("@")
    if source.startswith((".", "/", "~")) or repo_id.count("/") != 1:
        raise bad(what, "an existing folder or a Hub repository 'owner/name[@revision]'", f"'{source}'")
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=list(_FILES)))
    except Exception as error:
        wanted = f"a folder '{source}', or a repository '{repo_id}' that can be fetched or is in the cache"
        raise bad(what, wanted, f"no folder, and {first_line(error).rstrip('.: ')}") from error
    return path, repo_id, path.name


def _read_config(folder: Path, source: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise bad(f"base '{source}'", "a config.json", "none in that folder")
    return read_object(path)
