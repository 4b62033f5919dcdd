"""Real checkpoints: loaded into minitf, and written so that ``transformers`` loads them.

Every tensor of a file is accounted for and only its name and layout change, so what is loaded and saved again is
the same to the bit. Weights are read from safetensors alone: opening them runs no code. Only a source that begins
with ``hub:`` goes to the network.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save as to_safetensors

from minitf import tokenizer as tokenizers
from minitf.config import ModelConfig
from minitf.declaration import check_fit
from minitf.families import bert, bloom, gpt2, gpt_neox, llama, llama2c, llama2c_tokenizer, native, tokenizer_json
from minitf.families.mapping import Family, check_finite, read, write
from minitf.families.tokenizer_json import JsonTokenizer
from minitf.families.weights import INDEX, ONE, open_folder, read_json, shards
from minitf.files import write_atomically
from minitf.parameters import Parameters, named, stack_layers
from minitf.tokenizer_file import TokenizerFile
from minitf.vocabulary import FILE as VOCABULARY
from minitf.vocabulary import Tokenizer, load_vocabulary, vocabulary_of

# By the "model_type" of a config.json.
FAMILIES: dict[str, Family] = {
    "bert": bert.FAMILY,
    "bloom": bloom.FAMILY,
    "gpt2": gpt2.FAMILY,
    "gpt_neox": gpt_neox.FAMILY,
    "llama": llama.LLAMA,
    "mistral": llama.MISTRAL,
    "qwen2": llama.QWEN2,
    "qwen3": llama.QWEN3,
}
_GPT2_VOCABULARY = 50257
# merges.txt, the name of GPT-2's vocab.bpe on the hub.
_GPT2_MERGES = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


@dataclass(frozen=True)
class Pretrained:
    """A model with its weights.

    ``family`` is the ``model_type`` of its config.json ("minitf": our own), or "llama2c". ``tokenizer`` has
    ``encode``, ``decode`` and ``n_vocab``: a ``tiktoken.Encoding`` for GPT-2's, llama2.c's own, or that of the
    folder's tokenizer.json (:class:`minitf.families.tokenizer_json.JsonTokenizer`). It is None where there is
    none, or where the package ``tokenizers``, which runs the last, is not installed.
    """

    family: str
    config: ModelConfig
    parameters: Parameters
    tokenizer: Any = None


def load(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: Any = jnp.float32,
    tokenizer: str | os.PathLike[str] | None = None,
) -> Pretrained:
    """Load a checkpoint.

    Args:
        source: a folder with config.json and model.safetensors (or shards and model.safetensors.index.json); a
            llama2.c ``.bin`` file; or ``hub:owner/name``, which huggingface_hub fetches (install it for that).
            Checkpoints of ``minitf train`` are read by :func:`minitf.train.kept_models.load`.
        revision: branch, tag or commit on the hub, such as Pythia's ``step1000``; main when not given.
        dtype: the floating-point type of the parameters, whatever that of the file.
        tokenizer: llama2.c's tokenizer file; else tokN.bin (N tokens) or tokenizer.bin beside the model is taken,
            where there is one.

    Raises:
        ValueError: nothing there; an architecture or setting that minitf cannot express; a file that is damaged or
            not safetensors; an unknown, missing or misshapen tensor; NaN or infinity; a tokenizer that is damaged
            or another model's. Always before anything is compiled, and with the name of what is wrong.
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype is {dtype.name}; parameters are floating-point, such as float32")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"dtype is {dtype.name}, which JAX has only under jax.enable_x64(True)")
    name = os.fspath(source)
    if name.startswith("hub:"):
        folder = _fetch(name.removeprefix("hub:"), revision)
    elif revision is not None:
        raise ValueError(f"revision is {revision!r}, which only a model on the hub has: hub:owner/name")
    else:
        folder = Path(name)
    if folder.is_file():
        return _load_llama2c(folder, dtype, tokenizer)
    if tokenizer is not None:
        raise ValueError("tokenizer names llama2.c's tokenizer file, and only a llama2.c .bin file takes one")
    if not folder.is_dir():
        hint = f"; a model on the hub is named hub:{name}" if name.count("/") == 1 and name[0] not in "/.~" else ""
        raise ValueError(f"there is no file or folder {name!r}{hint}")
    return _load_folder(folder, dtype)


