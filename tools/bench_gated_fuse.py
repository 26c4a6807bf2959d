"""How fast the fused gate is, against the time that moving its bytes takes.

    python tools/bench_gated_fuse.py                           # L 32, B 16, H 4096
    python tools/bench_gated_fuse.py --layers 80 --hidden 8192 --device cuda --json gate.json

Forward: the kernel, plain PyTorch (the reference), and torch.compile of it, each over the time of reading `english`.
Backward: the same, over the time of reading `english` and writing its gradient. `floor` is that reading or copying,
measured in the same run: the fastest of several ways to do it. The cases take turns, so that a change of the machine's
speed meets all of them. Each call takes the next of several sets of tensors, together larger than the caches, as in
training the English pass lies behind (--sets 1: what one set leaves in the caches). Medians, in brackets quartiles.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable

import torch

from cc_ds.ops import gated_fuse_, gated_fuse_ref, status

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def make_inputs(args: argparse.Namespace) -> dict:
    """Keyword arguments of gated_fuse."""
    like = dict(dtype=DTYPES[args.dtype], device=args.device)
    L, B, T, H = args.layers, args.batch, args.positions, args.hidden
    return {
        "ffn_output": torch.randn(B, T, H, **like),
        "english": torch.randn(L, B, H, **like),
        "embedding": torch.randn(B, H, **like),
        "weight": torch.randn(L, H, **like) / H**0.5,
        "noise": torch.randn(B, L, device=args.device),
        "anchors": torch.randint(0, T, (B,), device=args.device),
        "hard": not args.soft,
    }


def floors(english: torch.Tensor) -> dict[str, dict[str, Callable]]:
    """Ways to read `english` once, and to read it and write as much."""
    target = torch.empty_like(english)
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[english.element_size()]
    return {
        "read": {
            "sum": lambda: english.sum(),
            "max": lambda: english.view(integers).max(),
            "any": lambda: english.view(torch.uint8).view(torch.int64).max(),
        },
        "copy": {"copy": lambda: target.copy_(english)},
    }


def forward_cases(inputs: dict, compiled: Callable | None) -> dict[str, Callable]:
    """Each adds to ffn_output again and again: in place where it can."""
    cases = {"kernel": lambda: gated_fuse_(**inputs), "reference": lambda: gated_fuse_ref(**inputs)}
    if compiled is not None:
        cases["compiled reference"] = lambda: compiled(**inputs)
    return {name: torch.no_grad()(case) for name, case in cases.items()}


def backward_cases(inputs: dict) -> dict[str, Callable]:
    """Gradients of english, embedding and weight, from a gradient of fused."""
    cases = {}
    for name, function in {"kernel": gated_fuse_, "reference": gated_fuse_ref}.items():
        leaves = {key: inputs[key].clone().requires_grad_() for key in ("english", "embedding", "weight")}
        ffn_output = inputs["ffn_output"].clone().requires_grad_() * 1
        fused = function(**{**inputs, **leaves, "ffn_output": ffn_output})[0]
        gradient = torch.randn_like(fused)
        cases[name] = lambda fused=fused, leaves=leaves, gradient=gradient: torch.autograd.grad(
            fused, list(leaves.values()), gradient, retain_graph=True
        )
    return cases


def measure(sets: list[dict[str, Callable]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Microseconds of each case, `repeats` times, in turns; every call on the next set."""
    cuda = args.device.startswith("cuda")
    times: dict[str, list[float]] = {name: [] for name in sets[0]}
    calls = itertools.cycle(sets)
    for round_ in range(args.repeats + 3):
        for name in times:
            case = next(calls)[name]
            if cuda:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                case()
                end.record()
                end.synchronize()
                elapsed = start.elapsed_time(end) * 1e3
            else:
                begin = time.perf_counter()
                case()
                elapsed = (time.perf_counter() - begin) * 1e6
            if round_ >= 3:
                times[name].append(elapsed)
    return times


def summarise(times: dict[str, list[float]], floor_names: list[str]) -> dict[str, dict[str, float]]:
    """Median and quartiles in microseconds, and the ratio to the fastest floor's median."""
    rows = {}
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        rows[name] = {"median_us": middle, "low_us": low, "high_us": high}
    fastest = min(floor_names, key=lambda name: rows[name]["median_us"])
    for row in rows.values():
        row["ratio"] = row["median_us"] / rows[fastest]["median_us"]
    return {"floor: " + fastest: rows[fastest], **{name: row for name, row in rows.items() if name not in floor_names}}


def main() -> None:
    """Measure and print a table; write the same figures as json on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--positions", type=int, default=64, help="T; only its anchors are touched by the kernel")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=51)
    parser.add_argument("--soft", action="store_true", help="the soft gate")
    parser.add_argument("--sets", type=int, help="sets of tensors; default: 160 MB of english")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the reference too")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    torch.manual_seed(0)
    megabytes = args.layers * args.batch * args.hidden * DTYPES[args.dtype].itemsize / 1e6
    # an odd number beside four to six cases, so that each case meets every set
    args.sets = args.sets or 2 * max(1, round(80 / megabytes)) + 1
    inputs = [make_inputs(args) for _ in range(args.sets)]
    compiled = torch.compile(gated_fuse_ref) if args.compile else None
    result = {"settings": vars(args), "status": status(), "english_megabytes": megabytes}
    for part, kind, cases_of in (
        ("forward", "read", lambda one: forward_cases(one, compiled)),
        ("backward", "copy", backward_cases),
    ):
        floor_names = list(floors(inputs[0]["english"])[kind])
        sets = [{**floors(one["english"])[kind], **cases_of(one)} for one in inputs]
        result[part] = summarise(measure(sets, args), floor_names)

    print(f"english {megabytes:.1f} MB {args.dtype} on {args.device}, {args.threads} threads; {status()}")
    for part in ("forward", "backward"):
        for name, row in result[part].items():
            print(
                f"{part:9s} {name:20s} {row['median_us']:9.1f} us [{row['low_us']:.1f}, {row['high_us']:.1f}]"
                f"  {row['ratio']:6.2f} x"
            )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
