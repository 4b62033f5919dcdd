"""The model once more, in plain float64 numpy: head by head, rotary by complex numbers, nothing shared."""

import math

import numpy as np


def forward(weights, tokens, config, valid=None):
    """Logits and the leaves a reader would check, by the walk's names.

    ``weights`` is ``minitf.parameters.named``; all numbers are taken to float64 first.
    """
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    x = start(w, tokens, config)
    found = {"start": x}
    per_layer = []
    for index in range(config.layers):
        part = {name[7:]: value[index] for name, value in w.items() if name.startswith("layers.")}
        x, leaves = layer(x, part, config, valid)
        per_layer.append(leaves)
    for name in per_layer[0]:
        found[f"layers.{name}"] = np.stack([leaves[name] for leaves in per_layer])
    found["end"] = x
    if config.norm != "none" and config.norm_placement == "pre":
        x = norm(x, w, "final_norm", config)
    found["context"] = x
    table = w["embedding"].T if config.tied else w["unembedding"]
    found["logits"] = x @ table + w.get("unembedding_bias", 0.0)
    return found


def start(w, tokens, config):
    length = tokens.shape[1]
    if config.embedding == "one_hot":
        x = np.eye(config.vocabulary)[tokens]
    else:
        x = w["embedding"][tokens] * config.embedding_scale
    if config.position == "learned":
        x = x + w["position"][:length]
    elif config.position == "sinusoidal":
        for t in range(length):
            for i in range(config.width):
                angle = t / 10000 ** (2 * (i // 2) / config.width)
                x[:, t, i] += math.cos(angle) if i % 2 else math.sin(angle)
    return norm(x, w, "embedding_norm", config) if config.embedding_norm else x


def layer(x, w, config, valid):
    pre = config.norm != "none" and config.norm_placement == "pre"
    post = config.norm != "none" and config.norm_placement == "post"
    leaves = {"resid_pre": x}
    attended, found = attention(norm(x, w, "attention_norm", config) if pre else x, w, config, valid)
    mid = x + attended if config.residual else attended
    if post:
        mid = norm(mid, w, "attention_norm", config)
    leaves |= found | {"attention_step": attended, "resid_mid": mid}
    end = mid
    if config.feed_forward != "none":
        source = x if config.parallel else mid
        step = feed_forward(norm(source, w, "feed_forward_norm", config) if pre else source, w, config)
        end = mid + step if config.residual else step
        if post:
            end = norm(end, w, "feed_forward_norm", config)
        leaves["feed_forward_step"] = step
    return end, leaves | {"resid_post": end}


def norm(x, w, name, config):
    if config.norm == "l2":
        length = np.linalg.norm(x, axis=-1, keepdims=True)
        return np.divide(x, length, out=np.zeros_like(x), where=length > 0)
    if config.norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon)
    return x * w[f"{name}.gain"] + w.get(f"{name}.offset", 0.0)


def attention(x, w, config, valid):
    batch, length, _ = x.shape
    patterns, total = [], 0.0
    for head in range(config.heads):
        group = head // (config.heads // (config.key_value_heads or config.heads))
        if config.attention == "table":
            scores = np.einsum("bqi,ij,bkj->bqk", x, w["attention.table"][head], x)
            values = x
        else:
            q = project(x, w, "query", head)
            k, values = project(x, w, "key", group), project(x, w, "value", group)
            if config.position == "rotary":
                q, k = rotate(q, config), rotate(k, config)
            scores = np.einsum("bqc,bkc->bqk", q, k) / math.sqrt(q.shape[-1])
        pattern = np.zeros((batch, length, length))
        for b, t in np.ndindex(batch, length):
            keys = [s for s in range(length) if may_see(t, s, config) and (valid is None or valid[b, s])]
            logit = np.array([scores[b, t, s] - slope(head, config) * abs(t - s) for s in keys])
            if keys:
                pattern[b, t, keys] = np.exp(logit - logit.max()) / np.exp(logit - logit.max()).sum()
        z = pattern @ values
        total = total + (z if config.attention == "table" else z @ w["attention.output"][head])
        patterns.append(pattern)
    return total + w.get("attention.output_bias", 0.0), {"pattern": np.stack(patterns, axis=1)}


def project(x, w, name, head):
    bias = w.get(f"attention.{name}_bias")
    return x @ w[f"attention.{name}"][:, head] + (0.0 if bias is None else bias[head])


def may_see(query, key, config):
    return (key <= query or not config.causal) and (key != query or config.attend_self)


def slope(head, config):
    """ALiBi, for the powers of two of the published formula and the rule for the numbers between."""
    if config.position != "alibi":
        return 0.0
    power = 1
    while 2 * power <= config.heads:
        power *= 2
    if head < power:
        return 2.0 ** (-8 * (head + 1) / power)
    return 2.0 ** (-8 * (2 * (head - power) + 1) / (2 * power))


def rotate(x, config):
    turning = int(x.shape[-1] * config.rotary_fraction)
    out = x.copy()
    for t in range(x.shape[1]):
        for pair in range(turning // 2):
            first, second = (2 * pair, 2 * pair + 1) if config.rotary_interleaved else (pair, pair + turning // 2)
            angle, growth = t * config.rotary_base ** (-2 * pair / turning), 1.0
            if config.rotary_scaling is not None:
                angle *= pace(pair, turning, config)
                growth = config.rotary_scaling.attention_factor
            turned = growth * (x[:, t, first] + 1j * x[:, t, second]) * np.exp(1j * angle)
            out[:, t, first], out[:, t, second] = turned.real, turned.imag
    return out


def pace(pair, turning, config):
    """How fast a pair turns in a model for longer texts, as a share of how fast it turned before."""
    scaling = config.rotary_scaling
    turns = lambda j: scaling.original_length * config.rotary_base ** (-2 * j / turning) / (2 * math.pi)
    if scaling.rule == "linear" or turns(pair) < scaling.slow_turns:
        return 1 / scaling.factor
    if turns(pair) > scaling.fast_turns and scaling.rule == "llama3":
        return 1.0
    if scaling.rule == "llama3":
        smooth = (turns(pair) - scaling.slow_turns) / (scaling.fast_turns - scaling.slow_turns)
        return (1 - smooth) / scaling.factor + smooth
    # The whole pairs around the two bounds, found by looking.
    first = max([j for j in range(turning) if turns(j) >= scaling.fast_turns], default=0)
    last = next((j for j in range(turning) if turns(j) <= scaling.slow_turns), turning - 1)
    slowed = min(max((pair - first) / (last - first), 0.0), 1.0)
    return (1 - slowed) + slowed / scaling.factor


def feed_forward(x, w, config):
    pre = x @ w["feed_forward.into"] + w.get("feed_forward.into_bias", 0.0)
    if config.feed_forward == "relu":
        post = np.where(pre > 0, pre, 0.0)
    elif config.feed_forward == "gelu":
        post = pre * 0.5 * (1 + np.vectorize(math.erf)(pre / math.sqrt(2)))
    elif config.feed_forward == "gelu_tanh":
        post = 0.5 * pre * (1 + np.tanh(math.sqrt(2 / math.pi) * (pre + 0.044715 * pre**3)))
    else:
        gate = x @ w["feed_forward.gate"] + w.get("feed_forward.gate_bias", 0.0)
        post = pre / (1 + np.exp(-pre)) * gate
    return post @ w["feed_forward.out"] + w.get("feed_forward.out_bias", 0.0)