def save(folder: str | os.PathLike[str], pretrained: Pretrained) -> None:
    """Write config.json and model.safetensors, which ``transformers`` loads with the same logits.

    The family "minitf" is our own: any configuration, for :func:`load` alone, with its vocabulary. Each tensor is
    written in the dtype in which it is. Of other families a tokenizer.json is written too where the model was
    read with it (GPT-2's is not, where tiktoken has it), and settings for generation are not.

    Raises:
        ValueError: the folder holds a model already; the family has no such configuration; parameters that do not
            fit it or are not finite.
    """
    folder, config = Path(folder), pretrained.config
    if pretrained.family == "llama2c":
        raise ValueError(
            "transformers does not know llama2.c's rotary pairs: convert with minitf.families.llama2c.as_llama, "
            "and save that as the family 'llama'"
        )
    family = None if pretrained.family == native.NAME else _family(pretrained.family, "family")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder")
    there = [path.name for name in ("config.json", INDEX, "*.safetensors", "*.bin") for path in folder.glob(name)]
    if there:
        raise ValueError(f"{folder} holds a model already ({there[0]}); choose another folder")
    parameters = pretrained.parameters
    check_fit(parameters, config)
    if not isinstance(config.mixer, tuple):
        parameters = stack_layers(parameters)
    for weight, value in named(parameters).items():
        check_finite(np.asarray(value), f"the weight {weight}")
    vocabulary = vocabulary_of(pretrained.tokenizer)
    if family is None:
        native.save(folder, config, parameters, vocabulary)
        return
    settings = family.json(config)
    lost = _differences(config, family.config(settings))
    if lost:
        raise ValueError(
            f"the family {pretrained.family} cannot express this configuration: it has no way to say "
            f"{', '.join(lost)}"
        )
    arrays = write(family, config, parameters)
    settings["dtype"] = arrays[family.tensors[0].theirs].dtype.name
    # The configuration last: a folder without one is not a model.
    write_atomically(folder / ONE, to_safetensors(arrays, {"format": "pt"}))
    if isinstance(vocabulary, TokenizerFile) and isinstance(vocabulary.tokenizer, JsonTokenizer):
        write_atomically(folder / "tokenizer.json", vocabulary.tokenizer.file)
    write_atomically(folder / "config.json", (json.dumps(settings, indent=2) + "\n").encode())


def _load_folder(folder: Path, dtype: Any) -> Pretrained:
    file = folder / "config.json"
    if not file.is_file():
        if folder.name == "checkpoints":
            raise ValueError(
                f"{folder} holds the models of a run on its way: name one by its step, as {folder / '64'}"
            )
        raise ValueError(f"{folder} has no config.json, without which the model is not known")
    settings = read_json(file)
    name = settings.get("model_type")
    for inner in (folder / "model", folder / "models" / "0"):
        if name is None and (inner / "config.json").is_file():
            raise ValueError(f"{folder} is the folder of a run; its model is in {inner}")
    if name is None and (folder / "checkpoints").is_dir():
        raise ValueError(
            f"{folder} is the folder of a run that did not end; what it kept on the way are the models in "
            f"{folder / 'checkpoints'}, each by its step"
        )
    if name == native.NAME:
        config = native.config_of(settings)
        return Pretrained(native.NAME, config, native.read(config, folder, dtype), own_tokenizer(folder))
    try:
        family = _family(name, "model_type")
        if settings.get("quantization_config"):
            raise ValueError("config.json: the weights are quantized; minitf reads only plain ones")
        config = family.config(settings)
    except ValueError as error:
        raise ValueError(f"{file}: {str(error).removeprefix('config.json: ')}") from error
    parameters = read(family, config, open_folder(folder), dtype, str(folder))
    return Pretrained(str(name), config, parameters, _tokenizer(folder, str(name), config))


def _load_llama2c(file: Path, dtype: Any, tokenizer: str | os.PathLike[str] | None) -> Pretrained:
    if file.suffix != ".bin":
        raise ValueError(f"{file} is a file: give the folder it lies in, or a llama2.c checkpoint named .bin")
    config, parameters = llama2c.load(file, dtype)
    beside = [file.with_name(f"tok{config.vocabulary}.bin"), file.with_name("tokenizer.bin")]
    path = Path(tokenizer) if tokenizer is not None else next((p for p in beside if p.is_file()), None)
    found = None if path is None else llama2c_tokenizer.load_tokenizer(path, config.vocabulary)
    return Pretrained("llama2c", config, parameters, found)


