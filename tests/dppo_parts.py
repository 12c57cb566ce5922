"""Checkpoints in the layout of DPPO's, with random weights, and the same computation written in numpy."""

import numpy as np
import torch

STATE, ACTION, CHUNK, TIME = 5, 3, 4, 16


def tensors(residual=True, norm=False, condition=(), width=12, depth=3, seed=0):
    """The network's weights by DPPO's names, without the prefix."""
    rng = np.random.default_rng(seed)
    flat, made = CHUNK * ACTION, {}

    def linear(name, into, out):
        made[f"{name}.weight"] = rng.normal(size=(out, into)) / np.sqrt(into)
        made[f"{name}.bias"] = 0.3 * rng.normal(size=out)

    def layer_norm(name):
        made[f"{name}.weight"], made[f"{name}.bias"] = rng.normal(1, 0.3, width), 0.3 * rng.normal(size=width)

    linear("time_embedding.1", TIME, 2 * TIME), linear("time_embedding.3", 2 * TIME, TIME)
    told = STATE
    for i, size in enumerate(condition):
        linear(f"cond_mlp.moduleList.{i}.linear_1", told, size)
        told = size
    sizes = [TIME + flat + told] + [width] * depth + [flat]
    if not residual:
        for i in range(len(sizes) - 1):
            linear(f"mlp_mean.moduleList.{i}.linear_1", sizes[i], sizes[i + 1])
            if norm and i < len(sizes) - 2:
                layer_norm(f"mlp_mean.moduleList.{i}.norm_1")
        return made
    blocks = (depth - 1) // 2
    linear("mlp_mean.layers.0", sizes[0], width), linear(f"mlp_mean.layers.{blocks + 1}", width, flat)
    for block in range(1, blocks + 1):
        for i in (1, 2):
            linear(f"mlp_mean.layers.{block}.l{i}", width, width)
            if norm:
                layer_norm(f"mlp_mean.layers.{block}.norm{i}")
    return made


def limits(seed=0):
    rng = np.random.default_rng(seed)
    low, reach = rng.normal(size=STATE), rng.uniform(1, 3, STATE)
    return {"obs_min": low, "obs_max": low + reach, "action_min": -np.array([1.0, 2, 3]), "action_max": np.ones(3)}


def save(folder, weights=None, name="state_5000.pt"):
    """Write checkpoint and normalization.npz; return the checkpoint's path. `ema` differs from `model`."""
    weights = tensors() if weights is None else weights
    model = {f"network.{k}": torch.tensor(v, dtype=torch.float32) for k, v in weights.items()}
    torch.save({"epoch": 5000, "model": model, "ema": {k: 0.9 * v for k, v in model.items()}}, folder / name)
    np.savez(folder / "normalization.npz", **limits())
    return folder / name


def mish(x):
    return x * np.tanh(np.log1p(np.exp(x)))


def relu(x):
    return np.maximum(x, 0)


def predict(w, x, t, state, act):
    """The noise that DPPO's network sees in x (H * A,) at timestep t; everything in float64."""

    def linear(name, v):
        return w[f"{name}.weight"] @ v + w[f"{name}.bias"]

    def norm(name, v, eps):
        if f"{name}.weight" not in w:
            return v
        return (v - v.mean()) / np.sqrt(v.var() + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def plain(prefix, v):
        last = max(int(k.split(".")[2]) for k in w if k.startswith(prefix))
        for i in range(last + 1):
            v = linear(f"{prefix}.{i}.linear_1", v)
            v = act(norm(f"{prefix}.{i}.norm_1", v, 1e-5)) if i < last else v
        return v

    angles = t * 10000.0 ** (-np.arange(TIME // 2) / (TIME // 2 - 1))
    time = linear("time_embedding.3", mish(linear("time_embedding.1", np.r_[np.sin(angles), np.cos(angles)])))
    if "cond_mlp.moduleList.0.linear_1.weight" in w:
        state = plain("cond_mlp.moduleList", state)
    v = np.r_[x, time, state]
    if "mlp_mean.layers.0.weight" not in w:
        return plain("mlp_mean.moduleList", v)
    v = linear("mlp_mean.layers.0", v)
    last = max(int(k.split(".")[2]) for k in w if k.startswith("mlp_mean.layers"))
    for i in range(1, last):
        inner = linear(f"mlp_mean.layers.{i}.l1", act(norm(f"mlp_mean.layers.{i}.norm1", v, 1e-6)))
        v = v + linear(f"mlp_mean.layers.{i}.l2", act(norm(f"mlp_mean.layers.{i}.norm2", inner, 1e-6)))
    return linear(f"mlp_mean.layers.{last}", v)


def reference(w, state, noise, act, ddim_steps, steps=20):
    """Actions (H, A) in environment units for one state (S,) and one noise (H, A)."""
    f = [np.cos((i * (steps + 1) / steps / (steps + 1) + 0.008) / 1.008 * np.pi / 2) ** 2 for i in range(steps + 1)]
    alphas = np.cumprod([1 - min(1 - f[i + 1] / f[i], 0.999) for i in range(steps)])
    span = limits()
    seen = 2 * (state - span["obs_min"]) / (span["obs_max"] - span["obs_min"] + 1e-6) - 1
    x, times = noise.reshape(-1).astype(float), [i * (steps // ddim_steps) for i in range(ddim_steps)]
    for i in reversed(range(ddim_steps)):
        a, b = alphas[times[i]], alphas[times[i - 1]] if i else 1.0
        clean = np.clip((x - np.sqrt(1 - a) * predict(w, x, times[i], seen, act)) / np.sqrt(a), -1, 1)
        x = np.sqrt(b) * clean + np.sqrt(1 - b) * (x - np.sqrt(a) * clean) / np.sqrt(1 - a)
    return (x.reshape(noise.shape) + 1) / 2 * (span["action_max"] - span["action_min"]) + span["action_min"]
