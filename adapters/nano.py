"""``nano:``: the miniature π0 that ships with the package, or ``nano:<folder>`` for one made by `pretrain`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from dsrl_vla.errors import bad

from . import transformers_pi0


def load(
    source: str = "", *, dtype: str = "float32", device: str = "cpu", uri: str = ""
) -> transformers_pi0.TransformersPi0:
    """Load the embedded base (empty source) or a folder that ``dsrl-vla pretrain`` wrote.

    Raises:
        DsrlError: the folder holds no base; or as `transformers_pi0.load`.
    """
    embedded = Path(str(resources.files("dsrl_vla.nano").joinpath("base")))
    folder = Path(source).expanduser() if source else embedded
    if not (folder / "config.json").exists():
        raise bad("base 'nano:'", "a folder made by `dsrl-vla pretrain`", f"'{folder}' without a config.json")
    return transformers_pi0.load(str(folder), dtype=dtype, device=device, uri=uri or f"nano:{source}")
