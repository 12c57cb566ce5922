"""π0's processing against transformers' own `PI0Processor`, of whose image processor torchvision is a part."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import randomised_pi0
from dsrl_vla import load_base
from dsrl_vla.adapters.pi0_processing import Pi0Processing, Pi0Statistics
from dsrl_vla.errors import DsrlError

PLAIN = Pi0Statistics(("a",), 224, 256, (0.0,), (1.0,), (0.0,), (1.0,))


@pytest.mark.parametrize("shape", [(480, 848), (640, 480), (224, 224), (101, 350)])
def test_a_picture_lies_where_the_upstream_processor_puts_it(shape):
    pytest.importorskip("torchvision")
    from transformers.models.pi0.image_processing_pi0 import PI0ImageProcessor

    rng = np.random.default_rng(0)
    picture = np.kron(rng.integers(0, 256, (-(-shape[0] // 32), -(-shape[1] // 32), 3)), np.ones((32, 32, 1)))
    picture = picture[: shape[0], : shape[1]].astype(np.uint8)
    expected = PI0ImageProcessor()([picture], return_tensors="pt")["pixel_values"][0]
    found = Pi0Processing(PLAIN, None, 32)._image(picture[None], torch.device("cpu"))[0]
    assert found.shape == expected.shape == (3, 224, 224)
    filled = lambda pixels: (pixels != 0).any(0).nonzero().amax(0).tolist()  # the rest is padding
    assert filled(found) == filled(expected)
    assert (found - expected).abs().mean() < 0.002 and (found - expected).abs().max() < 0.1  # theirs goes by bytes


@pytest.mark.parametrize(("padding", "rows", "around"), [("corner", (0, 16), 0.0), ("center", (8, 24), -1.0)])
def test_a_picture_of_another_shape_keeps_its_aspect(padding, rows, around):
    processing = Pi0Processing(replace(PLAIN, image_size=32, padding=padding), None, 32)
    found = processing._image(np.full((1, 20, 40, 3), 255, np.uint8), torch.device("cpu"))[0]
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[slice(*rows)] = True
    assert (found[:, inside] > 0.99).all() and (found[:, ~inside] == around).all()
    assert ("padding" in processing.statistics.facts()) == (padding == "center")  # heads know of none


def test_a_tokenizer_that_puts_bos_first_is_kept_from_it(tmp_path, observation):
    """As Gemma's does: it would shift every image token by one."""
    from tokenizers.processors import TemplateProcessing

    base = randomised_pi0()
    tokenizer = base.processing.tokenizer
    template = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = template
    base.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base.processing.statistics.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    with pytest.raises(DsrlError, match="tokenizer: expected 8 tokens '<image>' before the prompt"):
        base.act(observation(base), seed=0)
    loaded, plain = load_base(f"transformers:{tmp_path}"), randomised_pi0()
    seen = observation(loaded)
    assert torch.allclose(loaded.act(seen, seed=0), plain.act(seen, seed=0), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"padding": "middle"}, "statistics.padding: expected corner or center, got 'middle'"),
        ({"state_std": (1.0, 1.0)}, "statistics.state_std: expected 1 numbers, as in state_mean, got 2"),
    ],
)
def test_statistics_are_checked(changes, words):
    with pytest.raises(DsrlError, match=words):
        replace(PLAIN, **changes)


def test_statistics_that_the_model_cannot_take_are_refused(tmp_path):
    wide = replace(PLAIN, state_mean=(0.0,) * 40, state_std=(1.0,) * 40)
    with pytest.raises(DsrlError, match="statistics.state_mean: expected at most the model's 32 numbers, got 40"):
        Pi0Processing(wide, None, 32)
    PLAIN.save(tmp_path)
    path = tmp_path / "processor_config.json"
    raw = json.loads(path.read_text())
    raw["image_processor"]["image_mean"] = [0.485, 0.456, 0.406]
    path.write_text(json.dumps(raw))
    with pytest.raises(DsrlError, match="image_mean: expected the same number for every channel"):
        Pi0Statistics.load(tmp_path)
