"""What every tool's main() shares: how mistakes end, and the arguments that name and load a model."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from cc_ds import CCModelForCausalLM
    from cc_ds.data.pairs import Summary
    from cc_ds.data.templates import Template


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit with what it returns, or 0.

    A user's mistake (ValueError, or a file that is not there) is one line `error: ...` on stderr and exit code 2;
    Ctrl-C is 130; any other exception is a bug of ours and keeps its traceback. Warnings of cc_ds go to stderr, so that
    stdout carries results alone.
    """
    # Ours alone: libraries bring handlers of their own, and would say everything twice.
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.getLogger("cc_ds").addHandler(handler)
    try:
        code = main()
    except (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(code or 0)


def tool_parser(description: str, model_required: bool = True) -> argparse.ArgumentParser:
    """A parser whose help opens with the tool's docstring, with the arguments that `load_model` reads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=model_required, help="model folder, or a name on the Hugging Face hub")
    parser.add_argument("--chat_template", help="built-in chat template, where the model's own is missing or unwanted")
    parser.add_argument("--batch_size", type=positive, default=8, help="prompts read at once (default 8)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu ... (default: cuda where there is one)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default 0)")
    return parser


def report_rows(summary: Summary) -> None:
    """Log what was read: a warning where rows are left out or look wrong."""
    level = logging.WARNING if summary.bad_rows or summary.notes else logging.INFO
    logging.getLogger("cc_ds").log(level, "%s", summary)


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def check_gate(model: CCModelForCausalLM, path: str) -> None:
    """ValueError: the model at `path` came without a Decision Maker, so that what it has was drawn just now."""
    if not model.gate_was_stored:
        raise ValueError(
            f"{path} stores no Decision Maker (cc_connection.safetensors), so the connection would pick layers at "
            f"random: tune the model with cc_ds/train.py --method cc; without a connection, evaluate it with --mode "
            f"plain and generate with --no_connection"
        )


def load_model(args: argparse.Namespace) -> tuple[CCModelForCausalLM, Any, Template]:
    """The model on its device in eval mode, its tokenizer and its template. ValueError: anything missing there."""
    from transformers import AutoTokenizer

    from cc_ds import CCModelForCausalLM
    from cc_ds.data.templates import load_template
    from cc_ds.dist.group import choose_accelerator
    from cc_ds.export import check_model_folder, load_part

    on_gpu = choose_accelerator()
    check_model_folder(args.model)
    tokenizer = load_part(AutoTokenizer, args.model, "--model")
    template = load_template(tokenizer, args.chat_template)
    if getattr(args, "deepspeed", None):
        from cc_ds.dist.inference import load_partitioned

        return load_partitioned(args.model, args.deepspeed), tokenizer, template
    model = CCModelForCausalLM.from_pretrained(args.model)
    device = args.device or ("cuda" if on_gpu else "cpu")
    return model.to(device).eval(), tokenizer, template
