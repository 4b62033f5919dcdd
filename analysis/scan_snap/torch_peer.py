"""Scan and Snap's synthetic runs as a PyTorch user writes them: what our speed is measured against.

``python -m minitf.analysis.scan_snap.torch_peer`` reads jobs from standard input, one JSON object per line, and
answers each with a line; a process of its own, because the thread pools of PyTorch and XLA get in each other's
way. PyTorch is imported when a run begins, so this file can be imported without it.
"""

import importlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

from minitf.train.sequence_classes import SequenceClasses

Form = Literal["positions", "counts"]


@dataclass(frozen=True)
class Job:
    """One run: data, rates, length of training.

    ``form`` says whether the model reads positions or counts; ``threads`` 0 leaves PyTorch's own choice.
    """

    queries: int
    next_per_query: int
    decoder_rate: float
    attention_rate: float
    steps: int
    form: Form = "positions"
    threads: int = 0
    batch: int = 128
    length: int = 128
    common: int = 10
    distinct: int = 10
    momentum: float = 0.9
    seed: int = 0

    @property
    def data(self) -> SequenceClasses:
        """The data set."""
        return SequenceClasses(self.queries, self.next_per_query, self.common, self.distinct, self.length)


def _torch() -> Any:
    """PyTorch, imported when it is first needed and in no other process than that."""
    return importlib.import_module("torch")


def tables(vocabulary: int) -> Any:
    """The model's parameters: Y as a linear layer without bias, Z as an embedding, uniform(+-1/sqrt(M))."""
    torch = _torch()

    decoder = torch.nn.Linear(vocabulary, vocabulary, bias=False)  # its default initialization is just that
    attention = torch.nn.Embedding(vocabulary, vocabulary)
    torch.nn.init.uniform_(attention.weight, -(vocabulary**-0.5), vocabulary**-0.5)
    return torch.nn.ModuleDict({"decoder": decoder, "attention": attention})


def logits_of_positions(model: Any, tokens: Any) -> Any:
    """Logits [batch, vocabulary] of sequences [batch, position] whose last token is the query."""
    torch = _torch()

    context, query = tokens[:, :-1], tokens[:, -1]
    z = model["attention"](query)
    b = torch.softmax(z.gather(1, context), dim=1)
    v = torch.zeros_like(z).scatter_add(1, context, b)
    return model["decoder"](torch.nn.functional.normalize(v, dim=1))


def logits_of_counts(model: Any, queries: Any, counts: Any) -> Any:
    """The same from counts [batch, token] of the first tokens of the vocabulary."""
    torch = _torch()

    token = counts.shape[1]
    z = model["attention"](queries)[:, :token]
    v = torch.softmax(z + torch.log(counts), dim=1)  # a token that does not occur has weight exp(-inf) = 0
    normalized = torch.nn.functional.normalize(v, dim=1)
    return torch.nn.functional.linear(normalized, model["decoder"].weight[:, :token])


def sgd(model: Any, job: Job) -> Any:
    """SGD with momentum and a rate for each table."""
    torch = _torch()

    groups = [
        {"params": model["decoder"].parameters(), "lr": job.decoder_rate},
        {"params": model["attention"].parameters(), "lr": job.attention_rate},
    ]
    return torch.optim.SGD(groups, lr=job.decoder_rate, momentum=job.momentum)


def step(model: Any, optimizer: Any, logits: Any, labels: Any) -> Any:
    """One step of training; the loss before it."""
    torch = _torch()

    loss = torch.nn.functional.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def train(job: Job) -> dict[str, float]:
    """One run in eager PyTorch: its duration in seconds, data included, and its last loss."""
    torch = _torch()

    began = time.perf_counter()
    torch.manual_seed(job.seed)
    data = job.data
    probability = torch.tensor(data.probability, dtype=torch.float32)
    class_queries, class_labels = torch.tensor(data.class_queries), torch.tensor(data.class_labels)
    model = tables(data.vocabulary)
    optimizer = sgd(model, job)
    loss = torch.tensor(float("nan"))
    for _ in range(job.steps):
        classes = torch.randint(data.classes, (job.batch,))
        context = torch.multinomial(probability[classes], data.length - 1, replacement=True)
        queries = class_queries[classes]
        if job.form == "positions":
            logits = logits_of_positions(model, torch.cat([context, queries[:, None]], dim=1))
        else:
            counts = torch.zeros(job.batch, data.contextual)
            counts.scatter_add_(1, context, torch.ones(()).expand_as(context))
            logits = logits_of_counts(model, queries, counts)
        loss = step(model, optimizer, logits, class_labels[classes])
    return {"loss": loss.item(), "seconds": time.perf_counter() - began}


def line(job: Job) -> str:
    """A job as :func:`main` reads it."""
    return json.dumps(asdict(job))


def main() -> None:
    """Answer jobs until the input ends. The first line tells PyTorch's version and number of threads."""
    torch = _torch()

    print(json.dumps({"version": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    usual = torch.get_num_threads()
    for text in sys.stdin:
        job = Job(**json.loads(text))
        torch.set_num_threads(job.threads or usual)
        print(json.dumps(train(job)), flush=True)


if __name__ == "__main__":
    main()
