import numpy as np
import pytest
from dsrl_vla.errors import DsrlError
from dsrl_vla.observation import ObservationSpec, batch, select

SPEC = ObservationSpec(3, {"front": (8, 8, 3), "wrist": None})


def good():
    return {
        "observation.state": np.zeros((2, 3), np.float32),
        "observation.images.front": np.zeros((2, 8, 8, 3), np.uint8),
        "observation.images.wrist": np.zeros((2, 5, 9, 3), np.uint8),
        "task": ["open", "close"],
    }


def test_a_good_batch_passes():
    assert SPEC.check(good()) == 2


nan = np.zeros((2, 3), np.float32)
nan[1, 2] = np.nan


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("observation.state", nan, r"observation.state\[1, 2\]: expected a finite number, got nan"),
        ("observation.state", nan + np.inf, r"observation.state\[0, 0\]: expected a finite number, got inf"),
        ("observation.state", np.zeros((2, 4)), r"observation.state: expected shape \(B, 3\), got \(2, 4\)"),
        ("observation.state", np.full((2, 3), "x"), "observation.state: expected numbers"),
        ("observation.images.front", np.zeros((2, 9, 8, 3), np.uint8), r"front: expected shape \(2, 8, 8, 3\)"),
        (
            "observation.images.front",
            np.zeros((2, 8, 8, 3)),
            r"front: expected uint8 in \[0, 255\], got dtype float64",
        ),
        ("observation.images.wrist", np.zeros((2, 8, 8, 4), np.uint8), r"wrist: expected shape \(2, H, W, 3\)"),
        ("observation.images.wrist", np.zeros((1, 8, 8, 3), np.uint8), r"wrist: expected shape \(2, H, W, 3\)"),
        ("task", "open", "task: expected a list of 2 prompts"),
        ("task", ["open"], "task: expected a list of 2 prompts"),
        ("task", [1, 2], "task: expected a list of 2 prompts"),
        ("task", None, "task: expected a list of 2 prompts, got None"),
        ("observation.state", np.full((2, 3), 1e39), r"\[0, 0\]: expected a number that float32 holds, got 1e\+39"),
        ("observation.images.wrist", np.zeros((2, 0, 8, 3), np.uint8), r"wrist: expected shape \(2, H, W, 3\)"),
    ],
)
def test_each_fault_is_refused_by_name_on_one_line(key, value, message):
    with pytest.raises(DsrlError, match=message) as caught:
        SPEC.check(good() | {key: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", sorted(good()))
def test_a_missing_key_is_named(key):
    observations = good()
    del observations[key]
    with pytest.raises(DsrlError, match=f"{key}: expected to be in the observation"):
        SPEC.check(observations)


def test_batch_and_select_are_inverse():
    singles = [{"observation.state": np.full(3, i, np.float32), "task": f"p{i}"} for i in range(3)]
    chosen = select(batch(singles), [2, 0])
    assert chosen["task"] == ["p2", "p0"]
    assert (chosen["observation.state"][:, 0] == [2, 0]).all()
