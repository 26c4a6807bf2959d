"""Estimates as text, SFT and CC-Tuning side by side."""

from __future__ import annotations

from cc_ds.plan.estimate import USABLE, Cluster, Estimate

TITLES = {"sft": "SFT", "cc": "CC-Tuning", "cc-nograd": "CC, no English grad"}


def format_estimates(found: dict[str, Estimate], cluster: Cluster) -> str:
    """One column per method."""
    estimates = list(found.values())
    lines = [_line("", [TITLES[name] for name in found])]
    lines += ["memory of a GPU, GiB"]
    for part in estimates[0].memory:
        lines.append(_line(f"  {part}", [f"{each.memory[part]:.1f}" for each in estimates]))
    usable = USABLE * cluster.gpu.memory
    fits = ["yes" if each.fits else "NO" for each in estimates]
    lines.append(_line(f"  fits in {usable:.0f} of {cluster.gpu.memory:.0f} GiB", fits))
    if any(each.host_memory for each in estimates):
        lines.append(_line("RAM or NVMe of a node, GiB", [f"{each.host_memory:.0f}" for each in estimates]))
    lines.append("moved per step, GB in each GPU's buffers")
    for name in estimates[0].moved:
        lines.append(_line(f"  {name}", [f"{each.moved[name] / 1e9:.1f}" for each in estimates]))
    lines.append(_line("PFLOP per GPU and step", [f"{each.flops / 1e15:.2f}" for each in estimates]))
    lines.append("seconds per step")
    names = {"late": "communication waited for", "overlapped": "communication beside compute", "step": "whole step"}
    for name in estimates[0].seconds:
        lines.append(_line(f"  {names.get(name, name)}", [f"{each.seconds[name]:.2f}" for each in estimates]))
    lines.append(_line("target tokens per second", [f"{each.tokens_per_second:,.0f}" for each in estimates]))
    gpus = cluster.nodes * cluster.gpus_per_node
    lines.append(_line("  of one GPU", [f"{each.tokens_per_second / gpus:,.0f}" for each in estimates]))
    lines.append(_line("MFU", [f"{each.mfu:.2f}" for each in estimates]))
    return "\n".join(lines)


def format_changes(method: str, changes: list[tuple[str, Estimate]]) -> str:
    """What would fit, fastest first."""
    if not changes:
        return f"{TITLES[method]} does not fit, nor does any change tried here: take more nodes or larger GPUs."
    lines = [f"{TITLES[method]} does not fit. What does, the cheapest first:"]
    for name, each in changes:
        memory, speed = each.memory["peak"], each.tokens_per_second
        lines.append(f"  {name}: {memory:.1f} GiB, {speed:,.0f} tokens/s")
    return "\n".join(lines)


def _line(name: str, cells: list[str]) -> str:
    return f"{name:<32}" + "".join(f"{cell:>20}" for cell in cells)
