"""The peer's side: the same model and optimizer in PyTorch, eager or compiled, one model after another."""

import importlib
import sys
from functools import cache, partial
from typing import Any

from minitf.analysis.train_bench.sizes import DECAY, RATE, Size
from minitf.analysis.walk_bench.serve import Task, begin, serve
from minitf.analysis.walk_bench.with_torch import begin_torch, wait


def make_model(size: Size) -> Any:
    """The model, of tokens and targets to the mean loss."""
    return _published(size) if size.published else _written(size)


def _written(size: Size) -> Any:
    """As users of PyTorch write it."""
    torch = importlib.import_module("torch")
    nn, functional = torch.nn, torch.nn.functional

    class Block(nn.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.LayerNorm(size.width)
            self.attention = nn.Linear(size.width, 3 * size.width, bias=False)
            self.output = nn.Linear(size.width, size.width, bias=False)
            self.second = nn.LayerNorm(size.width)
            self.into = nn.Linear(size.width, 4 * size.width, bias=False)
            self.out = nn.Linear(4 * size.width, size.width, bias=False)

        def forward(self, x: Any) -> Any:
            batch, length, width = x.shape
            heads = lambda y: y.view(batch, length, size.heads, width // size.heads).transpose(1, 2)
            q, k, v = map(heads, self.attention(self.first(x)).split(width, dim=2))
            z = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.output(z.transpose(1, 2).reshape(batch, length, width))
            return x + self.out(functional.gelu(self.into(self.second(x)), approximate="tanh"))

    class Gpt(nn.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Embedding(size.vocabulary, size.width)
            self.position = nn.Embedding(size.length, size.width)
            self.blocks = nn.ModuleList([Block() for _ in range(size.layers)])
            self.norm = nn.LayerNorm(size.width)
            nn.init.normal_(self.token.weight, std=0.02)
            nn.init.normal_(self.position.weight, std=0.02)

        def forward(self, tokens: Any, targets: Any) -> Any:
            x = self.token(tokens) + self.position.weight
            for block in self.blocks:
                x = block(x)
            logits = functional.linear(self.norm(x), self.token.weight)
            return functional.cross_entropy(logits.view(-1, size.vocabulary), targets.reshape(-1))

    return Gpt()


def _published(size: Size) -> Any:
    """GPT-2 as transformers has it, with the fused attention of PyTorch."""
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    config = transformers.GPT2Config(
        vocab_size=size.vocabulary,
        n_positions=size.length,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    config._attn_implementation = "sdpa"

    class Published(torch.nn.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.GPT2LMHeadModel(config)

        def forward(self, tokens: Any, targets: Any) -> Any:
            logits = self.model(tokens).logits.float()
            return torch.nn.functional.cross_entropy(logits.view(-1, size.vocabulary), targets.reshape(-1))

    return Published()


def prepare(name: str, asked: dict[str, Any]) -> dict[str, Task]:
    """Training of that size, eager or compiled: one turn of one model."""
    torch = importlib.import_module("torch")
    size = Size(**asked)
    device = torch.get_default_device()
    half = torch.autocast(device.type, torch.bfloat16, enabled=size.precision == "bfloat16")

    @cache  # made, and compiled, when it is first asked for
    def task(compiled: bool) -> Task:
        torch.manual_seed(0)
        model = make_model(size).to(device)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=DECAY, fused=device.type == "cuda"
        )
        run = torch.compile(model) if compiled else model
        windows = torch.randint(0, size.vocabulary, (size.steps, size.batch, size.length + 1))

        def train() -> float:
            for window in windows:
                with half:
                    loss = run(window[:, :-1], window[:, 1:])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            wait()
            return float(loss.detach())

        return train

    def turn(compiled: bool) -> float:
        return task(compiled)()

    return {"eager": partial(turn, False), "compiled": partial(turn, True)}


if __name__ == "__main__":
    where = begin()
    torch = begin_torch(where)
    torch.set_float32_matmul_precision("high")  # on a GPU; as JAX does by itself
    serve({"side": "torch", "version": torch.__version__}, prepare, where)
    sys.exit(0)
