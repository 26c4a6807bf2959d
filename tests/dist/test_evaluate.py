"""Two real ranks of tools/evaluate.py find what one process finds, and go on from what one process left."""

from __future__ import annotations

import json
import runpy

from .conftest import REPOSITORY, torchrun


def test_two_ranks_equal_one_process(model_folder, rows_file, tmp_path):
    arguments = [
        "--model", str(model_folder), "--data", str(rows_file), "--task", "rows", "--chat_template", "plain",
        "--max_new_tokens", "4", "--batch_size", "4", "--device", "cpu",
    ]  # fmt: skip
    alone = runpy.run_path(str(REPOSITORY / "tools" / "evaluate.py"))["main"]
    alone([*arguments, "--output_dir", str(tmp_path / "one")])
    alone([*arguments, "--output_dir", str(tmp_path / "two"), "--limit", "5"])
    begun = (tmp_path / "two" / "rows.answers" / "rank-00000.jsonl").read_text(encoding="utf-8")
    said = torchrun("tools/evaluate.py", *arguments, "--output_dir", str(tmp_path / "two")).stdout
    one, two = (json.loads((tmp_path / name / "rows.json").read_text(encoding="utf-8")) for name in ("one", "two"))
    assert [a["response"] for a in one["answers"]] == [a["response"] for a in two["answers"]]
    assert one["macro"] == two["macro"] and (one["ranks"], two["ranks"]) == (1, 2)
    assert said.count("macro") == 1, "one rank speaks"
    files = [
        (tmp_path / "two" / "rows.answers" / f"rank-0000{rank}.jsonl").read_text(encoding="utf-8") for rank in (0, 1)
    ]
    assert files[0].startswith(begun) and len(begun.splitlines()) == 10
    assert [len(text.splitlines()) for text in files] == [10 + 7, 7]