def own_tokenizer(folder: Path) -> Tokenizer | None:
    """That of the vocabulary in a folder of ours, if any, and if what runs it is installed."""
    if not (folder / VOCABULARY).is_file():
        return None
    try:
        return Tokenizer(load_vocabulary(folder))
    except tokenizer_json.NotInstalled:
        return None


def _tokenizer(folder: Path, family: str, config: ModelConfig) -> Any:
    """GPT-2's encoding by tiktoken where it is the model's; else what tokenizer.json says, or None."""
    found = _gpt2_tokenizer(folder) if family == "gpt2" and config.vocabulary == _GPT2_VOCABULARY else None
    file = folder / "tokenizer.json"
    if found is None and file.is_file():
        return tokenizer_json.load_tokenizer(file, config.vocabulary)
    return found


def _gpt2_tokenizer(folder: Path) -> Any:
    """GPT-2's encoding, where the folder names no other and tiktoken has its files; else None."""
    try:
        found = tokenizers.gpt2_encoding()
    except ValueError:
        return None
    # A model of another language may have as many tokens.
    merges, file = folder / "merges.txt", folder / "tokenizer.json"
    if merges.is_file():
        return found if hashlib.sha256(merges.read_bytes()).hexdigest() == _GPT2_MERGES else None
    if file.is_file():
        own = {tokenizer_json.byte_level(found.decode_single_token_bytes(i)): i for i in range(found.n_vocab)}
        model = read_json(file).get("model")
        return found if isinstance(model, dict) and model.get("vocab") == own else None
    return found


def _family(name: Any, field: str) -> Family:
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"{field} is {name!r}, which minitf does not have; it has {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    """The fields in which two configurations describe different models."""
    a, b = (vars(_plain(config)) for config in (one, other))
    return [f"{name}={a[name]!r}" for name in a if a[name] != b[name]]


def _plain(config: ModelConfig) -> ModelConfig:
    """The same model with every size written out and what has no effect left at its default."""
    rotary = config.position == "rotary"
    return replace(
        config,
        head_width=config.head_size,
        key_value_heads=config.groups,
        hidden=config.hidden_size,
        rotary_fraction=config.rotary_fraction if rotary else 1.0,
        rotary_base=config.rotary_base if rotary else 10000.0,
        rotary_interleaved=rotary and config.rotary_interleaved,
        rotary_scaling=config.rotary_scaling if rotary else None,
        query_key_value_biases=config.query_key_value_biases or config.biases,
        initializer="normal",
    )


def _fetch(name: str, revision: str | None) -> Path:
    """The folder into which huggingface_hub fetched a model's configuration and weights."""
    if name.count("/") != 1 or not all(name.split("/")):
        raise ValueError(f"'hub:{name}' names no model on the hub; write hub:owner/name")
    try:
        import huggingface_hub  # noqa: PLC0415
        from huggingface_hub import errors  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(
            f"fetching hub:{name} needs the package huggingface_hub: pip install huggingface_hub (or fetch the "
            "model by other means and give its folder)"
        ) from error

    def fetch(file: str) -> Path:
        return Path(huggingface_hub.hf_hub_download(name, file, revision=revision))

    # Newer versions tell what is not on the hub from what could not be asked for.
    not_there = getattr(errors, "RemoteEntryNotFoundError", errors.EntryNotFoundError)
    try:
        folder = fetch("config.json").parent
        for file in ("merges.txt", "tokenizer.json"):
            with contextlib.suppress(errors.EntryNotFoundError):
                fetch(file)
        _fetch_weights(fetch, not_there)
    except (OSError, ValueError, errors.EntryNotFoundError) as error:
        at = f" at revision {revision}" if revision else ""
        raise ValueError(f"hub:{name}{at} could not be fetched: {error}") from error
    return folder


def _fetch_weights(fetch: Callable[[str], Path], not_there: type[Exception]) -> None:
    try:
        fetch(ONE)
    except not_there:
        try:
            index = fetch(INDEX)
        except not_there:
            raise ValueError("it has no weights as safetensors, and minitf reads no others") from None
        for file in shards(index):
            fetch(file)
