"""Every command that the documents show names a file that exists and options that it knows."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from cc_ds.config import CCConfig, DataConfig, ModelConfig, TrainConfig

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN_OPTIONS = {f.name for part in (CCConfig, DataConfig, ModelConfig, TrainConfig) for f in dataclasses.fields(part)}


def _commands() -> list[tuple[str, str]]:
    found = []
    documents = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("configs/*.yaml")]
    for path in documents:
        text = path.read_text(encoding="utf-8")
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if path.suffix == ".md" else [text]:
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"^#\s+", "", line) if path.suffix == ".yaml" else line
                if line.split(" ")[0] in ("make", "python", "deepspeed", "torchrun", "pytest", "bash"):
                    found.append((path.name, line))
    return found


@pytest.mark.parametrize(("document", "command"), _commands())
def test_command(document, command):
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
        return
    scripts = [word for word in words if re.search(r"\.(py|sh|yaml|json)$", word) and not word.startswith("data")]
    assert scripts and all((REPOSITORY / script).exists() for script in scripts), command
    script = next(word for word in words if word.endswith((".py", ".sh")))
    options = {word[2:].split("=")[0] for word in words[words.index(script) :] if word.startswith("--")}
    if script == "cc_ds/train.py":
        assert options - {"config"} <= TRAIN_OPTIONS
    elif script.startswith("tools/") and script != "tools/run_harness.py":  # whose options are the harness's own
        assert options <= _tool_options(script)


def _tool_options(script: str) -> set[str]:
    if script.endswith(".sh"):
        return set()
    source = (REPOSITORY / script).read_text(encoding="utf-8")
    shared = (REPOSITORY / "cc_ds/cli.py").read_text(encoding="utf-8") if "tool_parser" in source else ""
    return set(re.findall(r'add_argument\(\s*"--([\w-]+)"', source + shared))


def test_commands_were_found():
    assert len(_commands()) > 12
