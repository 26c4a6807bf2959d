"""Generate responses: to one prompt, to the rows of a file, or to the lines of stdin.

    python tools/generate.py --model runs/demo/model_with_transform --prompt "Mji mkuu wa Kenya ni upi?"

A file's rows (instruction, prompt or messages) come out as jsonl with `response` added; lines of stdin as jsonl with
`prompt` and `response`; one --prompt prints the response alone. The connection takes the model's transform, where it
has one; or the real English prompt, with --english (for --prompt) or --use_english (for rows that carry one).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # a file of tools/ must not shadow a library

from cc_ds import cli
from cc_ds.data.pairs import BadRow, Row, to_row
from cc_ds.data.sources import open_source
from cc_ds.infer.generate import ENGLISH
from cc_ds.infer.prompts import respond

# Batches generated before their responses are written: enough to group prompts by length, few enough to lose.
_BATCHES_PER_WRITE = 16


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.tool_parser(__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="one prompt")
    source.add_argument("--input", help="file of rows (json, jsonl, csv, parquet, arrow); default: lines of stdin")
    parser.add_argument("--output", type=Path, help="file for the jsonl (default: stdout)")
    parser.add_argument("--lang", help="language of the prompts, for rows that name none")
    parser.add_argument(
        "--exclude", nargs="*", default=list(ENGLISH), help="languages read without the connection (default: English)"
    )
    parser.add_argument("--english", help="the English version of --prompt, to connect to in place of the transform")
    parser.add_argument("--use_english", action="store_true", help="connect rows to the English prompt they carry")
    parser.add_argument("--no_connection", action="store_true", help="generate without the connection")
    parser.add_argument("--max_new_tokens", type=cli.positive, default=256, help="per response (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default); above 0: sample")
    parser.add_argument("--top_p", type=float, help="sample among the likeliest tokens of this total probability")
    parser.add_argument("--top_k", type=cli.positive, help="sample among so many likeliest tokens")
    args = parser.parse_args(argv)
    if args.english is not None and args.prompt is None:
        parser.error("--english goes with --prompt; rows of a file carry their own English prompt (--use_english)")
    if args.no_connection and (args.english is not None or args.use_english):
        parser.error("--no_connection leaves nothing for an English prompt to do")
    return args


def main(argv: list[str] | None = None) -> None:
    """Answer every prompt."""
    args = parse(argv)
    sampling = sampling_arguments(args)
    pairs = read(args)
    # The first row before the model: a mistake in the input should not wait for minutes of loading.
    first = list(islice(pairs, args.batch_size * _BATCHES_PER_WRITE))
    model, tokenizer, template = cli.load_model(args)
    with_english = args.english is not None or args.use_english
    if with_english or (model.transform is not None and not args.no_connection):
        cli.check_gate(model, args.model)
    import torch

    torch.manual_seed(args.seed)
    with open(args.output, "w", encoding="utf-8") if args.output else nullcontext(sys.stdout) as out:
        while first:
            responses = respond(
                model,
                tokenizer,
                template,
                [template.render_prompt(row.prompt, row.source) for _, row in first],
                english=[row.prompt_en and template.render_prompt(row.prompt_en, row.source) for _, row in first]
                if with_english
                else None,
                connect=not args.no_connection,
                languages=[record.get("lang") or args.lang or row.lang for record, row in first],
                exclude=args.exclude,
                batch_size=args.batch_size,
                max_new_tokens=args.max_new_tokens,
                **sampling,
            )
            for (record, _), response in zip(first, responses, strict=True):
                write(out, record, response.text, args)
            out.flush()
            first = list(islice(pairs, args.batch_size * _BATCHES_PER_WRITE))


def read(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Row]]:
    """Each record as it came, and as a row. ValueError: a row that cannot be asked, by file and line."""
    for record, where in records(args):
        row = to_row(record, None, where, require_response=False)
        if isinstance(row, BadRow):
            raise ValueError(f"{row.source}: {row.reason}" + (f" ({row.detail})" if row.detail else ""))
        yield record, row


def records(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], str]]:
    """Each prompt's record and where it comes from: the command line, a file, or standard input."""
    if args.prompt is not None:
        english = {} if args.english is None else {"prompt_en": args.english}
        yield {"prompt": args.prompt} | english, "--prompt"
    elif args.input:
        source = open_source(args.input)
        for number, record in source.records():
            yield record, f"{source.name}:{number}"
    else:
        for number, line in enumerate(sys.stdin, start=1):
            yield {"prompt": line.rstrip("\n")}, f"stdin:{number}"


def write(out: Any, record: dict[str, Any], response: str, args: argparse.Namespace) -> None:
    """One answer: its text alone for a prompt of the command line, else its record as a line of json."""
    if args.prompt is not None and not args.output:
        print(response, file=out)
        return
    lang = {"lang": args.lang} if args.lang and not record.get("lang") else {}
    print(json.dumps(record | lang | {"response": response}, ensure_ascii=False, default=str), file=out)


def sampling_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments for `generate`. Raises ValueError for settings that contradict greedy decoding."""
    if args.temperature < 0:
        raise ValueError(f"--temperature must be 0 (greedy) or above, got {args.temperature}")
    if args.temperature == 0:
        if args.top_p is not None or args.top_k is not None:
            raise ValueError("--top_p and --top_k need --temperature above 0; at 0 decoding is greedy")
        return {}
    chosen = {"top_p": args.top_p, "top_k": args.top_k}
    return {"do_sample": True, "temperature": args.temperature} | {k: v for k, v in chosen.items() if v is not None}


if __name__ == "__main__":
    cli.run(main)
