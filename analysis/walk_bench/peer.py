"""The peers' side of ``minitf bench walk``: TransformerLens (3 or 4) and transformers, as a worker on one core.

Run as a script, also by the interpreter of another environment: of minitf it imports only the loop beside it.
"""

import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parent)
from serve import Task, begin, serve  # noqa: E402
from with_torch import begin_torch, wait  # noqa: E402


def main() -> None:
    """Serve; on a CPU with one core and one thread."""
    device = begin()
    begin_torch(device).set_grad_enabled(False)
    has_lens = importlib.util.find_spec("transformer_lens") is not None
    names = ["torch", "transformers", *(["transformer-lens"] if has_lens else [])]
    serve({name: importlib.metadata.version(name) for name in names}, prepare, device)


def prepare(folder: str, size: dict[str, int]) -> dict[str, Task]:
    """What can be measured of a model."""
    import torch  # noqa: PLC0415
    from transformers import GPT2LMHeadModel  # noqa: PLC0415

    model = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
    # Where new tensors are made, too: on the GPU, if there is one to measure on.
    model = model.to(torch.get_default_device())
    corrupt, clean = (torch.tensor(x) for x in json.loads((Path(folder) / "tokens.json").read_text()))
    writing = {"max_new_tokens": size["new_tokens"], "min_new_tokens": size["new_tokens"], "do_sample": False}

    def written() -> Any:
        whole = model.generate(corrupt, attention_mask=torch.ones_like(corrupt), pad_token_id=0, **writing)
        return whole[:, corrupt.shape[1] :].tolist()

    tasks: dict[str, Task] = {
        "hf forward": lambda: _done(model(corrupt).logits),
        "hf generate": written,
    }
    if importlib.util.find_spec("transformer_lens") is not None:
        tasks |= _lens_tasks(_lens_model(model, folder), corrupt, clean)
    return tasks


def _lens_model(model: Any, folder: str) -> Any:
    """The same model in TransformerLens: a HookedTransformer up to version 3, a bridge since."""
    if int(importlib.metadata.version("transformer-lens").split(".")[0]) >= 4:
        from transformer_lens.model_bridge import TransformerBridge  # noqa: PLC0415

        return TransformerBridge.boot_transformers(folder, hf_model=model)
    from transformer_lens import HookedTransformer, HookedTransformerConfig  # noqa: PLC0415
    from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights  # noqa: PLC0415

    c = model.config
    config = HookedTransformerConfig(
        n_layers=c.n_layer,
        d_model=c.n_embd,
        n_heads=c.n_head,
        d_head=c.n_embd // c.n_head,
        d_mlp=4 * c.n_embd,
        d_vocab=c.vocab_size,
        n_ctx=c.n_positions,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=c.layer_norm_epsilon,
        device=str(model.device),
        default_prepend_bos=False,
    )
    lens = HookedTransformer(config)
    lens.load_state_dict(convert_gpt2_weights(model, config), strict=False)
    return lens.eval()


def _lens_tasks(lens: Any, corrupt: Any, clean: Any) -> dict[str, Task]:
    import torch  # noqa: PLC0415

    name = "blocks.{}.attn.hook_z"
    layers, heads = lens.cfg.n_layers, lens.cfg.n_heads

    def sweep() -> list[float]:
        """Every head's output replaced by its clean value, one run each: the usual loop."""
        _, cache = lens.run_with_cache(clean, names_filter=lambda hook: hook.endswith("hook_z"))
        found = []
        for layer in range(layers):
            value = cache[name.format(layer)]
            for head in range(heads):
                logits = lens.run_with_hooks(corrupt, fwd_hooks=[(name.format(layer), _replaced(value, head))])
                found.append(logits[:, -1, 3].mean().item())
        return found

    def ablation() -> list[float]:
        """Every head's association made uniform, one run each; the loss of the next token."""
        uniform = torch.ones(corrupt.shape[1], corrupt.shape[1]).tril()
        uniform = uniform / uniform.sum(dim=-1, keepdim=True)
        found = []
        for layer in range(layers):
            for head in range(heads):
                change = (f"blocks.{layer}.attn.hook_pattern", _set(uniform, head))
                says = lens.run_with_hooks(corrupt, fwd_hooks=[change])[:, :-1].flatten(0, 1)
                found.append(torch.nn.functional.cross_entropy(says, corrupt[:, 1:].flatten()).item())
        return found

    return {
        "forward": lambda: _done(lens(corrupt)),
        "everything": lambda: _done(lens.run_with_cache(corrupt)),
        "sweep": sweep,
        "ablation": ablation,
    }


def _replaced(value: Any, head: int) -> Callable[[Any, Any], Any]:
    def hook(z: Any, hook: Any) -> Any:
        z[:, :, head] = value[:, :, head]
        return z

    return hook


def _set(value: Any, head: int) -> Callable[[Any, Any], Any]:
    def hook(pattern: Any, hook: Any) -> Any:
        pattern = pattern.clone()
        pattern[:, head] = value
        return pattern

    return hook


def _done(value: Any) -> None:
    """Wait until a GPU has made it, and drop it: its numbers are not compared."""
    del value
    wait()


if __name__ == "__main__":
    main()
