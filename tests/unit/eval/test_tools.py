"""The three command-line tools from end to end on a tiny model, and how they end on a user's mistake."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cc_ds import CCModelForCausalLM, cli

TOOLS = Path(__file__).parents[3] / "tools"


def tool(name: str):
    spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fit_tool, generate_tool = tool("fit_transform"), tool("generate")
evaluate_tool, compare_tool = tool("evaluate"), tool("compare")


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def fit(model_folder, pairs_file, output, *more: str) -> None:
    arguments = ["--model", model_folder, "--data", pairs_file, "--output", output, "--device", "cpu", *more]
    fit_tool.main([str(argument) for argument in arguments])


@pytest.fixture
def fitted(model_folder, pairs_file, tmp_path, capsys) -> Path:
    fit(model_folder, pairs_file, tmp_path / "fitted", "--held_out", "0.2")
    return tmp_path / "fitted"


def test_fit_saves_the_model_its_transform_and_a_report(model_folder, pairs_file, tmp_path, capsys):
    output = tmp_path / "fitted"
    fit(model_folder, pairs_file, output, "--held_out", "0.2", "--ridge", "0.01", "--activations", str(tmp_path / "a"))
    model = CCModelForCausalLM.from_pretrained(output)
    report = json.loads((output / "transform_report.json").read_text(encoding="utf-8"))
    assert model.transform.matrix.shape == (16, 16)
    assert report["fit"]["pairs"] + report["held_out"]["pairs"] == 14
    assert report["fit"]["rows"] == [3 * report["fit"]["pairs"]] and report["settings"]["ridge"] == 0.01
    assert "Held-out fit" in capsys.readouterr().out
    assert list((tmp_path / "a").glob("pairs-*.safetensors"))
    # The base model is what it was, and nothing of the work is left lying about.
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (model_folder, output))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [path.name for path in output.iterdir() if path.is_dir()] == ["figures"]
    assert (output / "figures" / "fit_by_layer.png").stat().st_size > 1000


def test_fit_per_layer_and_without_held_out_pairs(model_folder, pairs_file, tmp_path, capsys):
    fit(model_folder, pairs_file, tmp_path / "fitted", "--held_out", "0", "--scope", "per_layer", "--ridge", "0.1")
    assert CCModelForCausalLM.from_pretrained(tmp_path / "fitted").transform.matrix.shape == (3, 16, 16)
    assert "nothing is known" in capsys.readouterr().out


def test_fit_says_which_rows_it_leaves_out(model_folder, pairs_file, tmp_path, caplog):
    with pairs_file.open("a", encoding="utf-8") as stream:
        stream.write('{"instruction": "moja", "instruction_en": 1}\n')
    fit(model_folder, pairs_file, tmp_path / "fitted", "--held_out", "0")
    assert "pairs.jsonl:15: instruction_en is of type int" in caplog.text


def test_fit_with_few_pairs_warns_with_numbers(model_folder, pairs_file, tmp_path, caplog):
    fit(model_folder, pairs_file, tmp_path / "fitted", "--num_pairs", "4", "--held_out", "0.25")
    assert "of H = 16 directions" in caplog.text


def test_evaluate_takes_the_transform_where_there_is_one(model_folder, fitted, pairs_file, tmp_path, capsys):
    modes = {}
    for folder, more in ((model_folder, []), (fitted, []), (fitted, ["--mode", "english"])):
        output = tmp_path / f"results{len(modes)}"
        arguments = ["--model", folder, "--data", pairs_file, "--task", "numbers", "--max_new_tokens", "4"]
        evaluate_tool.main(
            [str(a) for a in [*arguments, "--output_dir", output, "--limit", "2", "--device", "cpu", *more]]
        )
        result = json.loads((output / "numbers.json").read_text(encoding="utf-8"))
        modes[result["mode"]] = result
        assert {lang: score["rows"] for lang, score in result["languages"].items()} == {"de": 2, "sw": 2}
    assert list(modes) == ["plain", "transform", "english"]
    assert modes["english"]["tokens_in"] > modes["transform"]["tokens_in"] == modes["plain"]["tokens_in"]
    assert modes["plain"]["settings"]["max_new_tokens"] == 4 and modes["plain"]["ranks"] == 1
    printed = capsys.readouterr().out
    assert "macro" in printed and (output / "numbers.txt").read_text(encoding="utf-8") in printed
    assert (output / "numbers.png").exists() and len(lines_of(output / "numbers.answers" / "rank-00000.jsonl")) == 4


def test_evaluate_writes_over_no_result_of_another_mode_or_model(model_folder, fitted, pairs_file, tmp_path):
    def asked(folder, *more: str) -> str:
        arguments = [
            "--model",
            folder,
            "--data",
            pairs_file,
            "--task",
            "numbers",
            "--max_new_tokens",
            "2",
            "--limit",
            "1",
        ]
        evaluate_tool.main([str(a) for a in [*arguments, "--device", "cpu", "--output_dir", tmp_path / "out", *more]])
        return (tmp_path / "out" / "numbers.json").read_text(encoding="utf-8")

    first = asked(fitted)
    for folder, more in ((fitted, ["--mode", "plain"]), (model_folder, [])):
        with pytest.raises(ValueError, match=r"numbers.json is the result of mode transform of .*another --output_dir"):
            asked(folder, *more)
    assert (tmp_path / "out" / "numbers.json").read_text(encoding="utf-8") == first
    assert json.loads(asked(fitted, "--limit", "2"))["macro"]["rows"] == 4, "the same run goes on"


def test_evaluate_asks_several_tasks_and_compare_sets_runs_beside_each_other(fitted, pairs_file, tmp_path, capsys):
    for task in ("numbers", "again"):
        (tmp_path / "data" / task).mkdir(parents=True)
        (tmp_path / "data" / task / "rows.jsonl").write_bytes(pairs_file.read_bytes())
    arguments = ["--model", fitted, "--data", tmp_path / "data", "--task", "numbers", "again", "--max_new_tokens", "4"]
    for mode in ("plain", "transform"):
        more = ["--mode", mode, "--output_dir", tmp_path / mode, "--metrics", "f1", "exact_match"]
        evaluate_tool.main([str(argument) for argument in [*arguments, *more]])
    capsys.readouterr()
    compared = tmp_path / "compared"
    compare_tool.main([str(tmp_path / mode) for mode in ("plain", "transform")] + ["--output_dir", str(compared)])
    printed = capsys.readouterr().out
    assert (
        "**again, f1**" in printed and "**numbers, f1**" in printed and "| plain (plain) | transform (trans" in printed
    )
    assert {file.name for file in compared.iterdir()} == {"compare.md", "compare.csv", "compare.png"}
    assert (compared / "compare.md").read_text(encoding="utf-8") == printed
    with pytest.raises(ValueError, match="--names has 1 labels for 2 runs"):
        compare_tool.main([str(tmp_path / "plain"), str(tmp_path / "transform"), "--names", "SFT"])


def test_a_connection_needs_a_decision_maker_that_was_trained(model_folder, pairs_file, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare)
    (bare / "cc_connection.safetensors").unlink()
    ask = ["--model", str(bare), "--data", str(pairs_file), "--task", "numbers", "--max_new_tokens", "4"]
    prompt = ("--prompt", "moja", "--english", "one")
    for refused in (
        lambda: fit(bare, pairs_file, tmp_path / "fitted"),
        lambda: evaluate_tool.main([*ask, "--mode", "english"]),
        lambda: generate(bare, *prompt),
    ):
        with pytest.raises(ValueError, match=r"bare stores no Decision Maker .*: tune the model .*--method cc"):
            refused()
    evaluate_tool.main([*ask, "--mode", "plain"])
    generate(bare, *prompt[:2])
    generate(model_folder, *prompt)


def test_evaluate_names_the_languages_there_are(model_folder, pairs_file):
    with pytest.raises(ValueError, match="no rows in fr; there are de, sw"):
        evaluate_tool.main(["--model", str(model_folder), "--data", str(pairs_file), "--langs", "fr", "sw"])


def generate(folder, *more) -> None:
    generate_tool.main(["--model", str(folder), "--max_new_tokens", "5", "--device", "cpu", *map(str, more)])


def test_generate_gives_one_answer_in_each_way_of_asking(fitted, pairs_file, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out.jsonl"
    generate(fitted, "--input", pairs_file, "--output", output, "--batch_size", "2")
    rows, given = lines_of(output), lines_of(pairs_file)
    assert [{k: v for k, v in row.items() if k != "response"} for row in rows] == given
    capsys.readouterr()
    generate(fitted, "--prompt", given[3]["instruction"])
    assert capsys.readouterr().out.strip() == rows[3]["response"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(given[3]["instruction"] + "\n" + given[0]["instruction"] + "\n"))
    generate(fitted, "--lang", "sw")
    out = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["response"], row["lang"]) for row in out] == [(rows[3]["response"], "sw"), (rows[0]["response"], "sw")]


def test_generate_connects_to_what_it_is_told(fitted, pairs_file, tmp_path, capsys):
    answers = {}
    for name, more in {"transform": [], "english": ["--use_english"], "plain": ["--no_connection"]}.items():
        generate(fitted, "--input", pairs_file, "--output", tmp_path / "out.jsonl", *more)
        answers[name] = [row["response"] for row in lines_of(tmp_path / "out.jsonl")]
    assert answers["english"] != answers["plain"] != answers["transform"]
    row = lines_of(pairs_file)[0]
    capsys.readouterr()
    generate(fitted, "--prompt", row["instruction"], "--english", row["instruction_en"])
    assert capsys.readouterr().out.strip() == answers["english"][0]


def test_generate_needs_the_language_where_each_has_its_matrix(model_folder, pairs_file, tmp_path, capsys):
    folder = tmp_path / "per_language"
    fit(model_folder, pairs_file, folder, "--held_out", "0", "--scope", "per_language")
    generate(folder, "--prompt", "q", "--lang", "sw")
    with pytest.raises(ValueError, match=r"'und' \(the row names none\), only for de, sw"):
        generate(folder, "--prompt", "q")


def test_evaluate_excludes_what_it_is_told(model_folder, pairs_file, tmp_path):
    folder, answers = tmp_path / "connected", {}
    model = CCModelForCausalLM.from_pretrained(model_folder)
    model.set_transform(10 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).write_bytes((model_folder / file).read_bytes())
    for name, more in {"plain": ["--mode", "plain"], "excluded": ["--exclude", "sw", "de"], "deployed": []}.items():
        arguments = ["--model", folder, "--data", pairs_file, "--task", "numbers", "--max_new_tokens", "4"]
        evaluate_tool.main([str(argument) for argument in [*arguments, "--output_dir", tmp_path / name, *more]])
        result = json.loads((tmp_path / name / "numbers.json").read_text(encoding="utf-8"))
        answers[name] = [answer["response"] for answer in result["answers"]]
    assert answers["plain"] == answers["excluded"] != answers["deployed"]


def test_a_model_whose_config_switches_the_cache_off_is_asked_with_one(fitted, capsys):
    capsys.readouterr()
    generate(fitted, "--prompt", "q")
    expected = capsys.readouterr().out
    (fitted / "generation_config.json").unlink()
    config = json.loads((fitted / "config.json").read_text(encoding="utf-8"))
    (fitted / "config.json").write_text(json.dumps(config | {"use_cache": False}), encoding="utf-8")
    assert CCModelForCausalLM.from_pretrained(fitted).generation_config.use_cache is False
    generate(fitted, "--prompt", "q")
    assert capsys.readouterr().out == expected


def test_generate_samples_by_seed(fitted, pairs_file, tmp_path):
    said = []
    for seed in (1, 1, 2):
        generate(fitted, "--input", pairs_file, "--output", tmp_path / "o", "--temperature", "5", "--seed", seed)
        said.append([row["response"] for row in lines_of(tmp_path / "o")])
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "  "}', "rows.jsonl:2: the prompt is empty"),
        ('{"question": "q"}', r"rows.jsonl:2: column .* is missing.*\n  found: \['question'\]\n  expected: .*prompt"),
        ("{", "line 2.*broken JSON"),
    ],
)
def test_generate_names_the_bad_row(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        generate("nowhere", "--input", path)


def test_rows_that_the_chat_template_rejects_are_named(model_folder, fitted, pairs_file, tmp_path, caplog, capsys):
    strict = tmp_path / "strict"
    shutil.copytree(fitted, strict)
    source = (strict / "chat_template.jinja").read_text(encoding="utf-8")
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    (strict / "chat_template.jinja").write_text(refusal + source, encoding="utf-8")
    with pairs_file.open("a", encoding="utf-8") as stream:
        stream.write(
            '{"instruction": "moja", "instruction_en": "one", "system": "s", "answers": ["x"], "lang": "sw"}\n'
        )
    fit(strict, pairs_file, tmp_path / "again", "--held_out", "0")
    assert "1 of 15 pairs left out; the first: " in caplog.text and "pairs.jsonl:15: the chat template" in caplog.text
    assert json.loads((tmp_path / "again/transform_report.json").read_text())["fit"]["pairs"] == 14
    for ask in (
        lambda: generate(strict, "--input", pairs_file),
        lambda: evaluate_tool.main(["--model", str(strict), "--data", str(pairs_file), "--device", "cpu"]),
    ):
        with pytest.raises(
            ValueError, match=r"pairs.jsonl(:|, line )15: the chat template rejects it \(.*not supported"
        ):
            ask()


def test_mistakes_end_in_one_line_and_code_2(model_folder, pairs_file, tmp_path, capsys):
    def ends(main) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            cli.run(main)
        return stop.value.code, capsys.readouterr().err

    for main, message in [
        (lambda: generate(model_folder, "--prompt", " "), "error: --prompt: the prompt is empty\n"),
        (lambda: generate(model_folder, "--prompt", "q", "--top_p", "0.5"), "error: --top_p and --top_k need"),
        (lambda: fit(model_folder, pairs_file, model_folder), "error: --output must be another folder"),
        (lambda: fit(model_folder, tmp_path / "no.jsonl", tmp_path / "out"), "no such file"),
        (lambda: generate(tmp_path / "no_model", "--prompt", "q"), "no_model"),
    ]:
        code, printed = ends(main)
        assert code == 2 and message in printed and printed.count("\n") == 1 and printed.startswith("error: ")
    assert ends(lambda: None) == (0, "")
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 // 0)


def test_a_model_without_a_chat_template_is_told_so(model_folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="--chat_template"):
        generate(bare, "--prompt", "q")
    generate(bare, "--prompt", "q", "--chat_template", "plain")
